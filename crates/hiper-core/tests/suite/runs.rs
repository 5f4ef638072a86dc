//! The loop: torch's losses, exact resumption, cancellation, and what a failing step leaves.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use hiper_core::{
    AdamConfig, Checkpoint, Error, Event, HiperEmbedding, NoisePredictor, NoiseSchedule, Outcome,
    Personalisation, PersonalisationConfig, PredictionType, RunControl, Step, TextEmbedding, TorchGenerator,
};
use proptest::prelude::*;

use crate::toy::{Golden, KINDS, Toy, epsilon_run, relative_l2, start, values};

/// The figures for 20 steps: each loss, and the tail at the end.
const LOSS: f64 = 1e-4;
const TAIL: f64 = 1e-3;

#[test]
fn twenty_steps_are_torchs() {
    for (name, prediction_type) in KINDS {
        let golden = Golden::load(name);
        let toy = Toy::new(&golden, DType::F32);
        let network = |x: &Tensor, t: f64, text: &Tensor| toy.forward(x, t, text);
        let mut run = start(&golden, prediction_type, 20);
        let (losses, tails) = (golden.f32("losses"), golden.get("tails"));
        let timesteps = golden.get("timesteps").to_vec1::<i64>().unwrap();
        for i in 0..20 {
            let step = run.step(&network).unwrap().unwrap();
            assert_eq!((step.step, step.timestep as i64), (i + 1, timesteps[i]));
            let error = (step.loss / f64::from(losses[i]) - 1.0).abs();
            assert!(error < LOSS, "{name} step {step:?}: {}", losses[i]);
            let error = relative_l2(&values(run.tail().tensor()), &values(&tails.get(i).unwrap()));
            assert!(error < TAIL, "{name} step {}: tail off by {error}", i + 1);
        }
        assert!(run.step(&network).unwrap().is_none());
    }
}

fn finish(mut run: Personalisation, network: &impl NoisePredictor) -> (Vec<Step>, Vec<f32>) {
    let mut steps = Vec::new();
    while let Some(step) = run.step(network).unwrap() {
        steps.push(step);
    }
    (steps, values(run.tail().tensor()))
}

#[test]
fn stopping_anywhere_and_resuming_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hiper_step.safetensors");
    let (_, network) = epsilon_run(1);
    let (steps, whole) = finish(epsilon_run(12).0, &network);
    for stop in 0..=12 {
        let mut run = epsilon_run(12).0;
        for _ in 0..stop {
            run.step(&network).unwrap();
        }
        run.checkpoint().save(&path).unwrap();
        let resumed = epsilon_run(12).0.resume(Checkpoint::load(&path).unwrap()).unwrap();
        assert_eq!(resumed.steps_taken(), stop);
        assert_eq!(resumed.last_loss(), stop.checked_sub(1).map(|i| steps[i].loss));
        let (rest, tail) = finish(resumed, &network);
        assert_eq!((&steps[stop..], &whole), (&rest[..], &tail), "stopped after {stop}");
    }
}

#[test]
fn a_run_may_be_made_longer() {
    let (_, network) = epsilon_run(1);
    let mut short = epsilon_run(6).0;
    while short.step(&network).unwrap().is_some() {}
    let resumed = epsilon_run(12).0.resume(short.checkpoint()).unwrap();
    assert_eq!(finish(resumed, &network).1, finish(epsilon_run(12).0, &network).1);
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let (run, network) = epsilon_run(3);
    let mut other = run.clone();
    while other.step(&network).unwrap().is_some() {}
    let checkpoint = other.checkpoint();
    let refusal = |checkpoint: Checkpoint| run.clone().resume(checkpoint).unwrap_err().to_string();

    let tail = HiperEmbedding::new(Tensor::zeros((3, 8), DType::F32, &Device::Cpu).unwrap()).unwrap();
    let error = refusal(Checkpoint { tail, ..checkpoint.clone() });
    assert_eq!(error, "checkpoint: expected a tail of [3, 16], got a tail of [3, 8]");

    let mut rate = checkpoint.clone();
    rate.adam.config.learning_rate = 0.01;
    assert!(refusal(rate).contains("learning_rate: 0.005"));

    let error = epsilon_run(2).0.resume(checkpoint).unwrap_err().to_string();
    assert_eq!(error, "checkpoint: expected at most train_steps, 2 steps, got 3 steps");
}

#[test]
fn events_come_in_order_and_checkpoints_when_due() {
    let (mut run, network) = epsilon_run(7);
    let mut told = Vec::new();
    let control = RunControl { checkpoint_every: 3, cancel: None };
    let outcome = run.run(&network, control, |event| {
        told.push(match event {
            Event::Step(step) => format!("step {}", step.step),
            Event::Checkpoint(checkpoint) => format!("checkpoint {}", checkpoint.adam.steps),
        });
        Ok::<(), Error>(())
    });
    assert_eq!(outcome.unwrap(), Outcome::Finished);
    let expected = "step 1,step 2,step 3,checkpoint 3,step 4,step 5,step 6,checkpoint 6,step 7".split(',');
    assert_eq!(told, expected.collect::<Vec<_>>());
}

#[test]
fn a_cancelled_run_hands_out_where_it_is_and_continues_exactly() {
    let (_, network) = epsilon_run(1);
    for (checkpoint_every, expected) in [(0, vec![4]), (2, vec![2, 4]), (3, vec![3, 4])] {
        let cancel = AtomicBool::new(false);
        let (mut run, mut checkpoints) = (epsilon_run(9).0, Vec::new());
        let control = RunControl { checkpoint_every, cancel: Some(&cancel) };
        let outcome = run.run(&network, control, |event| {
            match event {
                Event::Step(step) => cancel.store(step.step == 4, Ordering::Relaxed),
                Event::Checkpoint(checkpoint) => checkpoints.push(*checkpoint),
            }
            Ok::<(), Error>(())
        });
        assert_eq!(outcome.unwrap(), Outcome::Cancelled);
        assert_eq!(checkpoints.iter().map(|c| c.adam.steps).collect::<Vec<_>>(), expected);
        let resumed = epsilon_run(9).0.resume(checkpoints.pop().unwrap()).unwrap();
        assert_eq!(finish(resumed, &network).1, finish(epsilon_run(9).0, &network).1);
    }
    // Set during the last step, it comes too late.
    let (cancel, mut run) = (AtomicBool::new(false), epsilon_run(1).0);
    let control = RunControl { checkpoint_every: 0, cancel: Some(&cancel) };
    let outcome = run.run(&network, control, |_| {
        cancel.store(true, Ordering::Relaxed);
        Ok::<(), Error>(())
    });
    assert_eq!(outcome.unwrap(), Outcome::Finished);
}

#[test]
fn the_receivers_error_stops_the_run() {
    #[derive(Debug)]
    struct DiskFull;
    impl From<Error> for DiskFull {
        fn from(error: Error) -> Self {
            panic!("{error}")
        }
    }
    let (mut run, network) = epsilon_run(9);
    let result = run.run(&network, RunControl::default(), |_| Err(DiskFull));
    assert!(matches!(result, Err(DiskFull)));
    assert_eq!(run.steps_taken(), 1);
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let (_, network) = epsilon_run(1);
    let calls = AtomicUsize::new(0);
    // The fourth and fifth evaluations go wrong: NaN in the loss, then an error of the network.
    let flaky = |x: &Tensor, t: f64, text: &Tensor| match calls.fetch_add(1, Ordering::Relaxed) {
        3 => network(x, t, text)? * f64::NAN,
        4 => candle_core::bail!("out of memory"),
        _ => network(x, t, text),
    };
    let mut run = epsilon_run(8).0;
    let mut steps = Vec::new();
    let mut errors = Vec::new();
    loop {
        match run.step(&flaky) {
            Ok(Some(step)) => steps.push(step),
            Ok(None) => break,
            Err(error) => errors.push(error.to_string()),
        }
    }
    assert!(errors[0].starts_with("step 4: the loss is not finite (loss NaN)"), "{}", errors[0]);
    assert!(errors[1].contains("out of memory"), "{}", errors[1]);
    assert_eq!((steps, values(run.tail().tensor())), finish(epsilon_run(8).0, &network));
}

#[test]
fn gradients_and_tails_that_are_not_finite_are_refused() {
    // A square root's slope at 0 is infinite, its value is not.
    let steep = |x: &Tensor, _t: f64, text: &Tensor| {
        x.broadcast_add(&((text - text.detach())?.sqr()?.sum_all()?.sqrt()? + text.mean_all()?)?)
    };
    let (mut run, network) = epsilon_run(1);
    let error = run.step(&steep).unwrap_err();
    assert!(matches!(error, Error::NotFinite { step: 1, quantity: "the gradient", .. }), "{error}");

    let golden = Golden::load(KINDS[0].0);
    let source = TextEmbedding::new(golden.get("source").clone()).unwrap();
    let adam = AdamConfig { learning_rate: 1e300, ..Default::default() };
    let config = PersonalisationConfig { adam, ..Default::default() };
    let schedule = NoiseSchedule::linear(1e-4, 0.02, 10, PredictionType::Epsilon);
    let generator = TorchGenerator::new(0);
    let mut run = Personalisation::new(config, golden.get("latents"), &source, schedule, generator).unwrap();
    let error = run.step(&network).unwrap_err();
    assert!(matches!(error, Error::NotFinite { quantity: "the tail after it", .. }), "{error}");
    assert_eq!(run.steps_taken(), 0);
}

#[test]
fn settings_and_inputs_outside_their_range_are_refused() {
    let golden = Golden::load(KINDS[0].0);
    let good = PersonalisationConfig::default();
    let latents = golden.get("latents");
    let source = golden.get("source");
    let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 10, PredictionType::Epsilon);
    let refusal = |config: &PersonalisationConfig,
                   latents: &Tensor,
                   source: &Tensor,
                   schedule: &NoiseSchedule| {
        let source = TextEmbedding::new(source.clone()).unwrap();
        let new =
            Personalisation::new(config.clone(), latents, &source, schedule.clone(), TorchGenerator::new(0));
        new.map(|_| ()).unwrap_err().to_string()
    };
    let adam = |learning_rate| AdamConfig { learning_rate, ..Default::default() };
    let none = NoiseSchedule { alphas_cumprod: Vec::new(), ..schedule.clone() };
    let nan = |x: &Tensor| (x * f64::NAN).unwrap();
    for (error, expected) in [
        (
            refusal(&PersonalisationConfig { n_hiper: 0, ..good.clone() }, latents, source, &schedule),
            "n_hiper",
        ),
        (
            refusal(&PersonalisationConfig { n_hiper: 11, ..good.clone() }, latents, source, &schedule),
            "n_hiper",
        ),
        (
            refusal(&PersonalisationConfig { train_steps: 0, ..good.clone() }, latents, source, &schedule),
            "train_steps",
        ),
        (
            refusal(&PersonalisationConfig { adam: adam(-1.0), ..good.clone() }, latents, source, &schedule),
            "learning_rate",
        ),
        (
            refusal(
                &PersonalisationConfig { adam: adam(f64::NAN), ..good.clone() },
                latents,
                source,
                &schedule,
            ),
            "learning_rate",
        ),
        (refusal(&good, &latents.squeeze(0).unwrap(), source, &schedule), "latents"),
        (refusal(&good, &latents.to_dtype(DType::F16).unwrap(), source, &schedule), "latents"),
        (refusal(&good, &nan(latents), source, &schedule), "latents: expected finite"),
        (refusal(&good, latents, &nan(source), &schedule), "source embedding: expected finite"),
        (refusal(&good, latents, source, &none), "alphas_cumprod"),
    ] {
        assert!(error.starts_with(expected), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_head_never_moves(n_hiper in 1usize..10, train_steps in 1usize..4, seed: u64) {
        let golden = Golden::load(KINDS[0].0);
        let (_, network) = epsilon_run(1);
        let source = TextEmbedding::new(golden.get("source").clone()).unwrap();
        let (head, tail) = source.split(n_hiper).unwrap();
        let config = PersonalisationConfig { n_hiper, train_steps, ..Default::default() };
        let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::VPrediction);
        let generator = TorchGenerator::new(seed);
        let mut run = Personalisation::new(config, golden.get("latents"), &source, schedule, generator).unwrap();
        while run.step(&network).unwrap().is_some() {}
        prop_assert_eq!(values(run.head()), values(&head));
        prop_assert_eq!(values(source.tensor()), golden.f32("source"));
        prop_assert!(values(run.tail().tensor()) != values(tail.tensor()));
        prop_assert_eq!(run.tail().tensor().dims(), [n_hiper, source.width()]);
    }
}
