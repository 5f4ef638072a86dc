//! diffusers' `Transformer2DModel` and `BasicTransformerBlock`.

use std::sync::Arc;

use candle_core::Tensor;
use hiper_kernels::{
    Context, Linear, Memory, Tape, Transformer, TransformerAttention, TransformerBlock, Value, Weight,
};

use super::{group_norm, layer_norm, linear, pointwise};
use crate::{Error, Result, Weights};

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

/// `to_k` and `to_v` of cross-attentions, in the order in which latents pass them.
pub(crate) type TextLayers = std::vec::IntoIter<Linear>;

impl Transformer2DConfig {
    /// The weights of a transformer's [`TextLayers`].
    pub(crate) fn text_layers(&self, weights: &Weights) -> Result<Vec<(Weight, Option<Tensor>)>> {
        let of_block = |i: usize| {
            let weights = weights.pp(format!("transformer_blocks.{i}.attn2"));
            ["to_k", "to_v"].map(|name| matrix(&weights, name, [self.channels, self.cross_attention_dim]))
        };
        (0..self.num_layers).flat_map(of_block).collect()
    }
}

/// Transformer blocks over the pixels of a picture, with the text as their context.
pub(crate) struct Transformer2DModel {
    transformer: Transformer,
    memory: Memory,
}

impl Transformer2DModel {
    /// Takes its own of the `text_layers`.
    pub(crate) fn load(
        weights: &Weights,
        config: Transformer2DConfig,
        text_layers: &mut TextLayers,
    ) -> Result<Self> {
        let c = config.channels;
        let project = |name| {
            if config.use_linear_projection {
                linear(&weights.pp(name), c, c)
            } else {
                pointwise(&weights.pp(name), c, c)
            }
        };
        let mut block = |i| {
            let weights = weights.pp(format!("transformer_blocks.{i}"));
            Ok(Arc::new(basic_transformer_block(&weights, config, text_layers)?))
        };
        let transformer = Transformer {
            norm: group_norm(&weights.pp("norm"), c, config.groups, 1e-6, None)?,
            proj_in: project("proj_in")?,
            blocks: (0..config.num_layers).map(&mut block).collect::<Result<_>>()?,
            proj_out: project("proj_out")?,
        };
        Ok(Self { transformer, memory: weights.memory() })
    }

    pub(crate) fn blocks(&self) -> &[Arc<TransformerBlock>] {
        &self.transformer.blocks
    }

    /// `x [B, H, W, C]`, `context [B, T, D]` and the same on the tape.
    pub(crate) fn on(&self, tape: &mut Tape, x: &Value, context: (&Context, &Value)) -> Result<Value> {
        Ok(self.transformer.on(tape, x, context, self.memory)?)
    }
}

/// Queries, keys and values have no bias in the UNet: the architecture says so, never the file.
fn matrix(weights: &Weights, name: &str, shape: [usize; 2]) -> Result<(Weight, Option<Tensor>)> {
    Ok((weights.pp(name).get_matrix("weight", &shape)?, None))
}

fn basic_transformer_block(
    weights: &Weights,
    config: Transformer2DConfig,
    text_layers: &mut TextLayers,
) -> Result<TransformerBlock> {
    let c = config.channels;
    let norm = |name| layer_norm(&weights.pp(name), c, 1e-5);
    let attention = |name, [to_q, to_k, to_v]: [Linear; 3]| {
        let to_out = linear(&weights.pp(format!("{name}.to_out.0")), c, c)?;
        Ok::<_, Error>(TransformerAttention { to_q, to_k, to_v, to_out, num_heads: config.num_heads })
    };
    let square = |name| matrix(weights, name, [c, c]);
    let itself = Linear::side_by_side([square("attn1.to_q")?, square("attn1.to_k")?, square("attn1.to_v")?])?;
    let [to_q] = Linear::side_by_side([square("attn2.to_q")?])?;
    let mut text_layer = || {
        let (expected, got) = ("two for each transformer block".into(), "fewer".into());
        text_layers.next().ok_or(Error::Argument { argument: "attn2.to_k and to_v", expected, got })
    };
    let (to_k, to_v) = (text_layer()?, text_layer()?);
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
