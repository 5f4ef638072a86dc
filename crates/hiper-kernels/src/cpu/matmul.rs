//! Matrix products on slices: bounds are checked here, once, and the product is `gemm`'s.

use gemm::Parallelism;
use rayon::prelude::*;

/// A matrix over a slice: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix whose rows lie `row_stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// A dense row-major matrix.
    pub(crate) fn dense(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transpose: same data.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows `start..start + rows`.
    pub(crate) fn row_range(self, start: usize, rows: usize) -> Self {
        assert!(start + rows <= self.rows);
        Self { data: &self.data[start * self.row_stride..], rows, ..self }
    }

    fn last_index(&self) -> usize {
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride
    }
}

/// What happens to the destination's old content.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// `dst = lhs · rhs`.
    Replace,
    /// `dst += lhs · rhs`.
    Add,
}

/// `dst (=|+=) lhs · rhs` on the calling thread. `dst` is row-major, rows `dst_stride` apart.
pub(crate) fn matmul_into(dst: &mut [f32], dst_stride: usize, write: Write, lhs: Mat<'_>, rhs: Mat<'_>) {
    matmul(dst, dst_stride, write, lhs, rhs, Parallelism::None);
}

/// A dense `lhs · rhs` on all threads.
pub(crate) fn matmul_parallel(lhs: Mat<'_>, rhs: Mat<'_>) -> Vec<f32> {
    /// Below this many rows a thread's share is too thin to amortise packing `rhs`, so threads share the packing.
    const MIN_ROWS: usize = 192;
    let mut out = vec![0f32; lhs.rows * rhs.cols];
    if out.is_empty() {
        return out;
    }
    let rows = super::rows_per_thread(lhs.rows, MIN_ROWS);
    if rows >= lhs.rows {
        let threads = Parallelism::Rayon(rayon::current_num_threads());
        matmul(&mut out, rhs.cols, Write::Replace, lhs, rhs, threads);
    } else {
        out.par_chunks_mut(rows * rhs.cols).enumerate().for_each(|(i, dst)| {
            let lhs = lhs.row_range(i * rows, dst.len() / rhs.cols);
            matmul(dst, rhs.cols, Write::Replace, lhs, rhs, Parallelism::None);
        });
    }
    out
}

fn matmul(
    dst: &mut [f32],
    dst_stride: usize,
    write: Write,
    lhs: Mat<'_>,
    rhs: Mat<'_>,
    parallelism: Parallelism,
) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!(lhs.cols, rhs.rows, "inner dimensions");
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0 && n <= dst_stride && (m - 1) * dst_stride + n <= dst.len());
    assert!(lhs.last_index() < lhs.data.len() && rhs.last_index() < rhs.data.len());
    // SAFETY:
    // 1. The asserts above bound every element that the strides reach, in all three matrices.
    // 2. `dst` is borrowed mutably, so it overlaps neither `lhs` nor `rhs`; its rows do not overlap (`n <= dst_stride`).
    // 3. All three hold initialised `f32`, one of the types `gemm` accepts.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            write == Write::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normals, relative_l2};

    #[test]
    fn products_match_the_definition_in_every_orientation() {
        // Sizes around the 14×32 register tile and the row split.
        for (m, n, k) in [(1, 1, 1), (13, 31, 7), (14, 32, 16), (15, 33, 17), (400, 5, 3)] {
            let (a, b) = (normals(m * k, 1), normals(k * n, 2));
            let mut exact = vec![0f64; m * n];
            for i in 0..m {
                for j in 0..n {
                    exact[i * n + j] = (0..k).map(|l| a[i * k + l] as f64 * b[l * n + j] as f64).sum();
                }
            }
            let transposed: Vec<f32> = (0..k * n).map(|i| b[(i % k) * n + i / k]).collect();
            for rhs in [Mat::dense(&b, k, n), Mat::dense(&transposed, n, k).t()] {
                let out = matmul_parallel(Mat::dense(&a, m, k), rhs);
                assert!(relative_l2(&out, &exact) < 1e-6);
                let mut twice = out.clone();
                matmul_into(&mut twice, n, Write::Add, Mat::dense(&a, m, k), rhs);
                let double: Vec<f64> = exact.iter().map(|v| 2.0 * v).collect();
                assert!(relative_l2(&twice, &double) < 1e-6);
            }
        }
    }
}
