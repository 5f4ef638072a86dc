//! Inputs for the benchmarks: tensors whose values are cheap to make and neither zero nor denormal.

use candle_core::{Device, Result, Tensor};

/// A tensor of small pseudo-random values.
///
/// # Errors
/// When it cannot be allocated.
pub fn filled(shape: &[usize]) -> Result<Tensor> {
    let values = (0..shape.iter().product::<usize>())
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 7 & 1023) as f32 / 1024.0 - 0.5);
    Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu)
}
