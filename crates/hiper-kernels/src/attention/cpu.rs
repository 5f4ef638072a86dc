//! Forward pass: a block of queries against a block of keys at a time, with the online softmax.

use rayon::prelude::*;

use super::{AttentionMask, AttentionShape};
use crate::cpu::math::exp;
use crate::cpu::matmul::{Mat, Write, matmul_into};
use crate::cpu::simd::{max, sum, vectorise};

/// Queries and keys a block: the scores of one block (256 KiB) stay in the second-level cache.
pub(super) const QUERY_BLOCK: usize = 128;
pub(super) const KEY_BLOCK: usize = 512;

/// Returns `y [B, Sq, H·D]` and the log-sum-exp `[B, Sq, H]` of every row of scores.
pub(super) fn forward(shape: &AttentionShape, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let width = shape.width();
    let mut y = vec![0f32; q.len()];
    let mut log_sum_exp = vec![0f32; shape.batch * shape.queries * shape.num_heads];
    // A short sequence is cut finer, so that every thread has work.
    let block = crate::cpu::rows_per_thread(shape.queries, 16).min(QUERY_BLOCK);
    let images = y
        .par_chunks_mut(shape.queries * width)
        .zip(log_sum_exp.par_chunks_mut(shape.queries * shape.num_heads));
    images.enumerate().for_each(|(b, (y, log_sum_exp))| {
        let blocks = y.par_chunks_mut(block * width).zip(log_sum_exp.par_chunks_mut(block * shape.num_heads));
        blocks.enumerate().for_each(|(i, (y, log_sum_exp))| {
            let mut scores = vec![0f32; block * shape.keys.min(KEY_BLOCK)];
            for head in 0..shape.num_heads {
                let tile = Tile { shape, image: b, head, first_query: i * block };
                tile.forward([q, k, v], &mut scores, y, log_sum_exp);
            }
        });
    });
    (y, log_sum_exp)
}

/// One head of one block of queries.
struct Tile<'a> {
    shape: &'a AttentionShape,
    image: usize,
    head: usize,
    first_query: usize,
}

impl Tile<'_> {
    /// `y` and `log_sum_exp` are the block's rows, all heads.
    fn forward(&self, [q, k, v]: [&[f32]; 3], scores: &mut [f32], y: &mut [f32], log_sum_exp: &mut [f32]) {
        let shape = self.shape;
        let (width, d) = (shape.width(), shape.head_dim);
        let rows = y.len() / width;
        let channel = self.head * d;
        let q = shape.head(q, shape.queries, self.image, self.head).row_range(self.first_query, rows);
        let (k, v) = (
            shape.head(k, shape.keys, self.image, self.head),
            shape.head(v, shape.keys, self.image, self.head),
        );
        // Running maximum and sum of each row (Milakov & Gimelshein, arXiv 1805.02867).
        let mut maxima = vec![f32::NEG_INFINITY; rows];
        let mut sums = vec![0f32; rows];
        for start in (0..shape.keys).step_by(KEY_BLOCK) {
            let keys = KEY_BLOCK.min(shape.keys - start);
            if shape.mask == AttentionMask::Causal && start > self.first_query + rows - 1 {
                break;
            }
            let scores = &mut scores[..rows * keys];
            matmul_into(scores, keys, Write::Replace, q, k.row_range(start, keys).t());
            vectorise(|| {
                for (r, scores) in scores.chunks_exact_mut(keys).enumerate() {
                    let seen = shape.seen(self.first_query + r, start, keys);
                    scores[seen..].fill(0.0);
                    let scores = &mut scores[..seen];
                    scores.iter_mut().for_each(|s| *s *= shape.softmax_scale);
                    let new_max = maxima[r].max(max(scores));
                    let shrink = if maxima[r] == f32::NEG_INFINITY { 0.0 } else { exp(maxima[r] - new_max) };
                    scores.iter_mut().for_each(|s| *s = exp(*s - new_max));
                    sums[r] = sums[r] * shrink + sum(scores.len(), |i| scores[i]);
                    maxima[r] = new_max;
                    y[r * width + channel..][..d].iter_mut().for_each(|y| *y *= shrink);
                }
            });
            matmul_into(
                &mut y[channel..],
                width,
                Write::Add,
                Mat::dense(scores, rows, keys),
                v.row_range(start, keys),
            );
        }
        for r in 0..rows {
            y[r * width + channel..][..d].iter_mut().for_each(|y| *y /= sums[r]);
            log_sum_exp[r * shape.num_heads + self.head] = maxima[r] + sums[r].ln();
        }
    }
}

impl AttentionShape {
    /// One head's rows of `x [B, rows, H·D]`.
    pub(super) fn head<'a>(&self, x: &'a [f32], rows: usize, image: usize, head: usize) -> Mat<'a> {
        Mat::strided(
            &x[image * rows * self.width() + head * self.head_dim..],
            rows,
            self.head_dim,
            self.width(),
        )
    }

    /// How many of the keys `start..start + keys` a query sees; they are the first ones.
    pub(super) fn seen(&self, query: usize, start: usize, keys: usize) -> usize {
        match self.mask {
            AttentionMask::None => keys,
            AttentionMask::Causal => (query + 1).saturating_sub(start).min(keys),
        }
    }
}
