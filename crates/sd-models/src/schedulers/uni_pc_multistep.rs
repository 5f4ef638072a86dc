//! `UniPCMultistepScheduler` (arXiv 2302.04867): predictor UniP and corrector UniC of order up to 2, data prediction,
//! `B(h) = e^h − 1` ("bh2") or `B(h) = h` ("bh1").

use candle_core::Tensor;

use super::dpm_solver_multistep::predict_x0;
use super::sigmas::{alpha_sigma_lambda, multistep};
use super::{Noise, PredictionType, Scheduler, SchedulerConfig, combine};
use crate::Result;

pub(super) struct UniPc {
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
    prediction_type: PredictionType,
    solver_order: usize,
    lower_order_final: bool,
    bh1: bool,
    /// Predicted pictures of the steps before, newest last, at most two.
    outputs: Vec<Tensor>,
    last_sample: Option<Tensor>,
    last_order: usize,
}

impl UniPc {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Self {
        let (timesteps, sigmas) = multistep(config, n);
        Self {
            timesteps,
            sigmas,
            prediction_type: config.prediction_type,
            solver_order: config.solver_order,
            lower_order_final: config.lower_order_final.unwrap_or(true),
            bh1: config.solver_type.as_deref() == Some("bh1"),
            outputs: Vec::new(),
            last_sample: None,
            last_order: 1,
        }
    }

    fn interval(&self, from: usize) -> Interval {
        let (alpha_t, sigma_t, lambda_t) = alpha_sigma_lambda(self.sigmas[from + 1]);
        let (_, sigma_s, lambda_s) = alpha_sigma_lambda(self.sigmas[from]);
        let h = lambda_t - lambda_s;
        let before = from.checked_sub(1).map(|before| alpha_sigma_lambda(self.sigmas[before]).2);
        let b_h = if self.bh1 { -h } else { (-h).exp_m1() };
        Interval {
            h,
            alpha_t,
            ratio: sigma_t / sigma_s,
            b_h,
            r: before.map_or(1.0, |before| (before - lambda_s) / h),
        }
    }

    /// UniC: `sample` was predicted from `last_sample`; now that `x0` is known at its end, that step is taken again.
    fn correct(&self, i: usize, x0: &Tensor, last_sample: &Tensor) -> Result<Tensor> {
        let step = self.interval(i - 1);
        let m0 = &self.outputs[self.outputs.len() - 1];
        let base = combine(step.ratio, last_sample, -step.alpha_t * step.phi_1(), m0)?;
        let newest = (x0 - m0)?;
        if self.last_order < 2 {
            return combine(1.0, &base, -step.alpha_t * step.b_h * 0.5, &newest);
        }
        // Two equations for two weights: ρ₀ + ρ₁ = b₁ and r ρ₀ + ρ₁ = b₂.
        let hh = -step.h;
        let phi_2 = step.phi_1() / hh - 1.0;
        let (b1, b2) = (phi_2 / step.b_h, (phi_2 / hh - 0.5) * 2.0 / step.b_h);
        let rho_0 = (b1 - b2) / (1.0 - step.r);
        let older = ((&self.outputs[self.outputs.len() - 2] - m0)? / step.r)?;
        let slope = combine(rho_0, &older, b1 - rho_0, &newest)?;
        combine(1.0, &base, -step.alpha_t * step.b_h, &slope)
    }

    /// UniP.
    fn predict(&self, i: usize, sample: &Tensor, order: usize) -> Result<Tensor> {
        let step = self.interval(i);
        let m0 = &self.outputs[self.outputs.len() - 1];
        let base = combine(step.ratio, sample, -step.alpha_t * step.phi_1(), m0)?;
        if order < 2 {
            return Ok(base);
        }
        let slope = ((&self.outputs[self.outputs.len() - 2] - m0)? / step.r)?;
        combine(1.0, &base, -step.alpha_t * step.b_h * 0.5, &slope)
    }
}

/// One step from σ_s to σ_t in λ = −ln σ.
struct Interval {
    h: f64,
    alpha_t: f64,
    /// σ_t/σ_s of the variance-preserving process.
    ratio: f64,
    b_h: f64,
    /// The step before, relative to this one; negative.
    r: f64,
}

impl Interval {
    fn phi_1(&self) -> f64 {
        (-self.h).exp_m1()
    }
}

impl Scheduler for UniPc {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        i: usize,
        sample: &Tensor,
        _noise: &mut Noise<'_>,
    ) -> Result<Tensor> {
        let x0 = predict_x0(self.prediction_type, self.sigmas[i], sample, model_output)?;
        let sample = match &self.last_sample {
            Some(last_sample) => self.correct(i, &x0, last_sample)?,
            None => sample.clone(),
        };
        if self.outputs.len() == 2 {
            self.outputs.remove(0);
        }
        self.outputs.push(x0);
        let left = self.timesteps.len() - i;
        let order = if self.lower_order_final { self.solver_order.min(left) } else { self.solver_order };
        self.last_order = order.min(i + 1);
        let moved = self.predict(i, &sample, self.last_order)?;
        self.last_sample = Some(sample);
        Ok(moved)
    }
}
