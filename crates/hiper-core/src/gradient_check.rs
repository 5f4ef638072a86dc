//! Is a network's gradient the slope of its loss?

use candle_core::{DType, Device, Tensor};

use crate::predictor::{mean, squares};
use crate::{Error, NoisePredictor, Result, TailLoss, TorchGenerator};

/// How a gradient is compared with differences of the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientCheckConfig {
    /// Random directions tried. One can be almost level by chance.
    pub num_directions: usize,
    /// Length of the move to each side, relative to the tail's own length. Larger ones see the loss's curvature, smaller ones
    /// the rounding of `f32`.
    pub step_size: f64,
}

impl Default for GradientCheckConfig {
    fn default() -> Self {
        Self { num_directions: 4, step_size: 0.02 }
    }
}

/// Slopes of the loss along random directions of length 1, taken twice.
#[derive(Debug, Clone, PartialEq)]
pub struct GradientCheck {
    /// From the network's gradient.
    pub from_gradient: Vec<f64>,
    /// From the loss on both sides of the tail.
    pub from_differences: Vec<f64>,
}

impl GradientCheck {
    /// Relative L2 error of the gradient's slopes; 0 when both are level.
    pub fn relative_error(&self) -> f64 {
        let pairs = self.from_gradient.iter().zip(&self.from_differences);
        let error: f64 = pairs.map(|(a, b)| (a - b).powi(2)).sum();
        let scale: f64 = self.from_differences.iter().map(|b| b * b).sum();
        if error == 0.0 { 0.0 } else { (error / scale).sqrt() }
    }

    /// Refuses a gradient that is off by more than `tolerance`. A correct one in `f32` is good for 1e-2, in `f64` for 1e-4; one
    /// that lost a part of the network is off by 0.1 and more.
    ///
    /// # Errors
    /// [`Error::WrongGradient`].
    pub fn ensure(&self, tolerance: f64) -> Result<()> {
        let relative_error = self.relative_error();
        // Written so that NaN is refused.
        if relative_error <= tolerance {
            Ok(())
        } else {
            Err(Error::WrongGradient { relative_error, tolerance })
        }
    }
}

/// Compares a network's gradient with central differences of its loss along random directions.
///
/// Worth a call before a long run with a network of your own: candle has operations that return no gradient, or a part of
/// it, without an error. `x + layer_norm(x)` with candle-nn's fused normalisation returns the residual's part alone. A check
/// costs one gradient and two evaluations a direction. [`Personalisation::check_gradient`](crate::Personalisation::check_gradient)
/// calls it for the next step of a run.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hiper_core::{TailLoss, TorchGenerator, check_gradient};
///
/// let mut generator = TorchGenerator::new(0);
/// let mut draw = |shape: &[usize]| generator.randn_tensor(shape, &Device::Cpu);
/// let (latents, target) = (draw(&[1, 4, 8, 8])?, draw(&[1, 4, 8, 8])?);
/// let (head, tail) = (draw(&[1, 9, 16])?, draw(&[5, 16])?);
/// let step = TailLoss { noisy_latents: &latents, timestep: 500.0, head: &head, tail: &tail, target: &target };
///
/// let whole = |x: &Tensor, _t: f64, text: &Tensor| x.broadcast_add(&(text.sqr()? + text)?.mean_all()?);
/// check_gradient(&whole, &step, &mut generator, Default::default())?.ensure(1e-2)?;
/// let cut = |x: &Tensor, _t: f64, text: &Tensor| x.broadcast_add(&(text.sqr()?.detach() + text)?.mean_all()?);
/// assert!(check_gradient(&cut, &step, &mut generator, Default::default())?.ensure(1e-2).is_err());
/// # Ok::<(), hiper_core::Error>(())
/// ```
///
/// # Errors
/// When the network fails.
pub fn check_gradient(
    network: &impl NoisePredictor,
    step: &TailLoss<'_>,
    generator: &mut TorchGenerator,
    config: GradientCheckConfig,
) -> Result<GradientCheck> {
    let gradient = network.losses_and_gradients(std::slice::from_ref(step))?.pop();
    let gradient = gradient.map(|of| of.tail_gradient).unwrap_or_default();
    let n = step.tail.elem_count();
    if gradient.len() != n {
        return Err(Error::argument(
            "tail_gradient",
            format!("{n} values, as the tail"),
            format!("{} values", gradient.len()),
        ));
    }
    let tail_values: Vec<f32> =
        step.tail.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let size = config.step_size * length(&tail_values).max(f64::MIN_POSITIVE);
    let loss_at = |direction: &Tensor, size: f64| -> Result<f64> {
        let context = step.encoder_hidden_states(&(step.tail + (direction * size)?)?)?;
        let prediction = network.predict_noise(step.noisy_latents, &[step.timestep], &context)?;
        mean(&squares(&prediction, step.target)?)
    };
    let mut check = GradientCheck { from_gradient: Vec::new(), from_differences: Vec::new() };
    for _ in 0..config.num_directions {
        let mut direction = generator.randn(n);
        let scale = 1.0 / length(&direction).max(f64::MIN_POSITIVE);
        direction.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
        let slope = gradient.iter().zip(&direction).map(|(&g, &d)| f64::from(g) * f64::from(d)).sum();
        check.from_gradient.push(slope);
        let direction = Tensor::from_vec(direction, step.tail.shape(), step.tail.device())?
            .to_dtype(step.tail.dtype())?;
        let difference = loss_at(&direction, size)? - loss_at(&direction, -size)?;
        check.from_differences.push(difference / (2.0 * size));
    }
    Ok(check)
}

fn length(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}
