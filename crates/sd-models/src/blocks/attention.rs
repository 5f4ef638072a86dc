//! The VAE's `Attention`: projections around scaled dot-product attention.

use candle_core::Tensor;
use hiper_kernels::{AttentionConfig, AttentionMask, Linear, attention};

use super::linear;
use crate::{Result, Weights};

/// Single-head attention of a sequence to itself, every projection with its bias.
pub(crate) struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    config: AttentionConfig,
}

impl Attention {
    /// Weights `to_q`, `to_k`, `to_v`, `to_out.0`, or the older `query`, `key`, `value`, `proj_attn`.
    pub(crate) fn load(weights: &Weights, channels: usize) -> Result<Self> {
        let old_names = weights.contains("query.weight");
        let layer = |new, old| linear(&weights.pp(if old_names { old } else { new }), channels, channels);
        Ok(Self {
            to_q: layer("to_q", "query")?,
            to_k: layer("to_k", "key")?,
            to_v: layer("to_v", "value")?,
            to_out: layer("to_out.0", "proj_attn")?,
            config: AttentionConfig {
                num_heads: 1,
                softmax_scale: (channels as f64).powf(-0.5),
                mask: AttentionMask::None,
            },
        })
    }

    /// `x [B, S, C]` attends to itself.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (self.to_q.forward(x)?, self.to_k.forward(x)?, self.to_v.forward(x)?);
        Ok(self.to_out.forward(&attention(&q, &k, &v, &self.config)?)?)
    }
}
