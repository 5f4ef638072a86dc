//! One product each way with the same weight.

use super::LinearFunction;
use crate::cpu::gemm::gemm;
use crate::cpu::matrix::Rhs;

/// `y = x Wᵀ + b (+ residual)`.
pub(crate) fn forward(layer: &LinearFunction, x: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
    let (inputs, outputs) = (layer.in_features, layer.out_features);
    let rows = x.len() / inputs;
    gemm(
        rows,
        |row, k, out| out.copy_from_slice(&x[row * inputs..][k]),
        Rhs::Forward(&layer.weight),
        |row, col, y| {
            if let Some(bias) = &layer.bias {
                y.iter_mut().zip(&bias[col..]).for_each(|(y, b)| *y += b);
            }
            if let Some(residual) = residual {
                y.iter_mut().zip(&residual[row * outputs + col..]).for_each(|(y, r)| *y += r);
            }
        },
    )
}

/// `dx = dy W (+ residual)`.
pub(crate) fn input_gradient(
    layer: &LinearFunction,
    grad_output: &[f32],
    residual: Option<&[f32]>,
) -> Vec<f32> {
    let (inputs, outputs) = (layer.in_features, layer.out_features);
    let rows = grad_output.len() / outputs;
    let dy = |row: usize, k, out: &mut [f32]| out.copy_from_slice(&grad_output[row * outputs..][k]);
    gemm(rows, dy, Rhs::Gradient(&layer.weight), |row, col, dx| {
        if let Some(residual) = residual {
            dx.iter_mut().zip(&residual[row * inputs + col..]).for_each(|(dx, r)| *dx += r);
        }
    })
}
