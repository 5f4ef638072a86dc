//! AVX2 and FMA: the tile is cut into blocks of at most 6 × 16, 12 accumulators of 8, or of 2 × 40; 8 columns left over make narrower ones.
//! Rows are shared out evenly: a block of less than four rows would wait for its own sums.

#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_add_ps, _mm256_castpd_ps, _mm256_castps_pd,
    _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_storeu_ps, _mm256_unpackhi_pd, _mm256_unpackhi_ps, _mm256_unpacklo_pd,
    _mm256_unpacklo_ps,
};

use half::f16;

use super::{COLS, Lhs, MAX_ROWS, Tile, WIDE};

/// The blocks of so many rows.
const BLOCKS: [&[usize]; MAX_ROWS + 1] = [
    &[],
    &[1],
    &[2],
    &[3],
    &[4],
    &[5],
    &[6],
    &[4, 3],
    &[4, 4],
    &[5, 4],
    &[5, 5],
    &[6, 5],
    &[6, 6],
    &[5, 4, 4],
    &[5, 5, 4],
];

/// # Safety
/// AVX2 and FMA; `t` and `c` as [`super::tile`] asserts them.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile(t: &Tile<'_>, c: *mut f32, c_stride: usize) {
    // SAFETY: the caller's promises are the callee's.
    unsafe {
        match t.layout {
            Lhs::Panel => by_blocks::<{ Lhs::PANEL_STRIDE }>(t, 1, c, c_stride),
            Lhs::ShortPanel => by_blocks::<{ Lhs::SHORT_PANEL_STRIDE }>(t, 1, c, c_stride),
            Lhs::Lanes => by_blocks::<COLS>(t, 1, c, c_stride),
            Lhs::Columns { stride } => by_blocks::<1>(t, stride, c, c_stride),
        }
    }
}

/// Rows of the left-hand side lie `ROW` apart, its columns `column`.
#[target_feature(enable = "avx2,fma")]
unsafe fn by_blocks<const ROW: usize>(t: &Tile<'_>, column: usize, c: *mut f32, c_stride: usize) {
    if t.columns == WIDE {
        for row in (0..t.rows).step_by(2) {
            // SAFETY: these rows lie inside the tile that the caller promises.
            unsafe {
                let from = [t.lhs.as_ptr().add(row * ROW), t.rhs.as_ptr()];
                let c = c.add(row * c_stride);
                match t.rows - row {
                    1 => run::<1, ROW, 5>(t, from, column, c, c_stride),
                    _ => run::<2, ROW, 5>(t, from, column, c, c_stride),
                }
            }
        }
        return;
    }
    for col in (0..t.columns).step_by(16) {
        let mut row = 0;
        for &rows in BLOCKS[t.rows] {
            // SAFETY: the block lies inside the tile that the caller promises.
            unsafe {
                let from = [t.lhs.as_ptr().add(row * ROW), t.rhs.as_ptr().add(col)];
                let c = c.add(row * c_stride + col);
                match t.columns - col {
                    8 => block::<ROW, 1>(rows, t, from, column, c, c_stride),
                    _ => block::<ROW, 2>(rows, t, from, column, c, c_stride),
                }
            }
            row += rows;
        }
    }
}

/// Picks the instance for a number of rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn block<const ROW: usize, const V: usize>(
    rows: usize,
    t: &Tile<'_>,
    from: [*const f32; 2],
    column: usize,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: the caller's promises are the callee's.
    unsafe {
        match rows {
            1 => run::<1, ROW, V>(t, from, column, c, c_stride),
            2 => run::<2, ROW, V>(t, from, column, c, c_stride),
            3 => run::<3, ROW, V>(t, from, column, c, c_stride),
            4 => run::<4, ROW, V>(t, from, column, c, c_stride),
            5 => run::<5, ROW, V>(t, from, column, c, c_stride),
            _ => run::<6, ROW, V>(t, from, column, c, c_stride),
        }
    }
}

/// `R` rows of `V` vectors.
#[target_feature(enable = "avx2,fma")]
unsafe fn run<const R: usize, const ROW: usize, const V: usize>(
    t: &Tile<'_>,
    [mut a, mut b]: [*const f32; 2],
    column: usize,
    c: *mut f32,
    c_stride: usize,
) {
    if t.add {
        // The result is wanted when the products are done: by then it has come from wherever it lies.
        for i in 0..R {
            for end in [0, 8 * V - 1] {
                _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * c_stride + end).cast());
            }
        }
    }
    let mut acc = [[_mm256_setzero_ps(); V]; R];
    for _ in 0..t.depth {
        let mut rhs = [_mm256_setzero_ps(); V];
        for (v, rhs) in rhs.iter_mut().enumerate() {
            // SAFETY: inside `rhs`, as the caller asserts.
            *rhs = unsafe { _mm256_loadu_ps(b.add(8 * v)) };
        }
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: inside `lhs`, as the caller asserts.
            let lhs = _mm256_set1_ps(unsafe { *a.add(i * ROW) });
            for (acc, rhs) in acc.iter_mut().zip(&rhs) {
                *acc = _mm256_fmadd_ps(lhs, *rhs, *acc);
            }
        }
        // `wrapping_add`: the last step leaves the slices without reading there.
        (a, b) = (a.wrapping_add(column), b.wrapping_add(t.rhs_stride));
    }
    for (i, acc) in acc.iter().enumerate() {
        for (v, acc) in acc.iter().enumerate() {
            // SAFETY: inside `c`, as the caller asserts.
            unsafe {
                let at = c.add(i * c_stride + 8 * v);
                let sum = if t.add { _mm256_add_ps(_mm256_loadu_ps(at), *acc) } else { *acc };
                _mm256_storeu_ps(at, sum);
            }
        }
    }
}

/// # Safety
/// AVX2; 16 rows of 16 values are readable at `src` and writable at `dst`, and the two do not overlap.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn transpose_16x16(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    for (i, j) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
        // SAFETY: an 8 × 8 block of what the caller promises.
        unsafe {
            transpose_8x8(src.add(i * src_stride + j), src_stride, dst.add(j * dst_stride + i), dst_stride)
        };
    }
}

/// # Safety
/// AVX2; 8 rows of 8 values are readable at `src` and writable at `dst`, and the two do not overlap.
#[target_feature(enable = "avx2")]
unsafe fn transpose_8x8(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    let mut r = [_mm256_setzero_ps(); 8];
    for (i, r) in r.iter_mut().enumerate() {
        // SAFETY: row `i` is readable.
        *r = unsafe { _mm256_loadu_ps(src.add(i * src_stride)) };
    }
    // Within each 128-bit lane, 4 × 4 blocks: pairs of rows, then pairs of pairs.
    let quad = |hi: bool, a: __m256, b: __m256| {
        let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
        _mm256_castpd_ps(if hi { _mm256_unpackhi_pd(a, b) } else { _mm256_unpacklo_pd(a, b) })
    };
    let mut s = [_mm256_setzero_ps(); 8];
    for q in [0, 4] {
        let (lo0, lo1) = (_mm256_unpacklo_ps(r[q], r[q + 1]), _mm256_unpacklo_ps(r[q + 2], r[q + 3]));
        let (hi0, hi1) = (_mm256_unpackhi_ps(r[q], r[q + 1]), _mm256_unpackhi_ps(r[q + 2], r[q + 3]));
        s[q] = quad(false, lo0, lo1);
        s[q + 1] = quad(true, lo0, lo1);
        s[q + 2] = quad(false, hi0, hi1);
        s[q + 3] = quad(true, hi0, hi1);
    }
    // `s[q + m]` holds columns m and 4 + m of rows q..q + 4.
    for m in 0..4 {
        // SAFETY: rows `m` and `m + 4` are writable.
        unsafe {
            _mm256_storeu_ps(dst.add(m * dst_stride), _mm256_permute2f128_ps::<0x20>(s[m], s[4 + m]));
            _mm256_storeu_ps(dst.add((m + 4) * dst_stride), _mm256_permute2f128_ps::<0x31>(s[m], s[4 + m]));
        }
    }
}

/// # Safety
/// AVX and F16C.
#[target_feature(enable = "avx,f16c")]
pub(super) unsafe fn widen(from: &[f16], to: &mut [f32]) {
    let (from, rest) = from.as_chunks::<8>();
    let (to, last) = to.as_chunks_mut::<8>();
    for (from, to) in from.iter().zip(to) {
        // SAFETY: eight numbers of two bytes, and eight of four.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) };
    }
    for (from, to) in rest.iter().zip(last) {
        *to = from.to_f32();
    }
}
