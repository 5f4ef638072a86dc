//! Row by row; a row stays in the first-level cache between its passes.

use super::LayerNormFunction;
use crate::cpu::fill::fill;
use crate::cpu::simd::{sum, vectorise};
use crate::cpu::stretch;

pub(crate) fn forward(norm: &LayerNormFunction, x: &[f32]) -> Vec<f32> {
    rows(norm.weight.len(), [x, x], None, |x, _, y| {
        let (mean, scale) = statistics(x, norm.eps);
        let n = x.len();
        let (y, w, b) = (&mut y[..n], &norm.weight[..n], &norm.bias[..n]);
        for c in 0..n {
            y[c] = (x[c] - mean) * scale * w[c] + b[c];
        }
    })
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
    rows(norm.weight.len(), [x, grad_output], residual, |x, dy, dx| {
        let (mean, scale) = statistics(x, norm.eps);
        let n = x.len();
        let (w, dy, dx) = (&norm.weight[..n], &dy[..n], &mut dx[..n]);
        let mean_g = sum(n, |c| dy[c] * w[c]) / n as f32;
        let mean_gx = sum(n, |c| dy[c] * w[c] * (x[c] - mean)) * scale / n as f32;
        for c in 0..n {
            dx[c] += (dy[c] * w[c] - mean_g - (x[c] - mean) * scale * mean_gx) * scale;
        }
    })
}

/// Mean and 1/σ of a row, in two passes.
#[inline(always)]
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x.len(), |c| x[c]) / n;
    let var = sum(x.len(), |c| (x[c] - mean) * (x[c] - mean)) / n;
    (mean, 1.0 / (var + eps).sqrt())
}

/// Calls `f` on every row of the inputs and of the result, which begins as `start`, or as zeros.
fn rows(
    channels: usize,
    [a, b]: [&[f32]; 2],
    start: Option<&[f32]>,
    f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) -> Vec<f32> {
    fill([1, a.len()], stretch(channels), |_, first, out| {
        let part = first..first + out.len();
        if let Some(start) = start {
            out.copy_from_slice(&start[part.clone()]);
        }
        vectorise(
            #[inline(always)]
            || {
                let rows = a[part.clone()].chunks_exact(channels).zip(b[part].chunks_exact(channels));
                for (out, (a, b)) in out.chunks_exact_mut(channels).zip(rows) {
                    f(a, b, out);
                }
            },
        );
    })
}
