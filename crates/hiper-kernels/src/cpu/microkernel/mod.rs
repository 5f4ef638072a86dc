//! The innermost matrix product: a tile of the result that lives in registers.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::LINE;
use super::isa::Isa;

/// Most rows of a tile: 14 × 2 accumulators, 2 registers of the right-hand side and 1 to broadcast fill AVX-512's 32.
pub(crate) const MAX_ROWS: usize = 14;

/// Columns of a tile, and of a panel of the right-hand side.
pub(crate) const COLS: usize = 32;

/// Columns of a tile that AVX2 cuts into rows of 5 vectors: attention's heads of 40, 80 and 160 divide into them, not into [`COLS`].
#[cfg(target_arch = "x86_64")]
pub(super) const WIDE: usize = 40;

/// How the left-hand side lies: element `(i, k)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lhs {
    /// `a[i · 176 + k]`, at most 160 `k`: a packed panel. The stride is known when compiling, so that every row is an
    /// address offset, and it spreads the rows over the sets of the first-level cache.
    Panel,
    /// `a[i · 48 + k]`, at most 48 `k`: the same for short rows (attention heads of 40).
    ShortPanel,
    /// `a[i · 32 + k]`, at most 32 `k`: a block that another tile wrote.
    Lanes,
    /// `a[k · stride + i]`: any matrix whose `i` are neighbours in memory.
    Columns {
        /// Values between neighbouring `k`.
        stride: usize,
    },
}

impl Lhs {
    /// Longest row of a [`Lhs::Panel`].
    pub(crate) const PANEL_DEPTH: usize = 160;
    /// Values between the rows of a [`Lhs::Panel`].
    pub(crate) const PANEL_STRIDE: usize = 176;
    /// Values between the rows of a [`Lhs::ShortPanel`], and its longest row.
    pub(crate) const SHORT_PANEL_STRIDE: usize = 48;

    /// Index of the last element that `rows × depth` elements touch.
    fn last(self, rows: usize, depth: usize) -> usize {
        match self {
            Self::Panel => (rows - 1) * Self::PANEL_STRIDE + depth - 1,
            Self::ShortPanel => (rows - 1) * Self::SHORT_PANEL_STRIDE + depth - 1,
            Self::Lanes => (rows - 1) * COLS + depth - 1,
            Self::Columns { stride } => (depth - 1) * stride + rows - 1,
        }
    }
}

/// The arguments of one tile: `c[i · c_stride + j] (=|+=) Σ_k lhs(i, k) · rhs[k · rhs_stride + j]`, `i < rows`,
/// `j < columns`, `k < depth`.
pub(crate) struct Tile<'a> {
    pub lhs: &'a [f32],
    pub layout: Lhs,
    pub rhs: &'a [f32],
    pub rhs_stride: usize,
    pub rows: usize,
    pub depth: usize,
    /// At most [`COLS`] or [`Isa::widest`], a multiple of [`Isa::lanes`].
    pub columns: usize,
    /// Whether the product is added to what `c` holds.
    pub add: bool,
}

/// Computes one tile into a slice.
#[inline]
pub(crate) fn tile(isa: Isa, t: &Tile<'_>, c: &mut [f32], c_stride: usize) {
    assert!(t.rows > 0 && (t.rows - 1) * c_stride + t.columns <= c.len());
    // SAFETY: the assert bounds every element that the tile writes; `c` is borrowed mutably.
    #[allow(unsafe_code)]
    unsafe {
        tile_at(isa, t, c.as_mut_ptr(), c_stride);
    }
}

/// Computes one tile at a pointer, for tiles of a matrix that several threads fill.
///
/// # Safety
/// `rows` rows of `columns` values, `c_stride` apart, are valid at `c`, and no one else reads or writes them
/// meanwhile.
#[inline]
#[allow(unsafe_code)]
pub(crate) unsafe fn tile_at(isa: Isa, t: &Tile<'_>, c: *mut f32, c_stride: usize) {
    assert!((1..=MAX_ROWS).contains(&t.rows) && t.depth > 0);
    assert!((1..=isa.widest()).contains(&t.columns) && t.columns.is_multiple_of(isa.lanes()));
    assert!(t.layout.last(t.rows, t.depth) < t.lhs.len());
    assert!((t.depth - 1) * t.rhs_stride + t.columns <= t.rhs.len());
    // SAFETY: `Isa::available` saw the instruction set on this processor. The asserts bound every element that the
    // layouts reach in `lhs` and `rhs`; the caller vouches for `c`.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::tile(t, c, c_stride),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::tile(t, c, c_stride),
            Isa::Portable => portable::tile(t, c, c_stride),
        }
    }
}

/// Asks for values that will be read soon, where they lie in memory as the processor would not expect.
#[inline]
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(LINE / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of any address does nothing that a program could notice.
        #[allow(unsafe_code)]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

/// Copies a 16 × 16 block, transposed: `dst[j · dst_stride + i] = src[i · src_stride + j]`.
#[inline]
pub(crate) fn transpose_16x16(isa: Isa, src: &[f32], src_stride: usize, dst: &mut [f32], dst_stride: usize) {
    assert!(15 * src_stride + 16 <= src.len() && 15 * dst_stride + 16 <= dst.len());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::available` saw AVX-512F. The assert bounds all 16 rows of both blocks, and `dst` is
        // borrowed mutably.
        #[allow(unsafe_code)]
        Isa::Avx512 => unsafe {
            avx512::transpose_16x16(src.as_ptr(), src_stride, dst.as_mut_ptr(), dst_stride);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above, with AVX2.
        #[allow(unsafe_code)]
        Isa::Avx2 => unsafe {
            avx2::transpose_16x16(src.as_ptr(), src_stride, dst.as_mut_ptr(), dst_stride);
        },
        Isa::Portable => portable::transpose_16x16(src, src_stride, dst, dst_stride),
    }
}

/// f16 numbers as f32.
#[inline]
pub(crate) fn widen(isa: Isa, from: &[f16], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::available` saw AVX and F16C for both.
        #[allow(unsafe_code)]
        Isa::Avx512 | Isa::Avx2 => unsafe { avx2::widen(from, to) },
        Isa::Portable => from.convert_to_f32_slice(to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    /// Every shape of tile, layout and instruction set against the definition.
    #[test]
    fn tiles_match_the_definition_on_every_instruction_set() {
        for isa in Isa::available() {
            for layout in [Lhs::Panel, Lhs::ShortPanel, Lhs::Lanes, Lhs::Columns { stride: 37 }] {
                let widths = (isa.lanes()..=isa.widest()).step_by(isa.lanes());
                for (rows, columns, (depth, add)) in (1..=MAX_ROWS)
                    .flat_map(|r| widths.clone().map(move |w| (r, w)))
                    .flat_map(|(r, w)| [(5, false), (32, true), (1, false)].map(|rest| (r, w, rest)))
                {
                    let lhs = normals(layout.last(rows, depth) + 1, 1);
                    let rhs_stride = columns + 3;
                    let rhs = normals((depth - 1) * rhs_stride + columns, 2);
                    let c_stride = columns + 5;
                    let before = normals((rows - 1) * c_stride + columns, 3);
                    let mut c = before.clone();
                    let t = Tile { lhs: &lhs, layout, rhs: &rhs, rhs_stride, rows, depth, columns, add };
                    tile(isa, &t, &mut c, c_stride);
                    for (at, (&got, &old)) in c.iter().zip(&before).enumerate() {
                        let (i, j) = (at / c_stride, at % c_stride);
                        if j >= columns {
                            assert_eq!(got, old, "{isa:?} wrote between rows");
                            continue;
                        }
                        let element = |k| lhs[layout.last(i + 1, k + 1)] as f64;
                        let sum: f64 = (0..depth).map(|k| element(k) * rhs[k * rhs_stride + j] as f64).sum();
                        let exact = if add { old as f64 + sum } else { sum };
                        assert!(
                            (got as f64 - exact).abs() < 2e-5,
                            "{isa:?} {layout:?} {rows}×{columns} {got} {exact}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_are_widened_on_every_instruction_set() {
        let from: Vec<f16> = (0..u16::MAX).map(f16::from_bits).filter(|value| value.is_finite()).collect();
        for isa in Isa::available() {
            for len in [0, 1, 7, 8, 9, 40, from.len()] {
                let mut to = vec![f32::NAN; len];
                widen(isa, &from[..len], &mut to);
                assert!(to.iter().zip(&from).all(|(to, from)| *to == from.to_f32()), "{isa:?} {len}");
            }
        }
    }

    #[test]
    fn blocks_are_transposed_on_every_instruction_set() {
        let src = normals(15 * 19 + 16, 1);
        for isa in Isa::available() {
            let mut dst = vec![0f32; 15 * 17 + 16];
            transpose_16x16(isa, &src, 19, &mut dst, 17);
            for (i, j) in (0..256).map(|n| (n / 16, n % 16)) {
                assert_eq!(dst[j * 17 + i], src[i * 19 + j]);
            }
        }
    }
}
