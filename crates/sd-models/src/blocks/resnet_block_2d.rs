//! diffusers' `ResnetBlock2D`.

use candle_core::Tensor;
use hiper_kernels::{Activation, Conv2d, GroupNorm, Linear, Padding};

use super::{conv2d, group_norm, linear, pointwise};
use crate::{Result, Weights};

/// The shape of a residual block.
#[derive(Clone, Copy)]
pub(crate) struct ResnetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    /// Width of the time embedding; none in the VAE.
    pub temb_channels: Option<usize>,
    pub groups: usize,
    pub eps: f64,
}

/// `y = (shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))) + time)))) / output_scale_factor`.
pub(crate) struct ResnetBlock2D {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Linear>,
    output_scale_factor: f64,
}

impl ResnetBlock2D {
    pub(crate) fn load(weights: &Weights, config: ResnetConfig) -> Result<Self> {
        let ResnetConfig { in_channels, out_channels, temb_channels, groups, eps } = config;
        let act = Some(Activation::Silu);
        Ok(Self {
            norm1: group_norm(&weights.pp("norm1"), in_channels, groups, eps, act)?,
            conv1: conv2d(&weights.pp("conv1"), in_channels, out_channels, 1, Padding::same(1))?,
            time_emb_proj: temb_channels
                .map(|t| linear(&weights.pp("time_emb_proj"), t, out_channels))
                .transpose()?,
            norm2: group_norm(&weights.pp("norm2"), out_channels, groups, eps, act)?,
            conv2: conv2d(&weights.pp("conv2"), out_channels, out_channels, 1, Padding::same(1))?,
            conv_shortcut: (in_channels != out_channels)
                .then(|| pointwise(&weights.pp("conv_shortcut"), in_channels, out_channels))
                .transpose()?,
            output_scale_factor: 1.0,
        })
    }

    /// Divides the block's sum, as the UNet's `mid_block_scale_factor` asks.
    pub(crate) fn with_output_scale_factor(self, output_scale_factor: f64) -> Self {
        Self { output_scale_factor, ..self }
    }

    /// `x [B, H, W, I]`; `temb [1, T]`, already activated.
    pub(crate) fn forward(&self, x: &Tensor, temb: Option<&Tensor>) -> Result<Tensor> {
        let mut h = self.conv1.forward(&self.norm1.forward(x)?)?;
        if let (Some(project), Some(temb)) = (&self.time_emb_proj, temb) {
            h = h.broadcast_add(&project.forward(temb)?)?;
        }
        let h = self.conv2.forward(&self.norm2.forward(&h)?)?;
        let sum = match &self.conv_shortcut {
            Some(shortcut) => (shortcut.forward(x)? + h)?,
            None => (x + h)?,
        };
        Ok(if self.output_scale_factor == 1.0 { sum } else { (sum / self.output_scale_factor)? })
    }
}
