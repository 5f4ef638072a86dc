//! Winograd for 3 × 3 convolutions of stride 1; patches and one matrix product for the others.

use super::winograd::Winograd;
use super::{ConvFunction, Padding};
use crate::cpu::fill::fill;
use crate::cpu::gemm::gemm;
use crate::cpu::matrix::Rhs;

/// `y = conv(x) (+ bias) (+ residual)`; the bias, `[O]` or `[B, O]`, is an argument because a block may add to the layer's own.
pub(crate) fn forward(
    conv: &ConvFunction,
    x: &[f32],
    shape: &[usize],
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
) -> Vec<f32> {
    let input = [shape[1], shape[2]];
    let output = conv.output_size(input[0], input[1]);
    if conv.is_winograd(output) {
        let Padding { top, left, .. } = conv.config.padding;
        let (channels, weight) = ([conv.channels_in, conv.channels_out], Rhs::Forward(&conv.weight));
        return Winograd { input, output, channels, padding: [top, left], weight, bias, residual }.run(x);
    }
    let patches = Patches::new(conv, shape);
    let pixels = output[0] * output[1];
    gemm(
        patches.count(),
        |pixel, k, out| patches.gather(x, pixel, k, out),
        Rhs::Forward(&conv.weight),
        |row, col, y| {
            if let Some(bias) = bias {
                let bias = &bias_of(bias, row / pixels, conv.channels_out)[col..];
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
            if let Some(residual) = residual {
                let from = &residual[row * conv.channels_out + col..];
                y.iter_mut().zip(from).for_each(|(y, r)| *y += r);
            }
        },
    )
}

/// The bias of one picture of the batch: all share one, `[O]`, or each has its own, `[B, O]`.
pub(super) fn bias_of(bias: &[f32], image: usize, channels_out: usize) -> &[f32] {
    let first = if bias.len() == channels_out { 0 } else { image * channels_out };
    &bias[first..first + channels_out]
}

/// The same convolution with the taps turned around and transposed; for other strides, patches scattered back.
pub(crate) fn input_gradient(conv: &ConvFunction, shape: &[usize], grad_output: &[f32]) -> Vec<f32> {
    let input = [shape[1], shape[2]];
    if conv.is_winograd(conv.output_size(input[0], input[1])) {
        let Padding { top, left, .. } = conv.config.padding;
        let (input, output) = (conv.output_size(input[0], input[1]), input);
        let (channels, weight) = ([conv.channels_out, conv.channels_in], Rhs::Gradient(&conv.weight));
        let padding = [2 - top, 2 - left];
        return Winograd { input, output, channels, padding, weight, bias: None, residual: None }
            .run(grad_output);
    }
    let patches = Patches::new(conv, shape);
    let outputs = conv.channels_out;
    let dy = |row: usize, k, out: &mut [f32]| out.copy_from_slice(&grad_output[row * outputs..][k]);
    let cols = gemm(patches.count(), dy, Rhs::Gradient(&conv.weight), |_, _, _| {});
    patches.scatter(&cols)
}

impl ConvFunction {
    /// Not for small pictures, whose few tiles do not pay for the transform of a weight. (A batch has more of them, but its sums run
    /// in the order of a single picture's.)
    fn is_winograd(&self, output: [usize; 2]) -> bool {
        self.config.stride == 1 && self.kernel == [3, 3] && output[0] * output[1] > 64
    }
}

/// The patches of a convolution: patch `p` belongs to output pixel `p`.
struct Patches<'a> {
    conv: &'a ConvFunction,
    batch: usize,
    input: [usize; 2],
    output: [usize; 2],
    /// Values in a patch, `[I, KH·KW]` as the weight's rows.
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

    /// Where tap `tap` of patch `p` lies in the batch of pictures, as a pixel's index; none outside the picture.
    fn pixel(&self, p: usize, tap: usize) -> Option<usize> {
        let (pixels, kernel_w) = (self.output[0] * self.output[1], self.conv.kernel[1]);
        let (image, row, col) = (p / pixels, p % pixels / self.output[1], p % self.output[1]);
        let Padding { top, left, .. } = self.conv.config.padding;
        let y = (row * self.conv.config.stride + tap / kernel_w).checked_sub(top)?;
        let x = (col * self.conv.config.stride + tap % kernel_w).checked_sub(left)?;
        (y < self.input[0] && x < self.input[1]).then(|| (image * self.input[0] + y) * self.input[1] + x)
    }

    /// Values `k` of patch `p`.
    fn gather(&self, x: &[f32], p: usize, k: std::ops::Range<usize>, out: &mut [f32]) {
        let (taps, channels) = (self.taps(), self.conv.channels_in);
        for tap in 0..taps {
            // The first of `k` that are this tap's.
            let first = k.start + (tap + taps - k.start % taps) % taps;
            let out = out.iter_mut().skip(first - k.start).step_by(taps);
            match self.pixel(p, tap) {
                Some(pixel) => {
                    let values = &x[pixel * channels + first / taps..];
                    out.zip(values).for_each(|(out, value)| *out = *value);
                }
                None => out.for_each(|out| *out = 0.0),
            }
        }
    }

    fn taps(&self) -> usize {
        self.conv.kernel[0] * self.conv.kernel[1]
    }

    /// The sum, at every input pixel, of the patches' values there.
    fn scatter(&self, patches: &[f32]) -> Vec<f32> {
        let channels = self.conv.channels_in;
        let [height, width] = self.input;
        let per_image = self.output[0] * self.output[1];
        // Bands of rows: a task reads every patch that reaches into its band.
        let band = height.div_ceil(rayon::current_num_threads()) * width * channels;
        fill([self.batch, height * width * channels], band, |image, first, dx| {
            let first = image * height * width + first / channels;
            let pixels = first..first + dx.len() / channels;
            for p in image * per_image..(image + 1) * per_image {
                let values = &patches[p * self.len..][..self.len];
                for tap in 0..self.taps() {
                    if let Some(pixel) = self.pixel(p, tap).filter(|pixel| pixels.contains(pixel)) {
                        let dx = &mut dx[(pixel - first) * channels..][..channels];
                        let values = values.iter().skip(tap).step_by(self.taps());
                        dx.iter_mut().zip(values).for_each(|(dx, v)| *dx += v);
                    }
                }
            }
        })
    }
}
