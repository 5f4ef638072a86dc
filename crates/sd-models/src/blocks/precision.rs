//! Between the `f32` of a network's arguments and the type that it computes in.

use candle_core::{DType, Result, Tensor};

/// The type that a network computes in: `f32` on a CPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Precision(pub DType);

impl Precision {
    /// What gradients are multiplied by on their way through the network. That of a mean over many numbers is so small that
    /// `f16` would lose its digits; `bf16` reaches as far down as `f32`.
    pub(crate) fn gradient_scale(self) -> f64 {
        if self.0 == DType::F16 { 1024.0 } else { 1.0 }
    }

    /// An argument of the network, in its type.
    pub(crate) fn enter(self, x: &Tensor) -> Result<Tensor> {
        scale_gradient(x, 1.0 / self.gradient_scale())?.to_dtype(self.0)
    }

    /// A result of the network, in `f32`.
    pub(crate) fn leave(self, x: &Tensor) -> Result<Tensor> {
        scale_gradient(&x.to_dtype(DType::F32)?, self.gradient_scale())
    }
}

/// `x` itself, whose gradient is multiplied by a power of two: `s x − s x + x`, of which the first term alone has a gradient.
fn scale_gradient(x: &Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 || !x.track_op() {
        return Ok(x.clone());
    }
    let scaled = (x * scale)?;
    (&scaled - scaled.detach())? + x.detach()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn values_stay_and_gradients_pass_scaled() {
        let x = Var::new(&[0.1f32, -3e3, 7e-6], &Device::Cpu).unwrap();
        let half = Precision(DType::F16);
        let y = scale_gradient(&x, half.gradient_scale()).unwrap();
        assert_eq!(y.to_vec1::<f32>().unwrap(), x.to_vec1::<f32>().unwrap());
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>().unwrap(), [1024.0; 3]);

        let through = half.leave(&half.enter(&x).unwrap()).unwrap();
        let small = (through.sum_all().unwrap() * 1e-9).unwrap();
        let grads = small.backward().unwrap();
        let got = grads.get(&x).unwrap().to_vec1::<f32>().unwrap();
        assert!(got.iter().all(|g| (g / 1e-9 - 1.0).abs() < 0.1), "{got:?}");
    }

    #[test]
    fn f32_is_left_alone() {
        let x = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let y = Precision(DType::F32).enter(&x).unwrap();
        assert_eq!(y.id(), x.id());
    }
}
