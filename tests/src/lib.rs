//! What the golden tests and the binary `parity` share: a checkpoint against values that PyTorch computed from it.

mod golden;

pub use golden::{Golden, parity, tolerance};

use candle_core::Tensor;
use hiper_core::NoisePredictor;
use sd_models::UNet2DConditionModel;

/// The network of a checkpoint as hiper-core sees it.
pub struct Network<'a>(pub &'a UNet2DConditionModel);

impl NoisePredictor for Network<'_> {
    fn predict_noise(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        text: &Tensor,
    ) -> candle_core::Result<Tensor> {
        Ok(self.0.forward(latents, timesteps, text)?)
    }

    fn predict_noise_with_tail(
        &self,
        latents: &Tensor,
        timesteps: &[f64],
        head: &Tensor,
        tail: &Tensor,
    ) -> candle_core::Result<Tensor> {
        Ok(self.0.forward_with_tail(latents, timesteps, head, tail)?)
    }
}

/// `‖a − b‖ / ‖b‖`, summed in `f64`.
///
/// # Errors
/// When the number of elements differs.
pub fn relative_l2(a: &Tensor, b: &Tensor) -> anyhow::Result<f64> {
    let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
    anyhow::ensure!(a.len() == b.len(), "{} elements against {}", a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(&b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    Ok((difference / norm).sqrt())
}
