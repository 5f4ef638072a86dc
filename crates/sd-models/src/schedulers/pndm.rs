//! `PNDMScheduler` with `skip_prk_steps`, as Stable Diffusion uses it: PLMS, linear multistep over up to four predictions
//! (arXiv 2202.09778, equations 9 and 12). The second timestep is visited twice, so a run of `n` steps predicts `n + 1` times.

use candle_core::Tensor;

use super::{Noise, PredictionType, Scheduler, SchedulerConfig, TimestepSpacing, combine};
use crate::Result;

pub(super) struct Pndm {
    timesteps: Vec<f64>,
    alphas_cumprod: Vec<f32>,
    final_alpha: f32,
    ratio: i64,
    prediction_type: PredictionType,
    /// The last predictions, newest last.
    ets: Vec<Tensor>,
    first_sample: Option<Tensor>,
}

impl Pndm {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Result<Self> {
        // diffusers' class knows no rescaling and ignores the field.
        let alphas_cumprod =
            SchedulerConfig { rescale_betas_zero_snr: false, ..config.clone() }.alphas_cumprod();
        let descending: Vec<f64> =
            config.timesteps(TimestepSpacing::Leading, n).into_iter().map(f64::round_ties_even).collect();
        let mut timesteps = descending.clone();
        timesteps.insert(1, descending[1]);
        let final_alpha = if config.set_alpha_to_one.unwrap_or(false) { 1.0 } else { alphas_cumprod[0] };
        Ok(Self {
            timesteps,
            alphas_cumprod,
            final_alpha,
            ratio: (config.num_train_timesteps / n) as i64,
            prediction_type: config.prediction_type,
            ets: Vec::new(),
            first_sample: None,
        })
    }

    fn alpha(&self, timestep: i64) -> f64 {
        let alpha = usize::try_from(timestep)
            .map_or(self.final_alpha, |t| self.alphas_cumprod[t.min(self.alphas_cumprod.len() - 1)]);
        f64::from(alpha)
    }

    /// Equation 9, from `timestep` to `previous`.
    fn previous_sample(
        &self,
        sample: &Tensor,
        timestep: i64,
        previous: i64,
        model_output: &Tensor,
    ) -> Result<Tensor> {
        let (alpha, alpha_prev) = (self.alpha(timestep), self.alpha(previous));
        let (beta, beta_prev) = (1.0 - alpha, 1.0 - alpha_prev);
        let epsilon = match self.prediction_type {
            PredictionType::Epsilon => model_output.clone(),
            PredictionType::VPrediction => combine(alpha.sqrt(), model_output, beta.sqrt(), sample)?,
        };
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
        let timestep = self.timesteps[step_index] as i64;
        if step_index == 1 {
            // The second visit: the mean of both predictions, applied to the first sample again.
            let mean = match self.ets.last() {
                Some(first) => combine(0.5, model_output, 0.5, first)?,
                None => model_output.clone(),
            };
            let first_sample = self.first_sample.take().unwrap_or_else(|| sample.clone());
            return self.previous_sample(&first_sample, timestep + self.ratio, timestep, &mean);
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
        self.previous_sample(sample, timestep, timestep - self.ratio, &blend)
    }
}
