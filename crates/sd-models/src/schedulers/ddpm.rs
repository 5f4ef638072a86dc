//! `DDPMScheduler` (arXiv 2006.11239, equations 6 and 7), the smaller of the two variances.

use candle_core::Tensor;

use super::ddim::{clipped, predictions};
use super::{Noise, PredictionType, Scheduler, SchedulerConfig, TimestepSpacing, combine};
use crate::Result;

pub(super) struct Ddpm {
    timesteps: Vec<f64>,
    alphas: Vec<[f64; 2]>,
    prediction_type: PredictionType,
    clip: Option<f64>,
}

impl Ddpm {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Result<Self> {
        let alphas_cumprod = config.alphas_cumprod();
        let timesteps: Vec<f64> =
            config.timesteps(TimestepSpacing::Leading, n).into_iter().map(f64::round_ties_even).collect();
        let alpha = |&t: &f64| f64::from(alphas_cumprod[t as usize]);
        let alphas =
            timesteps.iter().enumerate().map(|(i, t)| [alpha(t), timesteps.get(i + 1).map_or(1.0, alpha)]);
        Ok(Self {
            alphas: alphas.collect(),
            timesteps,
            prediction_type: config.prediction_type,
            clip: config.clip_sample.unwrap_or(true).then_some(config.clip_sample_range),
        })
    }
}

impl Scheduler for Ddpm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        noise: &mut Noise<'_>,
    ) -> Result<Tensor> {
        let [alpha, alpha_prev] = self.alphas[step_index];
        let (x0, _) = predictions(self.prediction_type, alpha, sample, model_output)?;
        let x0 = clipped(x0, self.clip)?;
        let current_alpha = alpha / alpha_prev;
        let current_beta = 1.0 - current_alpha;
        let x0_coefficient = alpha_prev.sqrt() * current_beta / (1.0 - alpha);
        let sample_coefficient = current_alpha.sqrt() * (1.0 - alpha_prev) / (1.0 - alpha);
        let mean = combine(x0_coefficient, &x0, sample_coefficient, sample)?;
        if self.timesteps[step_index] == 0.0 {
            return Ok(mean);
        }
        let variance = ((1.0 - alpha_prev) / (1.0 - alpha) * current_beta).max(1e-20);
        combine(1.0, &mean, variance.sqrt(), &noise(sample.dims())?)
    }
}
