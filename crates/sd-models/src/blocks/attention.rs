//! diffusers' `Attention`: projections around scaled dot-product attention.

use candle_core::Tensor;
use hiper_kernels::{AttentionConfig, AttentionMask, Linear, attention};

use super::{Bias, linear, projection};
use crate::{Result, Weights};

/// Multi-head attention of a sequence to itself or to another.
pub(crate) struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    config: AttentionConfig,
}

impl Attention {
    /// Weights `to_q`, `to_k`, `to_v`, `to_out.0` (or the VAE's older `query`, `key`, `value`, `proj_attn`). The first
    /// three have a bias in the VAE and none in the UNet; the last has one in both.
    pub(crate) fn load(
        weights: &Weights,
        channels: usize,
        context_channels: usize,
        num_heads: usize,
        bias: Bias,
    ) -> Result<Self> {
        let old_names = weights.contains("query.weight");
        let name = |new, old| weights.pp(if old_names { old } else { new });
        Ok(Self {
            to_q: projection(&name("to_q", "query"), bias, channels, channels)?,
            to_k: projection(&name("to_k", "key"), bias, context_channels, channels)?,
            to_v: projection(&name("to_v", "value"), bias, context_channels, channels)?,
            to_out: linear(&name("to_out.0", "proj_attn"), channels, channels)?,
            config: AttentionConfig {
                num_heads,
                softmax_scale: ((channels / num_heads) as f64).powf(-0.5),
                mask: AttentionMask::None,
            },
        })
    }

    /// `x [B, S, C]` attends to `context [B, T, K]`.
    pub(crate) fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (self.to_q.forward(x)?, self.to_k.forward(context)?, self.to_v.forward(context)?);
        Ok(self.to_out.forward(&attention(&q, &k, &v, &self.config)?)?)
    }
}
