//! The network, seen through one small trait.

use candle_core::{DType, Device, Tensor, Var};

use crate::{Error, Result};

/// What one step asks of the network.
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

    /// `(target − prediction)²`, `[1, 4, h, w]`, in `f32` or wider.
    pub(crate) fn squares(&self, prediction: &Tensor) -> Result<Tensor> {
        if prediction.dims() != self.target.dims() {
            let (expected, got) = (format!("{:?}", self.target.dims()), format!("{:?}", prediction.dims()));
            return Err(Error::argument("the network's prediction", expected, got));
        }
        let dtype = if prediction.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        Ok((prediction.to_dtype(dtype)? - self.target.to_dtype(dtype)?)?.sqr()?)
    }
}

/// The loss and its gradient to the tail.
#[derive(Debug, Clone, PartialEq)]
pub struct LossAndGradient {
    /// `mean((target − prediction)²)`.
    pub loss: f64,
    /// `∂loss/∂tail`, `[N, D]` row-major.
    pub tail_gradient: Vec<f32>,
}

/// A network that predicts noise (or velocity). A closure `Fn(&latents, timestep, &encoder_hidden_states) -> prediction`
/// is one.
///
/// ```
/// use candle_core::Tensor;
/// use hiper_core::NoisePredictor;
///
/// fn takes_a_network(_: &impl NoisePredictor) {}
/// takes_a_network(&|latents: &Tensor, _timestep: f64, text: &Tensor| latents.broadcast_add(&text.mean_all()?));
/// ```
pub trait NoisePredictor {
    /// The prediction for `latents [B, 4, h, w]` at `timestep`, given `encoder_hidden_states [B, T, D]`; it has the shape of
    /// `latents`.
    ///
    /// The tensors arrive in `f32`; a network of another type converts them (`to_dtype` has a gradient) and may answer in it.
    ///
    /// # Errors
    /// Whatever the network's errors are.
    fn predict_noise(
        &self,
        latents: &Tensor,
        timestep: f64,
        encoder_hidden_states: &Tensor,
    ) -> candle_core::Result<Tensor>;

    /// The paper's loss, `‖target − ε_θ(x_t, t, [head; tail])‖²` averaged over the latents, and its gradient to the tail.
    ///
    /// The default differentiates [`predict_noise`](Self::predict_noise) with candle; implement it where there is a faster
    /// way. candle drops gradients silently at operations without a backward pass, and the default notices only when nothing
    /// arrives: see [`check_gradient`](crate::check_gradient).
    ///
    /// # Errors
    /// [`Error::NoGradient`] when the network's graph does not lead back to the tail.
    fn loss_and_gradient(&self, step: &TailLoss<'_>) -> Result<LossAndGradient> {
        let tail = Var::from_tensor(step.tail)?;
        let context = step.encoder_hidden_states(&tail)?;
        let squares = step.squares(&self.predict_noise(step.noisy_latents, step.timestep, &context)?)?;
        let gradients = squares.mean_all()?.backward()?;
        let gradient = gradients.get(&tail).ok_or(Error::NoGradient)?;
        let gradient = gradient.to_dtype(DType::F32)?.flatten_all()?.to_device(&Device::Cpu)?;
        Ok(LossAndGradient { loss: mean(&squares)?, tail_gradient: gradient.to_vec1()? })
    }
}

impl<F> NoisePredictor for F
where
    F: Fn(&Tensor, f64, &Tensor) -> candle_core::Result<Tensor>,
{
    fn predict_noise(
        &self,
        latents: &Tensor,
        timestep: f64,
        encoder_hidden_states: &Tensor,
    ) -> candle_core::Result<Tensor> {
        self(latents, timestep, encoder_hidden_states)
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
