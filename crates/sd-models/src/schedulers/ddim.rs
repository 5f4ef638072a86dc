//! `DDIMScheduler` with η = 0 (arXiv 2010.02502, equation 12).

use candle_core::Tensor;

use super::alphas::{Alphas, Reading, stride, whole_timesteps};
use super::{Noise, Scheduler, SchedulerConfig, combine};
use crate::Result;

pub(super) struct Ddim {
    timesteps: Vec<f64>,
    /// ᾱ at each step, and after it.
    alphas: Vec<[f64; 2]>,
    reading: Reading,
}

impl Ddim {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Self {
        let alphas = Alphas::new(config, config.set_alpha_to_one.unwrap_or(true));
        let (timesteps, stride) = (whole_timesteps(config, n), stride(config, n));
        let alphas = timesteps.iter().map(|t| [alphas.at(*t), alphas.at(t - stride)]).collect();
        Self { timesteps, alphas, reading: Reading::new(config) }
    }
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        _noise: &mut Noise<'_>,
    ) -> Result<Tensor> {
        let [alpha, alpha_prev] = self.alphas[step_index];
        let x0 = self.reading.picture(alpha, sample, model_output)?;
        let epsilon = self.reading.noise(alpha, sample, model_output)?;
        combine(alpha_prev.sqrt(), &x0, (1.0 - alpha_prev).sqrt(), &epsilon)
    }
}
