//! The forward process: how noise is mixed into latents, and what the network should answer.

use candle_core::Tensor;

use crate::{Error, Result};

/// What the network was trained to predict; the names are diffusers' `prediction_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise ε.
    Epsilon,
    /// `v = √ᾱ ε − √(1 − ᾱ) x₀` (Salimans & Ho, arXiv 2202.00512).
    VPrediction,
}

/// ᾱ of every training timestep, and what the network predicts.
///
/// ```
/// use hiper_core::{NoiseSchedule, PredictionType};
///
/// let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1000, PredictionType::Epsilon); // Stable Diffusion 1.x
/// assert_eq!(schedule.num_train_timesteps(), 1000);
/// assert!((schedule.alphas_cumprod[999] - 0.0047).abs() < 1e-4); // almost pure noise
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    /// ᾱ, descending from almost 1; its length is the number of training timesteps.
    pub alphas_cumprod: Vec<f32>,
    /// What the network predicts.
    pub prediction_type: PredictionType,
}

impl NoiseSchedule {
    /// β linear in √β from `beta_start` to `beta_end`: Stable Diffusion's schedule.
    ///
    /// # Source
    /// diffusers' `DDPMScheduler(beta_schedule="scaled_linear")`; the values are equal bit for bit.
    pub fn scaled_linear(
        beta_start: f64,
        beta_end: f64,
        num_train_timesteps: usize,
        prediction_type: PredictionType,
    ) -> Self {
        let roots = linspace(beta_start.sqrt(), beta_end.sqrt(), num_train_timesteps);
        Self { alphas_cumprod: alphas_cumprod(roots.map(|root| root * root)), prediction_type }
    }

    /// β linear from `beta_start` to `beta_end` (Ho et al., arXiv 2006.11239).
    ///
    /// # Source
    /// diffusers' `DDPMScheduler(beta_schedule="linear")`; the values are equal bit for bit.
    pub fn linear(
        beta_start: f64,
        beta_end: f64,
        num_train_timesteps: usize,
        prediction_type: PredictionType,
    ) -> Self {
        Self {
            alphas_cumprod: alphas_cumprod(linspace(beta_start, beta_end, num_train_timesteps)),
            prediction_type,
        }
    }

    /// Number of training timesteps.
    pub fn num_train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// `x_t = √ᾱ x₀ + √(1 − ᾱ) ε` (Ho et al., arXiv 2006.11239, equation 4).
    ///
    /// # Shapes
    /// `latents` and `noise` alike, usually `[1, 4, h, w]`; so is the result.
    ///
    /// # Errors
    /// When the shapes differ or there is no such timestep.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timestep: usize) -> Result<Tensor> {
        let (signal, sigma) = self.coefficients(timestep).map(|(a, b)| (f64::from(a), f64::from(b)))?;
        Ok(((latents * signal)? + (noise * sigma)?)?)
    }

    /// What the network should answer: ε, or v.
    ///
    /// # Shapes
    /// As [`add_noise`](Self::add_noise).
    ///
    /// # Errors
    /// When the shapes differ or there is no such timestep.
    pub fn target(&self, latents: &Tensor, noise: &Tensor, timestep: usize) -> Result<Tensor> {
        let (signal, sigma) = self.coefficients(timestep).map(|(a, b)| (f64::from(a), f64::from(b)))?;
        match self.prediction_type {
            PredictionType::Epsilon => Ok(noise.clone()),
            PredictionType::VPrediction => Ok(((noise * signal)? - (latents * sigma)?)?),
        }
    }

    /// `(√ᾱ, √(1 − ᾱ))`: how much of the latents and of the noise is in `x_t`. Rounded to `f32` as diffusers rounds them.
    ///
    /// # Errors
    /// When there is no such timestep.
    pub fn coefficients(&self, timestep: usize) -> Result<(f32, f32)> {
        let Some(&alpha) = self.alphas_cumprod.get(timestep) else {
            let expected = format!("below {}, the number of training timesteps", self.num_train_timesteps());
            return Err(Error::argument("timestep", expected, timestep));
        };
        Ok((alpha.sqrt(), (1.0 - alpha).sqrt()))
    }

    /// Refuses a schedule that no training can have used.
    pub(crate) fn check(&self) -> Result<()> {
        let expected = "numbers above 0 and at most 1, one for each training timestep";
        if self.alphas_cumprod.is_empty() || u32::try_from(self.num_train_timesteps()).is_err() {
            return Err(Error::argument(
                "alphas_cumprod",
                expected,
                format!("{} numbers", self.num_train_timesteps()),
            ));
        }
        match self.alphas_cumprod.iter().find(|&&alpha| !(0.0..=1.0).contains(&alpha)) {
            Some(alpha) => Err(Error::argument("alphas_cumprod", expected, alpha)),
            None => Ok(()),
        }
    }
}

/// `torch.linspace(start, end, n, dtype=float32)`: counted from both ends, each value one fused multiply-add.
fn linspace(start: f64, end: f64, n: usize) -> impl Iterator<Item = f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / n.saturating_sub(1).max(1) as f32;
    (0..n).map(move |i| {
        if i < n / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((n - 1 - i) as f32, end) }
    })
}

/// `torch.cumprod(1 − β)` of `f32`, which accumulates in `f64`.
fn alphas_cumprod(betas: impl Iterator<Item = f32>) -> Vec<f32> {
    let mut product = 1f64;
    betas
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_timestep_beyond_the_schedule_is_refused() {
        let schedule = NoiseSchedule::linear(1e-4, 0.02, 10, PredictionType::Epsilon);
        let x = Tensor::ones((1, 4, 2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(schedule.add_noise(&x, &x, 9).is_ok());
        let error = schedule.add_noise(&x, &x, 10).unwrap_err().to_string();
        assert_eq!(error, "timestep: expected below 10, the number of training timesteps, got 10");
    }

    #[test]
    fn schedules_of_one_and_no_timestep() {
        let schedule = |n| NoiseSchedule::linear(0.5, 0.5, n, PredictionType::Epsilon);
        assert_eq!(schedule(1).alphas_cumprod, [0.5]);
        assert!(schedule(1).check().is_ok());
        assert!(schedule(0).check().is_err());
        let broken = NoiseSchedule { alphas_cumprod: vec![0.9, f32::NAN], ..schedule(2) };
        assert!(broken.check().is_err());
    }
}
