//! The UNet's levels: `CrossAttnDownBlock2D`, `DownBlock2D`, `UNetMidBlock2DCrossAttn`, `CrossAttnUpBlock2D`, `UpBlock2D`.
//!
//! A block with cross-attention and its plain sibling are one type here: the plain one has no transformers.

use candle_core::Tensor;
use hiper_kernels::{Context, Padding, Tape, Value, Weight};

use super::UNet2DConditionConfig;
use crate::blocks::{
    Downsample2D, ResnetBlock2D, ResnetConfig, Transformer2DConfig, Transformer2DModel, Upsample2D,
};
use crate::{Error, Result, Weights};

/// What latents meet on their way.
pub(super) struct Pass<'a> {
    pub tape: Tape,
    /// What is still to come of the residual blocks' projections of the time embedding, `[B, O]` or `[1, O]`.
    pub time: std::vec::IntoIter<Tensor>,
    pub context: &'a Context,
    /// The context's tail, on the tape.
    pub tail: Value,
    /// What the way up will need of the way down.
    pub skips: Vec<Value>,
}

impl Pass<'_> {
    fn resnet(&mut self, resnet: &ResnetBlock2D, x: &Value) -> Result<Value> {
        let Some(time) = self.time.next() else {
            let (expected, got) = ("one for each residual block".into(), "fewer".into());
            return Err(Error::Argument { argument: "time_emb_proj", expected, got });
        };
        resnet.on(&mut self.tape, x, &time)
    }

    fn attend(&mut self, attention: Option<&Transformer2DModel>, x: Value) -> Result<Value> {
        match attention {
            Some(attention) => attention.on(&mut self.tape, &x, (self.context, &self.tail)),
            None => Ok(x),
        }
    }
}

/// What the configuration says of one level.
#[derive(Clone, Copy)]
pub(super) struct BlockConfig {
    channels: usize,
    pub(super) num_layers: usize,
    down_attention: bool,
    up_attention: bool,
    transformer: Transformer2DConfig,
    temb_channels: usize,
    eps: f64,
    downsample_padding: usize,
}

impl BlockConfig {
    /// Of a validated configuration.
    pub(super) fn new(config: &UNet2DConditionConfig, level: usize) -> Self {
        let channels = config.block_out_channels[level];
        Self {
            channels,
            num_layers: config.layers_per_block.at(level).unwrap_or(1),
            down_attention: config.down_block_types[level].starts_with("CrossAttn"),
            up_attention: config.up_block_types[config.num_levels() - 1 - level].starts_with("CrossAttn"),
            transformer: Transformer2DConfig {
                channels,
                cross_attention_dim: config.cross_attention_dim.at(level).unwrap_or(1),
                num_heads: config.num_heads(level),
                num_layers: config.transformer_layers_per_block.at(level).unwrap_or(1),
                groups: config.norm_num_groups,
                use_linear_projection: config.use_linear_projection,
            },
            temb_channels: 4 * config.block_out_channels[0],
            eps: config.norm_eps,
            downsample_padding: config.downsample_padding,
        }
    }

    fn resnet(&self, weights: &Weights, index: usize, in_channels: usize) -> Result<ResnetBlock2D> {
        let config = ResnetConfig {
            in_channels,
            out_channels: self.channels,
            groups: self.transformer.groups,
            eps: self.eps,
        };
        ResnetBlock2D::load(&weights.pp(format!("resnets.{index}")), config)
    }

    /// The weights of the `time_emb_proj` of so many residual blocks.
    pub(super) fn time_emb_projs(
        &self,
        weights: &Weights,
        count: usize,
    ) -> Result<Vec<(Weight, Option<Tensor>)>> {
        let of = |weights: Weights| {
            let weight = weights.get_matrix("weight", &[self.channels, self.temb_channels])?;
            Ok((weight, Some(weights.get("bias", &[self.channels])?)))
        };
        (0..count).map(|i| of(weights.pp(format!("resnets.{i}.time_emb_proj")))).collect()
    }

    fn attentions(&self, weights: &Weights, present: bool, count: usize) -> Result<Vec<Transformer2DModel>> {
        let count = if present { count } else { 0 };
        (0..count)
            .map(|i| Transformer2DModel::load(&weights.pp(format!("attentions.{i}")), self.transformer))
            .collect()
    }
}

/// `CrossAttnDownBlock2D` or `DownBlock2D`.
pub(super) struct DownBlock {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Transformer2DModel>,
    downsampler: Option<Downsample2D>,
}

impl DownBlock {
    pub(super) fn load(
        weights: &Weights,
        level: BlockConfig,
        in_channels: usize,
        downsample: bool,
    ) -> Result<Self> {
        let input = |i| if i == 0 { in_channels } else { level.channels };
        let padding = Padding::same(level.downsample_padding);
        Ok(Self {
            resnets: (0..level.num_layers)
                .map(|i| level.resnet(weights, i, input(i)))
                .collect::<Result<_>>()?,
            attentions: level.attentions(weights, level.down_attention, level.num_layers)?,
            downsampler: downsample
                .then(|| Downsample2D::load(&weights.pp("downsamplers.0"), level.channels, padding))
                .transpose()?,
        })
    }

    /// Pushes onto the skips.
    pub(super) fn forward(&self, pass: &mut Pass<'_>, x: &Value) -> Result<Value> {
        let mut h = x.clone();
        for (i, resnet) in self.resnets.iter().enumerate() {
            h = pass.resnet(resnet, &h)?;
            h = pass.attend(self.attentions.get(i), h)?;
            pass.skips.push(h.clone());
        }
        if let Some(downsampler) = &self.downsampler {
            h = downsampler.on(&mut pass.tape, &h)?;
            pass.skips.push(h.clone());
        }
        Ok(h)
    }
}

/// `UNetMidBlock2DCrossAttn`.
pub(super) struct MidBlock {
    first: ResnetBlock2D,
    attention: Transformer2DModel,
    second: ResnetBlock2D,
}

impl MidBlock {
    pub(super) fn load(weights: &Weights, level: BlockConfig, scale_factor: f64) -> Result<Self> {
        let resnet = |i| {
            Ok::<_, Error>(level.resnet(weights, i, level.channels)?.with_output_scale_factor(scale_factor))
        };
        Ok(Self {
            first: resnet(0)?,
            attention: Transformer2DModel::load(&weights.pp("attentions.0"), level.transformer)?,
            second: resnet(1)?,
        })
    }

    pub(super) fn forward(&self, pass: &mut Pass<'_>, x: &Value) -> Result<Value> {
        let h = pass.resnet(&self.first, x)?;
        let h = pass.attend(Some(&self.attention), h)?;
        pass.resnet(&self.second, &h)
    }
}

/// `CrossAttnUpBlock2D` or `UpBlock2D`.
pub(super) struct UpBlock {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Transformer2DModel>,
    upsampler: Option<Upsample2D>,
}

impl UpBlock {
    /// `previous`: channels coming up; `skip`: channels of the level below in the list, whose last skip ends this block.
    pub(super) fn load(
        weights: &Weights,
        level: BlockConfig,
        [previous, skip]: [usize; 2],
        upsample: bool,
    ) -> Result<Self> {
        let num_layers = level.num_layers + 1;
        let input = |i| {
            let from_below = if i == 0 { previous } else { level.channels };
            let from_skip = if i + 1 == num_layers { skip } else { level.channels };
            from_below + from_skip
        };
        Ok(Self {
            resnets: (0..num_layers).map(|i| level.resnet(weights, i, input(i))).collect::<Result<_>>()?,
            attentions: level.attentions(weights, level.up_attention, num_layers)?,
            upsampler: upsample
                .then(|| Upsample2D::load(&weights.pp("upsamplers.0"), level.channels))
                .transpose()?,
        })
    }

    /// Pops what the way down left on the skips.
    pub(super) fn forward(&self, pass: &mut Pass<'_>, x: &Value) -> Result<Value> {
        let mut h = x.clone();
        for (i, resnet) in self.resnets.iter().enumerate() {
            let Some(skip) = pass.skips.pop() else {
                let (expected, got) = ("as many layers up as down, and one".into(), "more".into());
                return Err(Error::Argument { argument: "layers_per_block", expected, got });
            };
            let both = pass.tape.concatenate([&h, &skip], 3)?;
            h = pass.resnet(resnet, &both)?;
            h = pass.attend(self.attentions.get(i), h)?;
        }
        if let Some(upsampler) = &self.upsampler {
            // Latents whose size is no multiple of the deepest level's come back to the size of the skip.
            let (height, width) = match pass.skips.last() {
                Some(skip) => (skip.tensor().dim(1)?, skip.tensor().dim(2)?),
                None => (2 * h.tensor().dim(1)?, 2 * h.tensor().dim(2)?),
            };
            h = upsampler.on(&mut pass.tape, &h, height, width)?;
        }
        Ok(h)
    }
}
