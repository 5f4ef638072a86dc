//! Copies of pixels, and sums of copies.

use crate::cpu::fill::fill;

pub(super) fn forward(x: &[f32], shape: &[usize], [height, width]: [usize; 2]) -> Vec<f32> {
    let [batch, h, w, channels] = [shape[0], shape[1], shape[2], shape[3]];
    fill([batch * height, width * channels], width * channels, |row, _, y| {
        let (image, row) = (row / height, row % height);
        let from = &x[(image * h + row * h / height) * w * channels..][..w * channels];
        for (col, y) in y.chunks_exact_mut(channels).enumerate() {
            y.copy_from_slice(&from[col * w / width * channels..][..channels]);
        }
    })
}

pub(super) fn input_gradient(shape: &[usize], [height, width]: [usize; 2], grad_output: &[f32]) -> Vec<f32> {
    let [batch, h, w, channels] = [shape[0], shape[1], shape[2], shape[3]];
    fill([batch * h, w * channels], w * channels, |row, _, dx| {
        let (image, row) = (row / h, row % h);
        // The output rows that read input row `row`: ⌊r h / height⌋ = row.
        for r in (row * height).div_ceil(h)..((row + 1) * height).div_ceil(h) {
            let from = &grad_output[(image * height + r) * width * channels..][..width * channels];
            for (col, dy) in from.chunks_exact(channels).enumerate() {
                let dx = &mut dx[col * w / width * channels..][..channels];
                dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
            }
        }
    })
}
