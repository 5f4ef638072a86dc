//! 3 × 3 convolutions of stride 1 by Winograd's minimal filtering (Lavin & Gray, arXiv 1509.09308).
//!
//! A tile of `M × M` outputs costs `(M + 2)²` products a channel pair instead of `9 M²`: 2.25 times fewer for `M = 2`,
//! 4 times fewer for `M = 4`. The products become one matrix product for each of the `(M + 2)²` points of the transformed
//! tile. Weights are transformed on the fly, panel by panel, from the checkpoint's own: kept transformed they would be
//! 1.8 or 4 times as large, in each direction.
//!
//! Loop nest: blocks of tiles; blocks of depth (input channels), so that a block's transformed input stays in the
//! third-level cache; then panels of 32 output channels on all threads; last the inverse transform.

mod transforms;

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::cpu::bias_of;
use crate::cpu::gemm::{LHS_PANEL, depth_blocks};
use crate::cpu::isa::Isa;
use crate::cpu::matrix::{Rhs, TAPS};
use crate::cpu::microkernel::{COLS, Lhs, Tile, prefetch, tile};
use crate::cpu::scratch::{Scratch, with_local};
use transforms::{F2, F4, Step, Transforms, both_ways};

/// Most tiles in flight: their products, `(M + 2)²` for each output channel, stay near the caches.
const TILES: usize = 256;

/// Most panels of 32 output channels whose transformed weights a thread holds at a time, for few row panels and for many: few share
/// the weights while they are near, many would come from the third-level cache again for every group.
fn most_panels(row_panels: usize) -> usize {
    if row_panels <= 8 { 2 } else { 6 }
}

/// One convolution: sizes, where the weights are, and what is added to the result.
pub(super) struct Winograd<'a> {
    /// Height and width of the input.
    pub input: [usize; 2],
    /// Height and width of the output.
    pub output: [usize; 2],
    /// Channels of both.
    pub channels: [usize; 2],
    /// Zeros above and to the left.
    pub padding: [usize; 2],
    /// The kernels, turned around where they are a gradient's.
    pub weight: Rhs<'a>,
    /// Added to every output pixel, `[O]` or `[B, O]`.
    pub bias: Option<&'a [f32]>,
    /// Added to the output, of its shape.
    pub residual: Option<&'a [f32]>,
}

impl Winograd<'_> {
    /// `y [B, H', W', O]` of `x [B, H, W, I]`.
    pub(super) fn run(&self, x: &[f32]) -> Vec<f32> {
        // Small pictures have few tiles to share a weight's transform, which is dearer for the larger tile.
        let [height, width] = self.output;
        if height.min(width) >= 24 { self.run_with::<F4, 4, 6>(x) } else { self.run_with::<F2, 2, 4>(x) }
    }

    fn run_with<T: Transforms<M, P>, const M: usize, const P: usize>(&self, x: &[f32]) -> Vec<f32> {
        let [channels_in, channels_out] = self.channels;
        let image_in = self.input[0] * self.input[1] * channels_in;
        let image_out = self.output[0] * self.output[1] * channels_out;
        let len = x.len() / image_in * image_out;
        let mut y = Vec::with_capacity(len);
        let grid = [self.output[0].div_ceil(M), self.output[1].div_ceil(M)];
        let tiles = x.len() / image_in * grid[0] * grid[1];
        let blocks = tiles.div_ceil(TILES);
        let out = Out { values: y.as_mut_ptr(), len };
        for block in 0..blocks {
            let tiles = block * tiles / blocks..(block + 1) * tiles / blocks;
            Block::<T, M, P> { conv: self, grid, tiles, transforms: std::marker::PhantomData }.run(x, &out);
        }
        // SAFETY: the blocks cover all tiles, and a block writes every pixel of its tiles.
        #[allow(unsafe_code)]
        unsafe {
            y.set_len(len);
        }
        y
    }
}

/// The result, which several threads fill tile by tile.
struct Out {
    values: *mut f32,
    len: usize,
}

// SAFETY: the pointer is to the result that `run_with` owns for as long as `Out` lives; threads write different channels
// of it, or different tiles (`Block::write`).
#[allow(unsafe_code)]
unsafe impl Sync for Out {}

/// Some tiles of the batch, all channels.
struct Block<'a, T, const M: usize, const P: usize> {
    conv: &'a Winograd<'a>,
    /// Tiles down and across a picture.
    grid: [usize; 2],
    tiles: Range<usize>,
    transforms: std::marker::PhantomData<T>,
}

impl<T: Transforms<M, P>, const M: usize, const P: usize> Block<'_, T, M, P> {
    fn run(&self, x: &[f32], out: &Out) {
        let isa = Isa::current();
        let [channels_in, channels_out] = self.conv.channels;
        let points = P * P;
        let tiles = self.tiles.len();
        let row_panels = tiles.div_ceil(isa.tile_rows());
        let rows = tiles.div_ceil(row_panels);
        let col_panels = channels_out.div_ceil(COLS);
        let (blocks, block_depth) = depth_blocks(channels_in);
        let mut transformed = Scratch::new(row_panels * points * LHS_PANEL);
        // Threads share the columns; where there are too few, the rows too, and each transforms the weights for itself.
        let threads = rayon::current_num_threads();
        let groups = col_panels.div_ceil(most_panels(row_panels)).next_multiple_of(threads).min(col_panels);
        let group = col_panels.div_ceil(groups);
        let row_share =
            if groups.is_multiple_of(threads) { row_panels } else { row_panels.div_ceil(threads) };
        // `[group][row panel][point][column panel][row, 32]`.
        let tile_size = rows * COLS;
        let mut products = Scratch::new(col_panels * row_panels * points * tile_size);
        for block in 0..blocks {
            let k = block * block_depth..((block + 1) * block_depth).min(channels_in);
            transformed.par_chunks_exact_mut(points * LHS_PANEL).enumerate().for_each(
                |(panel, transformed)| {
                    let first = self.tiles.start + panel * rows;
                    for (row, tile) in (first..(first + rows).min(self.tiles.end)).enumerate() {
                        let to = &mut transformed[row * Lhs::PANEL_STRIDE..];
                        pulp::Arch::new().dispatch(InputTile { block: self, x, tile, k: k.clone(), to });
                    }
                },
            );
            let transformed = &transformed;
            let groups = products.par_chunks_mut(group * row_panels * points * tile_size).enumerate();
            groups.for_each(|(g, products)| {
                let panels = g * group..((g + 1) * group).min(col_panels);
                let size = panels.len() * points * tile_size;
                products.par_chunks_mut(row_share * size).enumerate().for_each(|(share, products)| {
                    with_local((points * panels.len() + TAPS) * k.len() * COLS, |local| {
                        let (buffer, weights) = local.split_at_mut(TAPS * k.len() * COLS);
                        self.transform_weights(isa, panels.clone(), &k, buffer, weights);
                        let first = share * row_share;
                        let transformed = &transformed[first * points * LHS_PANEL..];
                        let tiles = (tiles - first * rows).min(products.len() / size * rows);
                        let sizes = Sizes { points, panels: panels.len(), rows, tiles };
                        sizes.multiply(isa, transformed, weights, products, &k);
                    });
                });
            });
        }
        products.par_chunks(group * row_panels * points * tile_size).enumerate().for_each(|(g, products)| {
            let panels = g * group..((g + 1) * group).min(col_panels);
            let point = panels.len() * tile_size;
            products.par_chunks_exact(points * point).enumerate().for_each(|(row_panel, products)| {
                let first = self.tiles.start + row_panel * rows;
                for (row, tile) in (first..(first + rows).min(self.tiles.end)).enumerate() {
                    for (i, panel) in panels.clone().enumerate() {
                        let products = &products[i * tile_size + row * COLS..];
                        pulp::Arch::new().dispatch(OutputTile {
                            block: self,
                            products,
                            point,
                            tile,
                            panel,
                            out,
                        });
                    }
                }
            });
        });
    }

    /// `G g Gᵀ` of the weights from input channels `k` to some panels of output channels, `[panel][point][k, 32]`.
    fn transform_weights(
        &self,
        isa: Isa,
        panels: Range<usize>,
        k: &Range<usize>,
        taps: &mut [f32],
        to: &mut [f32],
    ) {
        let weight = self.conv.weight;
        for (panel, to) in panels.zip(to.chunks_exact_mut(P * P * k.len() * COLS)) {
            weight.pack_taps(isa, panel, k.clone(), taps);
            let flip = matches!(weight, Rhs::Gradient(_));
            let transform = std::marker::PhantomData::<T::Weight>;
            pulp::Arch::new().dispatch(WeightPanel { taps: &*taps, flip, to, transform });
        }
    }

    /// Picture, row and column of a tile's first output pixel.
    fn origin(&self, tile: usize) -> [usize; 3] {
        let [down, across] = self.grid;
        let (image, at) = (tile / (down * across), tile % (down * across));
        [image, at / across * M, at % across * M]
    }
}

/// The sizes of the products of some row panels with a group of column panels.
struct Sizes {
    points: usize,
    /// Column panels.
    panels: usize,
    /// Tiles a row panel, all but the last.
    rows: usize,
    /// Tiles of all row panels.
    tiles: usize,
}

impl Sizes {
    /// The products of one block of depth. A point's weights stay in the second-level cache while all tiles pass, a row
    /// panel in the first-level one while all columns do; the next one is on its way meanwhile, as it lies in short rows where
    /// the processor does not expect it.
    fn multiply(&self, isa: Isa, lhs: &[f32], weights: &[f32], products: &mut [f32], k: &Range<usize>) {
        let (size, tile_size) = (k.len() * COLS, self.rows * COLS);
        for point in 0..self.points {
            for (i, first) in (0..self.tiles).step_by(self.rows).enumerate() {
                let at = (i * self.points + point) * self.panels * tile_size;
                let products = &mut products[at..at + self.panels * tile_size];
                let next =
                    if first + self.rows < self.tiles { (i + 1) * self.points + point } else { point + 1 };
                if let Some(next) = lhs.get(next * LHS_PANEL..(next + 1) * LHS_PANEL) {
                    for row in next.chunks_exact(Lhs::PANEL_STRIDE).take(self.rows) {
                        prefetch(&row[..k.len()]);
                    }
                }
                for (panel, products) in products.chunks_exact_mut(tile_size).enumerate() {
                    let t = Tile {
                        lhs: &lhs[(i * self.points + point) * LHS_PANEL..][..LHS_PANEL],
                        layout: Lhs::Panel,
                        rhs: &weights[(panel * self.points + point) * size..][..size],
                        rhs_stride: COLS,
                        rows: self.rows.min(self.tiles - first),
                        depth: k.len(),
                        columns: COLS,
                        add: k.start > 0,
                    };
                    tile(isa, &t, products, COLS);
                }
            }
        }
    }
}

/// A vector of at most `F32_LANES` values, zeros beyond them.
#[inline(always)]
fn load<S: Simd>(simd: S, values: &[f32]) -> S::f32s {
    match S::as_simd_f32s(values).0.first() {
        Some(whole) => *whole,
        None => simd.partial_load_f32s(values),
    }
}

/// As many of a vector's values as fit.
#[inline(always)]
fn store<S: Simd>(simd: S, to: &mut [f32], values: S::f32s) {
    match S::as_mut_simd_f32s(to).0.first_mut() {
        Some(whole) => *whole = values,
        None => simd.partial_store_f32s(to, values),
    }
}

/// `Bᵀ d B` of one tile, channels `k`, to row 0 of `to`: one panel a point.
struct InputTile<'a, 'b, T, const M: usize, const P: usize> {
    block: &'a Block<'b, T, M, P>,
    x: &'a [f32],
    tile: usize,
    k: Range<usize>,
    to: &'a mut [f32],
}

impl<T: Transforms<M, P>, const M: usize, const P: usize> WithSimd for InputTile<'_, '_, T, M, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let conv = self.block.conv;
        let channels = conv.channels[0];
        let [image, row, col] = self.block.origin(self.tile);
        let [height, width] = conv.input;
        for at in (0..self.k.len()).step_by(S::F32_LANES) {
            let lanes = S::F32_LANES.min(self.k.len() - at);
            let mut d = [[simd.splat_f32s(0.0); P]; P];
            for (r, d) in d.iter_mut().enumerate() {
                // Rows and columns before the picture wrap to huge numbers, beyond its end.
                let y = (row + r).wrapping_sub(conv.padding[0]);
                for (c, d) in d.iter_mut().enumerate() {
                    let x = (col + c).wrapping_sub(conv.padding[1]);
                    if y < height && x < width {
                        let from = ((image * height + y) * width + x) * channels + self.k.start + at;
                        *d = load(simd, &self.x[from..from + lanes]);
                    }
                }
            }
            for (r, d) in both_ways::<T::Input, S, P, P>(simd, d).into_iter().enumerate() {
                for (c, d) in d.into_iter().enumerate() {
                    let to = &mut self.to[(r * P + c) * LHS_PANEL + at..][..lanes];
                    store(simd, to, d);
                }
            }
        }
    }
}

/// `G g Gᵀ` of nine taps, `[depth, 9, 32]`, to `[points, depth, 32]`.
struct WeightPanel<'a, T, const P: usize> {
    taps: &'a [f32],
    /// Whether the kernel is turned around.
    flip: bool,
    to: &'a mut [f32],
    transform: std::marker::PhantomData<T>,
}

impl<T: Step<3, P>, const P: usize> WithSimd for WeightPanel<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let size = self.taps.len() / TAPS;
        for (k, taps) in self.taps.chunks_exact(TAPS * COLS).enumerate() {
            for at in (0..COLS).step_by(S::F32_LANES) {
                // 32 columns are a whole number of vectors on every instruction set.
                let mut g = [[simd.splat_f32s(0.0); 3]; 3];
                for tap in 0..TAPS {
                    let from = if self.flip { TAPS - 1 - tap } else { tap };
                    g[tap / 3][tap % 3] = load(simd, &taps[from * COLS + at..][..S::F32_LANES]);
                }
                let transformed = both_ways::<T, S, 3, P>(simd, g);
                for (point, to) in self.to.chunks_exact_mut(size).enumerate() {
                    let to = &mut to[k * COLS + at..][..S::F32_LANES];
                    store(simd, to, transformed[point / P][point % P]);
                }
            }
        }
    }
}

/// `Aᵀ m A` of one tile, 32 output channels, with what is added to them.
struct OutputTile<'a, 'b, T, const M: usize, const P: usize> {
    block: &'a Block<'b, T, M, P>,
    products: &'a [f32],
    /// Values between two points of `products`.
    point: usize,
    tile: usize,
    panel: usize,
    out: &'a Out,
}

impl<T: Transforms<M, P>, const M: usize, const P: usize> WithSimd for OutputTile<'_, '_, T, M, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let conv = self.block.conv;
        let channels = conv.channels[1];
        let [image, row, col] = self.block.origin(self.tile);
        let [height, width] = conv.output;
        let first = self.panel * COLS;
        for at in (0..COLS.min(channels - first)).step_by(S::F32_LANES) {
            let lanes = S::F32_LANES.min(channels - first - at);
            let mut m = [[simd.splat_f32s(0.0); P]; P];
            for (r, m) in m.iter_mut().enumerate() {
                for (c, m) in m.iter_mut().enumerate() {
                    let from = &self.products[(r * P + c) * self.point + at..][..S::F32_LANES];
                    *m = load(simd, from);
                }
            }
            let y = both_ways::<T::Output, S, P, M>(simd, m);
            let bias = conv.bias.map(|bias| bias_of(bias, image, channels));
            let bias = bias.map(|bias| load(simd, &bias[first + at..][..lanes]));
            for (r, y) in y.into_iter().enumerate().take(height - row) {
                for (c, y) in y.into_iter().enumerate().take(width - col) {
                    let mut value = bias.map_or(y, |bias| simd.add_f32s(y, bias));
                    let to = ((image * height + row + r) * width + col + c) * channels + first + at;
                    if let Some(residual) = conv.residual {
                        value = simd.add_f32s(value, load(simd, &residual[to..to + lanes]));
                    }
                    assert!(to + lanes <= self.out.len);
                    let value: &[S::f32s] = &[value];
                    // SAFETY: the assert bounds what is written, and a vector has that many values; pixels belong to
                    // one tile and channels to one panel, and each pair of tile and panel is written by one thread.
                    #[allow(unsafe_code)]
                    unsafe {
                        let to = self.out.values.add(to);
                        if lanes == S::F32_LANES {
                            to.cast::<S::f32s>().write_unaligned(value[0]);
                        } else {
                            to.copy_from_nonoverlapping(value.as_ptr().cast(), lanes);
                        }
                    }
                }
            }
        }
    }
}
