//! diffusers' `UNet2DConditionModel`.

mod config;
mod guided_prediction;
mod layers;
mod recorded_optimisation;
mod unet_2d_blocks;

use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use hiper_kernels::Context;

pub use config::{OneOrMany, UNet2DConditionConfig};
pub(crate) use guided_prediction::GuidedPrediction;
use layers::Layers;
pub use recorded_optimisation::{OptimisationConfig, RecordedOptimisation, Target};

use crate::blocks::Precision;
use crate::{Error, ModelFiles, Result, Weights};

/// The network that predicts the noise in latents, given a timestep and a text embedding.
///
/// Frozen: gradients reach `latents` and `encoder_hidden_states`, never a weight.
pub struct UNet2DConditionModel {
    config: UNet2DConditionConfig,
    precision: Precision,
    weights: Weights,
    layers: OnceLock<Layers>,
}

impl UNet2DConditionModel {
    /// Loads `unet/`.
    ///
    /// # Errors
    /// When the configuration asks for what is not built here, or the weights do not fit it.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let unet = Self::open(files, device)?;
        unet.read_weights()?;
        Ok(unet)
    }

    /// As [`UNet2DConditionModel::load`], but leaves the weights, most of a checkpoint, until they are needed: what comes
    /// before, such as encoding a picture, has the memory until then (a card's; on a CPU the pages of the file).
    ///
    /// # Errors
    /// When the configuration asks for what is not built here, or a file is missing or truncated.
    ///
    /// ```no_run
    /// # use candle_core::Device;
    /// # fn main() -> sd_models::Result<()> {
    /// # let files = sd_models::ModelFiles::from_dir("model")?;
    /// let unet = sd_models::UNet2DConditionModel::open(&files, &Device::Cpu)?;
    /// println!("draws {} latents a side", unet.config().sample_size);
    /// unet.read_weights()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn open(files: &ModelFiles, device: &Device) -> Result<Self> {
        let config: UNet2DConditionConfig = files.read_config("unet/config.json")?;
        config.validate()?;
        let weights = Weights::load(files, "unet", device)?;
        Ok(Self { config, precision: Precision(weights.dtype()), weights, layers: OnceLock::new() })
    }

    /// Reads the weights, unless they have been: otherwise the first prediction does.
    ///
    /// # Errors
    /// When they do not fit the configuration, or one is NaN or infinite.
    pub fn read_weights(&self) -> Result<()> {
        self.layers().map(|_| ())
    }

    fn layers(&self) -> Result<&Layers> {
        if let Some(layers) = self.layers.get() {
            return Ok(layers);
        }
        let layers = Layers::load(&self.weights, &self.config)?;
        Ok(self.layers.get_or_init(|| layers))
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
        self.forward_at(latents, &self.sinusoids(timesteps)?, &context)
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
        self.forward_at(latents, &self.sinusoids(timesteps)?, &context)
    }

    fn context(&self, head: &Tensor, tail: &Tensor) -> Result<Context> {
        let [head, tail] = [head, tail].map(|part| self.precision.enter(part));
        Ok(Context::of_head_and_tail(&head?, &tail?)?)
    }

    /// What the time embedding takes: a row for each timestep.
    fn sinusoids(&self, timesteps: &[f64]) -> Result<Tensor> {
        self.layers()?.time_embedding.rows(timesteps)
    }

    /// The prediction, of checked arguments.
    fn forward_at(&self, latents: &Tensor, sinusoids: &Tensor, context: &Context) -> Result<Tensor> {
        let latents = self.precision.enter(&self.centred(latents)?)?.permute((0, 2, 3, 1))?;
        let noise_pred = self.precision.leave(&self.layers()?.forward(&latents, sinusoids, context)?)?;
        Ok(noise_pred.permute((0, 3, 1, 2))?.contiguous()?)
    }

    /// What the first convolution takes of latents.
    fn centred(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(if self.config.center_input_sample { ((latents * 2.0)? - 1.0)? } else { latents.clone() })
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
