//! diffusers' `Transformer2DModel` and `BasicTransformerBlock`.

use candle_core::Tensor;
use hiper_kernels::{GroupNorm, LayerNorm, Linear, geglu};

use super::{Attention, Bias, group_norm, layer_norm, linear, pointwise};
use crate::{Result, Weights};

/// The shape of a transformer.
#[derive(Clone, Copy)]
pub(crate) struct Transformer2DConfig {
    pub channels: usize,
    pub cross_attention_dim: usize,
    pub num_heads: usize,
    pub num_layers: usize,
    pub groups: usize,
    pub use_linear_projection: bool,
}

/// Transformer blocks over the pixels of a picture, with the text as their context.
pub(crate) struct Transformer2DModel {
    norm: GroupNorm,
    proj_in: Linear,
    transformer_blocks: Vec<BasicTransformerBlock>,
    proj_out: Linear,
}

impl Transformer2DModel {
    pub(crate) fn load(weights: &Weights, config: Transformer2DConfig) -> Result<Self> {
        let c = config.channels;
        let project = |name| {
            if config.use_linear_projection {
                linear(&weights.pp(name), c, c)
            } else {
                pointwise(&weights.pp(name), c, c)
            }
        };
        let block = |i| BasicTransformerBlock::load(&weights.pp(format!("transformer_blocks.{i}")), config);
        Ok(Self {
            norm: group_norm(&weights.pp("norm"), c, config.groups, 1e-6, None)?,
            proj_in: project("proj_in")?,
            transformer_blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
            proj_out: project("proj_out")?,
        })
    }

    /// `x [B, H, W, C]`, `encoder_hidden_states [B, T, D]`.
    pub(crate) fn forward(&self, x: &Tensor, encoder_hidden_states: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let mut h = self.norm.forward(x)?.reshape((batch, height * width, channels))?;
        h = self.proj_in.forward(&h)?;
        for block in &self.transformer_blocks {
            h = block.forward(&h, encoder_hidden_states)?;
        }
        let h = self.proj_out.forward(&h)?.reshape((batch, height, width, channels))?;
        Ok((h + x)?)
    }
}

/// Self-attention, cross-attention, feed-forward; each normalised before and added after.
struct BasicTransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff_in: Linear,
    ff_out: Linear,
}

impl BasicTransformerBlock {
    fn load(weights: &Weights, config: Transformer2DConfig) -> Result<Self> {
        let c = config.channels;
        let norm = |name| layer_norm(&weights.pp(name), c, 1e-5);
        let attention =
            |name, context| Attention::load(&weights.pp(name), c, context, config.num_heads, Bias::Absent);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: attention("attn1", c)?,
            norm2: norm("norm2")?,
            attn2: attention("attn2", config.cross_attention_dim)?,
            norm3: norm("norm3")?,
            ff_in: linear(&weights.pp("ff.net.0.proj"), c, 8 * c)?,
            ff_out: linear(&weights.pp("ff.net.2"), 4 * c, c)?,
        })
    }

    fn forward(&self, x: &Tensor, encoder_hidden_states: &Tensor) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let x = (self.attn1.forward(&normed, &normed)? + x)?;
        let x = (self.attn2.forward(&self.norm2.forward(&x)?, encoder_hidden_states)? + x)?;
        let ff = self.ff_out.forward(&geglu(&self.ff_in.forward(&self.norm3.forward(&x)?)?)?)?;
        Ok((ff + x)?)
    }
}
