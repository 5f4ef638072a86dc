//! A frozen weight as the kernels read it: panels of 32 output channels, in the type in which the checkpoint stores it.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::fill::fill;
use super::isa::Isa;
use super::microkernel::{COLS, prefetch, transpose_16x16};

/// The matrix `[depth, cols]` of a layer, `y = x · W`, stored once for both directions as `[cols / 32, depth, 32]`, zeros
/// beyond the last column. An f16 checkpoint costs its own size: values are widened where they are used.
pub(crate) struct Weight {
    values: Values,
    depth: usize,
    cols: usize,
}

enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Weight {
    /// Of a layer's weight `[cols, depth]`, or kernels `[cols, channels, KH, KW]` whose depth becomes channels last,
    /// `[KH·KW·channels]`; in f32, f16 or bf16 (other types become f32).
    pub(crate) fn new(tensor: &Tensor) -> Result<Self> {
        let cols = tensor.dim(0)?;
        let depth = tensor.elem_count() / cols.max(1);
        let taps = tensor.dims().iter().skip(2).product::<usize>();
        let tensor = match tensor.dtype() {
            DType::F16 | DType::BF16 => tensor.contiguous()?,
            _ => tensor.to_dtype(DType::F32)?.contiguous()?,
        };
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            candle_core::bail!("a layer's weight must be on the CPU");
        };
        let (start, end) = layout.contiguous_offsets().unwrap_or_default();
        let values = match storage {
            CpuStorage::F16(values) => Values::F16(panels(&values[start..end], [cols, depth, taps])),
            CpuStorage::BF16(values) => Values::BF16(panels(&values[start..end], [cols, depth, taps])),
            CpuStorage::F32(values) => Values::F32(panels(&values[start..end], [cols, depth, taps])),
            _ => candle_core::bail!("a layer's weight must be f32, f16 or bf16"),
        };
        Ok(Self { values, depth, cols })
    }

    /// In place of one that is on a card: nothing here reads it.
    pub(crate) fn elsewhere() -> Self {
        Self { values: Values::F32(Vec::new()), depth: 0, cols: 0 }
    }

    /// Rows `k` of column panel `panel`, `[k.len(), 32]`: where they lie, or widened into `buffer`.
    fn panel<'a>(&'a self, panel: usize, k: Range<usize>, buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..if matches!(self.values, Values::F32(_)) { 0 } else { k.len() * COLS }];
        match &self.values {
            Values::F32(values) => return &values[self.range(panel, k)],
            Values::F16(values) => values[self.range(panel, k)].convert_to_f32_slice(buffer),
            Values::BF16(values) => values[self.range(panel, k)].convert_to_f32_slice(buffer),
        }
        buffer
    }

    /// The same, if that needs no room.
    fn panel_in_place(&self, panel: usize, k: Range<usize>) -> Option<&[f32]> {
        let Values::F32(values) = &self.values else { return None };
        Some(&values[self.range(panel, k)])
    }

    fn range(&self, panel: usize, k: Range<usize>) -> Range<usize> {
        let start = panel * self.depth * COLS;
        start + k.start * COLS..start + k.end * COLS
    }
}

/// `[cols, channels, taps]` to `[cols / 32, taps, channels, 32]`; `[cols, depth, taps]` are the sizes given.
fn panels<T: Copy + Default + Send + Sync>(rows: &[T], [cols, depth, taps]: [usize; 3]) -> Vec<T> {
    /// Values of a row that are turned at a time: some lines, as each row's first one is waited for.
    const BLOCK: usize = 64;
    let (size, channels) = (depth * COLS, depth / taps);
    fill([cols.div_ceil(COLS), size], size, |i, _, panel| {
        let rows = &rows[i * size..((i + 1) * COLS).min(cols) * depth];
        let mut turned = [[T::default(); COLS]; BLOCK];
        for first in (0..depth).step_by(BLOCK) {
            for (col, row) in rows.chunks_exact(depth).enumerate() {
                if let Some(next) = row.get(first + BLOCK..) {
                    prefetch(&next[..next.len().min(BLOCK)]);
                }
                for (turned, &value) in turned.iter_mut().zip(&row[first..]) {
                    turned[col] = value;
                }
            }
            for (k, turned) in (first..depth).zip(&turned) {
                let (channel, tap) = (k / taps, k % taps);
                panel[(tap * channels + channel) * COLS..][..COLS].copy_from_slice(turned);
            }
        }
    })
}

/// The right-hand side of a product: rows of a weight (forward), or its transpose (gradient), or one tap's part of either.
#[derive(Clone, Copy)]
pub(crate) struct Rhs<'a> {
    pub weight: &'a Weight,
    /// First row of the weight that takes part, and how many do.
    pub rows: (usize, usize),
    /// Whether this is the transpose.
    pub transposed: bool,
}

impl<'a> Rhs<'a> {
    /// The whole weight, or its transpose.
    pub(crate) fn whole(weight: &'a Weight, transposed: bool) -> Self {
        Self { weight, rows: (0, weight.depth), transposed }
    }

    /// Rows of this right-hand side.
    pub(crate) fn depth(&self) -> usize {
        if self.transposed { self.weight.cols } else { self.rows.1 }
    }

    /// Columns of this right-hand side.
    pub(crate) fn cols(&self) -> usize {
        if self.transposed { self.rows.1 } else { self.weight.cols }
    }

    /// Rows `k`, columns `32 · panel..`, as `[k.len(), 32]`; zeros beyond the last column. `k` begins at a multiple of 32.
    pub(crate) fn panel<'s>(
        &'s self,
        isa: Isa,
        panel: usize,
        k: Range<usize>,
        buffer: &'s mut [f32],
    ) -> &'s [f32] {
        if !self.transposed {
            return self.weight.panel(panel, self.rows.0 + k.start..self.rows.0 + k.end, buffer);
        }
        let first = panel * COLS;
        let cols = COLS.min(self.rows.1 - first);
        for (block, out) in buffer[..k.len() * COLS].chunks_mut(COLS * COLS).enumerate() {
            // A square of the weight, `[this panel's columns, 32 of this side's rows]`. Room is cleared where it is needed alone: it
            // is as large as what is transposed.
            let (mut square, mut padded) = (None, None);
            let from = self.rows.0 + first;
            let (block, rows) = (k.start / COLS + block, from..from + cols);
            if (block + 1) * COLS < k.end
                && let Some(next) = self.weight.panel_in_place(block + 1, rows.clone())
            {
                prefetch(next);
            }
            let stored = match self.weight.panel_in_place(block, rows.clone()) {
                Some(stored) => stored,
                None => self.weight.panel(block, rows, square.insert([0f32; COLS * COLS])),
            };
            let stored = if cols == COLS {
                stored
            } else {
                let padded = padded.insert([0f32; COLS * COLS]);
                padded[..cols * COLS].copy_from_slice(stored);
                padded
            };
            if out.len() == COLS * COLS {
                for (i, j) in [(0, 0), (0, 16), (16, 0), (16, 16)] {
                    transpose_16x16(isa, &stored[i * COLS + j..], COLS, &mut out[j * COLS + i..], COLS);
                }
            } else {
                for (row, out) in out.chunks_exact_mut(COLS).enumerate() {
                    out.iter_mut().enumerate().for_each(|(col, out)| *out = stored[col * COLS + row]);
                }
            }
        }
        &buffer[..k.len() * COLS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;
    use candle_core::Device;

    #[test]
    fn kernels_become_channels_last() {
        let (cols, channels) = (3, 5);
        let tensor =
            Tensor::from_vec(normals(cols * channels * 6, 1), (cols, channels, 2, 3), &Device::Cpu).unwrap();
        let exact = tensor.permute((0, 2, 3, 1)).unwrap().flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
        let weight = Weight::new(&tensor).unwrap();
        let panel = weight.panel(0, 0..channels * 6, &mut []);
        for (i, row) in panel.chunks_exact(COLS).enumerate() {
            assert!((0..cols).all(|col| row[col] == exact[col][i]) && row[cols..].iter().all(|&v| v == 0.0));
        }
    }

    #[test]
    fn panels_are_parts_of_the_matrix_in_every_type_and_direction() {
        let (cols, depth) = (70, 90);
        let tensor = Tensor::from_vec(normals(cols * depth, 1), (cols, depth), &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let tensor = tensor.to_dtype(dtype).unwrap();
            let exact = tensor.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            let weight = Weight::new(&tensor).unwrap();
            for isa in Isa::available() {
                for (rows, transposed, k, panel) in [
                    ((0, 90), false, 32..64, 2),
                    ((30, 45), false, 32..45, 0),
                    ((0, 90), true, 32..70, 2),
                    ((30, 45), true, 0..64, 1),
                ] {
                    let rhs = Rhs { weight: &weight, rows, transposed };
                    let mut buffer = vec![f32::NAN; k.len() * COLS];
                    let got = rhs.panel(isa, panel, k.clone(), &mut buffer);
                    for (i, j) in (0..k.len()).flat_map(|i| (0..COLS).map(move |j| (i, j))) {
                        let (row, col) = (k.start + i, panel * COLS + j);
                        let inside = col < rhs.cols();
                        let (o, i_) = if transposed { (row, col) } else { (col, row) };
                        let expected = if inside { exact[o][rows.0 + i_] } else { 0.0 };
                        assert_eq!(got[i * COLS + j], expected, "{isa:?} {dtype:?} {transposed} {row} {col}");
                    }
                }
            }
        }
    }
}
