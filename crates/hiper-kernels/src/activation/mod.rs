//! Pointwise activations.

pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod reference;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::frozen::{self, FrozenFunction};

/// The pointwise activations that Stable Diffusion's networks use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · σ(x)`, also called swish.
    Silu,
    /// `x · Φ(x)` with the exact normal distribution function (not the tanh approximation).
    Gelu,
    /// `x · σ(1.702 x)`, OpenAI CLIP's approximation of GELU.
    QuickGelu,
}

/// Applies `activation` to every element of `x` (any shape, `f32`). Differentiable.
///
/// # Errors
/// When `x` is not `f32`.
pub fn activation(x: &Tensor, activation: Activation) -> Result<Tensor> {
    frozen::apply(&Arc::new(activation), x)
}

impl FrozenFunction for Activation {
    const NAME: &'static str = "activation";

    fn output_shape(&self, input: &[usize]) -> Result<Vec<usize>> {
        Ok(input.to_vec())
    }

    fn forward(&self, x: &[f32], _shape: &[usize]) -> Vec<f32> {
        cpu::forward(*self, x)
    }

    fn input_gradient(&self, x: &[f32], _shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
        cpu::input_gradient(*self, x, grad_output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::check;

    #[test]
    fn matches_the_definition() {
        for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            for n in [1, 31, 32, 33, 1009] {
                check(&[&[n]], |x| activation(&x[0], kind), |x| reference::activation(&x[0], kind));
            }
        }
    }
}
