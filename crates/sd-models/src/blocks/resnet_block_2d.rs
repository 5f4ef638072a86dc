//! diffusers' `ResnetBlock2D`.

use candle_core::Tensor;
use hiper_kernels::{Activation, Memory, Padding, ResnetBlock, Tape, Value};

use super::{conv2d, group_norm, pointwise};
use crate::{Result, Weights};

/// The shape of a residual block.
#[derive(Clone, Copy)]
pub(crate) struct ResnetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub groups: usize,
    pub eps: f64,
}

/// A residual block. What the UNet's have of the timestep, their `time_emb_proj`, is computed for all of them at once.
pub(crate) struct ResnetBlock2D {
    block: ResnetBlock,
    memory: Memory,
}

impl ResnetBlock2D {
    pub(crate) fn load(weights: &Weights, config: ResnetConfig) -> Result<Self> {
        let ResnetConfig { in_channels, out_channels, groups, eps } = config;
        let act = Some(Activation::Silu);
        let block = ResnetBlock {
            norm1: group_norm(&weights.pp("norm1"), in_channels, groups, eps, act)?,
            conv1: conv2d(&weights.pp("conv1"), in_channels, out_channels, 1, Padding::same(1))?,
            norm2: group_norm(&weights.pp("norm2"), out_channels, groups, eps, act)?,
            conv2: conv2d(&weights.pp("conv2"), out_channels, out_channels, 1, Padding::same(1))?,
            conv_shortcut: (in_channels != out_channels)
                .then(|| pointwise(&weights.pp("conv_shortcut"), in_channels, out_channels))
                .transpose()?,
            output_scale_factor: 1.0,
        };
        Ok(Self { block, memory: weights.memory() })
    }

    /// Divides the block's sum, as the UNet's `mid_block_scale_factor` asks.
    pub(crate) fn with_output_scale_factor(mut self, output_scale_factor: f64) -> Self {
        self.block.output_scale_factor = output_scale_factor;
        self
    }

    /// `x [B, H, W, I]`, without a time embedding.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.block.forward(x, None, self.memory)?)
    }

    /// `x [B, H, W, I]`, or, with what came over a skip connection, both of them side by side; `time [B, O]` or `[1, O]`, its
    /// projection of the time embedding.
    pub(crate) fn on(&self, tape: &mut Tape, x: (&Value, Option<&Value>), time: &Tensor) -> Result<Value> {
        Ok(self.block.on(tape, x, Some(time), self.memory)?)
    }
}
