//! The UNet of candle-transformers, put together so that its gradient is whole.
//!
//! candle-transformers' own graph is cut in every transformer block: `softmax_last_dim` and the fused `layer_norm` of candle-nn
//! have no backward pass. What then reaches the text embedding is the path through the values of attention and the residuals
//! alone. Here are the same residual blocks and embeddings of candle-transformers, under the same weight names, with
//! transformer blocks made of `softmax` and `layer_norm_slow`, which do have one.

use candle_core::{D, Result, Tensor};
use candle_nn::{Conv2d, Conv2dConfig, GroupNorm, Linear, Module, VarBuilder, ops};
use candle_transformers::models::stable_diffusion::embeddings::{TimestepEmbedding, Timesteps};
use candle_transformers::models::stable_diffusion::resnet::{ResnetBlock2D, ResnetBlock2DConfig};
use candle_transformers::models::stable_diffusion::unet_2d::{BlockConfig, UNet2DConditionModelConfig};

/// [`UNet2DConditionModel`](candle_transformers::models::stable_diffusion::unet_2d::UNet2DConditionModel) with a gradient to
/// its text embedding. Latents must be divisible by two to the number of downsamplings.
pub struct DifferentiableUNet {
    conv_in: Conv2d,
    time_proj: Timesteps,
    time_embedding: TimestepEmbedding,
    down_blocks: Vec<Block>,
    mid_block: Block,
    up_blocks: Vec<Block>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl DifferentiableUNet {
    /// Takes the weights and the configuration that candle-transformers' model takes.
    pub fn new(
        vs: VarBuilder<'_>,
        in_channels: usize,
        out_channels: usize,
        config: &UNet2DConditionModelConfig,
    ) -> Result<Self> {
        let blocks = &config.blocks;
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else {
            candle_core::bail!("a UNet without blocks")
        };
        if config.downsample_padding != 1 {
            candle_core::bail!("downsample_padding is {}, Stable Diffusion's is 1", config.downsample_padding)
        }
        let (n, layers) = (blocks.len(), config.layers_per_block);
        let resnet = ResnetBlock2DConfig {
            temb_channels: Some(4 * first.out_channels),
            eps: config.norm_eps,
            ..Default::default()
        };
        let conv = |inputs, outputs, stride, name: String| {
            candle_nn::conv2d(
                inputs,
                outputs,
                3,
                Conv2dConfig { padding: 1, stride, ..Default::default() },
                vs.pp(name),
            )
        };
        let mut down_blocks = Vec::new();
        for (i, block) in blocks.iter().enumerate() {
            let before = blocks[i.saturating_sub(1)].out_channels;
            let channels = block.out_channels;
            let inputs: Vec<usize> = (0..layers).map(|j| if j == 0 { before } else { channels }).collect();
            let name = format!("down_blocks.{i}");
            let resample =
                (i + 1 < n).then(|| conv(channels, channels, 2, format!("{name}.downsamplers.0.conv")));
            let layers = Block::new(vs.pp(&name), &inputs, inputs.len(), *block, resnet, config)?;
            down_blocks.push(Block { resample: resample.transpose()?, ..layers });
        }
        let mut up_blocks = Vec::new();
        for i in 0..n {
            let block = blocks[n - 1 - i];
            let channels = block.out_channels;
            let before = blocks[(n - i).min(n - 1)].out_channels;
            let skipped = blocks[n.saturating_sub(i + 2)].out_channels;
            let inputs: Vec<usize> = (0..=layers)
                .map(|j| {
                    let own = if j == 0 { before } else { channels };
                    own + if j == layers { skipped } else { channels }
                })
                .collect();
            let name = format!("up_blocks.{i}");
            let resample =
                (i + 1 < n).then(|| conv(channels, channels, 1, format!("{name}.upsamplers.0.conv")));
            let layers = Block::new(vs.pp(&name), &inputs, inputs.len(), block, resnet, config)?;
            up_blocks.push(Block { resample: resample.transpose()?, ..layers });
        }
        let mid_resnet = ResnetBlock2DConfig {
            groups: config.norm_num_groups,
            output_scale_factor: config.mid_block_scale_factor,
            ..resnet
        };
        let mid = BlockConfig { use_cross_attn: Some(last.use_cross_attn.unwrap_or(1)), ..*last };
        let mid_inputs = [last.out_channels; 2];
        // One transformer, between two residual blocks.
        let mid_block = Block::new(vs.pp("mid_block"), &mid_inputs, 1, mid, mid_resnet, config)?;
        Ok(Self {
            conv_in: conv(in_channels, first.out_channels, 1, "conv_in".into())?,
            time_proj: Timesteps::new(first.out_channels, config.flip_sin_to_cos, config.freq_shift),
            time_embedding: TimestepEmbedding::new(
                vs.pp("time_embedding"),
                first.out_channels,
                4 * first.out_channels,
            )?,
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: candle_nn::group_norm(
                config.norm_num_groups,
                first.out_channels,
                config.norm_eps,
                vs.pp("conv_norm_out"),
            )?,
            conv_out: conv(first.out_channels, out_channels, 1, "conv_out".into())?,
        })
    }

    /// The prediction for `latents [B, 4, h, w]`, given `encoder_hidden_states [B, T, D]`.
    pub fn forward(&self, latents: &Tensor, timestep: f64, encoder_hidden_states: &Tensor) -> Result<Tensor> {
        let (batch, _, _, _) = latents.dims4()?;
        let time = (Tensor::ones(batch, latents.dtype(), latents.device())? * timestep)?;
        let time = self.time_embedding.forward(&self.time_proj.forward(&time)?)?;
        let mut x = self.conv_in.forward(latents)?;
        let mut skipped = vec![x.clone()];
        for block in &self.down_blocks {
            for layer in 0..block.resnets.len() {
                x = block.layer(layer, &x, &time, encoder_hidden_states)?;
                skipped.push(x.clone());
            }
            if let Some(conv) = &block.resample {
                x = conv.forward(&x)?;
                skipped.push(x.clone());
            }
        }
        for layer in 0..self.mid_block.resnets.len() {
            x = self.mid_block.layer(layer, &x, &time, encoder_hidden_states)?;
        }
        for block in &self.up_blocks {
            for layer in 0..block.resnets.len() {
                let Some(skip) = skipped.pop() else { candle_core::bail!("fewer skips than layers") };
                let joined = Tensor::cat(&[&x, &skip], 1)?.contiguous()?;
                x = block.layer(layer, &joined, &time, encoder_hidden_states)?;
            }
            if let Some(conv) = &block.resample {
                let (_, _, height, width) = x.dims4()?;
                x = conv.forward(&x.upsample_nearest2d(2 * height, 2 * width)?)?;
            }
        }
        self.conv_out.forward(&ops::silu(&self.conv_norm_out.forward(&x)?)?)
    }
}

/// Residual blocks, the first of them followed by a transformer each, and a change of resolution.
struct Block {
    resnets: Vec<ResnetBlock2D>,
    transformers: Vec<Transformer>,
    resample: Option<Conv2d>,
}

impl Block {
    fn new(
        vs: VarBuilder<'_>,
        inputs: &[usize],
        num_transformers: usize,
        block: BlockConfig,
        resnet: ResnetBlock2DConfig,
        config: &UNet2DConditionModelConfig,
    ) -> Result<Self> {
        let resnet = ResnetBlock2DConfig { out_channels: Some(block.out_channels), ..resnet };
        let resnets = inputs
            .iter()
            .enumerate()
            .map(|(i, &inputs)| ResnetBlock2D::new(vs.pp(format!("resnets.{i}")), inputs, resnet))
            .collect::<Result<_>>()?;
        let num_transformers = if block.use_cross_attn.is_some() { num_transformers } else { 0 };
        let transformers = (0..num_transformers)
            .map(|i| Transformer::new(vs.pp(format!("attentions.{i}")), block, config))
            .collect::<Result<_>>()?;
        Ok(Self { resnets, transformers, resample: None })
    }

    fn layer(&self, i: usize, x: &Tensor, time: &Tensor, text: &Tensor) -> Result<Tensor> {
        let x = self.resnets[i].forward(x, Some(time))?;
        match self.transformers.get(i) {
            Some(transformer) => transformer.forward(&x, text),
            None => Ok(x),
        }
    }
}

struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<TransformerBlock>,
    proj_out: Linear,
}

impl Transformer {
    fn new(vs: VarBuilder<'_>, block: BlockConfig, config: &UNet2DConditionModelConfig) -> Result<Self> {
        let channels = block.out_channels;
        let projection = |name| {
            let vs = vs.pp(name);
            let weight = match config.use_linear_projection {
                true => vs.get((channels, channels), "weight")?,
                // A 1×1 convolution is a linear layer.
                false => vs.get((channels, channels, 1, 1), "weight")?.reshape((channels, channels))?,
            };
            Ok::<_, candle_core::Error>(Linear::new(weight, Some(vs.get(channels, "bias")?)))
        };
        let depth = block.use_cross_attn.unwrap_or(0);
        let name = |i| vs.pp(format!("transformer_blocks.{i}"));
        Ok(Self {
            norm: candle_nn::group_norm(config.norm_num_groups, channels, 1e-6, vs.pp("norm"))?,
            proj_in: projection("proj_in")?,
            blocks: (0..depth)
                .map(|i| TransformerBlock::new(name(i), block, config.cross_attention_dim))
                .collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let tokens = self.norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        let mut tokens = self.proj_in.forward(&tokens)?;
        for block in &self.blocks {
            tokens = block.forward(&tokens, text)?;
        }
        self.proj_out.forward(&tokens)?.transpose(1, 2)?.contiguous()?.reshape(x.shape())? + x
    }
}

struct TransformerBlock {
    norm1: LayerNorm,
    self_attention: Attention,
    norm2: LayerNorm,
    cross_attention: Attention,
    norm3: LayerNorm,
    feed_forward_in: Linear,
    feed_forward_out: Linear,
}

impl TransformerBlock {
    fn new(vs: VarBuilder<'_>, block: BlockConfig, cross_attention_dim: usize) -> Result<Self> {
        // candle-transformers' `attention_head_dim` is the number of heads.
        let (channels, heads) = (block.out_channels, block.attention_head_dim);
        Ok(Self {
            norm1: LayerNorm::new(vs.pp("norm1"), channels)?,
            self_attention: Attention::new(vs.pp("attn1"), channels, channels, heads)?,
            norm2: LayerNorm::new(vs.pp("norm2"), channels)?,
            cross_attention: Attention::new(vs.pp("attn2"), channels, cross_attention_dim, heads)?,
            norm3: LayerNorm::new(vs.pp("norm3"), channels)?,
            feed_forward_in: candle_nn::linear(channels, 8 * channels, vs.pp("ff.net.0.proj"))?,
            feed_forward_out: candle_nn::linear(4 * channels, channels, vs.pp("ff.net.2"))?,
        })
    }

    fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let normed = self.norm1.forward(x)?;
        let x = (self.self_attention.forward(&normed, &normed)? + x)?;
        let x = (self.cross_attention.forward(&self.norm2.forward(&x)?, text)? + x)?;
        let gated = self.feed_forward_in.forward(&self.norm3.forward(&x)?)?.chunk(2, D::Minus1)?;
        self.feed_forward_out.forward(&(&gated[0] * gated[1].gelu()?)?)? + x
    }
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    fn new(vs: VarBuilder<'_>, channels: usize) -> Result<Self> {
        Ok(Self { weight: vs.get(channels, "weight")?, bias: vs.get(channels, "bias")? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm_slow(x, &self.weight, &self.bias, 1e-5)
    }
}

struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn new(vs: VarBuilder<'_>, channels: usize, context_dim: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            to_q: candle_nn::linear_no_bias(channels, channels, vs.pp("to_q"))?,
            to_k: candle_nn::linear_no_bias(context_dim, channels, vs.pp("to_k"))?,
            to_v: candle_nn::linear_no_bias(context_dim, channels, vs.pp("to_v"))?,
            to_out: candle_nn::linear(channels, channels, vs.pp("to_out.0"))?,
            heads,
        })
    }

    /// `x [B, S, C]` attends to `context [B, T, D]`.
    fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let (batch, tokens, channels) = x.dims3()?;
        let head_dim = channels / self.heads;
        let split = |x: Tensor| {
            let (batch, tokens, _) = x.dims3()?;
            x.reshape((batch, tokens, self.heads, head_dim))?.transpose(1, 2)?.contiguous()
        };
        let (q, k) = (split(self.to_q.forward(x)?)?, split(self.to_k.forward(context)?)?);
        let scores = q.matmul(&(k.transpose(2, 3)?.contiguous()? / (head_dim as f64).sqrt())?)?;
        let mixed = ops::softmax(&scores, D::Minus1)?.matmul(&split(self.to_v.forward(context)?)?)?;
        self.to_out.forward(&mixed.transpose(1, 2)?.contiguous()?.reshape((batch, tokens, channels))?)
    }
}
