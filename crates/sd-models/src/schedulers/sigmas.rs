//! Schedules in terms of σ = √((1 − ᾱ) / ᾱ), which Euler, DPM-Solver++ and UniPC share.

use super::config::{SchedulerConfig, TimestepSpacing, trailing};

/// σ of every training timestep, ascending. With zero terminal SNR the last ᾱ is 2⁻²⁴ instead of 0.
pub(super) fn training_sigmas(config: &SchedulerConfig) -> Vec<f64> {
    let mut alphas_cumprod = config.alphas_cumprod();
    if let (true, Some(last)) = (config.rescale_betas_zero_snr, alphas_cumprod.last_mut()) {
        *last = 2f32.powi(-24);
    }
    alphas_cumprod.iter().map(|&a| f64::from(((1.0 - a) / a).sqrt())).collect()
}

/// `numpy.interp(t, 0.., values)`.
pub(super) fn interpolate(values: &[f64], t: f64) -> f64 {
    let last = values.len() - 1;
    let low = (t.max(0.0) as usize).min(last);
    let fraction = (t - low as f64).clamp(0.0, 1.0);
    values[low] + (values[(low + 1).min(last)] - values[low]) * fraction
}

/// Karras et al.'s schedule (arXiv 2206.00364, equation 5, ρ = 7), from `max` down to `min`.
pub(super) fn karras(min: f64, max: f64, n: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (low, high) = (min.powf(1.0 / RHO), max.powf(1.0 / RHO));
    (0..n).map(|i| (high + i as f64 / (n.max(2) - 1) as f64 * (low - high)).powf(RHO)).collect()
}

/// The fractional timestep of a σ: interpolation in log σ.
pub(super) fn sigma_to_timestep(training: &[f64], sigma: f64) -> f64 {
    let log = |s: f64| s.max(1e-10).ln();
    let target = log(sigma);
    let low = training.iter().rposition(|&s| log(s) <= target).unwrap_or(0).min(training.len() - 2);
    let (below, above) = (log(training[low]), log(training[low + 1]));
    low as f64 + ((below - target) / (below - above)).clamp(0.0, 1.0)
}

/// Timesteps and σ (one more) of the multistep solvers, which place `n` steps among `n + 1` points.
pub(super) fn multistep(config: &SchedulerConfig, n: usize) -> (Vec<f64>, Vec<f64>) {
    let train = config.num_train_timesteps;
    let training = training_sigmas(config);
    let mut timesteps: Vec<f64> = match config.timestep_spacing.unwrap_or(TimestepSpacing::Linspace) {
        TimestepSpacing::Linspace => {
            let step = (train - 1) as f64 / n as f64;
            (1..=n).rev().map(|i| (i as f64 * step).round_ties_even()).collect()
        }
        TimestepSpacing::Leading => {
            let ratio = train / (n + 1);
            (1..=n).rev().map(|i| (i * ratio + config.steps_offset) as f64).collect()
        }
        TimestepSpacing::Trailing => trailing(train, n),
    };
    let mut sigmas: Vec<f64> = if config.use_karras_sigmas {
        let sigmas = karras(training[0], training[training.len() - 1], n);
        timesteps = sigmas.iter().map(|&s| sigma_to_timestep(&training, s).round_ties_even()).collect();
        sigmas
    } else {
        timesteps.iter().map(|&t| interpolate(&training, t)).collect()
    };
    sigmas.push(final_sigma(config, training[0]));
    (timesteps, to_f32(sigmas))
}

/// What the last step goes to.
pub(super) fn final_sigma(config: &SchedulerConfig, smallest: f64) -> f64 {
    if config.final_sigmas_type.as_deref() == Some("sigma_min") { smallest } else { 0.0 }
}

/// diffusers keeps σ in `f32`.
pub(super) fn to_f32(sigmas: Vec<f64>) -> Vec<f64> {
    sigmas.into_iter().map(|s| f64::from(s as f32)).collect()
}

/// A σ as `(α, σ, λ)` of the variance-preserving process: α = 1/√(1 + σ²), σ' = σ α, λ = ln α − ln σ'.
pub(super) fn alpha_sigma_lambda(sigma: f64) -> (f64, f64, f64) {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    (alpha, sigma * alpha, -sigma.ln())
}
