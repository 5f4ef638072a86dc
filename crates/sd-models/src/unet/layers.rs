//! The layers, in the order that latents pass them.

use candle_core::Tensor;
use hiper_kernels::{Activation, Context, Conv2d, GroupNorm, Linear, Padding, Tape, Value};

use super::UNet2DConditionConfig;
use super::unet_2d_blocks::{BlockConfig, DownBlock, MidBlock, Pass, UpBlock};
use crate::blocks::{TimestepEmbedding, conv2d, group_norm};
use crate::{Result, Weights};

/// All that has weights.
pub(super) struct Layers {
    pub(super) time_embedding: TimestepEmbedding,
    /// Of the residual blocks, in the order in which latents pass them.
    time_emb_projs: Vec<Linear>,
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
        let level = |level: usize| BlockConfig::new(config, level);
        let down_blocks = (0..=last).map(|i| {
            let input = if i == 0 { first } else { channels[i - 1] };
            DownBlock::load(&weights.pp(format!("down_blocks.{i}")), level(i), input, i < last)
        });
        let up_blocks = (0..=last).map(|i| {
            let at = last - i;
            let previous = channels[(at + 1).min(last)];
            let skip = channels[at.saturating_sub(1)];
            UpBlock::load(&weights.pp(format!("up_blocks.{i}")), level(at), [previous, skip], at > 0)
        });
        let mut time_emb_projs = Vec::new();
        for i in 0..=last {
            let weights = weights.pp(format!("down_blocks.{i}"));
            time_emb_projs.extend(level(i).time_emb_projs(&weights, level(i).num_layers)?);
        }
        time_emb_projs.extend(level(last).time_emb_projs(&weights.pp("mid_block"), 2)?);
        for i in 0..=last {
            let (weights, level) = (weights.pp(format!("up_blocks.{i}")), level(last - i));
            time_emb_projs.extend(level.time_emb_projs(&weights, level.num_layers + 1)?);
        }
        let act = Some(Activation::Silu);
        Ok(Self {
            time_emb_projs: Linear::all_side_by_side(time_emb_projs)?,
            conv_in: conv2d(&weights.pp("conv_in"), config.in_channels, first, 1, Padding::same(1))?,
            time_embedding: TimestepEmbedding::load(
                &weights.pp("time_embedding"),
                first,
                config.flip_sin_to_cos,
                config.freq_shift,
            )?,
            down_blocks: down_blocks.collect::<Result<_>>()?,
            mid_block: MidBlock::load(&weights.pp("mid_block"), level(last), config.mid_block_scale_factor)?,
            up_blocks: up_blocks.collect::<Result<_>>()?,
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
        let (latents, tail) = (tape.input(latents), tape.input(context.tail()));
        let mut h = self.conv_in.on(&mut tape, &latents)?;
        let mut pass = Pass { tape, time, context, tail, skips: vec![h.clone()] };
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
