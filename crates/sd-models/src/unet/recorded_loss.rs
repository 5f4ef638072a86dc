//! The step of an optimisation over text embeddings, done again and again at one shape.

use candle_core::{DType, Tensor, Var};
use hiper_kernels::Replay;

use super::UNet2DConditionModel;
use crate::{Error, Result};

/// Losses `mean((target − prediction)²)`, one for each of a batch, and their gradients to its text embeddings. On an NVIDIA card
/// all launches of a step are recorded once, and replayed.
///
/// ```no_run
/// # use candle_core::{DType, Device, Tensor};
/// # fn main() -> sd_models::Result<()> {
/// # let files = sd_models::ModelFiles::from_dir("model")?;
/// # let unet = sd_models::UNet2DConditionModel::load(&files, &Device::Cpu)?;
/// # let latents = Tensor::zeros((1, 4, 64, 64), DType::F32, &Device::Cpu)?;
/// # let text = Tensor::zeros((1, 77, 768), DType::F32, &Device::Cpu)?;
/// let recorded = sd_models::RecordedLoss::new(&unet, &latents, &text)?;
/// let (losses, gradients) = recorded.run(&latents, &[500.0], &text, &latents)?;
/// assert_eq!((losses.len(), gradients.dims()), (1, text.dims()));
/// # Ok(())
/// # }
/// ```
pub struct RecordedLoss<'a> {
    unet: &'a UNet2DConditionModel,
    tensors: Tensors,
    replay: Replay<'a>,
}

/// What a recording reads and writes.
#[derive(Clone)]
struct Tensors {
    latents: Tensor,
    sinusoids: Tensor,
    encoder_hidden_states: Var,
    target: Tensor,
    /// `[B]`.
    losses: Tensor,
    /// As `encoder_hidden_states`.
    gradients: Tensor,
}

impl<'a> RecordedLoss<'a> {
    /// For arguments of the shapes of these, `latents [B, 4, h, w]` and `encoder_hidden_states [B, T, D]`, on their device.
    ///
    /// # Errors
    /// When a shape disagrees with the configuration.
    pub fn new(
        unet: &'a UNet2DConditionModel,
        latents: &Tensor,
        encoder_hidden_states: &Tensor,
    ) -> Result<Self> {
        let batch = latents.dims().first().copied().unwrap_or_default();
        let timesteps = vec![0.0; batch];
        unet.check(latents, &timesteps, encoder_hidden_states)?;
        let zeros = |like: &Tensor| Tensor::zeros(like.shape(), DType::F32, like.device());
        let tensors = Tensors {
            latents: zeros(latents)?,
            sinusoids: unet.time_embedding.rows(&timesteps)?,
            encoder_hidden_states: Var::zeros(
                encoder_hidden_states.shape(),
                DType::F32,
                encoder_hidden_states.device(),
            )?,
            target: zeros(latents)?,
            losses: Tensor::zeros(batch, DType::F32, latents.device())?,
            gradients: zeros(encoder_hidden_states)?,
        };
        let recorded = tensors.clone();
        let replay = Replay::new(latents.device(), move || recorded.compute(unet))?;
        Ok(Self { unet, tensors, replay })
    }

    /// Whether it was recorded for arguments of these shapes.
    pub fn fits(&self, latents: &Tensor, encoder_hidden_states: &Tensor) -> bool {
        let own = &self.tensors;
        own.latents.dims() == latents.dims()
            && own.encoder_hidden_states.dims() == encoder_hidden_states.dims()
    }

    /// Losses and gradients `[B, T, D]`, which the next call overwrites. All arguments are `f32`, of the shapes given; a timestep
    /// for each of the batch.
    ///
    /// # Errors
    /// When a shape is another.
    pub fn run(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        encoder_hidden_states: &Tensor,
        target: &Tensor,
    ) -> Result<(Vec<f32>, Tensor)> {
        let own = &self.tensors;
        for (argument, to, from) in [
            ("latents", &own.latents, latents),
            ("timesteps", &own.sinusoids, &self.unet.time_embedding.rows(timesteps)?),
            ("encoder_hidden_states", own.encoder_hidden_states.as_tensor(), encoder_hidden_states),
            ("target", &own.target, target),
        ] {
            if from.dims() != to.dims() {
                let (expected, got) = (format!("{:?}", to.dims()), format!("{:?}", from.dims()));
                return Err(Error::Argument { argument, expected, got });
            }
            to.slice_set(&from.contiguous()?, 0, 0)?;
        }
        self.replay.run()?;
        Ok((own.losses.to_vec1()?, own.gradients.clone()))
    }
}

impl Tensors {
    fn compute(&self, unet: &UNet2DConditionModel) -> candle_core::Result<()> {
        let context = self.encoder_hidden_states.as_tensor();
        let prediction = unet.forward_at(&self.latents, &self.sinusoids, context)?;
        let losses = (&self.target - prediction)?.sqr()?.flatten_from(1)?.mean(1)?;
        let gradients = losses.sum_all()?.backward()?;
        let Some(gradient) = gradients.get(context) else {
            candle_core::bail!("no gradient reaches the text")
        };
        self.losses.slice_set(&losses.detach(), 0, 0)?;
        self.gradients.slice_set(&gradient.contiguous()?, 0, 0)
    }
}
