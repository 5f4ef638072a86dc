//! Row by row; a row stays in the first-level cache between its passes.

use rayon::prelude::*;

use super::LayerNormFunction;
use crate::cpu::rows_per_thread;
use crate::cpu::simd::{sum, vectorise};

pub(crate) fn forward(norm: &LayerNormFunction, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0f32; x.len()];
    for_each_row(norm.weight.len(), [x, x], &mut y, |x, _, y| {
        let (mean, scale) = statistics(x, norm.eps);
        for c in 0..x.len() {
            y[c] = (x[c] - mean) * scale * norm.weight[c] + norm.bias[c];
        }
    });
    y
}

/// With `g = dy · w`: `dx = (g − mean(g) − x̂ · mean(g · x̂)) / σ`.
///
/// `residual` is added: the gradient that reaches the input around the normalisation.
pub(crate) fn input_gradient(
    norm: &LayerNormFunction,
    x: &[f32],
    grad_output: &[f32],
    residual: Option<&[f32]>,
) -> Vec<f32> {
    let mut dx = residual.map_or_else(|| vec![0f32; x.len()], <[f32]>::to_vec);
    for_each_row(norm.weight.len(), [x, grad_output], &mut dx, |x, dy, dx| {
        let (mean, scale) = statistics(x, norm.eps);
        let n = x.len() as f32;
        let w = &norm.weight[..x.len()];
        let mean_g = sum(x.len(), |c| dy[c] * w[c]) / n;
        let mean_gx = sum(x.len(), |c| dy[c] * w[c] * (x[c] - mean)) * scale / n;
        for c in 0..x.len() {
            dx[c] += (dy[c] * w[c] - mean_g - (x[c] - mean) * scale * mean_gx) * scale;
        }
    });
    dx
}

/// Mean and 1/σ of a row, in two passes.
#[inline(always)]
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x.len(), |c| x[c]) / n;
    let var = sum(x.len(), |c| (x[c] - mean) * (x[c] - mean)) / n;
    (mean, 1.0 / (var + eps).sqrt())
}

fn for_each_row(
    channels: usize,
    inputs: [&[f32]; 2],
    out: &mut [f32],
    f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) {
    let share = rows_per_thread(out.len() / channels, 16) * channels;
    let [a, b] = inputs;
    out.par_chunks_mut(share).zip(a.par_chunks(share)).zip(b.par_chunks(share)).for_each(|((out, a), b)| {
        vectorise(
            #[inline(always)]
            || {
                for ((out, a), b) in
                    out.chunks_exact_mut(channels).zip(a.chunks_exact(channels)).zip(b.chunks_exact(channels))
                {
                    f(a, b, out);
                }
            },
        );
    });
}
