//! Backward pass: scores are recomputed block by block from the saved log-sum-exp.
//!
//! With `P = exp(S − lse)` and `δ = rowsum(dy ∘ y)`:
//! `dV = Pᵀ dy`, `dS = P ∘ (dy Vᵀ − δ) · scale`, `dQ = dS K`, `dK = dSᵀ Q`. As in the forward pass, 32 queries lie in the
//! lanes of the vectors and `P` and `dS` are held transposed.

use std::ops::Range;

use pulp::Simd;
use rayon::prelude::*;

use super::AttentionShape;
use super::cpu::{Head, KEY_BLOCK, QUERIES};
use crate::cpu::fill::fill;
use crate::cpu::isa::Isa;
use crate::cpu::math::exp_of_negative;
use crate::cpu::microkernel::{COLS, Lhs, Tile, tile};
use crate::cpu::scratch::{Scratch, with_local};
use crate::cpu::simd::{RowsOf32, run_rows, sum};

/// Queries of a head that one task takes, a multiple of a group: a thread that was held up is helped out. (A constant, as the
/// order of the sums depends on it. Tests have few queries.)
const PART: usize = if cfg!(test) { 64 } else { 2048 };

/// What the forward pass left.
pub(crate) struct Saved<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) y: &'a [f32],
    pub(crate) log_sum_exp: &'a [f32],
}

/// `[dq, dk, dv]`, the latter two of the keys that are `wanted`.
pub(crate) fn input_gradients(
    shape: &AttentionShape,
    saved: &Saved<'_>,
    grad_output: &[f32],
    wanted: Range<usize>,
) -> [Vec<f32>; 3] {
    let isa = Isa::current();
    let head = |i: usize| Head { shape, image: i / shape.num_heads, head: i % shape.num_heads, isa };
    let (heads, padded) = (shape.batch * shape.num_heads, head(0).padded_dim());
    // `[head][part]` of `dq` of the part's queries, and of what they add to `dk` and `dv`.
    let parts = shape.queries.div_ceil(PART);
    let (part_size, keys_size) = (PART.min(shape.queries) * padded, wanted.len() * padded);
    let size = part_size + 2 * keys_size;
    let mut gradients = Scratch::new(heads * parts * size);
    gradients.par_chunks_exact_mut(size).enumerate().for_each(|(i, gradients)| {
        let (dq, rest) = gradients.split_at_mut(part_size);
        let (dk, dv) = rest.split_at_mut(keys_size);
        let first = i % parts * PART;
        let queries = first..(first + PART).min(shape.queries);
        let (head, wanted) = (head(i / parts), wanted.clone());
        HeadGradients { head, queries, wanted, saved, dy: grad_output, dq, dk, dv }.run();
    });
    let (width, d) = (shape.width(), shape.head_dim);
    // `[rows, H·D]` of what every head has of a row: the sum over the parts from `parts(row)`, at `at(row)`.
    let interleave = |rows: usize, of: &(dyn Fn(usize) -> (Range<usize>, usize) + Sync)| {
        let size_of = [shape.batch * rows, width];
        fill(size_of, width, |row, _, out| {
            let (image, row) = (row / rows, row % rows);
            let (parts_of_row, at) = of(row);
            for (head, out) in out.chunks_exact_mut(d).enumerate() {
                for part in parts_of_row.clone() {
                    let from = ((image * shape.num_heads + head) * parts + part) * size + at;
                    out.iter_mut().zip(&gradients[from..]).for_each(|(out, g)| *out += g);
                }
            }
        })
    };
    [
        interleave(shape.queries, &|row| (row / PART..row / PART + 1, row % PART * padded)),
        interleave(wanted.len(), &|row| (0..parts, part_size + row * padded)),
        interleave(wanted.len(), &|row| (0..parts, part_size + keys_size + row * padded)),
    ]
}

/// The gradients of one head from some of its queries, `[rows, D]` with rows padded to whole vectors.
struct HeadGradients<'a> {
    head: Head<'a>,
    queries: Range<usize>,
    /// Keys that get a gradient.
    wanted: Range<usize>,
    saved: &'a Saved<'a>,
    dy: &'a [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl HeadGradients<'_> {
    fn run(mut self) {
        let shape = self.head.shape;
        let (d, padded) = (shape.head_dim, self.head.padded_dim());
        let (rows, columns) = (self.head.rows_size(), self.head.columns_size());
        self.dk.fill(0.0);
        self.dv.fill(0.0);
        let lanes = 3 * d * QUERIES;
        let group = 2 * QUERIES * padded;
        with_local(2 * rows + columns + lanes + group + 2 * KEY_BLOCK * QUERIES, |local| {
            let (keys, rest) = local.split_at_mut(rows);
            let (values, rest) = rest.split_at_mut(rows);
            let (key_columns, rest) = rest.split_at_mut(columns);
            let (lanes, rest) = rest.split_at_mut(lanes);
            let (group, blocks) = rest.split_at_mut(group);
            self.head.pack_rows(self.saved.k, keys);
            self.head.pack_rows(self.saved.v, values);
            self.head.pack_columns(self.saved.k, key_columns);
            for first in self.queries.clone().step_by(QUERIES) {
                self.group(first, [keys, values, key_columns], lanes, group, blocks);
            }
        });
    }

    /// Queries `first..first + 32` against all keys.
    fn group(
        &mut self,
        first: usize,
        [keys, values, key_columns]: [&[f32]; 3],
        lanes: &mut [f32],
        group: &mut [f32],
        blocks: &mut [f32],
    ) {
        let Head { shape, isa, .. } = self.head;
        let (d, padded) = (shape.head_dim, self.head.padded_dim());
        let count = QUERIES.min(shape.queries - first);
        let (q_lanes, rest) = lanes.split_at_mut(d * QUERIES);
        let (dy_lanes, dq_lanes) = rest.split_at_mut(d * QUERIES);
        self.head.lanes(self.saved.q, first, shape.softmax_scale, q_lanes);
        self.head.lanes(self.dy, first, 1.0, dy_lanes);
        dq_lanes.fill(0.0);
        // The group's rows of q (scaled) and dy, `[32, D]`; queries beyond the last are zeros and add nothing.
        group.fill(0.0);
        let (q_rows, dy_rows) = group.split_at_mut(QUERIES * padded);
        let (mut lse, mut delta) = ([0f32; QUERIES], [0f32; QUERIES]);
        for lane in 0..count {
            let row = |x| self.head.row(x, shape.queries, first + lane);
            let (q, y, dy) = (row(self.saved.q), row(self.saved.y), row(self.dy));
            q_rows[lane * padded..].iter_mut().zip(q).for_each(|(to, q)| *to = q * shape.softmax_scale);
            dy_rows[lane * padded..][..d].copy_from_slice(dy);
            delta[lane] = sum(d, |c| y[c] * dy[c]);
            let query = self.head.image * shape.queries + first + lane;
            lse[lane] = self.saved.log_sum_exp[query * shape.num_heads + self.head.head];
        }
        for block in self.head.key_blocks(first) {
            let (p, ds) = blocks.split_at_mut(KEY_BLOCK * QUERIES);
            let (p, ds) = (&mut p[..block.len() * QUERIES], &mut ds[..block.len() * QUERIES]);
            self.head.scores(keys, q_lanes, &block, p);
            self.head.mask(first, &block, p);
            self.head.scores(values, dy_lanes, &block, ds);
            run_rows(ScoreGradients { p, ds, lse: &lse, delta: &delta });
            self.head.weighted_sums(key_columns, ds, &block, dq_lanes);
            let keys = self.wanted.start.max(block.start)..self.wanted.end.min(block.end);
            if !keys.is_empty() {
                let part = |from: usize, width: usize| (keys.start - from) * width..(keys.end - from) * width;
                let (of_block, of_sums) = (part(block.start, QUERIES), part(self.wanted.start, padded));
                add_outer(isa, &p[of_block.clone()], dy_rows, padded, &mut self.dv[of_sums.clone()]);
                add_outer(isa, &ds[of_block], q_rows, padded, &mut self.dk[of_sums]);
            }
        }
        for (lane, dq) in
            self.dq[(first - self.queries.start) * padded..].chunks_exact_mut(padded).take(count).enumerate()
        {
            let from = dq_lanes.iter().skip(lane).step_by(QUERIES);
            dq.iter_mut().zip(from).for_each(|(dq, value)| *dq = value * shape.softmax_scale);
        }
    }
}

/// `p ← exp(p − lse)`, `ds ← p (ds − δ)`.
struct ScoreGradients<'a> {
    p: &'a mut [f32],
    ds: &'a mut [f32],
    lse: &'a [f32; QUERIES],
    delta: &'a [f32; QUERIES],
}

impl RowsOf32 for ScoreGradients<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) {
        let (p, ds) = (S::as_mut_simd_f32s(self.p).0, S::as_mut_simd_f32s(self.ds).0);
        let (lse, delta) = (S::as_simd_f32s(self.lse).0, S::as_simd_f32s(self.delta).0);
        let row = lse.len();
        for (part, (lse, delta)) in lse.as_chunks::<N>().0.iter().zip(delta.as_chunks::<N>().0).enumerate() {
            for (p, ds) in p.chunks_exact_mut(row).zip(ds.chunks_exact_mut(row)) {
                let (p, ds) = (&mut p.as_chunks_mut::<N>().0[part], &mut ds.as_chunks_mut::<N>().0[part]);
                let mut weights = *p;
                for (weight, lse) in weights.iter_mut().zip(lse) {
                    *weight = simd.sub_f32s(*weight, *lse);
                }
                *p = exp_of_negative(simd, weights);
                for ((ds, p), delta) in ds.iter_mut().zip(&*p).zip(delta) {
                    *ds = simd.mul_f32s(*p, simd.sub_f32s(*ds, *delta));
                }
            }
        }
    }
}

/// `sums[keys, D] += weights[keys, 32] · rows[32, D]`.
fn add_outer(isa: Isa, weights: &[f32], rows: &[f32], padded: usize, sums: &mut [f32]) {
    let height = isa.tile_rows();
    let width = if padded.is_multiple_of(isa.widest()) { isa.widest() } else { COLS };
    let panels = weights.chunks(height * QUERIES).zip(sums.chunks_mut(height * padded));
    for (lhs, sums) in panels {
        for col in (0..padded).step_by(width) {
            let t = Tile {
                lhs,
                layout: Lhs::Lanes,
                rhs: &rows[col..],
                rhs_stride: padded,
                rows: lhs.len() / QUERIES,
                depth: QUERIES,
                columns: width.min(padded - col),
                add: true,
            };
            tile(isa, &t, &mut sums[col..], padded);
        }
    }
}
