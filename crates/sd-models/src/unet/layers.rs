//! The layers, in the order that latents pass them.

use std::sync::Arc;

use candle_core::Tensor;
use hiper_kernels::{Activation, Context, Conv2d, GroupNorm, Linear, Padding, Tape, TransformerBlock, Value};

use super::UNet2DConditionConfig;
use super::unet_2d_blocks::{DownBlock, MidBlock, Parts, Pass, UpBlock};
use crate::blocks::{TimestepEmbedding, Transformer2DModel, conv2d, group_norm};
use crate::{Result, Weights};

/// All that has weights.
pub(super) struct Layers {
    pub(super) time_embedding: TimestepEmbedding,
    /// Of the residual blocks, in the order in which latents pass them.
    time_emb_projs: Vec<Linear>,
    /// Of the transformers, in the same order: what attends to the text.
    text_blocks: Vec<Arc<TransformerBlock>>,
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Layers {
    /// Reads the weights of a network of this configuration.
    pub(super) fn load(weights: &Weights, config: &UNet2DConditionConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], config.num_levels() - 1);
        let parts = Parts::new(weights, config);
        let mut text_layers = parts.text_layers()?;
        let down_blocks = parts.down.iter().enumerate().map(|(i, part)| {
            let input = if i == 0 { first } else { channels[i - 1] };
            DownBlock::load(part, input, i < last, &mut text_layers)
        });
        let down_blocks: Vec<DownBlock> = down_blocks.collect::<Result<_>>()?;
        let mid_block = MidBlock::load(&parts.mid, config.mid_block_scale_factor, &mut text_layers)?;
        let up_blocks = parts.up.iter().enumerate().map(|(i, part)| {
            let at = last - i;
            let previous = channels[(at + 1).min(last)];
            let skip = channels[at.saturating_sub(1)];
            UpBlock::load(part, [previous, skip], at > 0, &mut text_layers)
        });
        let up_blocks: Vec<UpBlock> = up_blocks.collect::<Result<_>>()?;
        let attentions = down_blocks.iter().flat_map(DownBlock::attentions);
        let attentions = attentions.chain([mid_block.attention()]);
        let attentions = attentions.chain(up_blocks.iter().flat_map(UpBlock::attentions));
        let text_blocks = attentions.flat_map(Transformer2DModel::blocks).cloned().collect();
        let act = Some(Activation::Silu);
        Ok(Self {
            time_emb_projs: parts.time_emb_projs()?,
            text_blocks,
            conv_in: conv2d(&weights.pp("conv_in"), config.in_channels, first, 1, Padding::same(1))?,
            time_embedding: TimestepEmbedding::load(
                &weights.pp("time_embedding"),
                first,
                config.flip_sin_to_cos,
                config.freq_shift,
            )?,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: group_norm(
                &weights.pp("conv_norm_out"),
                first,
                config.norm_num_groups,
                config.norm_eps,
                act,
            )?,
            conv_out: conv2d(&weights.pp("conv_out"), first, config.out_channels, 1, Padding::same(1))?,
        })
    }

    /// The context with what can be computed of it before latents and timesteps are known.
    pub(super) fn project(&self, context: &Context) -> Result<Context> {
        Ok(context.project(&self.text_blocks)?)
    }

    /// Of `latents [B, h, w, 4]` and a row of sinusoids for each timestep: `[B, h, w, 4]`.
    pub(super) fn forward(&self, latents: &Tensor, sinusoids: &Tensor, context: &Context) -> Result<Tensor> {
        let (tape, noise_pred) = self.on_tape(latents, sinusoids, context)?;
        Ok(tape.end(&noise_pred)?)
    }

    /// The same on a tape, whose inputs are the latents and the context's tail.
    pub(super) fn on_tape(
        &self,
        latents: &Tensor,
        sinusoids: &Tensor,
        context: &Context,
    ) -> Result<(Tape, Value)> {
        let temb = self.time_embedding.forward_activated(sinusoids)?;
        let time = Linear::forward_each(&self.time_emb_projs, &temb)?.into_iter();
        let mut tape = Tape::default();
        let context = &self.project(context)?;
        let (latents, text) = (tape.input(latents), context.on(&mut tape)?);
        let mut h = self.conv_in.on(&mut tape, &latents)?;
        let mut pass = Pass { tape, time, context, text, skips: vec![h.clone()] };
        for block in &self.down_blocks {
            h = block.forward(&mut pass, &h)?;
        }
        h = self.mid_block.forward(&mut pass, &h)?;
        for block in &self.up_blocks {
            h = block.forward(&mut pass, &h)?;
        }
        let mut tape = pass.tape;
        h = self.conv_norm_out.on(&mut tape, &h)?;
        h = self.conv_out.on(&mut tape, &h)?;
        Ok((tape, h))
    }
}
