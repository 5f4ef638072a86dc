//! A frozen two-dimensional convolution, channels last.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
pub(crate) mod reference;
mod winograd;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::cpu::matrix::Matrix;
use crate::error::{Error, check_shape, wrong_shape};
use crate::frozen::{self, FrozenFunction};
use crate::gpu::product::Added;
use crate::gpu::{Array, Gpu, Kept, View};
use crate::linear::to_vec;
use crate::tape::{Tape, Value};
use crate::weight::Weight;

/// Rows and columns of zeros around a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Padding {
    /// Rows above.
    pub top: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the left.
    pub left: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Padding {
    /// The same on every side.
    pub fn same(n: usize) -> Self {
        Self { top: n, bottom: n, left: n, right: n }
    }
}

/// Stride and padding of a [`Conv2d`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dConfig {
    /// Step between output pixels, ≥ 1, the same in both directions.
    pub stride: usize,
    /// Zeros around the input; the VAE's downsampling pads only right and below.
    pub padding: Padding,
}

/// A frozen convolution (cross-correlation, as in every deep-learning library).
///
/// # Shapes
/// `x [B, H, W, I]`, weight `[O, I, KH, KW]` (the checkpoint's order), bias `[O]`, `y [B, H', W', O]` with
/// `H' = (H + top + bottom − KH) / stride + 1`, `W'` likewise.
///
/// # Gradient
/// To `x` alone.
#[derive(Clone)]
pub struct Conv2d(pub(crate) Arc<ConvFunction>);

pub(crate) struct ConvFunction {
    /// `[O, I·KH·KW]`, if it is on the CPU.
    weight: Matrix,
    pub(crate) bias: Option<Vec<f32>>,
    kernel: [usize; 2],
    channels_in: usize,
    pub(crate) channels_out: usize,
    config: Conv2dConfig,
    /// `weight` and `bias`, if they are on a card.
    card: Option<Kept>,
}

impl Conv2d {
    /// Takes the layer's weights, `[O, I, KH, KW]` and `[O]`; a tensor, or a [`Weight`] of a file.
    ///
    /// # Errors
    /// When a shape disagrees, the stride is 0, or the padding is not smaller than the kernel.
    pub fn new(weight: impl Into<Weight>, bias: Option<&Tensor>, config: Conv2dConfig) -> Result<Self> {
        const NAME: &str = ConvFunction::NAME;
        let weight = weight.into();
        let &[channels_out, channels_in, kernel_h, kernel_w] = weight.dims() else {
            return Err(wrong_shape(NAME, "weight", "[O, I, KH, KW]".into(), weight.dims()));
        };
        if let Some(bias) = bias {
            check_shape(
                bias.dims() == [channels_out],
                NAME,
                "bias",
                || format!("[{channels_out}]"),
                bias.dims(),
            )?;
        }
        let Padding { top, bottom, left, right } = config.padding;
        if config.stride == 0 {
            return Err(Error::Setting {
                op: NAME,
                field: "stride",
                expected: "at least 1".into(),
                got: "0".into(),
            }
            .into());
        }
        if top.max(bottom) >= kernel_h || left.max(right) >= kernel_w {
            let (expected, got) = ("smaller than the kernel".into(), format!("{:?}", config.padding));
            return Err(Error::Setting { op: NAME, field: "padding", expected, got }.into());
        }
        let card = Kept::layer(&weight, bias)?;
        Ok(Self(Arc::new(ConvFunction {
            weight: if card.is_some() { Matrix::elsewhere() } else { Matrix::new(weight)? },
            bias: bias.map(to_vec).transpose()?,
            kernel: [kernel_h, kernel_w],
            channels_in,
            channels_out,
            config,
            card,
        })))
    }

    /// Applies the layer.
    ///
    /// # Errors
    /// When `x` is not `[B, H, W, I]`, smaller than the kernel after padding, or not `f32`.
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

impl ConvFunction {
    fn output_size(&self, height: usize, width: usize) -> [usize; 2] {
        let Padding { top, bottom, left, right } = self.config.padding;
        [
            (height + top + bottom - self.kernel[0]) / self.config.stride + 1,
            (width + left + right - self.kernel[1]) / self.config.stride + 1,
        ]
    }
}

impl FrozenFunction for ConvFunction {
    const NAME: &'static str = "conv2d";

    fn output_shape(&self, input: &[usize]) -> Result<Vec<usize>> {
        let Padding { top, bottom, left, right } = self.config.padding;
        let expected =
            || format!("[B, H, W, {}] with H, W not below the kernel {:?}", self.channels_in, self.kernel);
        let fits = |&[_, h, w, c]: &[usize; 4]| {
            c == self.channels_in
                && h + top + bottom >= self.kernel[0]
                && w + left + right >= self.kernel[1]
                && h * w > 0
        };
        let shape: Option<[usize; 4]> = input.try_into().ok().filter(|s| fits(s));
        check_shape(shape.is_some(), Self::NAME, "x", expected, input)?;
        let [h, w] = self.output_size(input[1], input[2]);
        Ok(vec![input[0], h, w, self.channels_out])
    }

    fn forward(&self, x: &[f32], shape: &[usize]) -> Vec<f32> {
        cpu::forward(self, x, shape, self.bias.as_deref(), None)
    }

    fn input_gradient(&self, _x: &[f32], shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
        cpu::input_gradient(self, shape, grad_output)
    }

    fn weights_on_card(&self) -> Option<bool> {
        Some(self.card.is_some())
    }

    fn forward_on<G: Gpu>(&self, gpu: &G, x: View<'_, G>, shape: &[usize]) -> Result<Array<G>> {
        cuda::forward(gpu, self, x, shape, &Added::NOTHING)
    }

    fn input_gradient_on<G: Gpu>(
        &self,
        gpu: &G,
        _x: View<'_, G>,
        shape: &[usize],
        grad_output: View<'_, G>,
    ) -> Result<Array<G>> {
        cuda::input_gradient(gpu, self, shape, grad_output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::host::on_host;
    use crate::testing::{CARD_DTYPES, check, check_on_card, normals, rounded};
    use candle_core::Device;

    #[test]
    fn matches_the_definition() {
        let same = Conv2dConfig { stride: 1, padding: Padding::same(1) };
        let down = Conv2dConfig { stride: 2, padding: Padding::same(1) };
        let vae_down =
            Conv2dConfig { stride: 2, padding: Padding { bottom: 1, right: 1, ..Padding::default() } };
        let point = Conv2dConfig { stride: 1, padding: Padding::default() };
        let lopsided = Conv2dConfig { stride: 1, padding: Padding { top: 2, left: 1, ..Padding::default() } };
        for (config, kernel) in
            [(same, 3), (down, 3), (vae_down, 3), (point, 1), (point, 3), (lopsided, 3), (down, 4)]
        {
            // Patches, F(2×2) where the stride is 1 and the kernel 3 × 3, patches; more channels than a panel of 32 has columns.
            for (b, h, w, i, o) in [(1, 4, 4, 1, 1), (2, 5, 7, 3, 5), (1, 3, 3, 17, 2), (1, 3, 7, 33, 35)] {
                let weights = normals(o * i * kernel * kernel, 8);
                let bias = normals(o, 9);
                let conv = Conv2d::new(
                    Tensor::from_slice(&weights, (o, i, kernel, kernel), &Device::Cpu).unwrap(),
                    Some(&Tensor::from_slice(&bias, o, &Device::Cpu).unwrap()),
                    config,
                )
                .unwrap();
                let reference = reference::Conv { weights: &weights, bias: &bias, kernel, config };
                check(&[&[b, h, w, i]], |x| conv.forward(&x[0]), |x| reference.forward(&x[0], [b, h, w, i]));
            }
        }
    }

    #[test]
    fn large_pictures_match_the_definition() {
        // F(4×4), whose tiles the picture's size is no multiple of.
        let config = Conv2dConfig { stride: 1, padding: Padding::same(1) };
        let (b, h, w, i, o) = (1, 25, 26, 2, 3);
        let (weights, bias) = (normals(o * i * 9, 8), normals(o, 9));
        let conv = Conv2d::new(
            Tensor::from_slice(&weights, (o, i, 3, 3), &Device::Cpu).unwrap(),
            Some(&Tensor::from_slice(&bias, o, &Device::Cpu).unwrap()),
            config,
        )
        .unwrap();
        let reference = reference::Conv { weights: &weights, bias: &bias, kernel: 3, config };
        check(&[&[b, h, w, i]], |x| conv.forward(&x[0]), |x| reference.forward(&x[0], [b, h, w, i]));
    }

    #[test]
    fn matches_the_definition_on_a_card() {
        let same = Conv2dConfig { stride: 1, padding: Padding::same(1) };
        let down = Conv2dConfig { stride: 2, padding: Padding::same(1) };
        let vae_down =
            Conv2dConfig { stride: 2, padding: Padding { bottom: 1, right: 1, ..Padding::default() } };
        for config in [same, down, vae_down] {
            for (b, h, w, i, o) in [(2, 5, 7, 4, 8), (1, 8, 6, 16, 4), (1, 12, 9, 24, 72), (1, 4, 4, 320, 16)]
            {
                for dtype in CARD_DTYPES {
                    let (w9, bias) = (rounded(dtype, &normals(o * i * 9, 8)), rounded(dtype, &normals(o, 9)));
                    let conv = on_host(|| {
                        let weight = Tensor::from_slice(&w9, (o, i, 3, 3), &Device::Cpu).unwrap();
                        let bias = Tensor::from_slice(&bias, o, &Device::Cpu).unwrap();
                        Conv2d::new(weight.to_dtype(dtype).unwrap(), Some(&bias), config).unwrap()
                    });
                    let reference = reference::Conv { weights: &w9, bias: &bias, kernel: 3, config };
                    let definition = |x: &[Vec<f64>]| reference.forward(&x[0], [b, h, w, i]);
                    check_on_card(dtype, &[&[b, h, w, i]], |x| conv.forward(&x[0]), definition);
                }
            }
        }
    }

    #[test]
    fn bad_arguments_are_errors() {
        let weight = Tensor::zeros((1, 2, 3, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let config = |stride, padding| Conv2dConfig { stride, padding: Padding::same(padding) };
        assert!(Conv2d::new(&weight, None, config(0, 1)).is_err());
        assert!(Conv2d::new(&weight, None, config(1, 3)).is_err());
        let conv = Conv2d::new(&weight, None, config(1, 0)).unwrap();
        for shape in [vec![1, 2, 2, 2], vec![1, 4, 4, 3], vec![4, 4, 2]] {
            assert!(
                conv.forward(&Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap()).is_err()
            );
        }
    }
}
