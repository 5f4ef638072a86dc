//! The UNet as hiper-core sees it.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};
use hiper_core::{
    Adam, AdamConfig, Error, NoisePredictor, Optimised, PredictionType, TailOptimisation,
    optimise_step_by_step,
};
use sd_models::{
    AdamConstants, AdamState, OptimisationStep, RecordedOptimisation, Target, UNet2DConditionModel, is_card,
};

/// Steps that a card takes before its losses are read: long enough that it never waits for the host, short enough that Ctrl-C
/// and the progress bar do not.
const STEPS_AT_ONCE: usize = 20;

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
    ) -> hiper_core::Result<Vec<Optimised>> {
        let stack = |of: fn(&TailOptimisation<'_>) -> candle_core::Result<Tensor>| {
            Tensor::cat(&subjects.iter().map(of).collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let latents = stack(|subject| Ok(subject.latents.clone()))?;
        let head = stack(|subject| Ok(subject.head.clone()))?;
        let tails = stack(|subject| subject.tail.unsqueeze(0))?;
        let AdamConfig { learning_rate, beta1, beta2, eps } = first.adam.config;
        let constants = AdamConstants { learning_rate, beta1, beta2, eps };
        let target = match first.schedule.prediction_type {
            PredictionType::Epsilon => Target::Noise,
            PredictionType::VPrediction => Target::Velocity,
        };
        let shapes = [&latents, &head, &tails];
        let mut recorded = self.recorded.borrow_mut();
        let recorded = match recorded.take().filter(|old| old.fits(shapes, constants, target)) {
            Some(fitting) => recorded.insert(fitting),
            None => recorded.insert(
                RecordedOptimisation::new(self.unet, shapes, constants, target)
                    .map_err(candle_core::Error::from)?,
            ),
        };
        let before = state(subjects, &tails)?;
        let steps = steps(subjects)?;
        let (losses, after) =
            recorded.run(&latents, &head, &before, &steps).map_err(candle_core::Error::from)?;
        optimised(subjects, &losses, &after)
    }
}

/// Whether what a recording has only once is the same for both.
fn alike(a: &TailOptimisation<'_>, b: &TailOptimisation<'_>) -> bool {
    a.adam.config == b.adam.config && a.schedule.prediction_type == b.schedule.prediction_type
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

/// What the batch draws, step by step.
fn steps<'a>(subjects: &'a [TailOptimisation<'_>]) -> hiper_core::Result<Vec<Vec<OptimisationStep<'a>>>> {
    let count = subjects.iter().map(|subject| subject.draws.len()).min().unwrap_or(0);
    let step = |i: usize, subject: &'a TailOptimisation<'_>| {
        let draw = &subject.draws[i];
        let (signal, sigma) = subject.schedule.coefficients(draw.timestep)?;
        Ok(OptimisationStep { noise: &draw.noise, timestep: draw.timestep as f64, signal, sigma })
    };
    (0..count).map(|i| subjects.iter().map(|subject| step(i, subject)).collect()).collect()
}

/// What became of each: its losses up to the step before which it stopped.
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
        let adam =
            Adam { first_moment, second_moment, steps: counts[0] as usize, config: subject.adam.config };
        let taken = adam.steps - subject.adam.steps;
        let mut losses = losses.iter().map(|step| f64::from(step[i]));
        let taken_losses = losses.by_ref().take(taken).collect();
        let failure = losses.next().map(|loss| Error::NotFinite {
            step: adam.steps + 1,
            quantity: if loss.is_finite() { "the gradient or the tail after it" } else { "the loss" },
            loss,
        });
        Optimised { losses: taken_losses, tail, adam, failure }
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

    fn steps_at_once(&self) -> usize {
        if self.on_card { STEPS_AT_ONCE } else { 1 }
    }

    fn optimise(&self, subjects: &[TailOptimisation<'_>]) -> hiper_core::Result<Vec<Optimised>> {
        match subjects {
            [first, others @ ..] if self.on_card && others.iter().all(|other| alike(first, other)) => {
                self.replay(first, subjects)
            }
            _ => optimise_step_by_step(self, subjects),
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
        let source = TextEmbedding::new(sd.encode_prompt("a dog standing").unwrap().1).unwrap();
        let config = sd.unet.config();
        let (channels, side) = (config.in_channels, config.sample_size);
        let mut generator = TorchGenerator::new(seed);
        let latents = generator.randn_tensor(&[1, channels, side, side], device).unwrap();
        let alphas_cumprod = sd.scheduler_config.alphas_cumprod();
        let schedule = NoiseSchedule { alphas_cumprod, prediction_type: PredictionType::Epsilon };
        let config = PersonalisationConfig { train_steps: STEPS, ..Default::default() };
        Personalisation::new(config, &latents, &source, schedule, generator).unwrap()
    }

    /// Steps and tails of two subjects.
    fn learn(sd: &StableDiffusion, device: &Device) -> (Vec<Vec<Step>>, Vec<Vec<f32>>) {
        let mut runs = [subject(sd, 1, device), subject(sd, 2, device)];
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
}
