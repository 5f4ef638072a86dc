//! diffusers' `AutoencoderKL`.

mod coder;

use candle_core::{Device, Tensor};
use hiper_kernels::Linear;
use serde::Deserialize;

use crate::blocks::{Precision, pointwise};
use crate::{Error, ModelFiles, Result, Weights};
use coder::{Decoder, Encoder};

const FILE: &str = "vae/config.json";

/// The fields of diffusers' `AutoencoderKL` configuration that Stable Diffusion uses, with diffusers' defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct AutoencoderKlConfig {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a picture.
    pub out_channels: usize,
    /// One `DownEncoderBlock2D` a level.
    pub down_block_types: Vec<String>,
    /// One `UpDecoderBlock2D` a level.
    pub up_block_types: Vec<String>,
    /// Channels of each level, from fine to coarse.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks a level (the decoder has one more).
    pub layers_per_block: usize,
    /// `silu`.
    pub act_fn: String,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of every group normalisation.
    pub norm_num_groups: usize,
    /// Height and width that the model was trained on.
    pub sample_size: usize,
    /// What latents are multiplied by before the UNet sees them.
    pub scaling_factor: f64,
    /// Subtracted from latents before scaling; Stable Diffusion 1.x and 2.x have none.
    pub shift_factor: Option<f64>,
    /// Whether the middle blocks hold an attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
}

impl Default for AutoencoderKlConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec!["DownEncoderBlock2D".into()],
            up_block_types: vec!["UpDecoderBlock2D".into()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".into(),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            mid_block_add_attention: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
        }
    }
}

impl AutoencoderKlConfig {
    /// Pixels a latent, in each direction: 8 for Stable Diffusion.
    pub fn vae_scale_factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    fn validate(&self) -> Result<()> {
        let fail = |field: &str, got: String, expected: &str| {
            Err(Error::UnsupportedConfig {
                file: FILE.into(),
                field: field.into(),
                got,
                expected: expected.into(),
            })
        };
        let levels = self.block_out_channels.len();
        if levels == 0 || levels > 8 || self.block_out_channels.contains(&0) {
            return fail(
                "block_out_channels",
                format!("{:?}", self.block_out_channels),
                "one positive number a level",
            );
        }
        for (field, types, supported) in [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ] {
            if let Some(unknown) = types.iter().find(|t| *t != supported) {
                return fail(field, format!("{unknown:?}"), supported);
            }
            if types.len() != levels {
                return fail(
                    field,
                    format!("{} entries", types.len()),
                    &format!("{levels}, as block_out_channels has"),
                );
            }
        }
        if self.act_fn != "silu" {
            return fail("act_fn", self.act_fn.clone(), "silu");
        }
        if let Some(shift) = self.shift_factor.filter(|s| *s != 0.0) {
            return fail("shift_factor", shift.to_string(), "null");
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0) {
            return fail("scaling_factor", self.scaling_factor.to_string(), "a finite number other than 0");
        }
        Ok(())
    }
}

/// The autoencoder between pictures and latents. Frozen.
pub struct AutoencoderKl {
    config: AutoencoderKlConfig,
    encoder: Encoder,
    quant_conv: Option<Linear>,
    post_quant_conv: Option<Linear>,
    decoder: Decoder,
    precision: Precision,
}

impl AutoencoderKl {
    /// Loads `vae/`.
    ///
    /// # Errors
    /// When the configuration asks for what is not built here, or the weights do not fit it.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let config: AutoencoderKlConfig = files.read_config(FILE)?;
        config.validate()?;
        let weights = Weights::load(files, "vae", device)?;
        let z = config.latent_channels;
        let optional =
            |present: bool, name: &str, n| present.then(|| pointwise(&weights.pp(name), n, n)).transpose();
        Ok(Self {
            encoder: Encoder::load(&weights.pp("encoder"), &config)?,
            quant_conv: optional(config.use_quant_conv, "quant_conv", 2 * z)?,
            post_quant_conv: optional(config.use_post_quant_conv, "post_quant_conv", z)?,
            decoder: Decoder::load(&weights.pp("decoder"), &config)?,
            precision: Precision(weights.dtype()),
            config,
        })
    }

    /// What `vae/config.json` says.
    pub fn config(&self) -> &AutoencoderKlConfig {
        &self.config
    }

    /// The distribution of a picture's latents, not yet multiplied by `scaling_factor`.
    ///
    /// # Shapes
    /// `image [B, 3, H, W]` in [−1, 1], `f32`; mean and deviation `[B, 4, H/f, W/f]`.
    ///
    /// # Errors
    /// When the image has other channels or is smaller than one latent.
    pub fn encode(&self, image: &Tensor) -> Result<DiagonalGaussian> {
        let (channels, factor) = (self.config.in_channels, self.config.vae_scale_factor());
        if !matches!(image.dims(), &[_, c, h, w] if c == channels && h >= factor && w >= factor) {
            let (expected, got) =
                (format!("[B, {channels}, H, W], H and W at least {factor}"), format!("{:?}", image.dims()));
            return Err(Error::Argument { argument: "image", expected, got });
        }
        let mut moments = self.encoder.forward(&self.precision.enter(image)?.permute((0, 2, 3, 1))?)?;
        if let Some(quant_conv) = &self.quant_conv {
            moments = quant_conv.forward(&moments)?;
        }
        let moments = self.precision.leave(&moments)?;
        let halves = moments.permute((0, 3, 1, 2))?.chunk(2, 1)?;
        Ok(DiagonalGaussian {
            mean: halves[0].contiguous()?,
            log_variance: halves[1].contiguous()?.clamp(-30f32, 20f32)?,
        })
    }

    /// Decodes latents that are already divided by `scaling_factor`.
    ///
    /// # Shapes
    /// `latents [B, 4, h, w]`, result `[B, 3, h·f, w·f]`, about [−1, 1], not clamped.
    ///
    /// # Errors
    /// When the latents have other channels.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let channels = self.config.latent_channels;
        if !matches!(latents.dims(), &[_, c, h, w] if c == channels && h > 0 && w > 0) {
            let (expected, got) = (format!("[B, {channels}, h, w]"), format!("{:?}", latents.dims()));
            return Err(Error::Argument { argument: "latents", expected, got });
        }
        let mut z = self.precision.enter(latents)?.permute((0, 2, 3, 1))?.contiguous()?;
        if let Some(post_quant_conv) = &self.post_quant_conv {
            z = post_quant_conv.forward(&z)?;
        }
        Ok(self.precision.leave(&self.decoder.forward(&z)?)?.permute((0, 3, 1, 2))?.contiguous()?)
    }
}

/// diffusers' `DiagonalGaussianDistribution`: independent normal latents.
pub struct DiagonalGaussian {
    /// Mean, `[B, 4, h, w]`.
    pub mean: Tensor,
    /// Logarithm of the variance, clamped to [−30, 20].
    pub log_variance: Tensor,
}

impl DiagonalGaussian {
    /// `mean + exp(log_variance / 2) · noise`; `noise` is standard normal and of the mean's shape.
    ///
    /// # Errors
    /// When the shapes disagree.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        Ok((&self.mean + ((&self.log_variance * 0.5)?.exp()? * noise)?)?)
    }
}
