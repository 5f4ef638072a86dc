//! The UNet as hiper-core sees it.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};
use hiper_core::{
    Adam, AdamConfig, Error, GeneratorState, NoisePredictor, Optimised, PredictionType, Step,
    TailOptimisation, optimise_step_by_step,
};
use sd_models::{
    AdamConstants, AdamState, OptimisationConfig, RecordedOptimisation, Target, UNet2DConditionModel, is_card,
};

/// Steps that a card takes before its losses are read: long enough that it never waits for the host, short enough that Ctrl-C
/// and the progress bar do not.
const STEPS_AT_ONCE: usize = 20;

/// torch draws fewer normal numbers than that in another way, which the card does not know.
const FEWEST_DRAWS: usize = 16;

/// The UNet; on a card, a step is recorded and replayed.
pub struct Network<'a> {
    unet: &'a UNet2DConditionModel,
    on_card: bool,
    /// The step of as many subjects, with pictures of one size.
    recorded: RefCell<Option<RecordedOptimisation<'a>>>,
}

impl<'a> Network<'a> {
    /// Of a checkpoint that computes on `device`.
    pub fn new(unet: &'a UNet2DConditionModel, device: &Device) -> Self {
        Self { unet, on_card: is_card(device), recorded: RefCell::default() }
    }

    /// Of subjects that are all like the first.
    fn replay(
        &self,
        first: &TailOptimisation<'_>,
        subjects: &[TailOptimisation<'_>],
        steps: usize,
    ) -> hiper_core::Result<Vec<Optimised>> {
        let stack = |of: fn(&TailOptimisation<'_>) -> candle_core::Result<Tensor>| {
            Tensor::cat(&subjects.iter().map(of).collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let latents = stack(|subject| Ok(subject.latents.clone()))?;
        let head = stack(|subject| Ok(subject.head.clone()))?;
        let tails = stack(|subject| subject.tail.unsqueeze(0))?;
        let AdamConfig { learning_rate, beta1, beta2, eps } = first.adam.config;
        let config = OptimisationConfig {
            adam: AdamConstants { learning_rate, beta1, beta2, eps },
            target: match first.schedule.prediction_type {
                PredictionType::Epsilon => Target::Noise,
                PredictionType::VPrediction => Target::Velocity,
            },
            alphas_cumprod: first.schedule.alphas_cumprod.clone(),
        };
        let shapes = [&latents, &head, &tails];
        let mut recorded = self.recorded.borrow_mut();
        let recorded = match recorded.take().filter(|old| old.fits(shapes, &config)) {
            Some(fitting) => recorded.insert(fitting),
            None => recorded.insert(
                RecordedOptimisation::new(self.unet, shapes, config).map_err(candle_core::Error::from)?,
            ),
        };
        let before = state(subjects, &tails)?;
        let generators = generators(subjects, tails.device())?;
        let (losses, after) =
            recorded.run(&latents, &head, &before, &generators, steps).map_err(candle_core::Error::from)?;
        optimised(subjects, &losses, &after)
    }
}

/// Whether what a recording has only once is the same for both.
fn alike(a: &TailOptimisation<'_>, b: &TailOptimisation<'_>) -> bool {
    a.adam.config == b.adam.config && a.schedule == b.schedule
}

/// The optimisers of a batch, on the card.
fn state(subjects: &[TailOptimisation<'_>], tails: &Tensor) -> candle_core::Result<AdamState> {
    let device = tails.device();
    let parameters = tails.flatten_from(1)?;
    let of_all = |of: fn(&Adam) -> &[f32]| {
        let values: Vec<f32> = subjects.iter().flat_map(|subject| of(subject.adam)).copied().collect();
        Tensor::from_vec(values, parameters.shape(), device)
    };
    let counts: Vec<f32> = subjects.iter().flat_map(|subject| [subject.adam.steps as f32, 0.0]).collect();
    Ok(AdamState {
        first_moment: of_all(|adam| &adam.first_moment)?,
        second_moment: of_all(|adam| &adam.second_moment)?,
        counts: Tensor::from_vec(counts, (subjects.len(), 2), device)?,
        parameters,
    })
}

/// The generators of a batch, on the card.
fn generators(subjects: &[TailOptimisation<'_>], device: &Device) -> candle_core::Result<Tensor> {
    let states = subjects.iter().flat_map(|subject| {
        let GeneratorState { mut words, index, cached_normal: _ } = subject.generator.state();
        words.push(index as u32);
        words
    });
    let states: Vec<u32> = states.collect();
    let width = states.len() / subjects.len();
    Tensor::from_vec(states, (subjects.len(), width), device)
}

/// What became of each: its losses up to the step before which it stopped. The generator draws again what the card has drawn.
fn optimised(
    subjects: &[TailOptimisation<'_>],
    losses: &[Vec<f32>],
    after: &AdamState,
) -> hiper_core::Result<Vec<Optimised>> {
    let rows = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_vec2::<f32>();
    let [tails, first, second, counts] =
        [&after.parameters, &after.first_moment, &after.second_moment, &after.counts].map(rows);
    let moments = first?.into_iter().zip(second?);
    let each = subjects.iter().enumerate().zip(tails?).zip(moments).zip(counts?);
    let each = each.map(|((((i, subject), tail), (first_moment, second_moment)), counts)| {
        let before = subject.adam.steps;
        let adam =
            Adam { first_moment, second_moment, steps: counts[0] as usize, config: subject.adam.config };
        let mut losses = losses.iter().map(|step| f64::from(step[i]));
        let mut generator = subject.generator.clone();
        let taken = losses.by_ref().take(adam.steps - before).enumerate();
        let step = |(i, loss)| Step {
            step: before + 1 + i,
            timestep: subject.draw_without_noise(&mut generator),
            loss,
        };
        let steps = taken.map(step).collect();
        let failure = losses.next().map(|loss| Error::NotFinite {
            step: adam.steps + 1,
            quantity: if loss.is_finite() { "the gradient or the tail after it" } else { "the loss" },
            loss,
        });
        Optimised { steps, tail, adam, generator, failure }
    });
    Ok(each.collect())
}

impl NoisePredictor for Network<'_> {
    fn predict_noise(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        text: &Tensor,
    ) -> candle_core::Result<Tensor> {
        Ok(self.unet.forward(latents, timesteps, text)?)
    }

    fn predict_noise_with_tail(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        head: &Tensor,
        tail: &Tensor,
    ) -> candle_core::Result<Tensor> {
        Ok(self.unet.forward_with_tail(latents, timesteps, head, tail)?)
    }

    fn steps_at_once(&self) -> usize {
        if self.on_card { STEPS_AT_ONCE } else { 1 }
    }

    fn optimise(
        &self,
        subjects: &[TailOptimisation<'_>],
        steps: usize,
    ) -> hiper_core::Result<Vec<Optimised>> {
        match subjects {
            [first, others @ ..]
                if self.on_card
                    && first.latents.elem_count() >= FEWEST_DRAWS
                    && others.iter().all(|other| alike(first, other)) =>
            {
                self.replay(first, subjects, steps)
            }
            _ => optimise_step_by_step(self, subjects, steps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hiper_core::{
        NoiseSchedule, Personalisation, PersonalisationConfig, Step, TextEmbedding, TorchGenerator,
    };
    use hiper_kernels::on_test_device;
    use sd_models::StableDiffusion;

    const STEPS: usize = 2;

    fn subject(sd: &StableDiffusion, seed: u64, device: &Device) -> Personalisation {
        subject_with(sd, seed, AdamConfig::default(), device)
    }

    fn subject_with(sd: &StableDiffusion, seed: u64, adam: AdamConfig, device: &Device) -> Personalisation {
        let source = TextEmbedding::new(sd.encode_prompt("a dog standing").unwrap().1).unwrap();
        let config = sd.unet.config();
        let (channels, side) = (config.in_channels, config.sample_size);
        let mut generator = TorchGenerator::new(seed);
        let latents = generator.randn_tensor(&[1, channels, side, side], device).unwrap();
        let alphas_cumprod = sd.scheduler_config.alphas_cumprod();
        let schedule = NoiseSchedule { alphas_cumprod, prediction_type: PredictionType::Epsilon };
        let config = PersonalisationConfig { train_steps: STEPS, adam, ..Default::default() };
        Personalisation::new(config, &latents, &source, schedule, generator).unwrap()
    }

    /// Steps and tails of two subjects.
    fn learn(sd: &StableDiffusion, device: &Device) -> (Vec<Vec<Step>>, Vec<Vec<f32>>) {
        learn_both(sd, [subject(sd, 1, device), subject(sd, 2, device)], device)
    }

    fn learn_both(
        sd: &StableDiffusion,
        mut runs: [Personalisation; 2],
        device: &Device,
    ) -> (Vec<Vec<Step>>, Vec<Vec<f32>>) {
        let mut steps = vec![Vec::new(); 2];
        let network = Network::new(&sd.unet, device);
        while runs.iter().any(|run| !run.is_finished()) {
            let moved =
                Personalisation::steps_together(&mut runs.iter_mut().collect::<Vec<_>>(), &network, STEPS);
            for (steps, moved) in steps.iter_mut().zip(moved.unwrap()) {
                steps.extend(moved.unwrap());
            }
        }
        let tail = |run: &Personalisation| run.tail().tensor().flatten_all().unwrap().to_vec1().unwrap();
        (steps, runs.iter().map(tail).collect())
    }

    /// What `f16` makes of a loss, and of the way that a tail goes in two steps: Adam's first ones are as long for a small
    /// gradient as for a large one, so each wrong sign shows.
    const LOSS: f64 = 2e-3;
    const WAY: f64 = 0.1;

    #[test]
    fn a_cards_steps_are_a_cpus() {
        let load = |dtype, device: &Device| {
            let files = crate::demo_model::files().unwrap().with_dtype(dtype);
            StableDiffusion::load(&files, device).unwrap()
        };
        let cpu = &Device::Cpu;
        let exact = load(DType::F32, cpu);
        let (expected, tails) = learn(&exact, cpu);
        let (got, tails_on_card) = on_test_device(|device| learn(&load(DType::F16, device), device));
        for (got, expected) in got.concat().iter().zip(expected.concat()) {
            assert_eq!((got.step, got.timestep), (expected.step, expected.timestep));
            assert!((got.loss / expected.loss - 1.0).abs() < LOSS, "{got:?} {expected:?}");
        }
        for (i, (got, expected)) in tails_on_card.iter().zip(&tails).enumerate() {
            let start: Vec<f32> =
                subject(&exact, i as u64 + 1, cpu).tail().tensor().flatten_all().unwrap().to_vec1().unwrap();
            let way = |tail: &[f32], from: &[f32]| -> f64 {
                tail.iter().zip(from).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
            };
            let error = way(got, expected) / way(expected, &start);
            assert!(error < WAY, "subject {i}: {error}");
        }
    }

    #[test]
    fn a_card_steps_one_by_one_where_optimisers_differ() {
        let files = crate::demo_model::files().unwrap().with_dtype(DType::F32);
        let slow = AdamConfig { learning_rate: 1e-4, ..Default::default() };
        let learn = |device: &Device| {
            let sd = StableDiffusion::load(&files, device).unwrap();
            let runs = [subject(&sd, 1, device), subject_with(&sd, 2, slow, device)];
            learn_both(&sd, runs, device).1
        };
        let (expected, got) = (learn(&Device::Cpu), on_test_device(learn));
        for (got, expected) in got.iter().zip(&expected) {
            let furthest = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            // A step of the other's learning rate would be fifty times as far.
            assert!(furthest < 1e-4, "{furthest}");
        }
    }
}
