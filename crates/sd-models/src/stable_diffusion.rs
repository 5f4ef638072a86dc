//! A whole checkpoint, and sampling with classifier-free guidance.

use candle_core::{Device, Tensor};

use crate::schedulers::{Scheduler, SchedulerConfig};
use crate::unet::GuidedPrediction;
use crate::{
    AutoencoderKl, ClipTextModel, ClipTokenizer, Error, ModelFiles, Result, Tokens, UNet2DConditionModel,
};

/// All parts of one checkpoint.
pub struct StableDiffusion {
    /// Prompt to token ids.
    pub tokenizer: ClipTokenizer,
    /// Token ids to `encoder_hidden_states`.
    pub text_encoder: ClipTextModel,
    /// Noise predictor.
    pub unet: UNet2DConditionModel,
    /// Pictures to latents and back.
    pub vae: AutoencoderKl,
    /// `scheduler/scheduler_config.json`.
    pub scheduler_config: SchedulerConfig,
}

/// What [`StableDiffusion::sample`] draws from.
pub struct SampleConfig<'a> {
    /// Embedding of the prompt, `[1, T, D]`.
    pub prompt_embeds: &'a Tensor,
    /// Embedding of the negative prompt, `[1, T, D]`.
    pub negative_prompt_embeds: &'a Tensor,
    /// Strength of the guidance; 1 is none.
    pub guidance_scale: f64,
}

impl StableDiffusion {
    /// Loads every part of a checkpoint.
    ///
    /// # Errors
    /// When a file is missing or malformed, or parts do not fit each other.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let model = Self::open(files, device)?;
        model.unet.read_weights()?;
        Ok(model)
    }

    /// As [`StableDiffusion::load`], but leaves the UNet's weights until they are needed: see [`UNet2DConditionModel::open`].
    ///
    /// # Errors
    /// When a file is missing or malformed, or parts do not fit each other; of the UNet's weights, only what their header
    /// tells.
    pub fn open(files: &ModelFiles, device: &Device) -> Result<Self> {
        let located = |error: Error| error.in_checkpoint(files);
        let model = Self {
            tokenizer: ClipTokenizer::load(files)?,
            text_encoder: ClipTextModel::load(files, device)?,
            unet: UNet2DConditionModel::open(files, device).map_err(located)?,
            vae: AutoencoderKl::load(files, device).map_err(located)?,
            scheduler_config: SchedulerConfig::load(files)?,
        };
        let agree = |file: &str, field: &str, got: usize, expected: usize, whose: &str| {
            if got == expected {
                return Ok(());
            }
            let expected = format!("{expected}, as {whose}");
            Err(Error::UnsupportedConfig {
                file: files.path_of(file),
                field: field.into(),
                got: got.to_string(),
                expected,
            })
        };
        let width = model.text_encoder.config().hidden_size;
        agree(
            "unet/config.json",
            "cross_attention_dim",
            model.unet.cross_attention_dim(),
            width,
            "text_encoder's hidden_size",
        )?;
        let latents = model.vae.config().latent_channels;
        agree(
            "unet/config.json",
            "in_channels",
            model.unet.config().in_channels,
            latents,
            "vae's latent_channels",
        )?;
        Ok(model)
    }

    /// Tokenises and encodes a prompt: `[1, 77, D]`.
    ///
    /// # Errors
    /// When the tokenizer and the text encoder do not fit each other.
    pub fn encode_prompt(&self, prompt: &str) -> Result<(Tokens, Tensor)> {
        let tokens = self.tokenizer.encode(prompt)?;
        let embedding = self.text_encoder.forward(&tokens.ids)?;
        Ok((tokens, embedding))
    }

    /// Pixels a latent, in each direction.
    pub fn vae_scale_factor(&self) -> usize {
        self.vae.config().vae_scale_factor()
    }

    /// Height and width in pixels that the model was trained on.
    pub fn default_size(&self) -> usize {
        self.unet.config().sample_size * self.vae_scale_factor()
    }

    /// Scaled latents of a picture: `(mean + deviation · noise) · scaling_factor`.
    ///
    /// # Shapes
    /// `image [1, 3, H, W]` in [−1, 1]; `noise [1, 4, H/f, W/f]`, standard normal.
    ///
    /// # Errors
    /// When the shapes disagree.
    pub fn encode_image(&self, image: &Tensor, noise: &Tensor) -> Result<Tensor> {
        Ok((self.vae.encode(image)?.sample(noise)? * self.vae.config().scaling_factor)?)
    }

    /// The picture of scaled latents, about [−1, 1].
    ///
    /// # Errors
    /// When the latents have other channels than the VAE.
    pub fn decode_latents(&self, latents: &Tensor) -> Result<Tensor> {
        self.vae.decode(&(latents / self.vae.config().scaling_factor)?)
    }

    /// Draws latents: denoises `latents [1, 4, h, w]` (standard normal) with classifier-free guidance
    /// (Ho & Salimans, arXiv 2207.12598): `ε = ε_u + guidance_scale · (ε_c − ε_u)`.
    ///
    /// `noise` is asked for fresh noise by schedulers that need it. `on_step(i)` is called after step `i`; when it returns
    /// `false`, sampling stops and the latents so far are returned.
    ///
    /// # Errors
    /// When shapes disagree.
    pub fn sample(
        &self,
        latents: &Tensor,
        config: &SampleConfig<'_>,
        scheduler: &mut dyn Scheduler,
        noise: &mut dyn FnMut(&[usize]) -> candle_core::Result<Tensor>,
        on_step: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Tensor> {
        let mut sample = (latents * scheduler.init_noise_sigma())?;
        let text = [config.negative_prompt_embeds, config.prompt_embeds];
        let predict = GuidedPrediction::new(&self.unet, &sample, text, config.guidance_scale)?;
        let timesteps = scheduler.timesteps().to_vec();
        for (i, &timestep) in timesteps.iter().enumerate() {
            let input = scheduler.scale_model_input(&sample, i)?;
            let model_output = predict.at(&input, timestep)?;
            sample = scheduler.step(&model_output, i, &sample, noise)?;
            if !on_step(i) {
                break;
            }
        }
        Ok(sample)
    }
}
