//! A frozen layer's matrix where the checkpoint has it, and the panels of 32 columns that products read.
//!
//! Nothing is rearranged when a network is loaded, so a mapped file is all the memory that its weights take. A product packs
//! the panels that it is about to use: the forward pass transposes, the gradient copies rows; 16-bit numbers are widened
//! on the way.

use std::ops::Range;

use candle_core::Result;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::isa::Isa;
use super::microkernel::{COLS, prefetch, transpose_16x16, widen};
use crate::weight::{Stored, Values, Weight};

/// `W [rows, width]`, row-major: a row for each output channel. Of a convolution's kernels, `[O, I, KH, KW]`, a row is
/// `[I, KH·KW]`: all taps of a channel, then those of the next.
pub(crate) struct Matrix {
    values: Values,
    rows: usize,
    width: usize,
}

/// Taps of a 3 × 3 kernel.
pub(crate) const TAPS: usize = 9;

impl Matrix {
    pub(crate) fn new(weight: Weight) -> Result<Self> {
        let rows = weight.dims().first().copied().unwrap_or_default();
        let width = weight.dims().iter().skip(1).product();
        Ok(Self { values: weight.values()?, rows, width })
    }

    /// In place of one that is on a card: nothing here reads it.
    pub(crate) fn elsewhere() -> Self {
        Self { values: Values::F32(Stored::Own([].into())), rows: 0, width: 0 }
    }

    fn view(&self) -> View<'_> {
        let numbers = match &self.values {
            Values::F32(values) => Numbers::F32(values),
            Values::F16(values) => Numbers::F16(values),
            Values::BF16(values) => Numbers::BF16(values),
        };
        View { numbers, rows: self.rows, width: self.width }
    }
}

/// A matrix whose numbers have been found: where they lie costs something to ask.
#[derive(Clone, Copy)]
struct View<'a> {
    numbers: Numbers<'a>,
    rows: usize,
    width: usize,
}

#[derive(Clone, Copy)]
enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// Columns that are transposed in one go: some lines of a row.
const STRIP: usize = 64;

impl View<'_> {
    /// Columns of a row: where they lie, or widened into `buffer`.
    fn row<'a>(&'a self, isa: Isa, row: usize, columns: Range<usize>, buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..columns.len()];
        let at = row * self.width + columns.start..row * self.width + columns.end;
        match self.numbers {
            Numbers::F32(values) => return &values[at],
            Numbers::F16(values) => widen(isa, &values[at], buffer),
            Numbers::BF16(values) => values[at].convert_to_f32_slice(buffer),
        }
        buffer
    }

    /// Asks for columns of a row that will be read soon, as far as they exist.
    fn prefetch(&self, row: usize, columns: Range<usize>) {
        let end = columns.end.min(self.width);
        if row >= self.rows || columns.start >= end {
            return;
        }
        let at = row * self.width + columns.start..row * self.width + end;
        match self.numbers {
            Numbers::F32(values) => prefetch(&values[at]),
            Numbers::F16(values) => prefetch(&values[at]),
            Numbers::BF16(values) => prefetch(&values[at]),
        }
    }

    /// At most 32 rows, transposed to `[columns, 32]`, zeros in place of missing rows.
    fn transpose(&self, isa: Isa, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        /// Columns transposed by one call.
        const SIDE: usize = 16;
        let mut strip = [0f32; COLS * STRIP];
        for (first, out) in columns.clone().step_by(STRIP).zip(out.chunks_mut(STRIP * COLS)) {
            let columns = first..(first + STRIP).min(columns.end);
            let (src, stride) = match self.numbers {
                Numbers::F32(values) => (&values[rows.start * self.width + first..], self.width),
                _ => {
                    for (row, strip) in rows.clone().zip(strip.chunks_exact_mut(STRIP)) {
                        self.row(isa, row, columns.clone(), strip);
                    }
                    (&strip[..], STRIP)
                }
            };
            for (i, out) in out.chunks_mut(SIDE * COLS).enumerate() {
                // Rows are short streams from far apart, which the processor does not foresee.
                let ahead = rows.clone().skip(i * COLS * SIDE / STRIP).take(COLS * SIDE / STRIP);
                ahead.for_each(|row| self.prefetch(row, first + STRIP..first + 2 * STRIP));
                let src = &src[i * SIDE..];
                if rows.len() == COLS && out.len() == SIDE * COLS {
                    transpose_16x16(isa, src, stride, out, COLS);
                    transpose_16x16(isa, &src[SIDE * stride..], stride, &mut out[SIDE..], COLS);
                    continue;
                }
                for (j, out) in out.chunks_exact_mut(COLS).enumerate() {
                    for (row, out) in out.iter_mut().enumerate() {
                        *out = if row < rows.len() { src[row * stride + j] } else { 0.0 };
                    }
                }
            }
        }
    }

    /// Columns of some rows as panels, `[panel][rows, 32]`, zeros in place of missing columns.
    fn copy(&self, isa: Isa, rows: Range<usize>, panels: Range<usize>, out: &mut [f32]) {
        /// Columns at a time.
        const PIECE: usize = 16 * COLS;
        let size = rows.len() * COLS;
        let mut widened = [0f32; PIECE];
        for (i, row) in rows.enumerate() {
            for (piece, out) in panels.clone().step_by(PIECE / COLS).zip(out.chunks_mut(PIECE / COLS * size))
            {
                let first = piece * COLS;
                let end = (first + PIECE).min(panels.end * COLS).min(self.width);
                self.prefetch(row + 2, first..end);
                let values = self.row(isa, row, first..end, &mut widened);
                let (whole, rest) = values.as_chunks::<COLS>();
                let mut panels = out.chunks_exact_mut(size).map(|panel| &mut panel[i * COLS..][..COLS]);
                whole.iter().zip(&mut panels).for_each(|(values, panel)| panel.copy_from_slice(values));
                if let Some(panel) = panels.next() {
                    panel[..rest.len()].copy_from_slice(rest);
                    panel[rest.len()..].fill(0.0);
                }
            }
        }
    }

    /// A panel of 32 input channels of a 3 × 3 kernel's rows, `[rows, 9, 32]`, zeros in place of missing channels.
    fn copy_taps(&self, isa: Isa, rows: Range<usize>, panel: usize, out: &mut [f32]) {
        let first = panel * COLS * TAPS;
        let columns = first..(first + COLS * TAPS).min(self.width);
        let mut widened = [0f32; COLS * TAPS];
        for (row, out) in rows.zip(out.as_chunks_mut::<{ COLS * TAPS }>().0) {
            self.prefetch(row + 2, columns.clone());
            let values = self.row(isa, row, columns.clone(), &mut widened);
            match <&[f32; COLS * TAPS]>::try_from(values) {
                Ok(values) => {
                    for (tap, out) in out.as_chunks_mut::<COLS>().0.iter_mut().enumerate() {
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = values[i * TAPS + tap];
                        }
                    }
                }
                Err(_) => {
                    out.fill(0.0);
                    for (i, &value) in values.iter().enumerate() {
                        out[i % TAPS * COLS + i / TAPS] = value;
                    }
                }
            }
        }
    }
}

/// The right-hand side of a product with a layer's matrix.
#[derive(Clone, Copy)]
pub(crate) enum Rhs<'a> {
    /// `Wᵀ [width, rows]`.
    Forward(&'a Matrix),
    /// `W [rows, width]`.
    Gradient(&'a Matrix),
}

impl Rhs<'_> {
    /// Rows of this right-hand side.
    pub(crate) fn depth(&self) -> usize {
        match self {
            Self::Forward(matrix) => matrix.width,
            Self::Gradient(matrix) => matrix.rows,
        }
    }

    /// Columns of this right-hand side.
    pub(crate) fn cols(&self) -> usize {
        match self {
            Self::Forward(matrix) => matrix.rows,
            Self::Gradient(matrix) => matrix.width,
        }
    }

    /// Rows `k` of some panels of 32 columns, `[panel][k, 32]`, zeros in place of missing columns.
    pub(crate) fn pack(&self, isa: Isa, panels: Range<usize>, k: Range<usize>, out: &mut [f32]) {
        match self {
            Self::Forward(matrix) => {
                let matrix = matrix.view();
                // transpose asks for the next strips itself; each panel's first would come unannounced.
                let first_strip = |panel: usize| {
                    let rows = panel * COLS..(panel + 1) * COLS;
                    rows.for_each(|row| matrix.prefetch(row, k.start..k.start + STRIP));
                };
                first_strip(panels.start);
                for (panel, out) in panels.zip(out.chunks_exact_mut(k.len() * COLS)) {
                    first_strip(panel + 1);
                    let rows = panel * COLS..((panel + 1) * COLS).min(matrix.rows);
                    matrix.transpose(isa, rows, k.clone(), out);
                }
            }
            Self::Gradient(matrix) => matrix.view().copy(isa, k, panels, out),
        }
    }

    /// Of a 3 × 3 convolution: the taps from channels `k` to a panel of 32 channels, `[k, 9, 32]`. Channels are those of the input
    /// and of the output in the forward pass, the other way round in the gradient.
    pub(crate) fn pack_taps(&self, isa: Isa, panel: usize, k: Range<usize>, out: &mut [f32]) {
        match self {
            Self::Forward(_) => self.pack(isa, panel..panel + 1, k.start * TAPS..k.end * TAPS, out),
            Self::Gradient(matrix) => matrix.view().copy_taps(isa, k, panel, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;
    use candle_core::{DType, Device, Tensor};

    /// Its panels, in every type, on every instruction set.
    fn each(dims: &[usize], check: impl Fn(Isa, &Matrix, &[f32])) {
        let tensor = Tensor::from_vec(normals(dims.iter().product(), 1), dims, &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let tensor = tensor.to_dtype(dtype).unwrap();
            let exact: Vec<f32> =
                tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let matrix = Matrix::new((&tensor).into()).unwrap();
            Isa::available().into_iter().for_each(|isa| check(isa, &matrix, &exact));
        }
    }

    #[test]
    fn panels_are_parts_of_the_matrix_in_every_type_and_direction() {
        let (rows, width) = (70, 90);
        each(&[rows, width], |isa, matrix, exact| {
            for (panels, k) in [(0..1, 32..64), (0..3, 0..70), (1..3, 7..24), (2..3, 32..70)] {
                for rhs in [Rhs::Forward(matrix), Rhs::Gradient(matrix)] {
                    let mut out = vec![f32::NAN; panels.len() * k.len() * COLS];
                    rhs.pack(isa, panels.clone(), k.clone(), &mut out);
                    for (i, &got) in out.iter().enumerate() {
                        let (panel, row, col) = (i / COLS / k.len(), i / COLS % k.len() + k.start, i % COLS);
                        let col = (panels.start + panel) * COLS + col;
                        let expected = match rhs {
                            _ if col >= rhs.cols() => 0.0,
                            Rhs::Forward(_) => exact[col * width + row],
                            Rhs::Gradient(_) => exact[row * width + col],
                        };
                        assert_eq!(got, expected, "{isa:?} {panels:?} {k:?} {i}");
                    }
                }
            }
        });
    }

    #[test]
    fn taps_lie_beside_each_other_in_both_directions() {
        let (outputs, inputs) = (40, 70);
        each(&[outputs, inputs, 3, 3], |isa, matrix, exact| {
            for (rhs, [from, to]) in
                [(Rhs::Forward(matrix), [inputs, outputs]), (Rhs::Gradient(matrix), [outputs, inputs])]
            {
                for (panel, k) in [(0, 0..from), (1, 3..20)] {
                    let mut out = vec![f32::NAN; k.len() * TAPS * COLS];
                    rhs.pack_taps(isa, panel, k.clone(), &mut out);
                    for (i, &got) in out.iter().enumerate() {
                        let (c, tap, col) =
                            (i / COLS / TAPS + k.start, i / COLS % TAPS, panel * COLS + i % COLS);
                        let (o, i_) = if matches!(rhs, Rhs::Forward(_)) { (col, c) } else { (c, col) };
                        let expected = if col < to { exact[(o * inputs + i_) * TAPS + tap] } else { 0.0 };
                        assert_eq!(got, expected, "{isa:?} {panel} {k:?} {i}");
                    }
                }
            }
        });
    }
}
