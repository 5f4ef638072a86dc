//! Steps of an optimisation of the end of a text, which a card takes without waiting for the host.

use candle_core::{DType, Tensor, Var};
use hiper_kernels::{AdamConstants, AdamState, Replay};

use super::UNet2DConditionModel;
use crate::{Error, Result};

/// What a network is asked to predict, as [`OptimisationStep`] mixes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The noise.
    Noise,
    /// `signal · noise − sigma · latents`.
    Velocity,
}

/// One step of one of a batch: the network sees `signal · latents + sigma · noise` at `timestep`.
#[derive(Debug, Clone, Copy)]
pub struct OptimisationStep<'a> {
    /// `[1, C, h, w]`.
    pub noise: &'a Tensor,
    /// When.
    pub timestep: f64,
    /// How much of the latents.
    pub signal: f32,
    /// How much noise.
    pub sigma: f32,
}

/// Steps of Adam on the last `n` tokens of each text of a batch, against `mean((target − prediction)²)`. On an NVIDIA card a
/// whole step (mixing, network, gradient, Adam) is recorded once, and replayed; nothing is read back before the last. A text
/// stops before the first step whose loss, gradient or moved token is not finite ([`AdamState::counts`]).
///
/// ```no_run
/// # use candle_core::{DType, Tensor};
/// # use sd_models::*;
/// # fn main() -> Result<()> {
/// let card = cuda_device(0)?;
/// let unet = UNet2DConditionModel::load(&ModelFiles::from_dir("model")?.with_dtype(DType::F16), &card)?;
/// let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &card);
/// let (latents, head, tail) = (zeros(&[1, 4, 64, 64])?, zeros(&[1, 72, 768])?, zeros(&[1, 5, 768])?);
/// let constants = AdamConstants { learning_rate: 5e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
/// let recorded = RecordedOptimisation::new(&unet, [&latents, &head, &tail], constants, Target::Noise)?;
/// let before = AdamState {
///     parameters: tail.flatten_from(1)?,
///     first_moment: zeros(&[1, 5 * 768])?,
///     second_moment: zeros(&[1, 5 * 768])?,
///     counts: zeros(&[1, 2])?,
/// };
/// let noise = zeros(&[1, 4, 64, 64])?;
/// let step = OptimisationStep { noise: &noise, timestep: 500.0, signal: 0.5, sigma: 0.866 };
/// let (losses, after) = recorded.run(&latents, &head, &before, &[vec![step], vec![step]])?;
/// assert_eq!((losses.len(), after.parameters.dims()), (2, before.parameters.dims()));
/// # Ok(())
/// # }
/// ```
pub struct RecordedOptimisation<'a> {
    unet: &'a UNet2DConditionModel,
    tensors: Tensors,
    replay: Replay<'a>,
    constants: AdamConstants,
    target: Target,
}

/// What a recording reads and writes.
#[derive(Clone)]
struct Tensors {
    latents: Tensor,
    noise: Tensor,
    sinusoids: Tensor,
    /// `[2, B, 1, 1, 1]`: `signal` and `sigma`.
    mixture: Tensor,
    /// `[B, T − n, D]`.
    head: Tensor,
    /// `[B, n, D]`.
    tail: Var,
    /// Of the tail's own numbers.
    adam: AdamState,
    /// `[B]`.
    losses: Tensor,
}

impl<'a> RecordedOptimisation<'a> {
    /// For latents `[B, C, h, w]` and texts `head [B, T − n, D]`, `tail [B, n, D]` of the shapes of these, on a card.
    ///
    /// # Errors
    /// When a shape disagrees with the configuration, or the network is not on a card.
    pub fn new(
        unet: &'a UNet2DConditionModel,
        [latents, head, tail]: [&Tensor; 3],
        constants: AdamConstants,
        target: Target,
    ) -> Result<Self> {
        let timesteps = vec![0.0; latents.dims().first().copied().unwrap_or_default()];
        unet.check(latents, &timesteps, &Tensor::cat(&[head, tail], 1)?)?;
        let tensors = Tensors::new(unet, [latents, head, tail])?;
        let recorded = tensors.clone();
        let replay = Replay::new(latents.device(), move || recorded.step(unet, &constants, target))?;
        Ok(Self { unet, tensors, replay, constants, target })
    }

    /// Whether it was recorded for such arguments.
    pub fn fits(&self, tensors: [&Tensor; 3], constants: AdamConstants, target: Target) -> bool {
        let own = [&self.tensors.latents, &self.tensors.head, self.tensors.tail.as_tensor()];
        own.iter().zip(tensors).all(|(own, other)| own.dims() == other.dims())
            && (self.constants, self.target) == (constants, target)
    }

    /// Takes `steps`, a list of the batch's for each, from a state of the batch: `latents`, `head` and the optimiser, whose
    /// parameters are the tails `[B, n·D]`. Returns the losses, a list of the batch's for each step, and the optimiser after
    /// them; the next call overwrites it.
    ///
    /// # Errors
    /// When a shape is another.
    pub fn run(
        &self,
        latents: &Tensor,
        head: &Tensor,
        adam: &AdamState,
        steps: &[Vec<OptimisationStep<'_>>],
    ) -> Result<(Vec<Vec<f32>>, AdamState)> {
        let own = &self.tensors;
        for (argument, to, from) in [("latents", &own.latents, latents), ("head", &own.head, head)] {
            set(argument, to, from)?;
        }
        own.adam.set(adam)?;
        let batch = latents.dim(0)?;
        let history = Tensor::zeros((steps.len(), batch), DType::F32, latents.device())?;
        for (i, step) in steps.iter().enumerate() {
            self.draw(step)?;
            self.replay.run()?;
            history.slice_set(&own.losses.unsqueeze(0)?, 0, i)?;
        }
        Ok((history.to_vec2()?, own.adam.clone()))
    }

    /// Sends a step's random numbers.
    fn draw(&self, step: &[OptimisationStep<'_>]) -> Result<()> {
        let own = &self.tensors;
        let noise: Vec<&Tensor> = step.iter().map(|subject| subject.noise).collect();
        let timesteps: Vec<f64> = step.iter().map(|subject| subject.timestep).collect();
        let parts = [|s: &OptimisationStep<'_>| s.signal, |s: &OptimisationStep<'_>| s.sigma];
        let mixture: Vec<f32> = parts.iter().flat_map(|part| step.iter().map(part)).collect();
        let mixture = Tensor::from_vec(mixture, (2, step.len(), 1, 1, 1), own.latents.device())?;
        set("noise", &own.noise, &Tensor::cat(&noise, 0)?)?;
        set("timesteps", &own.sinusoids, &self.unet.time_embedding.rows(&timesteps)?)?;
        set("signal and sigma", &own.mixture, &mixture)
    }
}

/// Overwrites a tensor's numbers.
fn set(argument: &'static str, to: &Tensor, from: &Tensor) -> Result<()> {
    if from.dims() != to.dims() {
        let (expected, got) = (format!("{:?}", to.dims()), format!("{:?}", from.dims()));
        return Err(Error::Argument { argument, expected, got });
    }
    Ok(to.slice_set(&from.contiguous()?, 0, 0)?)
}

impl Tensors {
    /// Zeros: finite, so that the step that is recorded is too.
    fn new(unet: &UNet2DConditionModel, [latents, head, tail]: [&Tensor; 3]) -> Result<Self> {
        let device = latents.device();
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, device);
        let (batch, n, width) = tail.dims3()?;
        let tail = Var::zeros((batch, n, width), DType::F32, device)?;
        let flat = [batch, n * width];
        Ok(Self {
            latents: zeros(latents.dims())?,
            noise: zeros(latents.dims())?,
            sinusoids: unet.time_embedding.rows(&vec![0.0; batch])?,
            mixture: zeros(&[2, batch, 1, 1, 1])?,
            head: zeros(head.dims())?,
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
        let [signal, sigma] = [self.mixture.get(0)?, self.mixture.get(1)?];
        let mix = |a: &Tensor, b: &Tensor| -> candle_core::Result<_> {
            Ok((a.broadcast_mul(&signal)?, b.broadcast_mul(&sigma)?))
        };
        let (latents, noise) = mix(&self.latents, &self.noise)?;
        let noisy_latents = (latents + noise)?;
        let target = match target {
            Target::Noise => self.noise.clone(),
            Target::Velocity => {
                let (noise, latents) = mix(&self.noise, &self.latents)?;
                (noise - latents)?
            }
        };
        let text = Tensor::cat(&[&self.head, self.tail.as_tensor()], 1)?;
        let prediction = unet.forward_at(&noisy_latents, &self.sinusoids, &text)?;
        let losses = (target - prediction)?.sqr()?.flatten_from(1)?.mean(1)?;
        let gradients = losses.sum_all()?.backward()?;
        let Some(gradient) = gradients.get(self.tail.as_tensor()) else {
            candle_core::bail!("no gradient reaches the text")
        };
        let losses = losses.detach();
        self.losses.slice_set(&losses, 0, 0)?;
        // 0, or NaN where the loss is not finite: Adam stops there, whatever the gradient is.
        let whole = (&losses * 0.0)?.unsqueeze(1)?;
        let gradient = gradient.flatten_from(1)?.broadcast_add(&whole)?;
        self.adam.set(&self.adam.step(&gradient, constants)?)
    }
}
