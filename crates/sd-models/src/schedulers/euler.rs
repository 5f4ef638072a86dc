//! `EulerDiscreteScheduler` and `EulerAncestralDiscreteScheduler`: Euler's method on the probability-flow equation
//! dx/dσ = (x − x₀)/σ (arXiv 2206.00364, algorithm 2 without churn; k-diffusion's `sample_euler_ancestral`).

use candle_core::Tensor;

use super::sigmas::{final_sigma, interpolate, karras, sigma_to_timestep, to_f32, training_sigmas};
use super::{Noise, PredictionType, Scheduler, SchedulerConfig, TimestepSpacing, combine};
use crate::Result;

/// Whether a step goes all the way down, or further down and noise comes back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    Ancestral,
}

pub(super) struct Euler {
    kind: Kind,
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
    init_noise_sigma: f64,
    prediction_type: PredictionType,
}

impl Euler {
    pub(super) fn new(config: &SchedulerConfig, n: usize, kind: Kind) -> Self {
        let training = training_sigmas(config);
        // These two classes keep timesteps in f32 and do not round them.
        let mut timesteps = to_f32(config.timesteps(TimestepSpacing::Linspace, n));
        let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| interpolate(&training, t)).collect();
        if config.use_karras_sigmas && kind == Kind::Plain {
            sigmas = karras(sigmas[sigmas.len() - 1], sigmas[0], n);
            timesteps = to_f32(sigmas.iter().map(|&s| sigma_to_timestep(&training, s)).collect());
        }
        sigmas.push(if kind == Kind::Plain { final_sigma(config, training[0]) } else { 0.0 });
        let sigmas = to_f32(sigmas);
        let largest = sigmas.iter().copied().fold(0.0, f64::max);
        let leading = config.timestep_spacing == Some(TimestepSpacing::Leading);
        let init_noise_sigma = if leading { (largest * largest + 1.0).sqrt() } else { largest };
        Self { kind, timesteps, sigmas, init_noise_sigma, prediction_type: config.prediction_type }
    }
}

impl Scheduler for Euler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    fn scale_model_input(&self, sample: &Tensor, step_index: usize) -> Result<Tensor> {
        let sigma = self.sigmas[step_index];
        Ok((sample / (sigma * sigma + 1.0).sqrt())?)
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        noise: &mut Noise<'_>,
    ) -> Result<Tensor> {
        let (sigma, to) = (self.sigmas[step_index], self.sigmas[step_index + 1]);
        let x0 = match self.prediction_type {
            PredictionType::Epsilon => combine(1.0, sample, -sigma, model_output)?,
            PredictionType::VPrediction => {
                let total = sigma * sigma + 1.0;
                combine(-sigma / total.sqrt(), model_output, 1.0 / total, sample)?
            }
        };
        let (up, down) = match self.kind {
            Kind::Plain => (0.0, to),
            Kind::Ancestral => {
                let up = (to * to * (sigma * sigma - to * to) / (sigma * sigma)).sqrt();
                (up, (to * to - up * up).max(0.0).sqrt())
            }
        };
        // x + (x − x₀)/σ · (down − σ)
        let ratio = down / sigma;
        let moved = combine(ratio, sample, 1.0 - ratio, &x0)?;
        match self.kind {
            Kind::Plain => Ok(moved),
            Kind::Ancestral => combine(1.0, &moved, up, &noise(sample.dims())?),
        }
    }
}
