//! Subjects in a batch: each is what it would be alone.

use candle_core::{DType, Device, Tensor};
use hiper_core::{
    Error, Event, NoisePredictor, NoiseSchedule, Personalisation, PersonalisationConfig, PredictionType,
    RunControl, Step, TextEmbedding, TorchGenerator,
};

use crate::toy::{Golden, KINDS, Toy, relative_l2, values};

const SCHEDULE: [f64; 2] = [0.00085, 0.012];

fn toy() -> Toy {
    Toy::new(&Golden::load(KINDS[0].0), DType::F32)
}

/// A subject of its own: picture, text, draws, and number of steps.
fn subject(seed: u64, train_steps: usize) -> Personalisation {
    let golden = Golden::load(KINDS[0].0);
    let scaled = |name: &str| (golden.get(name) * (1.0 + seed as f64 / 8.0)).unwrap();
    let source = TextEmbedding::new(scaled("source")).unwrap();
    let [start, end] = SCHEDULE;
    let schedule = NoiseSchedule::scaled_linear(start, end, 1000, PredictionType::Epsilon);
    let config = PersonalisationConfig { n_hiper: 3, train_steps, ..Default::default() };
    let generator = TorchGenerator::new(seed);
    Personalisation::new(config, &scaled("latents"), &source, schedule, generator).unwrap()
}

fn step_together(
    runs: &mut [Personalisation],
    network: &impl NoisePredictor,
) -> hiper_core::Result<Vec<hiper_core::Result<Option<Step>>>> {
    let moved = Personalisation::steps_together(&mut runs.iter_mut().collect::<Vec<_>>(), network, 1)?;
    Ok(moved.into_iter().map(|steps| steps.map(|mut steps| steps.pop())).collect())
}

/// What a run that took all its steps alone says and leaves.
fn alone(mut run: Personalisation, network: &impl NoisePredictor) -> (Vec<Step>, Vec<f32>) {
    let steps = std::iter::from_fn(|| run.step(network).unwrap()).collect();
    (steps, values(run.tail().tensor()))
}

/// candle sums a batch of products in another order than one: relative errors of each loss, and of the tail after 12 steps of
/// an optimiser that divides by the gradient's size.
const LOSS: f64 = 1e-6;
const TAIL: f64 = 1e-6;

/// Steps and the tail at the end of three runs in a batch, which becomes smaller when the first is done.
fn together(network: &impl NoisePredictor) -> Vec<(Vec<Step>, Vec<f32>)> {
    let (mut runs, mut steps) = (three(), vec![Vec::new(); 3]);
    while runs.iter().any(|run| !run.is_finished()) {
        for (steps, step) in steps.iter_mut().zip(step_together(&mut runs, network).unwrap()) {
            steps.extend(step.unwrap());
        }
    }
    steps.into_iter().zip(runs.iter().map(|run| values(run.tail().tensor()))).collect()
}

fn three() -> [Personalisation; 3] {
    [subject(1, 4), subject(2, 12), subject(3, 12)]
}

#[test]
fn three_together_are_three_alone() {
    let toy = toy();
    for ((steps, tail), run) in together(&toy).into_iter().zip(three()) {
        let (steps_alone, tail_alone) = alone(run, &toy);
        for (step, alone) in steps.iter().zip(&steps_alone) {
            assert_eq!((step.step, step.timestep), (alone.step, alone.timestep));
            assert!((step.loss / alone.loss - 1.0).abs() < LOSS, "{step:?} {alone:?}");
        }
        let error = relative_l2(&tail, &tail_alone);
        assert!(steps.len() == steps_alone.len() && error < TAIL, "tail off by {error}");
    }
    // A closure is called for each, and so no bit differs.
    let closure = |x: &Tensor, t: f64, text: &Tensor| toy.forward(x, t, text);
    assert_eq!(together(&closure), three().map(|run| alone(run, &closure)));
}

#[test]
fn timesteps_differ_within_a_batch() {
    let mut runs = [subject(1, 1), subject(2, 1)];
    let steps = step_together(&mut runs, &toy()).unwrap();
    let timesteps: Vec<usize> = steps.into_iter().map(|step| step.unwrap().unwrap().timestep).collect();
    assert_ne!(timesteps[0], timesteps[1]);
}

#[test]
fn one_whose_loss_is_not_a_number_is_named_by_its_place_and_the_others_move() {
    let toy = toy();
    let mut runs = [subject(1, 5), subject(2, 5), subject(3, 5)];
    let timestep = alone(subject(2, 5), &toy).0[2].timestep as f64;
    let network = |x: &Tensor, t: f64, text: &Tensor| {
        let noise_pred = toy.forward(x, t, text)?;
        if t == timestep { noise_pred * f64::NAN } else { Ok(noise_pred) }
    };
    for step in 1..=5 {
        let steps = step_together(&mut runs, &network).unwrap();
        assert!(matches!((&steps[0], &steps[2]), (Ok(Some(_)), Ok(Some(_)))));
        match &steps[1] {
            Ok(Some(done)) => assert!(done.step < 3),
            Err(Error::NotFinite { step: 3, .. }) => assert!(step >= 3),
            other => panic!("step {step}: {other:?}"),
        }
    }
    assert_eq!(runs.each_ref().map(Personalisation::steps_taken), [5, 2, 5]);
    for (i, seed) in [(0, 1), (2, 3)] {
        assert_eq!(values(runs[i].tail().tensor()), alone(subject(seed, 5), &toy).1);
    }
    // It is as it was before, and goes on where it stands.
    let rest = alone(runs[1].clone(), &toy);
    assert_eq!(rest.1, alone(subject(2, 5), &toy).1);
}

#[test]
fn a_failure_of_the_network_moves_none() {
    let mut runs = [subject(1, 3), subject(2, 3)];
    let before = runs.each_ref().map(|run| values(run.tail().tensor()));
    let broken = |_: &Tensor, _: f64, _: &Tensor| candle_core::bail!("out of memory");
    let error = step_together(&mut runs, &broken).unwrap_err().to_string();
    assert!(error.contains("out of memory"), "{error}");
    assert_eq!(runs.each_ref().map(Personalisation::steps_taken), [0, 0]);
    assert_eq!(runs.each_ref().map(|run| values(run.tail().tensor())), before);
}

#[test]
fn nobody_is_a_batch_too() {
    assert!(step_together(&mut [], &toy()).unwrap().is_empty());
    let mut runs = [subject(1, 1)];
    step_together(&mut runs, &toy()).unwrap();
    let steps = step_together(&mut runs, &toy()).unwrap();
    assert!(matches!(steps[..], [Ok(None)]));
}

#[test]
fn shapes_that_differ_are_refused() {
    let draw = |shape: &[usize]| TorchGenerator::new(0).randn_tensor(shape, &Device::Cpu).unwrap();
    let begin = |latents: &[usize], text: &[usize]| {
        let source = TextEmbedding::new(draw(text)).unwrap();
        let schedule = NoiseSchedule::scaled_linear(SCHEDULE[0], SCHEDULE[1], 1000, PredictionType::Epsilon);
        let config = PersonalisationConfig::default();
        Personalisation::new(config, &draw(latents), &source, schedule, TorchGenerator::new(0)).unwrap()
    };
    let network = |x: &Tensor, _: f64, text: &Tensor| x.broadcast_add(&text.mean_all()?);
    let first = begin(&[1, 4, 6, 6], &[1, 9, 16]);
    for other in [begin(&[1, 4, 6, 8], &[1, 9, 16]), begin(&[1, 4, 6, 6], &[1, 9, 8])] {
        let error =
            step_together(&mut [first.clone(), first.clone(), other], &network).unwrap_err().to_string();
        assert!(error.starts_with("subjects in a batch: expected latents [1, 4, 6, 6]"), "{error}");
        assert!(error.ends_with("in number 3"), "{error}");
    }
}

/// A network that takes some steps at once.
struct Hasty<F>(F);

impl<F: Fn(&Tensor, f64, &Tensor) -> candle_core::Result<Tensor>> NoisePredictor for Hasty<F> {
    fn predict_noise(&self, x: &Tensor, t: &[f64], text: &Tensor) -> candle_core::Result<Tensor> {
        self.0.predict_noise(x, t, text)
    }

    fn steps_at_once(&self) -> usize {
        5
    }
}

#[test]
fn steps_at_once_are_steps_one_by_one() {
    let toy = toy();
    let network = Hasty(|x: &Tensor, t: f64, text: &Tensor| toy.forward(x, t, text));
    let mut runs = [subject(1, 4), subject(2, 12)];
    let mut told = [vec![], vec![]];
    let mut counts = vec![];
    while runs.iter().any(|run| !run.is_finished()) {
        let mut each: Vec<_> = runs.iter_mut().collect();
        let moved = Personalisation::steps_together(&mut each, &network, 7).unwrap();
        counts.push(moved.iter().map(|steps| steps.as_ref().unwrap().len()).max().unwrap());
        told.iter_mut().zip(moved).for_each(|(told, steps)| told.extend(steps.unwrap()));
    }
    assert_eq!(counts, [4, 5, 3], "as far as the first to end, then five, then what is left");
    for ((told, run), seed_and_steps) in told.into_iter().zip(&runs).zip([(1, 4), (2, 12)]) {
        let expected = alone(subject(seed_and_steps.0, seed_and_steps.1), &network.0);
        assert_eq!((told, values(run.tail().tensor())), expected);
    }
}

#[test]
fn a_failure_among_steps_at_once_is_met_after_those_before_it() {
    let toy = toy();
    let timestep = alone(subject(2, 5), &toy).0[2].timestep as f64;
    let network = Hasty(|x: &Tensor, t: f64, text: &Tensor| {
        let noise_pred = toy.forward(x, t, text)?;
        if t == timestep { noise_pred * f64::NAN } else { Ok(noise_pred) }
    });
    let mut run = subject(2, 5);
    let mut next = || Personalisation::steps_together(&mut [&mut run], &network, 5).unwrap().remove(0);
    assert_eq!(next().unwrap().len(), 2);
    assert!(matches!(next(), Err(Error::NotFinite { step: 3, .. })));
    assert_eq!(run.steps_taken(), 2);
    assert_eq!(alone(run, &toy).1, alone(subject(2, 5), &toy).1);
}

#[test]
fn checkpoints_are_due_between_steps_at_once() {
    let toy = toy();
    let network = Hasty(|x: &Tensor, t: f64, text: &Tensor| toy.forward(x, t, text));
    let control = RunControl { checkpoint_every: 4, cancel: None };
    let mut told = vec![];
    let told_of = |event: Event| -> hiper_core::Result<()> {
        told.push(match event {
            Event::Step(step) => step.step.to_string(),
            Event::Checkpoint(checkpoint) => format!("stored {}", checkpoint.adam.steps),
        });
        Ok(())
    };
    subject(1, 10).run(&network, control, told_of).unwrap();
    assert_eq!(told.join(" "), "1 2 3 4 stored 4 5 6 7 8 stored 8 9 10");
}
