//! One pass over memory each way.

use rayon::prelude::*;

use crate::activation::cpu::{gelu_derivative, normal_cdf};
use crate::cpu::rows_per_thread;
use crate::cpu::simd::vectorise;

pub(crate) fn forward(x: &[f32], c: usize) -> Vec<f32> {
    let mut y = vec![0f32; x.len() / 2];
    let rows = rows_per_thread(y.len() / c, 16);
    y.par_chunks_mut(rows * c).zip(x.par_chunks(rows * 2 * c)).for_each(|(y, x)| {
        vectorise(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(2 * c)) {
                    let (a, b) = x.split_at(c);
                    for i in 0..c {
                        y[i] = a[i] * b[i] * normal_cdf(b[i]);
                    }
                }
            },
        );
    });
    y
}

pub(crate) fn input_gradient(x: &[f32], c: usize, grad_output: &[f32]) -> Vec<f32> {
    let mut dx = vec![0f32; x.len()];
    let rows = rows_per_thread(x.len() / (2 * c), 16);
    let chunks = x.par_chunks(rows * 2 * c).zip(grad_output.par_chunks(rows * c));
    dx.par_chunks_mut(rows * 2 * c).zip(chunks).for_each(|(dx, (x, dy))| {
        vectorise(
            #[inline(always)]
            || {
                for ((dx, x), dy) in
                    dx.chunks_exact_mut(2 * c).zip(x.chunks_exact(2 * c)).zip(dy.chunks_exact(c))
                {
                    let (a, b) = x.split_at(c);
                    let (da, db) = dx.split_at_mut(c);
                    for i in 0..c {
                        da[i] = dy[i] * b[i] * normal_cdf(b[i]);
                        db[i] = dy[i] * a[i] * gelu_derivative(b[i]);
                    }
                }
            },
        );
    });
    dx
}
