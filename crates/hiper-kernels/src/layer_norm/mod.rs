//! Frozen layer normalisation.

pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod reference;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::error::check_shape;
use crate::frozen::{self, FrozenFunction};
use crate::linear::to_vec;

/// Frozen layer normalisation (Ba et al., arXiv 1607.06450) over the last dimension:
/// `y = (x − μ) / √(σ² + ε) · w + b`.
///
/// # Shapes
/// `x [.., C]`, weight and bias `[C]`, `y` as `x`.
///
/// # Gradient
/// To `x` alone, through the statistics.
#[derive(Clone)]
pub struct LayerNorm(pub(crate) Arc<LayerNormFunction>);

pub(crate) struct LayerNormFunction {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl LayerNorm {
    /// Takes the layer's weights, `[C]` each; `eps > 0` is added to the variance.
    ///
    /// # Errors
    /// When the shapes disagree.
    pub fn new(weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Self> {
        const NAME: &str = LayerNormFunction::NAME;
        check_shape(weight.rank() == 1, NAME, "weight", || "[C]".into(), weight.dims())?;
        check_shape(
            bias.dims() == weight.dims(),
            NAME,
            "bias",
            || format!("{:?}", weight.dims()),
            bias.dims(),
        )?;
        Ok(Self(Arc::new(LayerNormFunction {
            weight: to_vec(weight)?,
            bias: to_vec(bias)?,
            eps: eps as f32,
        })))
    }

    /// Applies the layer.
    ///
    /// # Errors
    /// When the last dimension of `x` is not `C`, or it is not `f32`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        frozen::apply(&self.0, x)
    }
}

impl FrozenFunction for LayerNormFunction {
    const NAME: &'static str = "layer_norm";

    fn output_shape(&self, input: &[usize]) -> Result<Vec<usize>> {
        let ok = input.last() == Some(&self.weight.len());
        check_shape(ok, Self::NAME, "x", || format!("[.., {}]", self.weight.len()), input)?;
        Ok(input.to_vec())
    }

    fn forward(&self, x: &[f32], _shape: &[usize]) -> Vec<f32> {
        cpu::forward(self, x)
    }

    fn input_gradient(&self, x: &[f32], _shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
        cpu::input_gradient(self, x, grad_output, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, normals};
    use candle_core::Device;

    #[test]
    fn matches_the_definition() {
        // With two channels x̂ is ±1 whatever x is, and the gradient all cancellation: begin at five.
        for (rows, c) in [(1, 5), (3, 31), (2, 32), (4, 33), (5, 127)] {
            let (weight, bias) = (normals(c, 8), normals(c, 9));
            let tensor = |v: &[f32]| Tensor::from_slice(v, c, &Device::Cpu).unwrap();
            let norm = LayerNorm::new(&tensor(&weight), &tensor(&bias), 1e-5).unwrap();
            check(
                &[&[1, rows, c]],
                |x| norm.forward(&x[0]),
                |x| reference::layer_norm(&x[0], &weight, &bias, 1e-5),
            );
        }
    }
}
