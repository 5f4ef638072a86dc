//! AVX2 and FMA: the tile is cut into blocks of 6 × 16, 12 accumulators of 8.

#![allow(unsafe_code)]

use std::arch::x86_64::{
    _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::{COLS, Lhs, Tile};

/// # Safety
/// AVX2 and FMA; `t` and `c` as [`super::tile`] asserts them.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile(t: Tile<'_>, c: *mut f32, c_stride: usize) {
    for v in 0..t.vectors {
        for row in (0..t.rows).step_by(6) {
            // SAFETY: the block lies inside the tile that the caller promises.
            unsafe {
                match t.layout {
                    Lhs::Panel => by_rows::<{ Lhs::PANEL_STRIDE }>(t, [row, v], 1, c, c_stride),
                    Lhs::ShortPanel => by_rows::<{ Lhs::SHORT_PANEL_STRIDE }>(t, [row, v], 1, c, c_stride),
                    Lhs::Lanes => by_rows::<COLS>(t, [row, v], 1, c, c_stride),
                    Lhs::Columns { stride } => by_rows::<1>(t, [row, v], stride, c, c_stride),
                }
            }
        }
    }
}

/// The block that begins at a row and a vector of 16 columns of the tile.
#[target_feature(enable = "avx2,fma")]
unsafe fn by_rows<const ROW: usize>(
    t: Tile<'_>,
    [row, v]: [usize; 2],
    column: usize,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: `row` is a row of the tile, `v` one of its vectors; the caller's promises are the callee's.
    unsafe {
        let from = [t.lhs.as_ptr().add(row * ROW), t.rhs.as_ptr().add(16 * v)];
        let c = c.add(row * c_stride + 16 * v);
        match t.rows - row {
            1 => run::<1, ROW>(t, from, column, c, c_stride),
            2 => run::<2, ROW>(t, from, column, c, c_stride),
            3 => run::<3, ROW>(t, from, column, c, c_stride),
            4 => run::<4, ROW>(t, from, column, c, c_stride),
            5 => run::<5, ROW>(t, from, column, c, c_stride),
            _ => run::<6, ROW>(t, from, column, c, c_stride),
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn run<const R: usize, const ROW: usize>(
    t: Tile<'_>,
    [mut a, mut b]: [*const f32; 2],
    column: usize,
    c: *mut f32,
    c_stride: usize,
) {
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for _ in 0..t.depth {
        // SAFETY: inside `rhs` and `lhs`, as the caller asserts.
        let rhs = unsafe { [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))] };
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: as above.
            let lhs = _mm256_set1_ps(unsafe { *a.add(i * ROW) });
            acc[0] = _mm256_fmadd_ps(lhs, rhs[0], acc[0]);
            acc[1] = _mm256_fmadd_ps(lhs, rhs[1], acc[1]);
        }
        // `wrapping_add`: the last step leaves the slices without reading there.
        (a, b) = (a.wrapping_add(column), b.wrapping_add(t.rhs_stride));
    }
    for (i, acc) in acc.iter().enumerate() {
        for (half, acc) in acc.iter().enumerate() {
            // SAFETY: inside `c`, as the caller asserts.
            unsafe {
                let at = c.add(i * c_stride + 8 * half);
                let sum = if t.add { _mm256_add_ps(_mm256_loadu_ps(at), *acc) } else { *acc };
                _mm256_storeu_ps(at, sum);
            }
        }
    }
}
