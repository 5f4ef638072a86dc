//! The network, seen through one small trait.

use candle_core::{DType, Device, Tensor, Var};

use crate::optimisation::{Optimised, TailOptimisation, optimise_step_by_step};
use crate::{Error, Result};

/// What one step of one subject asks of the network.
#[derive(Debug, Clone, Copy)]
pub struct TailLoss<'a> {
    /// `x_t`, `[1, 4, h, w]`.
    pub noisy_latents: &'a Tensor,
    /// `t`.
    pub timestep: f64,
    /// The semantic head, `[1, T − N, D]`: no gradient.
    pub head: &'a Tensor,
    /// The tail, `[N, D]`.
    pub tail: &'a Tensor,
    /// What the network should answer, `[1, 4, h, w]`.
    pub target: &'a Tensor,
}

impl TailLoss<'_> {
    /// `[head; tail]`, `[1, T, D]`: the network's `encoder_hidden_states` with this tail or another in its place.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn encoder_hidden_states(&self, tail: &Tensor) -> candle_core::Result<Tensor> {
        Tensor::cat(&[self.head, &tail.unsqueeze(0)?], 1)
    }
}

/// `(target − prediction)²`, `[B, 4, h, w]`, in `f32` or wider.
pub(crate) fn squares(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    if prediction.dims() != target.dims() {
        let (expected, got) = (format!("{:?}", target.dims()), format!("{:?}", prediction.dims()));
        return Err(Error::argument("the network's prediction", expected, got));
    }
    let dtype = if prediction.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Ok((prediction.to_dtype(dtype)? - target.to_dtype(dtype)?)?.sqr()?)
}

/// One subject's loss and its gradient to the tail.
#[derive(Debug, Clone, PartialEq)]
pub struct LossAndGradient {
    /// `mean((target − prediction)²)`.
    pub loss: f64,
    /// `∂loss/∂tail`, `[N, D]` row-major.
    pub tail_gradient: Vec<f32>,
}

/// A network that predicts noise (or velocity).
///
/// A closure `Fn(&latents [1, 4, h, w], timestep, &encoder_hidden_states [1, T, D]) -> prediction` is one; it sees the subjects
/// of a batch one after the other. To optimise them in one pass, implement the trait for a network that takes a timestep for
/// each sample.
///
/// ```
/// use candle_core::Tensor;
/// use hiper_core::NoisePredictor;
///
/// fn takes_a_network(_: &impl NoisePredictor) {}
/// takes_a_network(&|latents: &Tensor, _timestep: f64, text: &Tensor| latents.broadcast_add(&text.mean_all()?));
/// ```
pub trait NoisePredictor {
    /// The prediction for `latents [B, 4, h, w]`, each at its own of the `B` `timesteps`, given `encoder_hidden_states
    /// [B, T, D]`; it has the shape of `latents`. `B` is 1 but in a batch of subjects.
    ///
    /// The tensors arrive in `f32`; a network of another type converts them (`to_dtype` has a gradient) and may answer in it.
    ///
    /// # Errors
    /// Whatever the network's errors are.
    fn predict_noise(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        encoder_hidden_states: &Tensor,
    ) -> candle_core::Result<Tensor>;

    /// The same of a text in two parts, frozen `head [B, T − N, D]` and `tail [B, N, D]`: a gradient is wanted to the tail alone.
    ///
    /// The default puts them together for [`predict_noise`](Self::predict_noise); implement it for a network that can spare the
    /// head's gradient.
    ///
    /// # Errors
    /// Whatever the network's errors are.
    fn predict_noise_with_tail(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        head: &Tensor,
        tail: &Tensor,
    ) -> candle_core::Result<Tensor> {
        self.predict_noise(latents, timesteps, &Tensor::cat(&[head, tail], 1)?)
    }

    /// The paper's loss of each subject, `‖target − ε_θ(x_t, t, [head; tail])‖²` averaged over its own latents, and the gradient
    /// of that to its own tail: neither depends on who else is in the batch. The subjects' shapes agree.
    ///
    /// The default differentiates [`predict_noise_with_tail`](Self::predict_noise_with_tail) with candle; implement it where there
    /// is a faster way. candle drops gradients silently at operations without a backward pass, and the default notices only when
    /// nothing arrives: see [`check_gradient`](crate::check_gradient).
    ///
    /// # Errors
    /// [`Error::NoGradient`] when the network's graph does not lead back to the tail.
    fn losses_and_gradients(&self, steps: &[TailLoss<'_>]) -> Result<Vec<LossAndGradient>> {
        let tails = steps.iter().map(|step| Var::from_tensor(step.tail)).collect::<Result<Vec<_>, _>>()?;
        let tail = Tensor::stack(&tails.iter().map(Var::as_tensor).collect::<Vec<_>>(), 0)?;
        let stack =
            |of: fn(&TailLoss<'_>) -> Tensor| Tensor::cat(&steps.iter().map(of).collect::<Vec<_>>(), 0);
        let head = stack(|step| step.head.clone())?;
        let timesteps: Vec<f64> = steps.iter().map(|step| step.timestep).collect();
        let latents = stack(|step| step.noisy_latents.clone())?;
        let prediction = self.predict_noise_with_tail(&latents, &timesteps, &head, &tail)?;
        let squares = squares(&prediction, &stack(|step| step.target.clone())?)?;
        // The sum of the subjects' means: a mean over the batch would shrink every gradient.
        let sum_of_losses = (squares.sum_all()? / (squares.elem_count() / steps.len()) as f64)?;
        let gradients = sum_of_losses.backward()?;
        let each = tails.iter().enumerate().map(|(i, tail)| {
            let gradient = gradients.get(tail).ok_or(Error::NoGradient)?;
            let gradient = gradient.to_dtype(DType::F32)?.flatten_all()?.to_device(&Device::Cpu)?;
            Ok(LossAndGradient { loss: mean(&squares.get(i)?)?, tail_gradient: gradient.to_vec1()? })
        });
        each.collect()
    }

    /// How many steps in a row [`optimise`](Self::optimise) takes in less time than one after the other: 1 for the default, more
    /// where the optimiser runs beside the network, and nothing need be waited for in between.
    fn steps_at_once(&self) -> usize {
        1
    }

    /// Steps of Adam for each subject of a batch: what [`Personalisation`] calls. A subject stops before the first step whose
    /// loss, gradient or moved tail is not finite.
    ///
    /// The default takes [`losses_and_gradients`](Self::losses_and_gradients) step by step.
    ///
    /// # Errors
    /// Whatever the network's errors are: no subject has moved then.
    ///
    /// [`Personalisation`]: crate::Personalisation
    fn optimise(&self, subjects: &[TailOptimisation<'_>], steps: usize) -> Result<Vec<Optimised>> {
        optimise_step_by_step(self, subjects, steps)
    }
}

impl<F> NoisePredictor for F
where
    F: Fn(&Tensor, f64, &Tensor) -> candle_core::Result<Tensor>,
{
    fn predict_noise(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        encoder_hidden_states: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let each = timesteps.iter().enumerate().map(|(i, &timestep)| {
            self(&latents.narrow(0, i, 1)?, timestep, &encoder_hidden_states.narrow(0, i, 1)?)
        });
        Tensor::cat(&each.collect::<candle_core::Result<Vec<_>>>()?, 0)
    }
}

/// The mean of `f32` or `f64` values, summed in `f64`: thousands of values summed in `f32` lose two digits.
pub(crate) fn mean(values: &Tensor) -> Result<f64> {
    let values = values.flatten_all()?.to_device(&Device::Cpu)?;
    let sum: f64 = match values.dtype() {
        DType::F64 => values.to_vec1::<f64>()?.iter().sum(),
        _ => values.to_vec1::<f32>()?.iter().map(|&v| f64::from(v)).sum(),
    };
    Ok(sum / values.elem_count() as f64)
}
