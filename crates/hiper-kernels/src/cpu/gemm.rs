//! Products with a frozen weight, `out[m × n] = lhs[m × k] · rhs[k × n]`, and what follows them.
//!
//! The weight stays as the checkpoint has it; a thread packs the panels that it needs. It takes a group of columns and walks down
//! the rows, some panels of a tile's rows at a time, and through the depth, block by block: one block of the group's
//! columns stays in its second-level cache, one packed panel of rows in the first. Packing the rows costs little beside the
//! products, so every thread does it for itself; a closure says what they hold. The last visit of a tile applies the
//! epilogue while it is in cache.

use std::ops::Range;

use rayon::prelude::*;

use super::TASKS;
use super::isa::Isa;
use super::matrix::Rhs;
use super::microkernel::{COLS, Lhs, MAX_ROWS, Tile, tile, tile_at};
use super::scratch::with_local;

/// Values of a packed panel of the left-hand side.
pub(crate) const LHS_PANEL: usize = MAX_ROWS * Lhs::PANEL_STRIDE;

/// Most column panels of a group: one block of depth of them (240 KiB) stays in the second-level cache.
const GROUP: usize = 12;

/// Rows visited before the next columns, in panels: their result stays in the second-level cache.
const ROW_BLOCK: usize = 12;

/// Number and depth of the blocks into which `k` is cut: even, a multiple of a panel's columns, no longer than a packed row.
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
    let [depth, cols] = [rhs.depth(), rhs.cols()];
    let product = Product { isa, values: out.as_mut_ptr(), rows, cols, depth, lhs, epilogue };
    (0..grid.row_parts * grid.groups).into_par_iter().for_each(|task| {
        let (part, group) = (task / grid.groups, task % grid.groups);
        let (row_panels, panels) = (grid.rows(part), grid.panels(group));
        // Rows that are all visited at once pass one block of depth after the other; more of them come back to the first.
        let visit = if row_panels.len() <= ROW_BLOCK { block_depth } else { blocks * block_depth };
        let size = panels.len() * visit.min(rhs.depth()) * COLS;
        with_local(size + ROW_BLOCK * LHS_PANEL, |local| {
            let (columns, lhs_panels) = local.split_at_mut(size);
            for first in (0..rhs.depth()).step_by(visit) {
                let mut rest = &mut *columns;
                let mut packed = Vec::with_capacity(blocks);
                for k in (first..(first + visit).min(rhs.depth())).step_by(block_depth) {
                    let k = k..(k + block_depth).min(rhs.depth());
                    let (now, later) = rest.split_at_mut(panels.len() * k.len() * COLS);
                    rhs.pack(isa, panels.clone(), k.clone(), now);
                    packed.push((k, &*now));
                    rest = later;
                }
                // SAFETY: tasks differ in their rows or in their columns, so no two touch the same tile.
                #[allow(unsafe_code)]
                unsafe {
                    product.fill([row_panels.clone(), panels.clone()], &packed, lhs_panels);
                }
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
    depth: usize,
    lhs: L,
    epilogue: E,
}

// SAFETY: the pointer is to room that `gemm` owns for as long as `Product` lives; `fill` says who writes what. The closures
// are `Sync`.
#[allow(unsafe_code)]
unsafe impl<L: Sync, E: Sync> Sync for Product<L, E> {}

#[allow(unsafe_code)]
impl<L: Fn(usize, Range<usize>, &mut [f32]), E: Fn(usize, usize, &mut [f32])> Product<L, E> {
    /// Adds to the tiles of some row panels and column panels what some blocks of depth give. `packed` holds the latter's,
    /// `panels` is room for some of the former.
    ///
    /// # Safety
    /// The panels lie inside the result, and no other thread touches their tiles.
    unsafe fn fill(
        &self,
        [row_panels, col_panels]: [Range<usize>; 2],
        packed: &[(Range<usize>, &[f32])],
        panels: &mut [f32],
    ) {
        for first in row_panels.clone().step_by(ROW_BLOCK) {
            let row_panels = first..(first + ROW_BLOCK).min(row_panels.end);
            for (k, columns) in packed {
                let height = self.isa.tile_rows();
                let rows = |panel: usize| panel * height..((panel + 1) * height).min(self.rows);
                for (panel, packed) in row_panels.clone().zip(panels.chunks_exact_mut(LHS_PANEL)) {
                    for (row, packed) in rows(panel).zip(packed.chunks_exact_mut(Lhs::PANEL_STRIDE)) {
                        (self.lhs)(row, k.clone(), &mut packed[..k.len()]);
                    }
                }
                for (row_panel, lhs) in row_panels.clone().zip(panels.chunks_exact(LHS_PANEL)) {
                    for (panel, rhs) in col_panels.clone().zip(columns.chunks_exact(k.len() * COLS)) {
                        let (rows, col) = (rows(row_panel), panel * COLS);
                        let t = Tile {
                            lhs,
                            layout: Lhs::Panel,
                            rhs,
                            rhs_stride: COLS,
                            rows: rows.len(),
                            depth: k.len(),
                            columns: COLS.min((self.cols - col).next_multiple_of(self.isa.lanes())),
                            add: k.start > 0,
                        };
                        // SAFETY: the caller's promise.
                        unsafe {
                            self.tile(&t, rows.start, col);
                            if k.end == self.depth {
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
    unsafe fn tile(&self, t: &Tile<'_>, row: usize, col: usize) {
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
