//! diffusers' `Timesteps` and `TimestepEmbedding`.

use candle_core::{DType, Tensor};
use hiper_kernels::{Activation, Linear, activation, timestep_embedding};

use super::linear;
use crate::{Result, Weights};

/// Sinusoids of a timestep, then two fully connected layers.
pub(crate) struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    channels: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    device: candle_core::Device,
    dtype: DType,
}

impl TimestepEmbedding {
    /// `channels` sinusoids (the width of the UNet's first level) become four times as many features.
    pub(crate) fn load(
        weights: &Weights,
        channels: usize,
        flip_sin_to_cos: bool,
        freq_shift: f64,
    ) -> Result<Self> {
        Ok(Self {
            linear_1: linear(&weights.pp("linear_1"), channels, 4 * channels)?,
            linear_2: linear(&weights.pp("linear_2"), 4 * channels, 4 * channels)?,
            channels,
            flip_sin_to_cos,
            freq_shift,
            device: weights.device().clone(),
            dtype: weights.dtype(),
        })
    }

    /// A row for each timestep, `[B, C]` in `f32`.
    pub(crate) fn rows(&self, timesteps: &[f64]) -> Result<Tensor> {
        let sinusoids = timesteps.iter().flat_map(|&timestep| self.sinusoids(timestep as f32)).collect();
        Ok(Tensor::from_vec(sinusoids, (timesteps.len(), self.channels), &self.device)?)
    }

    /// The same of timesteps `[B]` that are on a card.
    pub(crate) fn rows_on_card(&self, timesteps: &Tensor) -> candle_core::Result<Tensor> {
        timestep_embedding(timesteps, self.channels, self.flip_sin_to_cos, self.freq_shift as f32)
    }

    /// Features of rows, `[B, 4C]`, with the activation that every residual block would apply to them.
    pub(crate) fn forward_activated(&self, x: &Tensor) -> Result<Tensor> {
        let x = activation(&self.linear_1.forward(&x.to_dtype(self.dtype)?)?, Activation::Silu)?;
        Ok(activation(&self.linear_2.forward(&x)?, Activation::Silu)?)
    }

    /// `[sin(t f), cos(t f)]`, or flipped, with `f_i = 10000^(−i / (C/2 − freq_shift))`; the frequencies and phases in
    /// `f32`, as diffusers computes them.
    fn sinusoids(&self, timestep: f32) -> Vec<f32> {
        let half = self.channels / 2;
        let phases: Vec<f64> = (0..half)
            .map(|i| {
                let exponent = -(10_000f32.ln()) * i as f32 / (half as f64 - self.freq_shift) as f32;
                f64::from(timestep * exponent.exp())
            })
            .collect();
        let sin = phases.iter().map(|p| p.sin() as f32);
        let cos = phases.iter().map(|p| p.cos() as f32);
        if self.flip_sin_to_cos { cos.chain(sin).collect() } else { sin.chain(cos).collect() }
    }
}
