//! `DDPMScheduler` (arXiv 2006.11239, equations 6 and 7), the smaller of the two variances.

use candle_core::Tensor;

use super::alphas::{Alphas, Reading, whole_timesteps};
use super::{Noise, Scheduler, SchedulerConfig, combine};
use crate::Result;

pub(super) struct Ddpm {
    timesteps: Vec<f64>,
    /// ᾱ at each step, and after it.
    alphas: Vec<[f64; 2]>,
    reading: Reading,
}

impl Ddpm {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Self {
        let (alphas, timesteps) = (Alphas::new(config, true), whole_timesteps(config, n));
        // Below timestep 0 there is no noise.
        let after = timesteps.iter().skip(1).chain(&[-1.0]);
        let alphas =
            timesteps.iter().zip(after).map(|(t, after)| [alphas.at(*t), alphas.at(*after)]).collect();
        Self { timesteps, alphas, reading: Reading::new(config) }
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
        let x0 = self.reading.picture(alpha, sample, model_output)?;
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
