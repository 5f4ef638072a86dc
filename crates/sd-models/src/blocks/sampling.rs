//! diffusers' `Downsample2D` and `Upsample2D`.

use candle_core::Tensor;
use hiper_kernels::{Conv2d, Padding, Tape, Value, upsample_nearest2d, upsample_nearest2d_on};

use super::conv2d;
use crate::{Result, Weights};

/// A convolution of stride 2.
pub(crate) struct Downsample2D(Conv2d);

impl Downsample2D {
    /// `padding`: 1 all around in the UNet, right and below in the VAE.
    pub(crate) fn load(weights: &Weights, channels: usize, padding: Padding) -> Result<Self> {
        Ok(Self(conv2d(&weights.pp("conv"), channels, channels, 2, padding)?))
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.0.forward(x)?)
    }

    pub(crate) fn on(&self, tape: &mut Tape, x: &Value) -> Result<Value> {
        Ok(self.0.on(tape, x)?)
    }
}

/// Nearest-neighbour enlargement, then a convolution.
pub(crate) struct Upsample2D(Conv2d);

impl Upsample2D {
    pub(crate) fn load(weights: &Weights, channels: usize) -> Result<Self> {
        Ok(Self(conv2d(&weights.pp("conv"), channels, channels, 1, Padding::same(1))?))
    }

    /// Enlarges to `height × width`, usually twice the size of `x`.
    pub(crate) fn forward(&self, x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        Ok(self.0.forward(&upsample_nearest2d(x, height, width)?)?)
    }

    /// The same on a tape.
    pub(crate) fn on(&self, tape: &mut Tape, x: &Value, height: usize, width: usize) -> Result<Value> {
        let enlarged = upsample_nearest2d_on(tape, x, height, width)?;
        Ok(self.0.on(tape, &enlarged)?)
    }
}
