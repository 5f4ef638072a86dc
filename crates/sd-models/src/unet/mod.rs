//! diffusers' `UNet2DConditionModel`.

mod config;
mod guided_prediction;
mod recorded_optimisation;
mod unet_2d_blocks;

use candle_core::{Device, Tensor};
use hiper_kernels::{Activation, Context, Conv2d, GroupNorm, Padding};

pub use config::{OneOrMany, UNet2DConditionConfig};
pub(crate) use guided_prediction::GuidedPrediction;
pub use recorded_optimisation::{OptimisationConfig, RecordedOptimisation, Target};
use unet_2d_blocks::{BlockConfig, DownBlock, MidBlock, UpBlock};

use crate::blocks::{Precision, TimestepEmbedding, conv2d, group_norm};
use crate::{Error, ModelFiles, Result, Weights};

/// The network that predicts the noise in latents, given a timestep and a text embedding.
///
/// Frozen: gradients reach `latents` and `encoder_hidden_states`, never a weight.
pub struct UNet2DConditionModel {
    config: UNet2DConditionConfig,
    conv_in: Conv2d,
    time_embedding: TimestepEmbedding,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    precision: Precision,
}

impl UNet2DConditionModel {
    /// Loads `unet/`.
    ///
    /// # Errors
    /// When the configuration asks for what is not built here, or the weights do not fit it.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let config: UNet2DConditionConfig = files.read_config("unet/config.json")?;
        config.validate()?;
        let weights = Weights::load(files, "unet", device)?;
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], config.num_levels() - 1);
        let level = |level: usize| BlockConfig::new(&config, level);
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
        let act = Some(Activation::Silu);
        Ok(Self {
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
            precision: Precision(weights.dtype()),
            config,
        })
    }

    /// What `unet/config.json` says.
    pub fn config(&self) -> &UNet2DConditionConfig {
        &self.config
    }

    /// Width `D` of the text embeddings that the network takes.
    pub fn cross_attention_dim(&self) -> usize {
        self.config.cross_attention_dim.at(0).unwrap_or_default()
    }

    /// Predicts noise (or velocity, as the scheduler's `prediction_type` says).
    ///
    /// # Shapes
    /// `latents [B, 4, h, w]`, `encoder_hidden_states [B, T, D]`, result `[B, 4, h, w]`, all `f32`; `timesteps` in 0..1000,
    /// one for each of the batch or a single one for all.
    ///
    /// # Gradient
    /// To `latents` and `encoder_hidden_states`.
    ///
    /// # Errors
    /// When a shape disagrees with the configuration.
    ///
    /// ```no_run
    /// # use candle_core::{DType, Device, Tensor};
    /// # fn main() -> sd_models::Result<()> {
    /// # let files = sd_models::ModelFiles::from_dir("model")?;
    /// let unet = sd_models::UNet2DConditionModel::load(&files, &Device::Cpu)?;
    /// let latents = Tensor::zeros((1, 4, 64, 64), DType::F32, &Device::Cpu)?;
    /// let text = Tensor::zeros((1, 77, unet.cross_attention_dim()), DType::F32, &Device::Cpu)?;
    /// let noise_pred = unet.forward(&latents, &[500.0], &text)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        encoder_hidden_states: &Tensor,
    ) -> Result<Tensor> {
        self.check(latents, timesteps, encoder_hidden_states)?;
        let context = Context::whole(&self.precision.enter(encoder_hidden_states)?);
        self.forward_at(latents, &self.time_embedding.rows(timesteps)?, &context)
    }

    /// The same of a text in two parts, `head [B, T − N, D]` and `tail [B, N, D]`.
    ///
    /// # Gradient
    /// To `latents` and `tail`; the head's is not computed.
    ///
    /// # Errors
    /// When a shape disagrees with the configuration.
    ///
    /// ```no_run
    /// # use candle_core::{DType, Device, Tensor, Var};
    /// # fn main() -> sd_models::Result<()> {
    /// # let files = sd_models::ModelFiles::from_dir("model")?;
    /// # let unet = sd_models::UNet2DConditionModel::load(&files, &Device::Cpu)?;
    /// # let latents = Tensor::zeros((1, 4, 64, 64), DType::F32, &Device::Cpu)?;
    /// let head = Tensor::zeros((1, 72, unet.cross_attention_dim()), DType::F32, &Device::Cpu)?;
    /// let tail = Var::zeros((1, 5, unet.cross_attention_dim()), DType::F32, &Device::Cpu)?;
    /// let noise_pred = unet.forward_with_tail(&latents, &[500.0], &head, &tail)?;
    /// let gradients = noise_pred.sqr()?.sum_all()?.backward()?;
    /// assert!(gradients.get(&tail).is_some());
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward_with_tail(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        head: &Tensor,
        tail: &Tensor,
    ) -> Result<Tensor> {
        let context = self.context(head, tail)?;
        self.check_shapes(latents, timesteps, context.dims())?;
        self.forward_at(latents, &self.time_embedding.rows(timesteps)?, &context)
    }

    fn context(&self, head: &Tensor, tail: &Tensor) -> Result<Context> {
        let [head, tail] = [head, tail].map(|part| self.precision.enter(part));
        Ok(Context::of_head_and_tail(&head?, &tail?)?)
    }

    /// The same, of checked arguments; a row of sinusoids for each timestep.
    fn forward_at(&self, latents: &Tensor, sinusoids: &Tensor, context: &Context) -> Result<Tensor> {
        let latents =
            if self.config.center_input_sample { ((latents * 2.0)? - 1.0)? } else { latents.clone() };
        let temb = self.time_embedding.forward_activated(sinusoids)?;
        let latents = self.precision.enter(&latents)?;
        let mut h = self.conv_in.forward(&latents.permute((0, 2, 3, 1))?)?;
        let mut skips = vec![h.clone()];
        for block in &self.down_blocks {
            h = block.forward(&h, &temb, context, &mut skips)?;
        }
        h = self.mid_block.forward(&h, &temb, context)?;
        for block in &self.up_blocks {
            h = block.forward(&h, &temb, context, &mut skips)?;
        }
        let h = self.conv_out.forward(&self.conv_norm_out.forward(&h)?)?;
        let h = self.precision.leave(&h)?;
        Ok(h.permute((0, 3, 1, 2))?.contiguous()?)
    }

    fn check(&self, latents: &Tensor, timesteps: &[f64], encoder_hidden_states: &Tensor) -> Result<()> {
        self.check_shapes(latents, timesteps, encoder_hidden_states.dims())
    }

    fn check_shapes(&self, latents: &Tensor, timesteps: &[f64], context: &[usize]) -> Result<()> {
        let (channels, width) = (self.config.in_channels, self.cross_attention_dim());
        let batch = latents.dims().first().copied().unwrap_or_default();
        if !matches!(latents.dims(), &[_, c, h, w] if c == channels && h > 0 && w > 0) {
            let (expected, got) = (format!("[B, {channels}, h, w]"), format!("{:?}", latents.dims()));
            return Err(Error::Argument { argument: "latents", expected, got });
        }
        if timesteps.len() != 1 && timesteps.len() != batch {
            let (expected, got) = (format!("1 or {batch}, as the latents"), timesteps.len().to_string());
            return Err(Error::Argument { argument: "timesteps", expected, got });
        }
        if !matches!(context, &[b, t, d] if b == batch && t > 0 && d == width) {
            let (expected, got) = (format!("[{batch}, T, {width}]"), format!("{context:?}"));
            return Err(Error::Argument { argument: "encoder_hidden_states", expected, got });
        }
        Ok(())
    }
}
