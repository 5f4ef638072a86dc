//! The gated GELU of a transformer's feed-forward layer.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod reference;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::error::check_shape;
use crate::frozen::{self, FrozenFunction};
use crate::gpu::{Array, Gpu, View};

/// GEGLU (Shazeer, arXiv 2002.05202): `y = a · gelu(b)` where `x = [a, b]` along the last dimension, with the exact
/// GELU, as diffusers' `GEGLU`.
///
/// # Shapes
/// `x [.., 2C]`, `y [.., C]`.
///
/// # Errors
/// When the last dimension is odd or `x` is not `f32`.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    frozen::apply(&Arc::new(Geglu), x)
}

struct Geglu;

impl FrozenFunction for Geglu {
    const NAME: &'static str = "geglu";

    fn output_shape(&self, input: &[usize]) -> Result<Vec<usize>> {
        let last = input.last().copied().unwrap_or(1);
        check_shape(last % 2 == 0 && last > 0, Self::NAME, "x", || "[.., 2C]".into(), input)?;
        let mut shape = input.to_vec();
        shape[input.len() - 1] = last / 2;
        Ok(shape)
    }

    fn forward(&self, x: &[f32], shape: &[usize]) -> Vec<f32> {
        cpu::forward(x, shape[shape.len() - 1] / 2)
    }

    fn input_gradient(&self, x: &[f32], shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
        cpu::input_gradient(x, shape[shape.len() - 1] / 2, grad_output)
    }

    fn forward_on<G: Gpu>(&self, gpu: &G, x: View<'_, G>, shape: &[usize]) -> Result<Array<G>> {
        cuda::forward(gpu, x, shape[shape.len() - 1] / 2)
    }

    fn input_gradient_on<G: Gpu>(
        &self,
        gpu: &G,
        x: View<'_, G>,
        shape: &[usize],
        grad_output: View<'_, G>,
    ) -> Result<Array<G>> {
        cuda::input_gradient(gpu, x, shape[shape.len() - 1] / 2, grad_output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CARD_DTYPES, check, check_on_card};

    #[test]
    fn matches_the_definition() {
        for (rows, c) in [(1, 1), (3, 31), (2, 32), (5, 33)] {
            check(&[&[rows, 2 * c]], |x| geglu(&x[0]), |x| reference::geglu(&x[0], c));
        }
    }

    #[test]
    fn matches_the_definition_on_a_card() {
        for (rows, c) in [(1, 1), (3, 31), (5, 8), (300, 16)] {
            for dtype in CARD_DTYPES {
                check_on_card(dtype, &[&[rows, 2 * c]], |x| geglu(&x[0]), |x| reference::geglu(&x[0], c));
            }
        }
    }

    #[test]
    fn an_odd_width_is_an_error() {
        let x = Tensor::zeros((2, 3), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        assert!(geglu(&x).is_err());
    }
}
