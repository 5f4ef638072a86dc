//! Two matrix products; the weight is read in the checkpoint's orientation by both.

use rayon::prelude::*;

use super::LinearFunction;
use crate::cpu::matmul::{Mat, matmul_parallel};

pub(super) fn forward(layer: &LinearFunction, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / layer.in_features;
    let weight = Mat::dense(&layer.weight, layer.out_features, layer.in_features);
    let mut y = matmul_parallel(Mat::dense(x, rows, layer.in_features), weight.t());
    if let Some(bias) = &layer.bias {
        add_bias(&mut y, bias);
    }
    y
}

pub(super) fn input_gradient(layer: &LinearFunction, grad_output: &[f32]) -> Vec<f32> {
    let rows = grad_output.len() / layer.out_features;
    let weight = Mat::dense(&layer.weight, layer.out_features, layer.in_features);
    matmul_parallel(Mat::dense(grad_output, rows, layer.out_features), weight)
}

fn add_bias(y: &mut [f32], bias: &[f32]) {
    let rows = crate::cpu::rows_per_thread(y.len() / bias.len(), 16);
    y.par_chunks_mut(rows * bias.len()).for_each(|chunk| {
        for row in chunk.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    });
}
