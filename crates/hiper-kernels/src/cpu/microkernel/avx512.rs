//! AVX-512: 14 × 2 accumulators of 16.

#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_storeu_ps,
    _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use super::{COLS, Lhs, Tile};

/// # Safety
/// AVX-512F; `t` and `c` as [`super::tile`] asserts them.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile(t: &Tile<'_>, c: *mut f32, c_stride: usize) {
    /// Picks the instance for a number of rows.
    macro_rules! by_rows {
        ($row:expr, $k:expr, $vectors:literal, $($rows:literal)*) => {
            match t.rows {
                // SAFETY: the caller's promises are the callee's.
                $($rows => unsafe { run::<$rows, $vectors, { $row }>(t, $k, c, c_stride) },)*
                _ => unreachable!("the caller bounds the rows"),
            }
        };
    }
    macro_rules! by_vectors {
        ($row:expr, $k:expr) => {
            match t.columns {
                16 => by_rows!($row, $k, 1, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
                _ => by_rows!($row, $k, 2, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
            }
        };
    }
    match t.layout {
        Lhs::Panel => by_vectors!(Lhs::PANEL_STRIDE, 1),
        Lhs::ShortPanel => by_vectors!(Lhs::SHORT_PANEL_STRIDE, 1),
        Lhs::Lanes => by_vectors!(COLS, 1),
        Lhs::Columns { stride } => by_vectors!(1, stride),
    }
}

/// One tile of `R × 16·V`; rows of the left-hand side lie `ROW` apart, its columns `column`.
#[target_feature(enable = "avx512f")]
unsafe fn run<const R: usize, const V: usize, const ROW: usize>(
    t: &Tile<'_>,
    column: usize,
    c: *mut f32,
    c_stride: usize,
) {
    let (mut a, mut b) = (t.lhs.as_ptr(), t.rhs.as_ptr());
    // The result is wanted when the products are done: by then it has come from wherever it lies.
    for i in 0..R {
        for v in 0..V {
            _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * c_stride + 16 * v).cast());
        }
    }
    let mut acc = [[_mm512_setzero_ps(); V]; R];
    for _ in 0..t.depth {
        let mut rhs = [_mm512_setzero_ps(); V];
        for (v, rhs) in rhs.iter_mut().enumerate() {
            // SAFETY: inside `rhs`, as the caller asserts.
            *rhs = unsafe { _mm512_loadu_ps(b.add(16 * v)) };
        }
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: inside `lhs`, as the caller asserts.
            let lhs = _mm512_set1_ps(unsafe { *a.add(i * ROW) });
            for (acc, rhs) in acc.iter_mut().zip(&rhs) {
                *acc = _mm512_fmadd_ps(lhs, *rhs, *acc);
            }
        }
        // `wrapping_add`: the last step leaves the slices without reading there.
        (a, b) = (a.wrapping_add(column), b.wrapping_add(t.rhs_stride));
    }
    for (i, acc) in acc.iter().enumerate() {
        for (v, acc) in acc.iter().enumerate() {
            // SAFETY: inside `c`, as the caller asserts.
            unsafe {
                let at = c.add(i * c_stride + 16 * v);
                let sum = if t.add { _mm512_add_ps(_mm512_loadu_ps(at), *acc) } else { *acc };
                _mm512_storeu_ps(at, sum);
            }
        }
    }
}

/// # Safety
/// AVX-512F; 16 rows of 16 values are readable at `src` and writable at `dst`, and the two do not overlap.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose_16x16(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    let mut r = [_mm512_setzero_ps(); 16];
    for (i, r) in r.iter_mut().enumerate() {
        // SAFETY: row `i` is readable.
        *r = unsafe { _mm512_loadu_ps(src.add(i * src_stride)) };
    }
    // Within each 128-bit lane, 4 × 4 blocks: pairs of rows, then pairs of pairs.
    let mut s = [_mm512_setzero_ps(); 16];
    for q in 0..4 {
        let pair = |hi: bool, a: __m512, b: __m512| {
            if hi { _mm512_unpackhi_ps(a, b) } else { _mm512_unpacklo_ps(a, b) }
        };
        let quad = |hi: bool, a: __m512, b: __m512| {
            let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
            _mm512_castpd_ps(if hi { _mm512_unpackhi_pd(a, b) } else { _mm512_unpacklo_pd(a, b) })
        };
        let [r0, r1, r2, r3] = [r[4 * q], r[4 * q + 1], r[4 * q + 2], r[4 * q + 3]];
        let (lo, hi) = ((pair(false, r0, r1), pair(false, r2, r3)), (pair(true, r0, r1), pair(true, r2, r3)));
        s[4 * q] = quad(false, lo.0, lo.1);
        s[4 * q + 1] = quad(true, lo.0, lo.1);
        s[4 * q + 2] = quad(false, hi.0, hi.1);
        s[4 * q + 3] = quad(true, hi.0, hi.1);
    }
    // `s[4q + m]` holds columns m, 4 + m, 8 + m, 12 + m of rows 4q..4q + 4; gather the four lanes of each column.
    for m in 0..4 {
        let (a, b, c, d) = (s[m], s[4 + m], s[8 + m], s[12 + m]);
        let ab_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
        let ab_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
        let cd_even = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
        let cd_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
        let columns = [
            _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_even, cd_even),
            _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_odd, cd_odd),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_even, cd_even),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_odd, cd_odd),
        ];
        for (lane, column) in columns.into_iter().enumerate() {
            // SAFETY: row `4 · lane + m` is writable.
            unsafe { _mm512_storeu_ps(dst.add((4 * lane + m) * dst_stride), column) };
        }
    }
}
