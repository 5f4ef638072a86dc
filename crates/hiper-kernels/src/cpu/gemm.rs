//! Products with a frozen weight, `out[m × n] = lhs[m × k] · rhs[k × n]`, and what follows them.
//!
//! The weight is stored once, as the forward pass reads it; the gradient packs the panels that it needs. A thread takes
//! a group of columns and walks down the rows, some panels of a tile's rows at a time, and through the depth, block by block: one
//! block of the group's columns stays in its second-level cache, one packed panel of rows in the first. Packing the rows
//! costs little beside the products, so every thread does it for itself; a closure says what they hold. The last visit of
//! a tile applies the epilogue while it is in cache.

use std::ops::Range;

use rayon::prelude::*;

use super::TASKS;
use super::isa::Isa;
use super::microkernel::{COLS, Lhs, MAX_ROWS, Tile, tile, tile_at};
use super::scratch::with_local;
use super::weight::Rhs;

/// Values of a packed panel of the left-hand side.
pub(crate) const LHS_PANEL: usize = MAX_ROWS * Lhs::PANEL_STRIDE;

/// Most column panels of a group: one block of depth of them (240 KiB) stays in the second-level cache.
const GROUP: usize = 12;

/// Rows visited before the next columns, in panels: their result stays in the second-level cache.
const ROW_BLOCK: usize = 12;

/// Number and depth of the blocks into which `k` is cut: even, a multiple of a panel's columns (so that blocks of a
/// transposed weight are whole squares), no longer than a packed row.
pub(crate) fn depth_blocks(k: usize) -> (usize, usize) {
    let depth = k.div_ceil(k.div_ceil(Lhs::PANEL_DEPTH)).next_multiple_of(COLS);
    (k.div_ceil(depth), depth)
}

/// `lhs · rhs`, after `epilogue(row, column, values)` on every stretch of a row.
///
/// `lhs(row, k, values)` writes columns `k` of a row of the left-hand side.
pub(crate) fn gemm(
    rows: usize,
    lhs: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
    rhs: Rhs<'_>,
    epilogue: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows * rhs.cols());
    if rows * rhs.cols() == 0 {
        return out;
    }
    let isa = Isa::current();
    let (blocks, block_depth) = depth_blocks(rhs.depth());
    let grid = Grid::new(isa, rows, rhs.cols());
    let product = Product { isa, values: out.as_mut_ptr(), rows, cols: rhs.cols(), lhs, epilogue };
    (0..grid.row_parts * grid.groups).into_par_iter().for_each(|task| {
        let (part, group) = (task / grid.groups, task % grid.groups);
        let panels = grid.panels(group);
        let size = panels.len() * rhs.depth() * COLS;
        with_local(size + ROW_BLOCK * LHS_PANEL, |local| {
            let (mut rest, lhs_panels) = local.split_at_mut(size);
            // The group's panels, a block of depth after the other.
            let mut packed = Vec::with_capacity(blocks);
            for block in 0..blocks {
                let k = block * block_depth..((block + 1) * block_depth).min(rhs.depth());
                let mut columns = Vec::with_capacity(panels.len());
                for panel in panels.clone() {
                    let (now, later) = rest.split_at_mut(k.len() * COLS);
                    columns.push(rhs.panel(isa, panel, k.clone(), now));
                    rest = later;
                }
                packed.push((k, columns));
            }
            // SAFETY: tasks differ in their rows or in their columns, so no two touch the same tile.
            #[allow(unsafe_code)]
            unsafe {
                product.fill([grid.rows(part), panels], &packed, lhs_panels);
            }
        });
    });
    // SAFETY: the tasks share out all tiles, and every tile is written before anything is added to it.
    #[allow(unsafe_code)]
    unsafe {
        out.set_len(rows * rhs.cols());
    }
    out
}

/// How a product is shared out: parts of the rows times groups of the columns.
struct Grid {
    row_parts: usize,
    row_panels: usize,
    groups: usize,
    col_panels: usize,
}

impl Grid {
    fn new(isa: Isa, rows: usize, cols: usize) -> Self {
        let threads = rayon::current_num_threads();
        let (row_panels, col_panels) = (rows.div_ceil(isa.tile_rows()), cols.div_ceil(COLS));
        let groups = col_panels.div_ceil(GROUP).next_multiple_of(threads);
        // Few columns and many rows: a task takes all columns of its rows, so that the rows are packed once.
        if col_panels <= GROUP && row_panels >= 4 * threads {
            let row_parts = threads * (row_panels / (ROW_BLOCK * threads)).clamp(1, TASKS);
            return Self { row_parts, row_panels, groups: 1, col_panels };
        }
        // Else columns alone, where they share out evenly, or rows too.
        if col_panels.is_multiple_of(groups) || col_panels >= 4 * groups || row_panels < threads {
            return Self { row_parts: 1, row_panels, groups: groups.min(col_panels), col_panels };
        }
        Self { row_parts: threads, row_panels, groups: col_panels.div_ceil(GROUP), col_panels }
    }

    fn panels(&self, group: usize) -> Range<usize> {
        group * self.col_panels / self.groups..(group + 1) * self.col_panels / self.groups
    }

    fn rows(&self, part: usize) -> Range<usize> {
        part * self.row_panels / self.row_parts..(part + 1) * self.row_panels / self.row_parts
    }
}

/// One product: its closures, and the result, which several threads fill tile by tile.
struct Product<L, E> {
    isa: Isa,
    values: *mut f32,
    rows: usize,
    cols: usize,
    lhs: L,
    epilogue: E,
}

// SAFETY: the pointer is to room that `gemm` owns for as long as `Product` lives; `fill` says who writes what. The closures
// are `Sync`.
#[allow(unsafe_code)]
unsafe impl<L: Sync, E: Sync> Sync for Product<L, E> {}

#[allow(unsafe_code)]
impl<L: Fn(usize, Range<usize>, &mut [f32]), E: Fn(usize, usize, &mut [f32])> Product<L, E> {
    /// Fills the tiles of some row panels and column panels. `packed` holds the latter, `panels` is room for some of the
    /// former.
    ///
    /// # Safety
    /// The panels lie inside the result, and no other thread touches their tiles.
    unsafe fn fill(
        &self,
        [row_panels, col_panels]: [Range<usize>; 2],
        packed: &[(Range<usize>, Vec<&[f32]>)],
        panels: &mut [f32],
    ) {
        for first in row_panels.clone().step_by(ROW_BLOCK) {
            let row_panels = first..(first + ROW_BLOCK).min(row_panels.end);
            for (block, (k, columns)) in packed.iter().enumerate() {
                let height = self.isa.tile_rows();
                let rows = |panel: usize| panel * height..((panel + 1) * height).min(self.rows);
                for (panel, packed) in row_panels.clone().zip(panels.chunks_exact_mut(LHS_PANEL)) {
                    for (row, packed) in rows(panel).zip(packed.chunks_exact_mut(Lhs::PANEL_STRIDE)) {
                        (self.lhs)(row, k.clone(), &mut packed[..k.len()]);
                    }
                }
                for (row_panel, lhs) in row_panels.clone().zip(panels.chunks_exact(LHS_PANEL)) {
                    for (panel, rhs) in col_panels.clone().zip(columns) {
                        let (rows, col) = (rows(row_panel), panel * COLS);
                        let t = Tile {
                            lhs,
                            layout: Lhs::Panel,
                            rhs,
                            rhs_stride: COLS,
                            rows: rows.len(),
                            depth: k.len(),
                            columns: COLS.min((self.cols - col).next_multiple_of(self.isa.lanes())),
                            add: block > 0,
                        };
                        // SAFETY: the caller's promise.
                        unsafe {
                            self.tile(t, rows.start, col);
                            if block + 1 == packed.len() {
                                self.finish(rows, col);
                            }
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// The tile at `(row, col)` lies inside the result, and no other thread touches it.
    unsafe fn tile(&self, t: Tile<'_>, row: usize, col: usize) {
        let width = COLS.min(self.cols - col);
        // SAFETY: by the caller's promise these elements exist and are this thread's.
        unsafe {
            let c = self.values.add(row * self.cols + col);
            if width == t.columns {
                return tile_at(self.isa, t, c, self.cols);
            }
            // The last columns: a whole tile beside, of which what exists is copied.
            let mut whole = [0f32; MAX_ROWS * COLS];
            if t.add {
                for (i, whole) in whole.chunks_exact_mut(COLS).enumerate().take(t.rows) {
                    whole[..width].copy_from_slice(std::slice::from_raw_parts(c.add(i * self.cols), width));
                }
            }
            tile(self.isa, t, &mut whole, COLS);
            for (i, whole) in whole.chunks_exact(COLS).enumerate().take(t.rows) {
                c.add(i * self.cols).copy_from_nonoverlapping(whole.as_ptr(), width);
            }
        }
    }

    /// Calls the epilogue on a tile's rows.
    ///
    /// # Safety
    /// As for [`Product::tile`].
    unsafe fn finish(&self, rows: Range<usize>, col: usize) {
        let width = COLS.min(self.cols - col);
        for row in rows {
            // SAFETY: by the caller's promise these elements exist and are this thread's.
            let values =
                unsafe { std::slice::from_raw_parts_mut(self.values.add(row * self.cols + col), width) };
            (self.epilogue)(row, col, values);
        }
    }
}
