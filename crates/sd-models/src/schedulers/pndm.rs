//! `PNDMScheduler` with `skip_prk_steps`, as Stable Diffusion uses it: PLMS, linear multistep over up to four predictions
//! (arXiv 2202.09778, equations 9 and 12). The second timestep is visited twice, so a run of `n` steps predicts `n + 1` times.

use candle_core::Tensor;

use super::alphas::{Alphas, Reading, stride, whole_timesteps};
use super::{Noise, Scheduler, SchedulerConfig, combine};
use crate::Result;

pub(super) struct Pndm {
    timesteps: Vec<f64>,
    /// ᾱ at each step's start and end.
    alphas: Vec<[f64; 2]>,
    reading: Reading,
    /// The last predictions, newest last.
    ets: Vec<Tensor>,
    first_sample: Option<Tensor>,
}

impl Pndm {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Self {
        // diffusers' class knows no rescaling and ignores the field.
        let config = SchedulerConfig { rescale_betas_zero_snr: false, ..config.clone() };
        let alphas = Alphas::new(&config, config.set_alpha_to_one.unwrap_or(false));
        let (mut timesteps, stride) = (whole_timesteps(&config, n), stride(&config, n));
        timesteps.insert(1, timesteps[1]);
        let step = |(i, t): (usize, &f64)| {
            // The second visit takes the first step again, which ends where it stands.
            let (from, to) = if i == 1 { (t + stride, *t) } else { (*t, t - stride) };
            [alphas.at(from), alphas.at(to)]
        };
        let alphas = timesteps.iter().enumerate().map(step).collect();
        Self { timesteps, alphas, reading: Reading::new(&config), ets: Vec::new(), first_sample: None }
    }

    /// Equation 9: `sample` moved by step `step_index`.
    fn previous_sample(&self, step_index: usize, sample: &Tensor, model_output: &Tensor) -> Result<Tensor> {
        let [alpha, alpha_prev] = self.alphas[step_index];
        let (beta, beta_prev) = (1.0 - alpha, 1.0 - alpha_prev);
        let epsilon = self.reading.noise(alpha, sample, model_output)?;
        let denominator = alpha * beta_prev.sqrt() + (alpha * beta * alpha_prev).sqrt();
        combine((alpha_prev / alpha).sqrt(), sample, -(alpha_prev - alpha) / denominator, &epsilon)
    }
}

impl Scheduler for Pndm {
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
        if step_index == 1 {
            // The second visit: the mean of both predictions, applied to the first sample again.
            let mean = match self.ets.last() {
                Some(first) => combine(0.5, model_output, 0.5, first)?,
                None => model_output.clone(),
            };
            let first_sample = self.first_sample.take().unwrap_or_else(|| sample.clone());
            return self.previous_sample(step_index, &first_sample, &mean);
        }
        if step_index == 0 {
            self.first_sample = Some(sample.clone());
        }
        if self.ets.len() == 4 {
            self.ets.remove(0);
        }
        self.ets.push(model_output.clone());
        let weights: &[f64] = match self.ets.len() {
            1 => &[1.0],
            2 => &[-1.0 / 2.0, 3.0 / 2.0],
            3 => &[5.0 / 12.0, -16.0 / 12.0, 23.0 / 12.0],
            _ => &[-9.0 / 24.0, 37.0 / 24.0, -59.0 / 24.0, 55.0 / 24.0],
        };
        let mut blend = (&self.ets[0] * weights[0])?;
        for (output, &weight) in self.ets.iter().zip(weights).skip(1) {
            blend = combine(1.0, &blend, weight, output)?;
        }
        self.previous_sample(step_index, sample, &blend)
    }
}
