//! The network, seen through one small trait.

use candle_core::{Device, Tensor, Var};

use crate::{Error, Result};

/// What one step asks of the network.
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

/// The loss and its gradient to the tail.
#[derive(Debug, Clone)]
pub struct LossAndGradient {
    /// `mean((target − prediction)²)`.
    pub loss: f64,
    /// `∂loss/∂tail`, `[N, D]` row-major.
    pub tail_gradient: Vec<f32>,
}

/// A network that predicts noise (or velocity). A closure `Fn(&latents, timestep, &encoder_hidden_states) -> prediction`
/// is one.
pub trait NoisePredictor {
    /// The prediction for `latents [B, 4, h, w]` at `timestep`, given `encoder_hidden_states [B, T, D]`.
    ///
    /// # Errors
    /// Whatever the network's errors are.
    fn predict_noise(
        &self,
        latents: &Tensor,
        timestep: f64,
        encoder_hidden_states: &Tensor,
    ) -> candle_core::Result<Tensor>;

    /// The loss of equation 4, `‖target − ε_θ(x_t, t, [head; tail])‖²` averaged over the latents, and its gradient to the
    /// tail. The default differentiates [`predict_noise`](Self::predict_noise) with candle; implement it where there is a
    /// faster way.
    ///
    /// # Errors
    /// [`Error::NoGradient`] when the network's graph does not lead back to the tail.
    fn loss_and_gradient(&self, step: &TailLoss<'_>) -> Result<LossAndGradient> {
        let tail = Var::from_tensor(step.tail)?;
        let context = Tensor::cat(&[step.head, &tail.as_tensor().unsqueeze(0)?], 1)?;
        let prediction = self.predict_noise(step.noisy_latents, step.timestep, &context)?;
        let loss = (prediction - step.target)?.sqr()?.mean_all()?;
        let gradients = loss.backward()?;
        let gradient = gradients.get(&tail).ok_or(Error::NoGradient)?;
        Ok(LossAndGradient {
            loss: f64::from(loss.to_scalar::<f32>()?),
            tail_gradient: gradient.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?,
        })
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

/// Compares a network's gradient with central differences of its loss along `direction` (`[N, D]` row-major), and returns
/// `(from the gradient, from differences)`. They should agree to about three digits in `f32`.
///
/// Worth a call before a long run with a network of your own: candle has operations that return no gradient, or a part of
/// it, without an error. `x + layer_norm(x)` with candle-nn's fused normalisation returns the residual's part alone.
///
/// # Errors
/// When the network fails or `direction` has another length than the tail.
pub fn check_gradient(
    network: &impl NoisePredictor,
    step: &TailLoss<'_>,
    direction: &[f32],
    size: f64,
) -> Result<(f64, f64)> {
    if direction.len() != step.tail.elem_count() {
        let (expected, got) =
            (format!("{} values, as the tail", step.tail.elem_count()), direction.len().to_string());
        return Err(Error::Argument { argument: "direction", expected, got });
    }
    let analytic = network.loss_and_gradient(step)?;
    let slope =
        analytic.tail_gradient.iter().zip(direction).map(|(&g, &d)| f64::from(g) * f64::from(d)).sum();
    let direction = Tensor::from_slice(direction, step.tail.shape(), step.tail.device())?;
    let loss_at = |size: f64| -> Result<f64> {
        let tail = (step.tail + (&direction * size)?)?;
        let context = Tensor::cat(&[step.head, &tail.unsqueeze(0)?], 1)?;
        let prediction = network.predict_noise(step.noisy_latents, step.timestep, &context)?;
        let squares = (prediction - step.target)?.sqr()?.flatten_all()?.to_vec1::<f32>()?;
        // In f64: the difference of two nearly equal means would lose its digits.
        Ok(squares.iter().map(|&v| f64::from(v)).sum::<f64>() / squares.len() as f64)
    };
    Ok((slope, (loss_at(size)? - loss_at(-size)?) / (2.0 * size)))
}
