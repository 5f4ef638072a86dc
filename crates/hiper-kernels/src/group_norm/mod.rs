//! Frozen group normalisation, optionally followed by an activation in the same pass.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod reference;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::Activation;
use crate::error::{Error, check_shape};
use crate::frozen::{self, FrozenFunction};
use crate::gpu::{Array, Gpu, Kept, View};
use crate::linear::to_vec;
use crate::tape::{Tape, Value};

/// Frozen group normalisation (Wu & He, arXiv 1803.08494), channels last, with an optional activation:
/// `y = act((x − μ_g) / √(σ²_g + ε) · w + b)`, μ and σ² over the pixels and channels of each group.
///
/// # Shapes
/// `x [B, H, W, C]` (or `[B, S, C]`), weight and bias `[C]`, `y` as `x`.
///
/// # Gradient
/// To `x` alone, through the statistics.
#[derive(Clone)]
pub struct GroupNorm(pub(crate) Arc<GroupNormFunction>);

pub(crate) struct GroupNormFunction {
    weight: Vec<f32>,
    bias: Vec<f32>,
    num_groups: usize,
    eps: f32,
    activation: Option<Activation>,
    /// `weight` and `bias` there, if they are on a card.
    card: Option<Kept>,
}

impl GroupNorm {
    /// Takes the layer's weights, `[C]` each; `eps > 0` is added to the variance.
    ///
    /// # Errors
    /// When the shapes disagree or `num_groups` does not divide `C`.
    pub fn new(
        weight: &Tensor,
        bias: &Tensor,
        num_groups: usize,
        eps: f64,
        activation: Option<Activation>,
    ) -> Result<Self> {
        const NAME: &str = GroupNormFunction::NAME;
        check_shape(weight.rank() == 1, NAME, "weight", || "[C]".into(), weight.dims())?;
        check_shape(
            bias.dims() == weight.dims(),
            NAME,
            "bias",
            || format!("{:?}", weight.dims()),
            bias.dims(),
        )?;
        let channels = weight.dims1()?;
        if num_groups == 0 || channels % num_groups != 0 {
            let (expected, got) = (format!("a divisor of {channels} channels"), num_groups.to_string());
            return Err(Error::Setting { op: NAME, field: "num_groups", expected, got }.into());
        }
        let card = Kept::affine(weight, bias)?;
        let (weight, bias) = (to_vec(weight)?, to_vec(bias)?);
        Ok(Self(Arc::new(GroupNormFunction { weight, bias, num_groups, eps: eps as f32, activation, card })))
    }

    /// Applies the layer.
    ///
    /// # Errors
    /// When the last dimension of `x` is not `C`, its rank is below 3, or it is not `f32`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        frozen::apply(&self.0, x)
    }

    /// The same on a tape.
    ///
    /// # Errors
    /// As above.
    pub fn on(&self, tape: &mut Tape, x: &Value) -> Result<Value> {
        frozen::apply_on(&self.0, tape, x)
    }
}

impl FrozenFunction for GroupNormFunction {
    const NAME: &'static str = "group_norm";

    fn output_shape(&self, input: &[usize]) -> Result<Vec<usize>> {
        let ok = input.len() >= 3 && input.last() == Some(&self.weight.len()) && !input.contains(&0);
        check_shape(ok, Self::NAME, "x", || format!("[B, .., {}]", self.weight.len()), input)?;
        Ok(input.to_vec())
    }

    fn forward(&self, x: &[f32], shape: &[usize]) -> Vec<f32> {
        cpu::forward(self, x, shape[0])
    }

    fn input_gradient(&self, x: &[f32], shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
        cpu::input_gradient(self, x, shape[0], grad_output, None)
    }

    fn weights_on_card(&self) -> Option<bool> {
        Some(self.card.is_some())
    }

    fn forward_on<G: Gpu>(&self, gpu: &G, x: View<'_, G>, shape: &[usize]) -> Result<Array<G>> {
        Ok(cuda::forward(gpu, self, x, shape[0])?.0)
    }

    fn input_gradient_on<G: Gpu>(
        &self,
        gpu: &G,
        x: View<'_, G>,
        shape: &[usize],
        grad_output: View<'_, G>,
    ) -> Result<Array<G>> {
        // A layer alone keeps nothing: the statistics are computed again. Blocks keep theirs.
        let (_, statistics) = cuda::forward(gpu, self, x, shape[0])?;
        cuda::input_gradient(gpu, self, [x, statistics.view()], shape[0], grad_output, [None; 2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Chip;
    use crate::gpu::host::on_host;
    use crate::testing::{CARD_DTYPES, check, check_on_chip, normals};
    use candle_core::Device;

    #[test]
    fn matches_the_definition() {
        for (b, h, w, c, groups) in [(1, 2, 2, 4, 2), (2, 5, 3, 6, 3), (1, 9, 8, 32, 32), (1, 3, 7, 35, 5)] {
            for activation in [None, Some(Activation::Silu)] {
                let (weight, bias) = (normals(c, 8), normals(c, 9));
                let tensor = |v: &[f32]| Tensor::from_slice(v, c, &Device::Cpu).unwrap();
                let norm =
                    GroupNorm::new(&tensor(&weight), &tensor(&bias), groups, 1e-5, activation).unwrap();
                let reference = reference::Norm {
                    weight: &weight,
                    bias: &bias,
                    groups,
                    eps: 1e-5,
                    silu: activation.is_some(),
                };
                check(&[&[b, h, w, c]], |x| norm.forward(&x[0]), |x| reference.forward(&x[0], b));
            }
        }
    }

    #[test]
    fn matches_the_definition_on_a_card() {
        // Groups that a block takes whole, and others: of ten channels, or of 20, 30 and 60, or of too many numbers. The last are so
        // wide that a block has to ask for shared memory, and then for more.
        for (b, h, w, c, groups) in [
            (1, 2, 3, 6, 3),
            (2, 9, 8, 64, 8),
            (1, 33, 40, 20, 2),
            (2, 5, 3, 320, 32),
            (1, 7, 5, 160, 8),
            (2, 3, 3, 270, 9),
            (1, 4, 5, 480, 8),
            (1, 52, 50, 16, 2),
            (1, 9, 3, 800, 1),
            (1, 5, 4, 1200, 1),
        ] {
            for activation in [None, Some(Activation::Silu)] {
                let (weight, bias) = (normals(c, 8), normals(c, 9));
                let tensor = |v: &[f32]| Tensor::from_slice(v, c, &Device::Cpu).unwrap();
                let norm = on_host(|| {
                    GroupNorm::new(&tensor(&weight), &tensor(&bias), groups, 1e-5, activation).unwrap()
                });
                let silu = activation.is_some();
                let reference = reference::Norm { weight: &weight, bias: &bias, groups, eps: 1e-5, silu };
                for (chip, dtype) in
                    Chip::SINGLE.into_iter().flat_map(|c| CARD_DTYPES.map(|dtype| (c, dtype)))
                {
                    check_on_chip(
                        chip,
                        dtype,
                        &[&[b, h, w, c]],
                        |x| norm.forward(&x[0]),
                        |x| reference.forward(&x[0], b),
                    );
                }
            }
        }
    }

    #[test]
    fn a_large_mean_does_not_cancel_the_variance() {
        let ones = Tensor::ones(4, candle_core::DType::F32, &Device::Cpu).unwrap();
        let norm = GroupNorm::new(&ones, &ones.zeros_like().unwrap(), 1, 1e-5, None).unwrap();
        let x: Vec<f32> = normals(4000, 3).iter().map(|v| v + 1000.0).collect();
        let exact: Vec<f64> = x.iter().map(|&v| v as f64).collect();
        let y = norm.forward(&Tensor::from_vec(x, (1, 1000, 4), &Device::Cpu).unwrap()).unwrap();
        let reference =
            reference::Norm { weight: &[1.0; 4], bias: &[0.0; 4], groups: 1, eps: 1e-5, silu: false };
        let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let error = crate::testing::relative_l2(&y, &reference.forward(&exact, 1));
        // The inputs carry 1000 · 2⁻²⁴ of rounding against a unit deviation; the operator may add as much again.
        assert!(error < 2.0 * 1000.0 * f32::EPSILON as f64, "{error:e}");
    }

    #[test]
    fn groups_must_divide_the_channels() {
        let ones = Tensor::ones(4, candle_core::DType::F32, &Device::Cpu).unwrap();
        let error = GroupNorm::new(&ones, &ones, 3, 1e-5, None).err().unwrap();
        assert!(error.to_string().contains("num_groups must be a divisor of 4 channels, got 3"), "{error}");
    }
}
