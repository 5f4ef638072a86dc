//! The forward process: how noise is mixed into latents, and what the network should answer.

use candle_core::Tensor;

use crate::Result;

/// What the network was trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise ε.
    Epsilon,
    /// `v = √ᾱ ε − √(1 − ᾱ) x₀` (Salimans & Ho, arXiv 2202.00512).
    VPrediction,
}

/// ᾱ of every training timestep, and what the network predicts.
#[derive(Debug, Clone)]
pub struct NoiseSchedule {
    /// ᾱ, descending; its length is the number of training timesteps.
    pub alphas_cumprod: Vec<f32>,
    /// What the network predicts.
    pub prediction_type: PredictionType,
}

impl NoiseSchedule {
    /// β straight in √β from `beta_start` to `beta_end`: Stable Diffusion's schedule.
    pub fn scaled_linear(
        beta_start: f64,
        beta_end: f64,
        num_train_timesteps: usize,
        prediction_type: PredictionType,
    ) -> Self {
        let (start, end) = (beta_start.sqrt(), beta_end.sqrt());
        let last = num_train_timesteps.max(2) - 1;
        let mut product = 1f64;
        let alphas_cumprod = (0..num_train_timesteps).map(|i| {
            let root = start + (end - start) * i as f64 / last as f64;
            product *= 1.0 - root * root;
            product as f32
        });
        Self { alphas_cumprod: alphas_cumprod.collect(), prediction_type }
    }

    /// Number of training timesteps.
    pub fn num_train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// `x_t = √ᾱ x₀ + √(1 − ᾱ) ε` (Ho et al., arXiv 2006.11239, equation 4).
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timestep: usize) -> Result<Tensor> {
        let (signal, sigma) = self.coefficients(timestep);
        Ok(((latents * signal)? + (noise * sigma)?)?)
    }

    /// What the network should answer: ε, or v.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn target(&self, latents: &Tensor, noise: &Tensor, timestep: usize) -> Result<Tensor> {
        let (signal, sigma) = self.coefficients(timestep);
        match self.prediction_type {
            PredictionType::Epsilon => Ok(noise.clone()),
            PredictionType::VPrediction => Ok(((noise * signal)? - (latents * sigma)?)?),
        }
    }

    fn coefficients(&self, timestep: usize) -> (f64, f64) {
        let alpha = self.alphas_cumprod[timestep.min(self.alphas_cumprod.len() - 1)];
        (f64::from(alpha.sqrt()), f64::from((1.0 - alpha).sqrt()))
    }
}
