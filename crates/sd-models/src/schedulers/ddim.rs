//! `DDIMScheduler` with η = 0 (arXiv 2010.02502, equation 12).

use candle_core::Tensor;

use super::{Noise, PredictionType, Scheduler, SchedulerConfig, TimestepSpacing, combine};
use crate::Result;

pub(super) struct Ddim {
    timesteps: Vec<f64>,
    /// ᾱ at each step, and after it.
    alphas: Vec<[f64; 2]>,
    prediction_type: PredictionType,
    clip: Option<f64>,
}

impl Ddim {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Result<Self> {
        let alphas_cumprod = config.alphas_cumprod();
        let timesteps: Vec<f64> =
            config.timesteps(TimestepSpacing::Leading, n).into_iter().map(f64::round_ties_even).collect();
        let last = if config.set_alpha_to_one.unwrap_or(true) { 1.0 } else { alphas_cumprod[0] };
        let ratio = config.num_train_timesteps / n;
        let alphas = timesteps.iter().map(|&t| {
            let t = t as usize;
            let previous = t.checked_sub(ratio).map_or(last, |p| alphas_cumprod[p]);
            [f64::from(alphas_cumprod[t]), f64::from(previous)]
        });
        Ok(Self {
            alphas: alphas.collect(),
            timesteps,
            prediction_type: config.prediction_type,
            clip: config.clip_sample.unwrap_or(true).then_some(config.clip_sample_range),
        })
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
        let (pred_original_sample, pred_epsilon) =
            predictions(self.prediction_type, alpha, sample, model_output)?;
        let x0 = clipped(pred_original_sample, self.clip)?;
        combine(alpha_prev.sqrt(), &x0, (1.0 - alpha_prev).sqrt(), &pred_epsilon)
    }
}

/// The picture and the noise that a prediction at ᾱ implies.
pub(super) fn predictions(
    kind: PredictionType,
    alpha: f64,
    sample: &Tensor,
    model_output: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (signal, noise) = (alpha.sqrt(), (1.0 - alpha).sqrt());
    Ok(match kind {
        PredictionType::Epsilon => {
            (combine(1.0 / signal, sample, -noise / signal, model_output)?, model_output.clone())
        }
        PredictionType::VPrediction => {
            (combine(signal, sample, -noise, model_output)?, combine(signal, model_output, noise, sample)?)
        }
    })
}

pub(super) fn clipped(pred_original_sample: Tensor, range: Option<f64>) -> Result<Tensor> {
    Ok(match range {
        Some(range) => pred_original_sample.clamp(-range, range)?,
        None => pred_original_sample,
    })
}
