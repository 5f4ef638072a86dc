//! Frozen layer normalisation.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod reference;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::error::check_shape;
use crate::frozen::{self, FrozenFunction};
use crate::gpu::{Array, Gpu, Kept, View};
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
    /// `weight` and `bias` there, if they are on a card.
    card: Option<Kept>,
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
            card: Kept::affine(weight, bias)?,
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

    fn weights_on_card(&self) -> Option<bool> {
        Some(self.card.is_some())
    }

    fn forward_on<G: Gpu>(&self, gpu: &G, x: View<'_, G>, _shape: &[usize]) -> Result<Array<G>> {
        cuda::forward(gpu, self, x)
    }

    fn input_gradient_on<G: Gpu>(
        &self,
        gpu: &G,
        x: View<'_, G>,
        _shape: &[usize],
        grad_output: View<'_, G>,
    ) -> Result<Array<G>> {
        cuda::input_gradient(gpu, self, x, grad_output, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::host::on_host;
    use crate::testing::{CARD_DTYPES, check, check_on_card, normals};
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

    #[test]
    fn matches_the_definition_on_a_card() {
        for (rows, c) in [(1, 8), (9, 33), (8, 320), (17, 40)] {
            let (weight, bias) = (normals(c, 8), normals(c, 9));
            let tensor = |v: &[f32]| Tensor::from_slice(v, c, &Device::Cpu).unwrap();
            let norm = on_host(|| LayerNorm::new(&tensor(&weight), &tensor(&bias), 1e-5).unwrap());
            for dtype in CARD_DTYPES {
                check_on_card(
                    dtype,
                    &[&[1, rows, c]],
                    |x| norm.forward(&x[0]),
                    |x| reference::layer_norm(&x[0], &weight, &bias, 1e-5),
                );
            }
        }
    }

    #[test]
    fn weights_on_another_device_are_an_error() {
        let ones = Tensor::ones(8, candle_core::DType::F32, &Device::Cpu).unwrap();
        let norm = on_host(|| LayerNorm::new(&ones, &ones, 1e-5).unwrap());
        let x = Tensor::zeros((1, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(norm.forward(&x).unwrap_err().to_string().contains("same device"));
        let norm = LayerNorm::new(&ones, &ones, 1e-5).unwrap();
        assert!(on_host(|| norm.forward(&x)).unwrap_err().to_string().contains("same device"));
    }
}
