//! `DPMSolverMultistepScheduler`: DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2).

use candle_core::Tensor;

use super::sigmas::{alpha_sigma_lambda, multistep};
use super::{Noise, PredictionType, Scheduler, SchedulerConfig, combine};
use crate::Result;

pub(super) struct DpmSolver {
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
    prediction_type: PredictionType,
    order: usize,
    heun: bool,
    /// Whether the last step is of first order.
    first_order_final: bool,
    previous: Option<Tensor>,
}

impl DpmSolver {
    pub(super) fn new(config: &SchedulerConfig, n: usize) -> Self {
        let (timesteps, sigmas) = multistep(config, n);
        let lower_order_final = config.lower_order_final.unwrap_or(true) && timesteps.len() < 15;
        let ends_in_zero = config.final_sigmas_type.as_deref().unwrap_or("zero") == "zero";
        Self {
            timesteps,
            sigmas,
            prediction_type: config.prediction_type,
            order: config.solver_order,
            heun: config.solver_type.as_deref() == Some("heun"),
            first_order_final: config.euler_at_final || lower_order_final || ends_in_zero,
            previous: None,
        }
    }
}

/// The picture that a prediction implies.
pub(super) fn predict_x0(
    kind: PredictionType,
    sigma: f64,
    sample: &Tensor,
    model_output: &Tensor,
) -> Result<Tensor> {
    let (alpha, sigma, _) = alpha_sigma_lambda(sigma);
    match kind {
        PredictionType::Epsilon => combine(1.0 / alpha, sample, -sigma / alpha, model_output),
        PredictionType::VPrediction => combine(alpha, sample, -sigma, model_output),
    }
}

impl Scheduler for DpmSolver {
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
        let (alpha_t, sigma_t, lambda_t) = alpha_sigma_lambda(self.sigmas[i + 1]);
        let (_, sigma_s, lambda_s) = alpha_sigma_lambda(self.sigmas[i]);
        let h = lambda_t - lambda_s;
        let phi = alpha_t * (-h).exp_m1();
        let first_order = combine(sigma_t / sigma_s, sample, -phi, &x0)?;
        let last = i + 1 == self.timesteps.len();
        let previous = self.previous.replace(x0.clone());
        let Some(previous) = previous.filter(|_| self.order == 2 && !(last && self.first_order_final)) else {
            return Ok(first_order);
        };
        let (_, _, lambda_before) = alpha_sigma_lambda(self.sigmas[i - 1]);
        let r = (lambda_s - lambda_before) / h;
        let slope = ((x0 - previous)? / r)?;
        let weight = if self.heun { alpha_t * ((-h).exp_m1() / h + 1.0) } else { -0.5 * phi };
        combine(1.0, &first_order, weight, &slope)
    }
}
