//! One pass over memory each way.

use crate::activation::cpu::{gelu_derivative, normal_cdf};
use crate::cpu::fill::fill;
use crate::cpu::simd::vectorise;
use crate::cpu::stretch;

pub(crate) fn forward(x: &[f32], c: usize) -> Vec<f32> {
    let len = x.len() / 2;
    fill([1, len], stretch(c), |_, first, y| {
        let x = &x[2 * first..];
        vectorise(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(2 * c)) {
                    let (a, b) = x.split_at(c);
                    let (a, b, y) = (&a[..c], &b[..c], &mut y[..c]);
                    for i in 0..c {
                        y[i] = a[i] * b[i] * normal_cdf(b[i]);
                    }
                }
            },
        );
    })
}

pub(crate) fn input_gradient(x: &[f32], c: usize, grad_output: &[f32]) -> Vec<f32> {
    fill([1, x.len()], stretch(2 * c), |_, first, dx| {
        let (x, dy) = (&x[first..], &grad_output[first / 2..]);
        vectorise(
            #[inline(always)]
            || {
                for ((dx, x), dy) in
                    dx.chunks_exact_mut(2 * c).zip(x.chunks_exact(2 * c)).zip(dy.chunks_exact(c))
                {
                    let (a, b) = x.split_at(c);
                    let (da, db) = dx.split_at_mut(c);
                    // Slices of one length: the loop then has no bounds to check, and vectorises.
                    let (a, b, dy, da, db) = (&a[..c], &b[..c], &dy[..c], &mut da[..c], &mut db[..c]);
                    for i in 0..c {
                        da[i] = dy[i] * b[i] * normal_cdf(b[i]);
                        db[i] = dy[i] * a[i] * gelu_derivative(b[i]);
                    }
                }
            },
        );
    })
}
