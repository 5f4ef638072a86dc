//! Steps of an optimisation of the end of a text, which a card takes without waiting for the host.

use candle_core::{DType, Tensor, Var};
use hiper_kernels::{
    AdamConstants, AdamState, Context, GENERATOR_STATE, MseLoss, Replay, add_noise, draw_noise, mse_loss,
    velocity,
};

use super::UNet2DConditionModel;
use crate::{Error, Result};

/// What a network is asked to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The noise.
    Noise,
    /// `√ᾱ noise − √(1 − ᾱ) latents`.
    Velocity,
}

/// What is the same for all steps.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimisationConfig {
    /// The optimiser's constants.
    pub adam: AdamConstants,
    /// What the network is asked to predict.
    pub target: Target,
    /// ᾱ of every training timestep: the network sees `√ᾱ latents + √(1 − ᾱ) noise`.
    pub alphas_cumprod: Vec<f32>,
}

/// Steps of Adam on the last `n` tokens of each text of a batch, against `mean((target − prediction)²)`. On an NVIDIA card a
/// whole step (draws, mixing, network, gradient, Adam) is recorded once, and replayed; nothing is sent in between, and nothing read
/// back before the last. A text stops before the first step whose loss, gradient or moved token is not finite
/// ([`AdamState::counts`]).
///
/// ```no_run
/// # use candle_core::{DType, Tensor};
/// # use sd_models::*;
/// # fn main() -> Result<()> {
/// let card = cuda_device(0)?;
/// let unet = UNet2DConditionModel::load(&ModelFiles::from_dir("model")?.with_dtype(DType::F16), &card)?;
/// let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &card);
/// let (latents, head, tail) = (zeros(&[1, 4, 64, 64])?, zeros(&[1, 72, 768])?, zeros(&[1, 5, 768])?);
/// let adam = AdamConstants { learning_rate: 5e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
/// let config = OptimisationConfig { adam, target: Target::Noise, alphas_cumprod: vec![0.5; 1000] };
/// let recorded = RecordedOptimisation::new(&unet, [&latents, &head, &tail], config)?;
/// let before = AdamState {
///     parameters: tail.flatten_from(1)?,
///     first_moment: zeros(&[1, 5 * 768])?,
///     second_moment: zeros(&[1, 5 * 768])?,
///     counts: zeros(&[1, 2])?,
/// };
/// let generators = Tensor::zeros((1, 625), DType::U32, &card)?; // 624 words of mt19937, and how many of them are used
/// let (losses, after) = recorded.run(&latents, &head, &before, &generators, 2)?;
/// assert_eq!((losses.len(), after.parameters.dims()), (2, before.parameters.dims()));
/// # Ok(())
/// # }
/// ```
pub struct RecordedOptimisation<'a> {
    tensors: Tensors,
    replay: Replay<'a>,
    config: OptimisationConfig,
}

/// What a recording reads and writes.
#[derive(Clone)]
struct Tensors {
    latents: Tensor,
    alphas_cumprod: Tensor,
    /// `[B, 625]` of `u32`.
    generators: Tensor,
    /// `[B, T − n, D]`, in the network's type.
    head: Tensor,
    /// `[B, n, D]`.
    tail: Var,
    /// Of the tail's own numbers.
    adam: AdamState,
    /// `[B]`.
    losses: Tensor,
}

impl<'a> RecordedOptimisation<'a> {
    /// For latents `[B, C, h, w]`, of at least 16 numbers each, and texts `head [B, T − n, D]`, `tail [B, n, D]` of the shapes of
    /// these, on a card.
    ///
    /// # Errors
    /// When a shape disagrees with the configuration, or the network is not on a card.
    pub fn new(
        unet: &'a UNet2DConditionModel,
        [latents, head, tail]: [&Tensor; 3],
        config: OptimisationConfig,
    ) -> Result<Self> {
        let timesteps = vec![0.0; latents.dims().first().copied().unwrap_or_default()];
        unet.check(latents, &timesteps, &Tensor::cat(&[head, tail], 1)?)?;
        let tensors = Tensors::new([latents, head, tail], unet.precision.0, &config.alphas_cumprod)?;
        let (recorded, adam, target) = (tensors.clone(), config.adam, config.target);
        let replay = Replay::new(latents.device(), move || recorded.step(unet, &adam, target))?;
        Ok(Self { tensors, replay, config })
    }

    /// Whether it was recorded for such arguments.
    pub fn fits(&self, tensors: [&Tensor; 3], config: &OptimisationConfig) -> bool {
        let own = [&self.tensors.latents, &self.tensors.head, self.tensors.tail.as_tensor()];
        own.iter().zip(tensors).all(|(own, other)| own.dims() == other.dims()) && self.config == *config
    }

    /// Takes `steps` from a state of the batch: `latents`, `head`, the optimiser, whose parameters are the tails `[B, n·D]`, and
    /// the `generators [B, 625]` of `u32` from which each step draws noise and then a timestep ([`draw_noise`]). Returns the
    /// losses, a list of the batch's for each step, and the optimiser after them; the next call overwrites it.
    ///
    /// # Errors
    /// When a shape is another.
    pub fn run(
        &self,
        latents: &Tensor,
        head: &Tensor,
        adam: &AdamState,
        generators: &Tensor,
        steps: usize,
    ) -> Result<(Vec<Vec<f32>>, AdamState)> {
        let own = &self.tensors;
        for (argument, to, from) in [
            ("latents", &own.latents, latents),
            ("head", &own.head, head),
            ("generators", &own.generators, generators),
        ] {
            set(argument, to, from)?;
        }
        own.adam.set(adam)?;
        let history = Tensor::zeros((steps, latents.dim(0)?), DType::F32, latents.device())?;
        for i in 0..steps {
            self.replay.run()?;
            history.slice_set(&own.losses.unsqueeze(0)?, 0, i)?;
        }
        Ok((history.to_vec2()?, own.adam.clone()))
    }
}

/// Overwrites a tensor's numbers, in its type.
fn set(argument: &'static str, to: &Tensor, from: &Tensor) -> Result<()> {
    if from.dims() != to.dims() {
        let (expected, got) = (format!("{:?}", to.dims()), format!("{:?}", from.dims()));
        return Err(Error::Argument { argument, expected, got });
    }
    Ok(to.slice_set(&from.to_dtype(to.dtype())?.contiguous()?, 0, 0)?)
}

impl Tensors {
    /// Zeros: finite, so that the step that is recorded is too.
    fn new([latents, head, tail]: [&Tensor; 3], dtype: DType, alphas_cumprod: &[f32]) -> Result<Self> {
        let device = latents.device();
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, device);
        let (batch, n, width) = tail.dims3()?;
        let tail = Var::zeros((batch, n, width), DType::F32, device)?;
        let flat = [batch, n * width];
        Ok(Self {
            latents: zeros(latents.dims())?,
            alphas_cumprod: Tensor::new(alphas_cumprod, device)?,
            generators: Tensor::zeros((batch, GENERATOR_STATE), DType::U32, device)?,
            head: Tensor::zeros(head.dims(), dtype, device)?,
            adam: AdamState {
                // The same memory: moving one moves the other.
                parameters: tail.as_tensor().detach().reshape(&flat)?,
                first_moment: zeros(&flat)?,
                second_moment: zeros(&flat)?,
                counts: zeros(&[batch, 2])?,
            },
            tail,
            losses: zeros(&[batch])?,
        })
    }

    fn step(
        &self,
        unet: &UNet2DConditionModel,
        constants: &AdamConstants,
        target: Target,
    ) -> candle_core::Result<()> {
        let Self { latents, alphas_cumprod, .. } = self;
        let drawn = draw_noise(&self.generators, latents.dims(), alphas_cumprod.elem_count())?;
        self.generators.slice_set(&drawn.generators, 0, 0)?;
        let (noise, timesteps) = (drawn.noise, &drawn.timesteps);
        let noisy_latents = add_noise(latents, &noise, timesteps, alphas_cumprod)?;
        let target = match target {
            Target::Noise => noise,
            Target::Velocity => velocity(latents, &noise, timesteps, alphas_cumprod)?,
        };
        let (dtype, scale) = (unet.precision.0, unet.precision.gradient_scale());
        let context = Context::of_head_and_tail(&self.head, &self.tail.to_dtype(dtype)?)?;
        let layers = unet.layers()?;
        let sinusoids = layers.time_embedding.rows_on_card(timesteps)?;
        let noisy_latents = unet.centred(&noisy_latents)?.to_dtype(dtype)?.permute((0, 2, 3, 1))?;
        let (tape, prediction) = layers.on_tape(&noisy_latents, &sinusoids, &context)?;
        let MseLoss { losses, gradient } = mse_loss(prediction.tensor(), &target, scale)?;
        let Some(Some(gradient)) = tape.gradients(&prediction, gradient)?.pop() else {
            candle_core::bail!("no gradient reaches the text")
        };
        self.losses.slice_set(&losses, 0, 0)?;
        self.adam.set(&self.adam.step(&gradient.flatten_from(1)?, &losses, scale, constants)?)
    }
}
