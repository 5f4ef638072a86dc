//! The loss of a prediction on a card, and the gradient that a backward pass begins with: `kernels/loss.cu`.

use candle_core::{DType, Result, Tensor};

use crate::error::check_shape;
use crate::gpu::{Argument, Card, Gpu, Launch, check_dtype, on_card, type_name, with_views};

/// What [`mse_loss`] computes.
#[derive(Debug, Clone)]
pub struct MseLoss {
    /// `[B]`, `f32`.
    pub losses: Tensor,
    /// As the prediction: that of the losses times the scale.
    pub gradient: Tensor,
}

/// `mean((target − prediction)²)` for each of a batch, and its gradient times `gradient_scale`, which keeps it in the range of `f16`.
/// `prediction [B, h, w, C]` of any type, `target [B, C, h, w]` in `f32`.
///
/// # Errors
/// When shapes or types disagree, or a tensor is not on a card.
///
/// ```no_run
/// use candle_core::{DType, Tensor};
/// use hiper_kernels::{cuda_device, mse_loss};
///
/// # fn main() -> candle_core::Result<()> {
/// let card = cuda_device(0)?;
/// let prediction = Tensor::ones((1, 64, 64, 4), DType::F16, &card)?;
/// let target = Tensor::zeros((1, 4, 64, 64), DType::F32, &card)?;
/// let loss = mse_loss(&prediction, &target, 1024.0)?;
/// assert_eq!(loss.losses.to_vec1::<f32>()?, [1.0]);
/// # Ok(())
/// # }
/// ```
pub fn mse_loss(prediction: &Tensor, target: &Tensor, gradient_scale: f64) -> Result<MseLoss> {
    const NAME: &str = "mse_loss";
    let (batch, height, width, channels) = prediction.dims4()?;
    let expected = [batch, channels, height, width];
    check_shape(!expected.contains(&0), NAME, "prediction", || "no size 0".into(), prediction.dims())?;
    check_shape(target.dims() == expected, NAME, "target", || format!("{expected:?}"), target.dims())?;
    check_dtype(prediction, NAME)?;
    if target.dtype() != DType::F32 {
        return Err(candle_core::Error::UnsupportedDTypeForOp(target.dtype(), NAME).bt());
    }
    on_card!(Card::needed(prediction, NAME)?, gpu => {
        let losses = gpu.alloc(DType::F32, batch)?;
        let gradient = gpu.alloc(prediction.dtype(), prediction.elem_count())?;
        let name = format!("{NAME}_{}", type_name(prediction.dtype()));
        let launch = Launch { threads: 1024, shared_bytes: 128, ..Launch::new(name, [batch, 1, 1]) };
        with_views(&gpu, [prediction, target], |[prediction, target]| {
            let results = [(&losses).into(), (&gradient).into()];
            let inputs = [prediction, target].map(Argument::from);
            let sizes = [height * width, channels].map(Argument::from);
            let scale = [Argument::F32(gradient_scale as f32)];
            gpu.launch(&launch, &[&results, inputs.as_slice(), &sizes, &scale].concat())
        })?;
        Ok(MseLoss {
            losses: losses.into_tensor(&gpu, &[batch])?,
            gradient: gradient.into_tensor(&gpu, prediction.dims())?,
        })
    })
}

/// The kernel's numbers are looked at in kernels/host/tests/loss.rs.
#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    use crate::gpu::host::on_host;

    #[test]
    fn each_of_a_batch_has_its_own_loss() {
        let prediction = Tensor::new(&[[[[1f32, 2.0]]], [[[3.0, 5.0]]]], &Device::Cpu).unwrap();
        let target = Tensor::new(&[[[[0f32]], [[0.0]]], [[[3.0]], [[4.0]]]], &Device::Cpu).unwrap();
        let MseLoss { losses, gradient } = on_host(|| mse_loss(&prediction, &target, 8.0)).unwrap();
        assert_eq!(losses.to_vec1::<f32>().unwrap(), [2.5, 0.5]);
        assert_eq!(gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [8.0, 16.0, 0.0, 8.0]);
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        let of_shape = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let (prediction, target) = (of_shape(&[1, 2, 3, 4]), of_shape(&[1, 4, 2, 3]));
        let on_cpu = mse_loss(&prediction, &target, 1.0).unwrap_err().to_string();
        assert!(on_cpu.contains("CPU"), "{on_cpu}");
        assert!(on_host(|| mse_loss(&prediction, &prediction, 1.0)).is_err());
        let half = target.to_dtype(DType::F16).unwrap();
        assert!(on_host(|| mse_loss(&prediction, &half, 1.0)).is_err());
    }
}
