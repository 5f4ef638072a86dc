//! Schedules in terms of ᾱ, the share of the picture in a noisy sample, which DDPM, DDIM and PNDM share.

use candle_core::Tensor;

use super::{PredictionType, SchedulerConfig, TimestepSpacing, combine};
use crate::Result;

/// ᾱ of every training timestep, and below timestep 0.
pub(super) struct Alphas {
    alphas_cumprod: Vec<f32>,
    /// What the last step goes to.
    final_alpha: f32,
}

impl Alphas {
    /// The last step goes to ᾱ = 1 (no noise at all) or to timestep 0.
    pub(super) fn new(config: &SchedulerConfig, set_alpha_to_one: bool) -> Self {
        let alphas_cumprod = config.alphas_cumprod();
        let final_alpha = if set_alpha_to_one { 1.0 } else { alphas_cumprod[0] };
        Self { alphas_cumprod, final_alpha }
    }

    /// ᾱ at a whole timestep; below 0 and above the last one, that of the end.
    pub(super) fn at(&self, timestep: f64) -> f64 {
        let last = self.alphas_cumprod.len() - 1;
        f64::from(if timestep < 0.0 {
            self.final_alpha
        } else {
            self.alphas_cumprod[(timestep as usize).min(last)]
        })
    }
}

/// The run's timesteps, descending, rounded to whole ones.
pub(super) fn whole_timesteps(config: &SchedulerConfig, n: usize) -> Vec<f64> {
    config.timesteps(TimestepSpacing::Leading, n).into_iter().map(f64::round_ties_even).collect()
}

/// Training timesteps from one whole timestep of the run to the next.
pub(super) fn stride(config: &SchedulerConfig, n: usize) -> f64 {
    (config.num_train_timesteps / n) as f64
}

/// How a network's output is read.
pub(super) struct Reading {
    prediction_type: PredictionType,
    /// Bound of the predicted picture's values.
    clip: Option<f64>,
}

impl Reading {
    pub(super) fn new(config: &SchedulerConfig) -> Self {
        let clip = config.clip_sample.unwrap_or(true).then_some(config.clip_sample_range);
        Self { prediction_type: config.prediction_type, clip }
    }

    /// The picture that an output at ᾱ implies, clipped if the configuration says so.
    pub(super) fn picture(&self, alpha: f64, sample: &Tensor, model_output: &Tensor) -> Result<Tensor> {
        let (signal, noise) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let picture = match self.prediction_type {
            PredictionType::Epsilon => combine(1.0 / signal, sample, -noise / signal, model_output)?,
            PredictionType::VPrediction => combine(signal, sample, -noise, model_output)?,
        };
        Ok(match self.clip {
            Some(range) => picture.clamp(-range, range)?,
            None => picture,
        })
    }

    /// The noise that an output at ᾱ implies.
    pub(super) fn noise(&self, alpha: f64, sample: &Tensor, model_output: &Tensor) -> Result<Tensor> {
        match self.prediction_type {
            PredictionType::Epsilon => Ok(model_output.clone()),
            PredictionType::VPrediction => combine(alpha.sqrt(), model_output, (1.0 - alpha).sqrt(), sample),
        }
    }
}
