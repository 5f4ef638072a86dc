//! Backward pass: scores are recomputed block by block from the saved log-sum-exp.
//!
//! With `P = exp(S − lse)` and `δ = rowsum(dy ∘ y)`:
//! `dV = Pᵀ dy`, `dS = P ∘ (dy Vᵀ − δ) · scale`, `dQ = dS K`, `dK = dSᵀ Q`.

use rayon::prelude::*;

use super::AttentionShape;
use super::cpu::{KEY_BLOCK, QUERY_BLOCK};
use crate::cpu::math::exp;
use crate::cpu::matmul::{Mat, Write, matmul_into};
use crate::cpu::simd::{sum, vectorise};

/// What the forward pass left.
pub(super) struct Saved<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub y: &'a [f32],
    pub log_sum_exp: &'a [f32],
}

/// `[dq, dk, dv]`.
pub(super) fn input_gradients(
    shape: &AttentionShape,
    saved: &Saved<'_>,
    grad_output: &[f32],
) -> [Vec<f32>; 3] {
    let heads: Vec<[Vec<f32>; 3]> = (0..shape.batch * shape.num_heads)
        .into_par_iter()
        .map(|i| head_gradients(shape, saved, grad_output, i / shape.num_heads, i % shape.num_heads))
        .collect();
    let interleave = |which: usize, rows: usize| {
        let (width, d) = (shape.width(), shape.head_dim);
        let mut out = vec![0f32; shape.batch * rows * width];
        out.par_chunks_exact_mut(width).enumerate().for_each(|(row, out)| {
            let (image, row) = (row / rows, row % rows);
            for (head, out) in out.chunks_exact_mut(d).enumerate() {
                out.copy_from_slice(&heads[image * shape.num_heads + head][which][row * d..][..d]);
            }
        });
        out
    };
    [interleave(0, shape.queries), interleave(1, shape.keys), interleave(2, shape.keys)]
}

/// One head's gradients, dense `[rows, D]` each.
fn head_gradients(
    shape: &AttentionShape,
    saved: &Saved<'_>,
    dy: &[f32],
    image: usize,
    head: usize,
) -> [Vec<f32>; 3] {
    let d = shape.head_dim;
    let q = shape.head(saved.q, shape.queries, image, head);
    let y = shape.head(saved.y, shape.queries, image, head);
    let dy = shape.head(dy, shape.queries, image, head);
    let k = shape.head(saved.k, shape.keys, image, head);
    let v = shape.head(saved.v, shape.keys, image, head);
    let lse = |row: usize| saved.log_sum_exp[(image * shape.queries + row) * shape.num_heads + head];
    let delta: Vec<f32> = (0..shape.queries)
        .map(|r| {
            let (y, dy) = (&y.data[r * y.row_stride..], &dy.data[r * dy.row_stride..]);
            sum(d, |c| y[c] * dy[c])
        })
        .collect();
    let (mut dq, mut dk, mut dv) =
        (vec![0f32; shape.queries * d], vec![0f32; shape.keys * d], vec![0f32; shape.keys * d]);
    let block = shape.queries.min(QUERY_BLOCK) * shape.keys.min(KEY_BLOCK);
    let (mut p, mut ds) = (vec![0f32; block], vec![0f32; block]);
    for k_start in (0..shape.keys).step_by(KEY_BLOCK) {
        let keys = KEY_BLOCK.min(shape.keys - k_start);
        let (k, v) = (k.row_range(k_start, keys), v.row_range(k_start, keys));
        let (dk, dv) = (&mut dk[k_start * d..][..keys * d], &mut dv[k_start * d..][..keys * d]);
        for q_start in (0..shape.queries).step_by(QUERY_BLOCK) {
            let rows = QUERY_BLOCK.min(shape.queries - q_start);
            let (q, dy) = (q.row_range(q_start, rows), dy.row_range(q_start, rows));
            let (p, ds) = (&mut p[..rows * keys], &mut ds[..rows * keys]);
            matmul_into(p, keys, Write::Replace, q, k.t());
            matmul_into(ds, keys, Write::Replace, dy, v.t());
            vectorise(|| {
                for (r, (p, ds)) in p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys)).enumerate() {
                    let row = q_start + r;
                    let (lse, delta) = (lse(row), delta[row]);
                    let seen = shape.seen(row, k_start, keys);
                    for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
                        *p = exp(*p * shape.softmax_scale - lse);
                        *ds = *p * (*ds - delta) * shape.softmax_scale;
                    }
                    p[seen..].fill(0.0);
                    ds[seen..].fill(0.0);
                }
            });
            let (p, ds) = (Mat::dense(p, rows, keys), Mat::dense(ds, rows, keys));
            matmul_into(dv, d, Write::Add, p.t(), dy);
            matmul_into(dk, d, Write::Add, ds.t(), q);
            matmul_into(&mut dq[q_start * d..], d, Write::Add, ds, k);
        }
    }
    [dq, dk, dv]
}
