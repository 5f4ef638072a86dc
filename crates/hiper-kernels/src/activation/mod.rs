//! Pointwise activations.

pub(crate) mod cpu;
mod cuda;
#[cfg(test)]
pub(crate) mod reference;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::frozen::{self, FrozenFunction};
use crate::gpu::{Array, Gpu, View};

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

    fn forward_on<G: Gpu>(&self, gpu: &G, x: View<'_, G>, _shape: &[usize]) -> Result<Array<G>> {
        cuda::forward(gpu, *self, x)
    }

    fn input_gradient_on<G: Gpu>(
        &self,
        gpu: &G,
        x: View<'_, G>,
        _shape: &[usize],
        grad_output: View<'_, G>,
    ) -> Result<Array<G>> {
        cuda::input_gradient(gpu, *self, x, grad_output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CARD_DTYPES, check, check_on_card};

    #[test]
    fn matches_the_definition() {
        for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            for n in [1, 31, 32, 33, 1009] {
                check(&[&[n]], |x| activation(&x[0], kind), |x| reference::activation(&x[0], kind));
            }
        }
    }

    #[test]
    fn matches_the_definition_on_a_card() {
        for kind in [Activation::Silu, Activation::Gelu, Activation::QuickGelu] {
            for (n, dtype) in [1, 2047, 2049].into_iter().flat_map(|n| CARD_DTYPES.map(|dtype| (n, dtype))) {
                let definition = |x: &[Vec<f64>]| reference::activation(&x[0], kind);
                check_on_card(dtype, &[&[n]], |x| activation(&x[0], kind), definition);
            }
        }
    }
}
