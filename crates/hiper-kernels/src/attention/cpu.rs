//! Forward pass: 32 queries in the lanes of the vectors against a block of keys at a time, with the online softmax.
//!
//! Scores are computed transposed, `[keys, 32 queries]`: the maximum and the sum of a query's row are vertical, nothing is
//! shuffled, and the block is as it stands the right-hand side of the product with the values.

use std::ops::Range;

use pulp::Simd;
use rayon::prelude::*;

use super::{AttentionMask, AttentionShape};
use crate::cpu::fill::fill;
use crate::cpu::gemm::depth_blocks;
use crate::cpu::isa::Isa;
use crate::cpu::math::exp_of_negative;
use crate::cpu::microkernel::{COLS, Lhs, Tile, tile};
use crate::cpu::scratch::{Scratch, with_local};
use crate::cpu::simd::{RowsOf32, run_rows};
use crate::cpu::{TASKS, stretch};

/// Queries a group: one panel's columns.
pub(super) const QUERIES: usize = COLS;

/// Keys a block: its scores (32 KiB) stay in the second-level cache beside what they are multiplied with.
pub(super) const KEY_BLOCK: usize = 256;

/// Keys whose weighted values are summed at a time: those and their weights stay in the first-level cache while all tiles of the
/// sums pass.
const SUMMED: usize = 84;

/// Returns `y [B, Sq, H·D]` and the log-sum-exp `[B, Sq, H]` of every row of scores.
pub(crate) fn forward(shape: &AttentionShape, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (width, d) = (shape.width(), shape.head_dim);
    let isa = Isa::current();
    let groups = shape.queries.div_ceil(QUERIES);
    // `[image, head, group][d + 1, 32]`: a group's result, transposed, and under it the log-sum-exp.
    let size = (d + 1) * QUERIES;
    let heads = shape.batch * shape.num_heads;
    let mut results = Scratch::new(heads * groups * size);
    // Heads, and parts of them where there are too few: some tasks a thread, so that one that was held up is helped out.
    let share = (heads * groups).div_ceil(TASKS * rayon::current_num_threads()).clamp(1, groups);
    results.par_chunks_exact_mut(groups * size).enumerate().for_each(|(i, results)| {
        let head = Head { shape, image: i / shape.num_heads, head: i % shape.num_heads, isa };
        results.par_chunks_mut(share * size).enumerate().for_each(|(j, results)| {
            with_local(head.rows_size() + head.columns_size() + (d + KEY_BLOCK) * QUERIES, |local| {
                let (keys, rest) = local.split_at_mut(head.rows_size());
                let (values, rest) = rest.split_at_mut(head.columns_size());
                let (queries, scores) = rest.split_at_mut(d * QUERIES);
                head.pack_rows(k, keys);
                head.pack_columns(v, values);
                for (group, result) in results.chunks_exact_mut(size).enumerate() {
                    let first = (j * share + group) * QUERIES;
                    head.lanes(q, first, shape.softmax_scale, queries);
                    head.forward([keys, values, queries], first, scores, result);
                }
            });
        });
    });
    // What the lanes hold of a query's head: its result and, under it, the log-sum-exp.
    let lane = |row: usize, head: usize| {
        let (image, query) = (row / shape.queries, row % shape.queries);
        let group = (image * shape.num_heads + head) * groups + query / QUERIES;
        results[group * size + query % QUERIES..].iter().step_by(QUERIES)
    };
    let rows = shape.batch * shape.queries;
    let y = fill([1, rows * width], stretch(width), |_, first, y| {
        for (row, y) in y.chunks_exact_mut(width).enumerate() {
            for (head, y) in y.chunks_exact_mut(d).enumerate() {
                y.iter_mut().zip(lane(first / width + row, head)).for_each(|(y, r)| *y = *r);
            }
        }
    });
    let last = |i: usize| lane(i / shape.num_heads, i % shape.num_heads).nth(d).copied().unwrap_or_default();
    (y, (0..rows * shape.num_heads).into_par_iter().map(last).collect())
}

/// One head of one image.
pub(super) struct Head<'a> {
    pub shape: &'a AttentionShape,
    pub image: usize,
    pub head: usize,
    pub isa: Isa,
}

impl Head<'_> {
    /// Layout, stride between rows, number and depth of the blocks of a packed head.
    fn layout(&self) -> (Lhs, usize, usize, usize) {
        let d = self.shape.head_dim;
        if d <= Lhs::SHORT_PANEL_STRIDE {
            return (Lhs::ShortPanel, Lhs::SHORT_PANEL_STRIDE, 1, d);
        }
        let (blocks, depth) = depth_blocks(d);
        (Lhs::Panel, Lhs::PANEL_STRIDE, blocks, depth)
    }

    /// Values that [`Self::pack_rows`] fills.
    pub(super) fn rows_size(&self) -> usize {
        let (_, stride, blocks, _) = self.layout();
        self.shape.keys.next_multiple_of(self.isa.tile_rows()) * blocks * stride
    }

    /// Values that [`Self::pack_columns`] fills.
    pub(super) fn columns_size(&self) -> usize {
        self.shape.keys * self.padded_dim()
    }

    /// Head size, rounded up to whole vectors.
    pub(super) fn padded_dim(&self) -> usize {
        self.shape.head_dim.next_multiple_of(self.isa.lanes())
    }

    /// This head's values of row `row` of `x [B, rows, H·D]`.
    pub(super) fn row<'x>(&self, x: &'x [f32], rows: usize, row: usize) -> &'x [f32] {
        let d = self.shape.head_dim;
        &x[(self.image * rows + row) * self.shape.width() + self.head * d..][..d]
    }

    /// Packs this head of `x [B, Sk, H·D]` as panels of a tile's rows.
    pub(super) fn pack_rows(&self, x: &[f32], packed: &mut [f32]) {
        let (_, stride, blocks, depth) = self.layout();
        let height = self.isa.tile_rows();
        for key in 0..self.shape.keys {
            let row = self.row(x, self.shape.keys, key);
            for (block, values) in row.chunks(depth).enumerate() {
                let panel = (key / height * blocks + block) * height + key % height;
                packed[panel * stride..][..values.len()].copy_from_slice(values);
            }
        }
    }

    /// Copies this head of `x [B, Sk, H·D]` to `[Sk, D]`, rows padded with zeros to whole vectors.
    pub(super) fn pack_columns(&self, x: &[f32], packed: &mut [f32]) {
        let d = self.shape.head_dim;
        for (key, packed) in packed.chunks_exact_mut(self.padded_dim()).enumerate().take(self.shape.keys) {
            packed[..d].copy_from_slice(self.row(x, self.shape.keys, key));
            packed[d..].fill(0.0);
        }
    }

    /// Queries `first..first + 32` of `x [B, Sq, H·D]`, transposed to `[D, 32]` and scaled; zeros beyond the last.
    pub(super) fn lanes(&self, x: &[f32], first: usize, scale: f32, lanes: &mut [f32]) {
        let count = QUERIES.min(self.shape.queries - first);
        if count < QUERIES {
            lanes.fill(0.0);
        }
        for lane in 0..count {
            let row = self.row(x, self.shape.queries, first + lane);
            lanes.chunks_exact_mut(QUERIES).zip(row).for_each(|(lanes, value)| lanes[lane] = value * scale);
        }
    }

    /// `scores[keys, 32] = rows[keys, D] · lanes[D, 32]` for the keys of a block, which begins with a panel.
    pub(super) fn scores(&self, rows: &[f32], lanes: &[f32], keys: &Range<usize>, scores: &mut [f32]) {
        let (layout, stride, blocks, depth) = self.layout();
        let height = self.isa.tile_rows();
        let panels = scores[..keys.len() * QUERIES].chunks_mut(height * QUERIES);
        for (panel, scores) in (keys.start / height..).zip(panels) {
            for block in 0..blocks {
                let lanes = &lanes[block * depth * QUERIES..];
                let t = Tile {
                    lhs: &rows[(panel * blocks + block) * height * stride..][..height * stride],
                    layout,
                    rhs: lanes,
                    rhs_stride: QUERIES,
                    rows: scores.len() / QUERIES,
                    depth: depth.min(lanes.len() / QUERIES),
                    columns: QUERIES,
                    add: block > 0,
                };
                tile(self.isa, &t, scores, QUERIES);
            }
        }
    }

    /// `sums[D, 32] += columns[keys, D]ᵀ · weights[keys, 32]`.
    pub(super) fn weighted_sums(
        &self,
        columns: &[f32],
        weights: &[f32],
        keys: &Range<usize>,
        sums: &mut [f32],
    ) {
        let (d, stride) = (self.shape.head_dim, self.padded_dim());
        // As many rows to one tile as to another.
        let height = d.div_ceil(d.div_ceil(self.isa.tile_rows()));
        for from in keys.clone().step_by(SUMMED) {
            let weights = &weights[(from - keys.start) * QUERIES..];
            let depth = SUMMED.min(keys.end - from);
            for (chunk, sums) in sums[..d * QUERIES].chunks_mut(height * QUERIES).enumerate() {
                let t = Tile {
                    lhs: &columns[from * stride + chunk * height..],
                    layout: Lhs::Columns { stride },
                    rhs: weights,
                    rhs_stride: QUERIES,
                    rows: sums.len() / QUERIES,
                    depth,
                    columns: QUERIES,
                    add: true,
                };
                tile(self.isa, &t, sums, QUERIES);
            }
        }
    }

    /// Blocks of keys that the queries from `first` on may see. A block begins with a panel.
    pub(super) fn key_blocks(&self, first: usize) -> impl Iterator<Item = Range<usize>> {
        /// A multiple of every instruction set's panels, so that sums run in one order.
        const BLOCK: usize = KEY_BLOCK / 84 * 84;
        let keys = match self.shape.mask {
            AttentionMask::None => self.shape.keys,
            AttentionMask::Causal => self.shape.keys.min(first + QUERIES),
        };
        (0..keys).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(keys))
    }

    /// Under the causal mask, sets the scores of keys that a query may not see so low that their weight vanishes.
    pub(super) fn mask(&self, first: usize, keys: &Range<usize>, scores: &mut [f32]) {
        const UNSEEN: f32 = -1e30;
        if self.shape.mask == AttentionMask::Causal && keys.end > first + 1 {
            for (key, scores) in keys.clone().zip(scores.chunks_exact_mut(QUERIES)) {
                scores[..key.saturating_sub(first).min(QUERIES)].fill(UNSEEN);
            }
        }
    }

    /// One group of queries: `result` becomes the outputs `[D, 32]` and the log-sum-exp `[32]`.
    fn forward(
        &self,
        [keys, values, queries]: [&[f32]; 3],
        first: usize,
        scores: &mut [f32],
        result: &mut [f32],
    ) {
        let (sums, log_sum_exp) = result.split_at_mut(self.shape.head_dim * QUERIES);
        sums.fill(0.0);
        // Running maximum and sum of each query (Milakov & Gimelshein, arXiv 1805.02867).
        let mut maxima = [f32::NEG_INFINITY; QUERIES];
        let mut totals = [0f32; QUERIES];
        for block in self.key_blocks(first) {
            self.scores(keys, queries, &block, scores);
            self.mask(first, &block, scores);
            let scores = &mut scores[..block.len() * QUERIES];
            let (maxima, totals) = (&mut maxima, &mut totals);
            run_rows(Softmax { scores, maxima, totals, sums });
            self.weighted_sums(values, scores, &block, sums);
        }
        for lane in 0..QUERIES {
            let inverse = 1.0 / totals[lane];
            sums.iter_mut().skip(lane).step_by(QUERIES).for_each(|sum| *sum *= inverse);
            log_sum_exp[lane] = maxima[lane] + totals[lane].ln();
        }
    }
}

/// Turns a block's scores `[keys, 32]` into weights under the new maxima, and brings sums `[D, 32]` and totals to them.
struct Softmax<'a> {
    scores: &'a mut [f32],
    maxima: &'a mut [f32; QUERIES],
    totals: &'a mut [f32; QUERIES],
    sums: &'a mut [f32],
}

impl RowsOf32 for Softmax<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) {
        let (scores, sums) = (S::as_mut_simd_f32s(self.scores).0, S::as_mut_simd_f32s(self.sums).0);
        let (maxima, totals) = (S::as_mut_simd_f32s(self.maxima).0, S::as_mut_simd_f32s(self.totals).0);
        let row = maxima.len();
        let parts = maxima.as_chunks_mut::<N>().0.iter_mut().zip(totals.as_chunks_mut::<N>().0);
        for (part, (old, total)) in parts.enumerate() {
            let mut maxima = *old;
            for scores in scores.chunks_exact(row) {
                for (maximum, score) in maxima.iter_mut().zip(&scores.as_chunks::<N>().0[part]) {
                    *maximum = simd.max_f32s(*score, *maximum);
                }
            }
            // The first block: exp(−∞) saturates near 1e-38, and there is nothing to shrink.
            let mut shrink = *old;
            for (shrink, maximum) in shrink.iter_mut().zip(&maxima) {
                *shrink = simd.sub_f32s(*shrink, *maximum);
            }
            let shrink = exp_of_negative(simd, shrink);
            for sums in sums.chunks_exact_mut(row) {
                for (sum, shrink) in sums.as_chunks_mut::<N>().0[part].iter_mut().zip(&shrink) {
                    *sum = simd.mul_f32s(*sum, *shrink);
                }
            }
            let mut totals = *total;
            for (total, shrink) in totals.iter_mut().zip(&shrink) {
                *total = simd.mul_f32s(*total, *shrink);
            }
            for scores in scores.chunks_exact_mut(row) {
                let scores = &mut scores.as_chunks_mut::<N>().0[part];
                let mut weights = *scores;
                for (weight, maximum) in weights.iter_mut().zip(&maxima) {
                    *weight = simd.sub_f32s(*weight, *maximum);
                }
                *scores = exp_of_negative(simd, weights);
                for (total, weight) in totals.iter_mut().zip(&*scores) {
                    *total = simd.add_f32s(*total, *weight);
                }
            }
            (*old, *total) = (maxima, totals);
        }
    }
}
