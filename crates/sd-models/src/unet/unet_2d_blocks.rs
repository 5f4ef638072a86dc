//! The UNet's levels: `CrossAttnDownBlock2D`, `DownBlock2D`, `UNetMidBlock2DCrossAttn`, `CrossAttnUpBlock2D`, `UpBlock2D`.
//!
//! A block with cross-attention and its plain sibling are one type here: the plain one has no transformers.

use candle_core::Tensor;
use hiper_kernels::{Context, Linear, Padding, Tape, Value};

use super::UNet2DConditionConfig;
use crate::blocks::{
    Downsample2D, ResnetBlock2D, ResnetConfig, TextLayers, Transformer2DConfig, Transformer2DModel,
    Upsample2D,
};
use crate::{Error, Result, Weights};

/// What latents meet on their way.
pub(super) struct Pass<'a> {
    pub tape: Tape,
    /// What is still to come of the residual blocks' projections of the time embedding, `[B, O]` or `[1, O]`.
    pub time: std::vec::IntoIter<Tensor>,
    pub context: &'a Context,
    /// The context on the tape.
    pub text: Value,
    /// What the way up will need of the way down.
    pub skips: Vec<Value>,
}

impl Pass<'_> {
    /// Of `x`, or of that and what came over a skip connection.
    fn resnet(&mut self, resnet: &ResnetBlock2D, x: &Value, skip: Option<&Value>) -> Result<Value> {
        let Some(time) = self.time.next() else {
            let (expected, got) = ("one for each residual block".into(), "fewer".into());
            return Err(Error::Argument { argument: "time_emb_proj", expected, got });
        };
        resnet.on(&mut self.tape, (x, skip), &time)
    }

    fn attend(&mut self, attention: Option<&Transformer2DModel>, x: Value) -> Result<Value> {
        match attention {
            Some(attention) => attention.on(&mut self.tape, &x, (self.context, &self.text)),
            None => Ok(x),
        }
    }
}

/// Weights of a block, and what the configuration says of it.
pub(super) struct Part {
    weights: Weights,
    channels: usize,
    num_resnets: usize,
    num_attentions: usize,
    transformer: Transformer2DConfig,
    temb_channels: usize,
    eps: f64,
    downsample_padding: usize,
}

/// Those of a network, in the order in which latents pass them.
pub(super) struct Parts {
    pub down: Vec<Part>,
    pub mid: Part,
    pub up: Vec<Part>,
}

impl Parts {
    /// Of a validated configuration.
    pub(super) fn new(weights: &Weights, config: &UNet2DConditionConfig) -> Self {
        let last = config.num_levels() - 1;
        let num_layers = |level| config.layers_per_block.at(level).unwrap_or(1);
        let part = |name: String, level: usize, num_resnets: usize, num_attentions: usize| {
            let channels = config.block_out_channels[level];
            let transformer = Transformer2DConfig {
                channels,
                cross_attention_dim: config.cross_attention_dim.at(level).unwrap_or(1),
                num_heads: config.num_heads(level),
                num_layers: config.transformer_layers_per_block.at(level).unwrap_or(1),
                groups: config.norm_num_groups,
                use_linear_projection: config.use_linear_projection,
            };
            Part {
                weights: weights.pp(name),
                channels,
                num_resnets,
                num_attentions,
                transformer,
                temb_channels: 4 * config.block_out_channels[0],
                eps: config.norm_eps,
                downsample_padding: config.downsample_padding,
            }
        };
        let of_type = |name: &str, count| if name.starts_with("CrossAttn") { count } else { 0 };
        let down = (0..=last).map(|i| {
            let count = num_layers(i);
            part(format!("down_blocks.{i}"), i, count, of_type(&config.down_block_types[i], count))
        });
        let up = (0..=last).map(|i| {
            let count = num_layers(last - i) + 1;
            part(format!("up_blocks.{i}"), last - i, count, of_type(&config.up_block_types[i], count))
        });
        Self { down: down.collect(), mid: part("mid_block".into(), last, 2, 1), up: up.collect() }
    }

    fn all(&self) -> impl Iterator<Item = &Part> {
        self.down.iter().chain([&self.mid]).chain(&self.up)
    }

    /// The `time_emb_proj` of the residual blocks.
    pub(super) fn time_emb_projs(&self) -> Result<Vec<Linear>> {
        let mut layers = Vec::new();
        for part in self.all() {
            for i in 0..part.num_resnets {
                let weights = part.weights.pp(format!("resnets.{i}.time_emb_proj"));
                let weight = weights.get_matrix("weight", &[part.channels, part.temb_channels])?;
                layers.push((weight, Some(weights.get("bias", &[part.channels])?)));
            }
        }
        Ok(Linear::all_side_by_side(layers)?)
    }

    pub(super) fn text_layers(&self) -> Result<TextLayers> {
        let mut layers = Vec::new();
        for part in self.all() {
            for i in 0..part.num_attentions {
                layers.extend(part.transformer.text_layers(&part.weights.pp(format!("attentions.{i}")))?);
            }
        }
        Ok(Linear::all_side_by_side(layers)?.into_iter())
    }
}

impl Part {
    fn resnet(&self, index: usize, in_channels: usize) -> Result<ResnetBlock2D> {
        let config = ResnetConfig {
            in_channels,
            out_channels: self.channels,
            groups: self.transformer.groups,
            eps: self.eps,
        };
        ResnetBlock2D::load(&self.weights.pp(format!("resnets.{index}")), config)
    }

    fn resnets(&self, in_channels: impl Fn(usize) -> usize) -> Result<Vec<ResnetBlock2D>> {
        (0..self.num_resnets).map(|i| self.resnet(i, in_channels(i))).collect()
    }

    fn attention(&self, index: usize, text_layers: &mut TextLayers) -> Result<Transformer2DModel> {
        let weights = self.weights.pp(format!("attentions.{index}"));
        Transformer2DModel::load(&weights, self.transformer, text_layers)
    }

    fn attentions(&self, text_layers: &mut TextLayers) -> Result<Vec<Transformer2DModel>> {
        (0..self.num_attentions).map(|i| self.attention(i, text_layers)).collect()
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
        part: &Part,
        in_channels: usize,
        downsample: bool,
        text_layers: &mut TextLayers,
    ) -> Result<Self> {
        let padding = Padding::same(part.downsample_padding);
        Ok(Self {
            resnets: part.resnets(|i| if i == 0 { in_channels } else { part.channels })?,
            attentions: part.attentions(text_layers)?,
            downsampler: downsample
                .then(|| Downsample2D::load(&part.weights.pp("downsamplers.0"), part.channels, padding))
                .transpose()?,
        })
    }

    pub(super) fn attentions(&self) -> &[Transformer2DModel] {
        &self.attentions
    }

    /// Pushes onto the skips.
    pub(super) fn forward(&self, pass: &mut Pass<'_>, x: &Value) -> Result<Value> {
        let mut h = x.clone();
        for (i, resnet) in self.resnets.iter().enumerate() {
            h = pass.resnet(resnet, &h, None)?;
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
    pub(super) fn load(part: &Part, scale_factor: f64, text_layers: &mut TextLayers) -> Result<Self> {
        let resnet =
            |i| Ok::<_, Error>(part.resnet(i, part.channels)?.with_output_scale_factor(scale_factor));
        Ok(Self { first: resnet(0)?, attention: part.attention(0, text_layers)?, second: resnet(1)? })
    }

    pub(super) fn attention(&self) -> &Transformer2DModel {
        &self.attention
    }

    pub(super) fn forward(&self, pass: &mut Pass<'_>, x: &Value) -> Result<Value> {
        let h = pass.resnet(&self.first, x, None)?;
        let h = pass.attend(Some(&self.attention), h)?;
        pass.resnet(&self.second, &h, None)
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
        part: &Part,
        [previous, skip]: [usize; 2],
        upsample: bool,
        text_layers: &mut TextLayers,
    ) -> Result<Self> {
        let in_channels = |i| {
            let from_below = if i == 0 { previous } else { part.channels };
            let from_skip = if i + 1 == part.num_resnets { skip } else { part.channels };
            from_below + from_skip
        };
        Ok(Self {
            resnets: part.resnets(in_channels)?,
            attentions: part.attentions(text_layers)?,
            upsampler: upsample
                .then(|| Upsample2D::load(&part.weights.pp("upsamplers.0"), part.channels))
                .transpose()?,
        })
    }

    pub(super) fn attentions(&self) -> &[Transformer2DModel] {
        &self.attentions
    }

    /// Pops what the way down left on the skips.
    pub(super) fn forward(&self, pass: &mut Pass<'_>, x: &Value) -> Result<Value> {
        let mut h = x.clone();
        for (i, resnet) in self.resnets.iter().enumerate() {
            let Some(skip) = pass.skips.pop() else {
                let (expected, got) = ("as many layers up as down, and one".into(), "more".into());
                return Err(Error::Argument { argument: "layers_per_block", expected, got });
            };
            h = pass.resnet(resnet, &h, Some(&skip))?;
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
