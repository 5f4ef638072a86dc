//! diffusers' `Transformer2DModel` and `BasicTransformerBlock`.

use std::sync::Arc;

use hiper_kernels::{
    Context, Linear, Memory, Tape, Transformer, TransformerAttention, TransformerBlock, Value,
};

use super::{group_norm, layer_norm, linear, pointwise};
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
    transformer: Transformer,
    memory: Memory,
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
        let block = |i| basic_transformer_block(&weights.pp(format!("transformer_blocks.{i}")), config);
        let transformer = Transformer {
            norm: group_norm(&weights.pp("norm"), c, config.groups, 1e-6, None)?,
            proj_in: project("proj_in")?,
            blocks: (0..config.num_layers).map(|i| Ok(Arc::new(block(i)?))).collect::<Result<_>>()?,
            proj_out: project("proj_out")?,
        };
        Ok(Self { transformer, memory: weights.memory() })
    }

    /// `x [B, H, W, C]`, `context [B, T, D]` and its tail.
    pub(crate) fn on(&self, tape: &mut Tape, x: &Value, context: (&Context, &Value)) -> Result<Value> {
        Ok(self.transformer.on(tape, x, context, self.memory)?)
    }
}

fn basic_transformer_block(weights: &Weights, config: Transformer2DConfig) -> Result<TransformerBlock> {
    let c = config.channels;
    let norm = |name| layer_norm(&weights.pp(name), c, 1e-5);
    // Queries, keys and values have no bias in the UNet: the architecture says so, never the file.
    let matrix = |name: &str, inputs| {
        Ok::<_, crate::Error>((weights.pp(name).get_matrix("weight", &[c, inputs])?, None))
    };
    let attention = |name, [to_q, to_k, to_v]: [Linear; 3]| {
        let to_out = linear(&weights.pp(format!("{name}.to_out.0")), c, c)?;
        Ok::<_, crate::Error>(TransformerAttention { to_q, to_k, to_v, to_out, num_heads: config.num_heads })
    };
    let itself =
        Linear::side_by_side([matrix("attn1.to_q", c)?, matrix("attn1.to_k", c)?, matrix("attn1.to_v", c)?])?;
    let context = config.cross_attention_dim;
    let [to_q] = Linear::side_by_side([matrix("attn2.to_q", c)?])?;
    let [to_k, to_v] =
        Linear::side_by_side([matrix("attn2.to_k", context)?, matrix("attn2.to_v", context)?])?;
    Ok(TransformerBlock {
        norm1: norm("norm1")?,
        attn1: attention("attn1", itself)?,
        norm2: norm("norm2")?,
        attn2: attention("attn2", [to_q, to_k, to_v])?,
        norm3: norm("norm3")?,
        ff_in: linear(&weights.pp("ff.net.0.proj"), c, 8 * c)?,
        ff_out: linear(&weights.pp("ff.net.2"), 4 * c, c)?,
    })
}
