//! Plain loops, in blocks of 4 × 16, or 8, that a compiler keeps in 128-bit registers (NEON's 32, for one).

#![allow(unsafe_code)]

use super::{COLS, Lhs, Tile};

/// # Safety
/// `c` as [`super::tile_at`] asks.
pub(super) unsafe fn tile(t: &Tile<'_>, c: *mut f32, c_stride: usize) {
    // SAFETY: blocks of columns of the tile that the caller vouches for.
    unsafe {
        for first in (0..t.columns).step_by(16) {
            match t.columns - first {
                8 => columns::<8>(t, first, c, c_stride),
                _ => columns::<16>(t, first, c, c_stride),
            }
        }
    }
}

/// # Safety
/// As for [`tile`], for `W` columns from `col` on.
unsafe fn columns<const W: usize>(t: &Tile<'_>, col: usize, c: *mut f32, c_stride: usize) {
    let (row_stride, column) = match t.layout {
        Lhs::Panel => (Lhs::PANEL_STRIDE, 1),
        Lhs::ShortPanel => (Lhs::SHORT_PANEL_STRIDE, 1),
        Lhs::Lanes => (COLS, 1),
        Lhs::Columns { stride } => (1, stride),
    };
    for first in (0..t.rows).step_by(4) {
        let rows = (t.rows - first).min(4);
        let mut acc = [[0f32; W]; 4];
        for k in 0..t.depth {
            let Some(rhs) = t.rhs[k * t.rhs_stride + col..].first_chunk::<W>() else { return };
            for (i, acc) in acc.iter_mut().enumerate().take(rows) {
                let lhs = t.lhs[(first + i) * row_stride + k * column];
                acc.iter_mut().zip(rhs).for_each(|(acc, rhs)| *acc += lhs * rhs);
            }
        }
        for (i, acc) in acc.iter().enumerate().take(rows) {
            // SAFETY: a row of the tile, which the caller vouches for; rows do not overlap.
            let c = unsafe { std::slice::from_raw_parts_mut(c.add((first + i) * c_stride + col), W) };
            match t.add {
                true => c.iter_mut().zip(acc).for_each(|(c, acc)| *c += acc),
                false => c.copy_from_slice(acc),
            }
        }
    }
}

pub(super) fn transpose_16x16(src: &[f32], src_stride: usize, dst: &mut [f32], dst_stride: usize) {
    for i in 0..16 {
        let row = &src[i * src_stride..][..16];
        for (j, &value) in row.iter().enumerate() {
            dst[j * dst_stride + i] = value;
        }
    }
}
