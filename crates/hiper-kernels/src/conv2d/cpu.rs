//! Direct convolution as matrix products.
//!
//! Stride 1: the input is copied once into a zero-padded picture of width `Wp`. Seen as `[Hp·Wp, I]`, the pixels that
//! one tap needs for a run of output rows are then one *contiguous* block of rows, so the whole run is `KH·KW`
//! accumulating products with no im2col. The `Wp − W'` columns between output rows are computed and dropped.
//! The input gradient is the same routine with the taps flipped and transposed.
//!
//! Other strides (three layers in a UNet) gather patches: im2col, one product; its transpose scatters.

use rayon::prelude::*;

use super::{ConvFunction, Padding};
use crate::cpu::matmul::{Mat, Write, matmul_into, matmul_parallel};
use crate::cpu::rows_per_thread;

pub(super) fn forward(conv: &ConvFunction, x: &[f32], shape: &[usize]) -> Vec<f32> {
    let [height, width] = [shape[1], shape[2]];
    if conv.config.stride > 1 {
        return forward_strided(conv, x, shape);
    }
    let output = conv.output_size(height, width);
    let [kernel_h, kernel_w] = conv.kernel;
    let tap = |kh, kw| conv.tap(kh, kw);
    let pass = StrideOne {
        input: [height, width],
        output,
        channels: [conv.channels_in, conv.channels_out],
        kernel: [kernel_h, kernel_w],
        padding: conv.config.padding,
    };
    pass.run(x, conv.bias.as_deref(), tap)
}

pub(super) fn input_gradient(conv: &ConvFunction, shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
    let [height, width] = [shape[1], shape[2]];
    if conv.config.stride > 1 {
        return input_gradient_strided(conv, shape, grad_output);
    }
    let [kernel_h, kernel_w] = conv.kernel;
    let Padding { top, bottom, left, right } = conv.config.padding;
    let flipped = Padding {
        top: kernel_h - 1 - top,
        bottom: kernel_h - 1 - bottom,
        left: kernel_w - 1 - left,
        right: kernel_w - 1 - right,
    };
    let pass = StrideOne {
        input: conv.output_size(height, width),
        output: [height, width],
        channels: [conv.channels_out, conv.channels_in],
        kernel: conv.kernel,
        padding: flipped,
    };
    pass.run(grad_output, None, |kh, kw| conv.tap(kernel_h - 1 - kh, kernel_w - 1 - kw).t())
}

impl ConvFunction {
    /// The `I × O` matrix of one tap.
    fn tap(&self, kh: usize, kw: usize) -> Mat<'_> {
        let size = self.channels_in * self.channels_out;
        let start = (kh * self.kernel[1] + kw) * size;
        Mat::dense(&self.taps[start..start + size], self.channels_in, self.channels_out)
    }
}

/// The shape of one stride-1 pass, forward or backward.
struct StrideOne {
    input: [usize; 2],
    output: [usize; 2],
    channels: [usize; 2],
    kernel: [usize; 2],
    padding: Padding,
}

impl StrideOne {
    fn run<'w>(
        &self,
        x: &[f32],
        bias: Option<&[f32]>,
        tap: impl Fn(usize, usize) -> Mat<'w> + Sync,
    ) -> Vec<f32> {
        let [channels_in, channels_out] = self.channels;
        let [rows, cols] = self.output;
        let image = self.input[0] * self.input[1] * channels_in;
        let mut y = vec![0f32; x.len() / image * rows * cols * channels_out];
        for (x, y) in x.chunks_exact(image).zip(y.chunks_exact_mut(rows * cols * channels_out)) {
            let padded = self.pad(x);
            // Enough rows a block to amortise packing the taps, even if that leaves a thread without work.
            const MIN_PIXELS: usize = 256;
            let block = rows_per_thread(rows, MIN_PIXELS.div_ceil(cols)).min(rows);
            y.par_chunks_mut(block * cols * channels_out).enumerate().for_each(|(i, y)| {
                self.block(&padded, i * block, bias, y, &tap);
            });
        }
        y
    }

    /// The width of a padded row.
    fn padded_width(&self) -> usize {
        self.input[1] + self.padding.left + self.padding.right
    }

    /// One picture with its border of zeros.
    fn pad(&self, x: &[f32]) -> Vec<f32> {
        let [height, width] = self.input;
        let channels = self.channels[0];
        let Padding { top, bottom, left, .. } = self.padding;
        let row = self.padded_width() * channels;
        let mut padded = vec![0f32; (height + top + bottom) * row];
        padded[top * row..(top + height) * row]
            .par_chunks_exact_mut(row)
            .zip(x.par_chunks_exact(width * channels))
            .for_each(|(padded, x)| padded[left * channels..][..width * channels].copy_from_slice(x));
        padded
    }

    /// Output rows `first_row..`, as many as `y` holds.
    fn block<'w>(
        &self,
        padded: &[f32],
        first_row: usize,
        bias: Option<&[f32]>,
        y: &mut [f32],
        tap: &impl Fn(usize, usize) -> Mat<'w>,
    ) {
        let [channels_in, channels_out] = self.channels;
        let (cols, stride) = (self.output[1], self.padded_width());
        let rows = y.len() / (cols * channels_out);
        let pixels = (rows - 1) * stride + cols;
        let direct = stride == cols;
        let mut scratch = if direct { Vec::new() } else { vec![0f32; pixels * channels_out] };
        let acc: &mut [f32] = if direct { y } else { &mut scratch };
        let mut write = Write::Replace;
        for kh in 0..self.kernel[0] {
            for kw in 0..self.kernel[1] {
                let start = ((first_row + kh) * stride + kw) * channels_in;
                let lhs = Mat::dense(&padded[start..start + pixels * channels_in], pixels, channels_in);
                matmul_into(acc, channels_out, write, lhs, tap(kh, kw));
                write = Write::Add;
            }
        }
        if direct {
            if let Some(bias) = bias {
                y.chunks_exact_mut(channels_out)
                    .for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
            }
            return;
        }
        for (row, y) in y.chunks_exact_mut(cols * channels_out).enumerate() {
            let from = &scratch[row * stride * channels_out..][..cols * channels_out];
            match bias {
                None => y.copy_from_slice(from),
                Some(bias) => {
                    for (y, from) in y.chunks_exact_mut(channels_out).zip(from.chunks_exact(channels_out)) {
                        y.iter_mut().zip(from).zip(bias).for_each(|((y, v), b)| *y = v + b);
                    }
                }
            }
        }
    }
}

fn forward_strided(conv: &ConvFunction, x: &[f32], shape: &[usize]) -> Vec<f32> {
    let patches = Patches::new(conv, shape);
    let mut cols = vec![0f32; patches.count() * patches.len];
    cols.par_chunks_exact_mut(patches.len).enumerate().for_each(|(p, patch)| {
        patches.taps_inside(p, |tap, pixel| {
            let c = conv.channels_in;
            patch[tap * c..][..c].copy_from_slice(&x[pixel * c..][..c]);
        });
    });
    let weight = Mat::dense(&conv.taps, patches.len, conv.channels_out);
    let mut y = matmul_parallel(Mat::dense(&cols, patches.count(), patches.len), weight);
    if let Some(bias) = &conv.bias {
        y.par_chunks_exact_mut(conv.channels_out)
            .for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    }
    y
}

fn input_gradient_strided(conv: &ConvFunction, shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
    let patches = Patches::new(conv, shape);
    let weight = Mat::dense(&conv.taps, patches.len, conv.channels_out);
    let cols = matmul_parallel(Mat::dense(grad_output, patches.count(), conv.channels_out), weight.t());
    let c = conv.channels_in;
    let mut dx = vec![0f32; shape.iter().product()];
    for (p, patch) in cols.chunks_exact(patches.len).enumerate() {
        patches.taps_inside(p, |tap, pixel| {
            dx[pixel * c..][..c].iter_mut().zip(&patch[tap * c..][..c]).for_each(|(dx, v)| *dx += v);
        });
    }
    dx
}

/// The patches of a strided convolution: patch `p` belongs to output pixel `p`.
struct Patches<'a> {
    conv: &'a ConvFunction,
    batch: usize,
    input: [usize; 2],
    output: [usize; 2],
    /// Values in a patch, `KH·KW·I`.
    len: usize,
}

impl<'a> Patches<'a> {
    fn new(conv: &'a ConvFunction, shape: &[usize]) -> Self {
        let input = [shape[1], shape[2]];
        let output = conv.output_size(input[0], input[1]);
        Self { conv, batch: shape[0], input, output, len: conv.kernel[0] * conv.kernel[1] * conv.channels_in }
    }

    fn count(&self) -> usize {
        self.batch * self.output[0] * self.output[1]
    }

    /// Calls `f(tap, input pixel)` for each tap of patch `p` that lies inside the picture.
    fn taps_inside(&self, p: usize, mut f: impl FnMut(usize, usize)) {
        let (pixels, stride, padding) =
            (self.output[0] * self.output[1], self.conv.config.stride, self.conv.config.padding);
        let (image, row, col) = (p / pixels, p % pixels / self.output[1], p % self.output[1]);
        for kh in 0..self.conv.kernel[0] {
            for kw in 0..self.conv.kernel[1] {
                let y = (row * stride + kh).wrapping_sub(padding.top);
                let x = (col * stride + kw).wrapping_sub(padding.left);
                if y < self.input[0] && x < self.input[1] {
                    f(kh * self.conv.kernel[1] + kw, (image * self.input[0] + y) * self.input[1] + x);
                }
            }
        }
    }
}
