//! Products with a frozen weight, `out[m × n] = lhs[m × k] · rhs[k × n]`, and what follows them.
//!
//! The weight is stored once, as the forward pass reads it; the gradient packs the panels that it needs. The left-hand
//! side is packed once, by a closure that may compute it (a normalisation, a gate). A thread takes a group of columns,
//! whose panels fit its second-level cache, and walks down the rows; the last visit of a tile applies the epilogue while
//! it is in cache.

use std::ops::Range;

use rayon::prelude::*;

use super::isa::Isa;
use super::microkernel::{COLS, Lhs, MAX_ROWS, Tile, tile, tile_at};
use super::scratch::{Scratch, with_local};
use super::weight::Rhs;

/// Values of a packed panel of the left-hand side.
pub(crate) const LHS_PANEL: usize = MAX_ROWS * Lhs::PANEL_STRIDE;

/// What a group of packed weight panels may take of the second-level cache, in values (512 KiB).
const GROUP: usize = 128 * 1024;

/// What the packed left-hand side may take, in values (64 MiB); beyond, the rows are cut into bands.
const BAND: usize = 16 * 1024 * 1024;

/// Rows visited before the next columns, in panels: their result stays in the second-level cache.
const ROW_BLOCK: usize = 8;

/// Number and depth of the blocks into which `k` is cut: even, a multiple of a panel's columns (so that blocks of a
/// transposed weight are whole squares), no longer than a packed row.
pub(crate) fn depth_blocks(k: usize) -> (usize, usize) {
    let depth = k.div_ceil(k.div_ceil(Lhs::PANEL_DEPTH)).next_multiple_of(COLS);
    (k.div_ceil(depth), depth)
}

/// `out = lhs · rhs`, then `epilogue(row, column, values)` on every stretch of a row.
///
/// `lhs(row, k, values)` writes columns `k` of a row of the left-hand side.
pub(crate) fn gemm(
    rows: usize,
    lhs: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
    rhs: Rhs<'_>,
    out: &mut [f32],
    epilogue: impl Fn(usize, usize, &mut [f32]) + Sync,
) {
    assert_eq!(out.len(), rows * rhs.cols());
    if out.is_empty() {
        return;
    }
    let (blocks, _) = depth_blocks(rhs.depth());
    let band = (BAND / (blocks * LHS_PANEL)).max(ROW_BLOCK) * MAX_ROWS;
    for (i, out) in out.chunks_mut(band * rhs.cols()).enumerate() {
        let first = i * band;
        let lhs = |row: usize, k, values: &mut [f32]| lhs(first + row, k, values);
        let epilogue = |row: usize, col, values: &mut [f32]| epilogue(first + row, col, values);
        gemm_band(out.len() / rhs.cols(), lhs, rhs, out, epilogue);
    }
}

/// [`gemm`] for so many rows that they may be packed all at once.
fn gemm_band(
    rows: usize,
    lhs: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
    rhs: Rhs<'_>,
    out: &mut [f32],
    epilogue: impl Fn(usize, usize, &mut [f32]) + Sync,
) {
    let isa = Isa::current();
    let lhs = PackedLhs::new(rows, rhs.depth(), lhs);
    let grid = Grid::new(rows, rhs.depth(), rhs.cols());
    let out = Out { values: out.as_mut_ptr(), cols: rhs.cols() };
    (0..grid.row_parts * grid.groups).into_par_iter().for_each(|task| {
        let (part, group) = (task / grid.groups, task % grid.groups);
        let panels = grid.panels(group);
        let size = panels.len() * rhs.depth() * COLS;
        with_local(size, |buffer| {
            // `[block][panel][k, 32]`: what a row of tiles reads lies together.
            let mut packed = Vec::with_capacity(lhs.blocks * panels.len());
            let mut rest = buffer;
            for block in 0..lhs.blocks {
                let k = lhs.block(block);
                for panel in panels.clone() {
                    let (now, later) = rest.split_at_mut(k.len() * COLS);
                    packed.push(rhs.panel(isa, panel, k.clone(), now));
                    rest = later;
                }
            }
            // SAFETY: tasks differ in their rows or in their columns, so no two touch the same tile.
            #[allow(unsafe_code)]
            unsafe {
                out.fill(isa, &lhs, [grid.rows(part), panels], &packed, &epilogue);
            }
        });
    });
}

/// How a product is shared out: parts of the rows times groups of the columns.
struct Grid {
    row_parts: usize,
    row_panels: usize,
    groups: usize,
    col_panels: usize,
}

impl Grid {
    fn new(rows: usize, depth: usize, cols: usize) -> Self {
        let threads = rayon::current_num_threads();
        let (row_panels, col_panels) = (rows.div_ceil(MAX_ROWS), cols.div_ceil(COLS));
        let largest = (GROUP / (depth * COLS)).max(1);
        let groups = col_panels.div_ceil(largest).next_multiple_of(threads);
        // Columns alone, where they share out evenly; else rows too.
        if col_panels.is_multiple_of(groups) || col_panels >= 4 * groups || row_panels < threads {
            return Self { row_parts: 1, row_panels, groups: groups.min(col_panels), col_panels };
        }
        Self { row_parts: threads, row_panels, groups: col_panels.div_ceil(largest), col_panels }
    }

    fn panels(&self, group: usize) -> Range<usize> {
        group * self.col_panels / self.groups..(group + 1) * self.col_panels / self.groups
    }

    fn rows(&self, part: usize) -> Range<usize> {
        part * self.row_panels / self.row_parts..(part + 1) * self.row_panels / self.row_parts
    }
}

/// The left-hand side as panels of 14 rows, block of depth by block of depth.
struct PackedLhs {
    values: Scratch,
    rows: usize,
    depth: usize,
    panels: usize,
    blocks: usize,
    block_depth: usize,
}

impl PackedLhs {
    fn new(rows: usize, depth: usize, fill: impl Fn(usize, Range<usize>, &mut [f32]) + Sync) -> Self {
        let (blocks, block_depth) = depth_blocks(depth);
        let panels = rows.div_ceil(MAX_ROWS);
        let values = Scratch::new(panels * blocks * LHS_PANEL);
        let mut lhs = Self { values, rows, depth, panels, blocks, block_depth };
        let ranges: Vec<_> = (0..blocks).map(|block| lhs.block(block)).collect();
        lhs.values.par_chunks_exact_mut(blocks * LHS_PANEL).with_min_len(4).enumerate().for_each(
            |(panel, values)| {
                for i in 0..MAX_ROWS.min(rows - panel * MAX_ROWS) {
                    for (k, values) in ranges.iter().zip(values.chunks_exact_mut(LHS_PANEL)) {
                        fill(
                            panel * MAX_ROWS + i,
                            k.clone(),
                            &mut values[i * Lhs::PANEL_STRIDE..][..k.len()],
                        );
                    }
                }
            },
        );
        lhs
    }

    fn block(&self, block: usize) -> Range<usize> {
        block * self.block_depth..((block + 1) * self.block_depth).min(self.depth)
    }

    fn panel(&self, panel: usize, block: usize) -> &[f32] {
        debug_assert!(panel < self.panels);
        &self.values[(panel * self.blocks + block) * LHS_PANEL..][..LHS_PANEL]
    }
}

/// The result, which several threads fill tile by tile.
struct Out {
    values: *mut f32,
    cols: usize,
}

// SAFETY: the pointer is to a slice that `gemm` borrows mutably for as long as `Out` lives; `fill` says who writes what.
#[allow(unsafe_code)]
unsafe impl Sync for Out {}

#[allow(unsafe_code)]
impl Out {
    /// Fills the tiles of row panels `row_panels` and column panels `col_panels`.
    ///
    /// # Safety
    /// The panels lie inside the result, and no other thread touches their tiles.
    unsafe fn fill(
        &self,
        isa: Isa,
        lhs: &PackedLhs,
        [row_panels, col_panels]: [Range<usize>; 2],
        packed: &[&[f32]],
        epilogue: &impl Fn(usize, usize, &mut [f32]),
    ) {
        for rows in row_panels.clone().step_by(ROW_BLOCK) {
            for (block, packed) in packed.chunks_exact(col_panels.len()).enumerate() {
                let k = lhs.block(block);
                let last = block + 1 == lhs.blocks;
                for row_panel in rows..(rows + ROW_BLOCK).min(row_panels.end) {
                    for (panel, rhs) in col_panels.clone().zip(packed) {
                        let (row, col) = (row_panel * MAX_ROWS, panel * COLS);
                        let t = Tile {
                            lhs: lhs.panel(row_panel, block),
                            layout: Lhs::Panel,
                            rhs,
                            rhs_stride: COLS,
                            rows: MAX_ROWS.min(lhs.rows - row),
                            depth: k.len(),
                            vectors: (self.cols - col).div_ceil(16).min(2),
                            add: block > 0,
                        };
                        // SAFETY: the caller's promise.
                        unsafe {
                            self.tile(isa, t, row, col);
                            if last {
                                self.rows(row, t.rows, col, epilogue);
                            }
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// The tile at `(row, col)` lies inside the result, and no other thread touches it.
    unsafe fn tile(&self, isa: Isa, t: Tile<'_>, row: usize, col: usize) {
        let width = COLS.min(self.cols - col);
        // SAFETY: by the caller's promise these elements exist and are this thread's.
        unsafe {
            let c = self.values.add(row * self.cols + col);
            if width == 16 * t.vectors {
                return tile_at(isa, t, c, self.cols);
            }
            // The last columns: a whole tile beside, of which what exists is copied.
            let mut whole = [0f32; MAX_ROWS * COLS];
            if t.add {
                for (i, whole) in whole.chunks_exact_mut(COLS).enumerate().take(t.rows) {
                    whole[..width].copy_from_slice(std::slice::from_raw_parts(c.add(i * self.cols), width));
                }
            }
            tile(isa, t, &mut whole, COLS);
            for (i, whole) in whole.chunks_exact(COLS).enumerate().take(t.rows) {
                std::slice::from_raw_parts_mut(c.add(i * self.cols), width).copy_from_slice(&whole[..width]);
            }
        }
    }

    /// Calls the epilogue on a tile's rows.
    ///
    /// # Safety
    /// As for [`Out::tile`].
    unsafe fn rows(&self, row: usize, rows: usize, col: usize, epilogue: &impl Fn(usize, usize, &mut [f32])) {
        let width = COLS.min(self.cols - col);
        for row in row..row + rows {
            // SAFETY: by the caller's promise these elements exist and are this thread's.
            let values =
                unsafe { std::slice::from_raw_parts_mut(self.values.add(row * self.cols + col), width) };
            epilogue(row, col, values);
        }
    }
}
