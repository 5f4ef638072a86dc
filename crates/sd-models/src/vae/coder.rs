//! diffusers' `Encoder` and `Decoder`.

use candle_core::Tensor;
use hiper_kernels::{Activation, Conv2d, GroupNorm, Padding};

use super::AutoencoderKlConfig;
use crate::blocks::{Attention, Downsample2D, ResnetBlock2D, ResnetConfig, Upsample2D, conv2d, group_norm};
use crate::{Result, Weights};

/// Added to the variance in every normalisation of the VAE.
const EPS: f64 = 1e-6;

/// The VAE pads its downsampling convolutions right and below only.
const DOWNSAMPLE_PADDING: Padding = Padding { top: 0, bottom: 1, left: 0, right: 1 };

fn resnet(
    weights: &Weights,
    config: &AutoencoderKlConfig,
    in_channels: usize,
    out_channels: usize,
) -> Result<ResnetBlock2D> {
    let groups = config.norm_num_groups;
    ResnetBlock2D::load(weights, ResnetConfig { in_channels, out_channels, groups, eps: EPS })
}

/// `[B, H, W, 3]` to moments `[B, h, w, 2·4]`.
pub(super) struct Encoder {
    conv_in: Conv2d,
    levels: Vec<(Vec<ResnetBlock2D>, Option<Downsample2D>)>,
    mid: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub(super) fn load(weights: &Weights, config: &AutoencoderKlConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let last = channels.len() - 1;
        let level = |i: usize| {
            let block = weights.pp(format!("down_blocks.{i}"));
            let input = |j| if j == 0 { channels[i.saturating_sub(1)] } else { channels[i] };
            let resnets = (0..config.layers_per_block)
                .map(|j| resnet(&block.pp(format!("resnets.{j}")), config, input(j), channels[i]))
                .collect::<Result<_>>()?;
            let down = (i < last)
                .then(|| Downsample2D::load(&block.pp("downsamplers.0"), channels[i], DOWNSAMPLE_PADDING));
            Ok((resnets, down.transpose()?))
        };
        let act = Some(Activation::Silu);
        Ok(Self {
            conv_in: conv2d(&weights.pp("conv_in"), config.in_channels, channels[0], 1, Padding::same(1))?,
            levels: (0..=last).map(level).collect::<Result<_>>()?,
            mid: MidBlock::load(&weights.pp("mid_block"), config)?,
            conv_norm_out: group_norm(
                &weights.pp("conv_norm_out"),
                channels[last],
                config.norm_num_groups,
                EPS,
                act,
            )?,
            conv_out: conv2d(
                &weights.pp("conv_out"),
                channels[last],
                2 * config.latent_channels,
                1,
                Padding::same(1),
            )?,
        })
    }

    pub(super) fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(image)?;
        for (resnets, downsampler) in &self.levels {
            for resnet in resnets {
                h = resnet.forward(&h)?;
            }
            if let Some(downsampler) = downsampler {
                h = downsampler.forward(&h)?;
            }
        }
        h = self.mid.forward(&h)?;
        Ok(self.conv_out.forward(&self.conv_norm_out.forward(&h)?)?)
    }
}

/// Latents `[B, h, w, 4]` to `[B, H, W, 3]`.
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid: MidBlock,
    levels: Vec<(Vec<ResnetBlock2D>, Option<Upsample2D>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    pub(super) fn load(weights: &Weights, config: &AutoencoderKlConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let last = channels.len() - 1;
        let level = |i: usize| {
            let block = weights.pp(format!("up_blocks.{i}"));
            let (input, output) = (channels[(last - i + 1).min(last)], channels[last - i]);
            let resnets = (0..=config.layers_per_block)
                .map(|j| {
                    resnet(
                        &block.pp(format!("resnets.{j}")),
                        config,
                        if j == 0 { input } else { output },
                        output,
                    )
                })
                .collect::<Result<_>>()?;
            let up = (i < last).then(|| Upsample2D::load(&block.pp("upsamplers.0"), output));
            Ok((resnets, up.transpose()?))
        };
        let act = Some(Activation::Silu);
        Ok(Self {
            conv_in: conv2d(
                &weights.pp("conv_in"),
                config.latent_channels,
                channels[last],
                1,
                Padding::same(1),
            )?,
            mid: MidBlock::load(&weights.pp("mid_block"), config)?,
            levels: (0..=last).map(level).collect::<Result<_>>()?,
            conv_norm_out: group_norm(
                &weights.pp("conv_norm_out"),
                channels[0],
                config.norm_num_groups,
                EPS,
                act,
            )?,
            conv_out: conv2d(&weights.pp("conv_out"), channels[0], config.out_channels, 1, Padding::same(1))?,
        })
    }

    pub(super) fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let mut h = self.mid.forward(&self.conv_in.forward(latents)?)?;
        for (resnets, upsampler) in &self.levels {
            for resnet in resnets {
                h = resnet.forward(&h)?;
            }
            if let Some(upsampler) = upsampler {
                h = upsampler.forward(&h, 2 * h.dim(1)?, 2 * h.dim(2)?)?;
            }
        }
        Ok(self.conv_out.forward(&self.conv_norm_out.forward(&h)?)?)
    }
}

/// `UNetMidBlock2D`: two residual blocks around a single-head attention.
struct MidBlock {
    first: ResnetBlock2D,
    attention: Option<(GroupNorm, Attention)>,
    second: ResnetBlock2D,
}

impl MidBlock {
    fn load(weights: &Weights, config: &AutoencoderKlConfig) -> Result<Self> {
        let channels = config.block_out_channels[config.block_out_channels.len() - 1];
        let attention = || {
            let weights = weights.pp("attentions.0");
            let norm = group_norm(&weights.pp("group_norm"), channels, config.norm_num_groups, EPS, None)?;
            Ok::<_, crate::Error>((norm, Attention::load(&weights, channels)?))
        };
        Ok(Self {
            first: resnet(&weights.pp("resnets.0"), config, channels, channels)?,
            attention: config.mid_block_add_attention.then(attention).transpose()?,
            second: resnet(&weights.pp("resnets.1"), config, channels, channels)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.first.forward(x)?;
        if let Some((norm, attention)) = &self.attention {
            let (batch, height, width, channels) = h.dims4()?;
            let tokens = norm.forward(&h)?.reshape((batch, height * width, channels))?;
            let attended = attention.forward(&tokens)?.reshape((batch, height, width, channels))?;
            h = (attended + h)?;
        }
        self.second.forward(&h)
    }
}
