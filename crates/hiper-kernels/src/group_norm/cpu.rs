//! Two passes over the picture forward, three backward: the last one writes, the others gather sums by channel.
//!
//! Sums by channel are gathered in `f32` over short blocks of pixels and carried in `f64`, so that neither a large
//! picture nor a mean far from zero costs digits.

use std::ops::Range;

use rayon::prelude::*;

use super::GroupNormFunction;
use crate::cpu::fill::fill;
use crate::cpu::simd::vectorise;
use crate::cpu::{share, stretch};

/// Pixels summed in `f32` before the sum moves to `f64`.
const BLOCK: usize = 16;

/// What normalises channel `c`: `x̂ = x · scale + shift` with `scale = 1/σ`, `shift = −μ/σ`.
struct Statistics {
    scale: Vec<f32>,
    shift: Vec<f32>,
}

pub(crate) fn forward(norm: &GroupNormFunction, x: &[f32], batch: usize) -> Vec<f32> {
    let (channels, image) = (norm.weight.len(), x.len() / batch);
    let affine = |x| {
        let Statistics { mut scale, mut shift } = statistics(norm, x);
        for c in 0..channels {
            scale[c] *= norm.weight[c];
            shift[c] = shift[c] * norm.weight[c] + norm.bias[c];
        }
        Statistics { scale, shift }
    };
    let images: Vec<Statistics> = x.chunks_exact(image).map(affine).collect();
    fill([batch, image], stretch(channels), |i, first, y| {
        let Statistics { scale, shift } = &images[i];
        let x = &x[i * image + first..];
        vectorise(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                    let (scale, shift) = (&scale[..x.len()], &shift[..x.len()]);
                    for c in 0..x.len() {
                        y[c] = x[c] * scale[c] + shift[c];
                    }
                }
            },
        );
        if let Some(activation) = norm.activation {
            activation.apply_in_place(y);
        }
    })
}

/// With `g = dy · act'(z) · w` and `x̂` the normalised input:
/// `dx = (g − mean(g) − x̂ · mean(g · x̂)) / σ`, means over the group.
///
/// `residual` is added: the gradient that reaches the input around the normalisation. `g` is computed twice, which costs
/// less than to write it and read it back.
pub(crate) fn input_gradient(
    norm: &GroupNormFunction,
    x: &[f32],
    batch: usize,
    grad_output: &[f32],
    residual: Option<&[f32]>,
) -> Vec<f32> {
    let (channels, image) = (norm.weight.len(), x.len() / batch);
    let images: Vec<_> = x
        .chunks_exact(image)
        .zip(grad_output.chunks_exact(image))
        .map(|(x, dy)| {
            let statistics = statistics(norm, x);
            let Statistics { scale, shift } = &statistics;
            let [sum_g, sum_gx] = channel_sums(x, channels, |pixels, sums, [z, g]| {
                let rows = x[pixels.clone()].chunks_exact(channels).zip(dy[pixels].chunks_exact(channels));
                for (x, dy) in rows {
                    norm.output_gradient(&statistics, x, dy, z, g);
                    let n = x.len();
                    let [sum_g, sum_gx] = sums.each_mut().map(|sum| &mut sum[..n]);
                    let (g, scale, shift) = (&g[..n], &scale[..n], &shift[..n]);
                    for c in 0..n {
                        sum_g[c] += g[c];
                        sum_gx[c] += g[c] * (x[c] * scale[c] + shift[c]);
                    }
                }
            });
            let means = [group_means(norm, &sum_g, image), group_means(norm, &sum_gx, image)];
            (statistics, means)
        })
        .collect();
    fill([batch, image], stretch(channels), |i, first, dx| {
        let (statistics, [mean_g, mean_gx]) = &images[i];
        let Statistics { scale, shift } = statistics;
        let part = i * image + first..i * image + first + dx.len();
        let (mut z, mut g) = (vec![0f32; channels], vec![0f32; channels]);
        if let Some(residual) = residual {
            dx.copy_from_slice(&residual[part.clone()]);
        }
        vectorise(
            #[inline(always)]
            || {
                let rows =
                    x[part.clone()].chunks_exact(channels).zip(grad_output[part].chunks_exact(channels));
                for (dx, (x, dy)) in dx.chunks_exact_mut(channels).zip(rows) {
                    norm.output_gradient(statistics, x, dy, &mut z, &mut g);
                    let n = x.len();
                    let (g, scale, shift) = (&g[..n], &scale[..n], &shift[..n]);
                    let (dx, mean_g, mean_gx) = (&mut dx[..n], &mean_g[..n], &mean_gx[..n]);
                    for c in 0..n {
                        let x_hat = x[c] * scale[c] + shift[c];
                        dx[c] += (g[c] - mean_g[c] - x_hat * mean_gx[c]) * scale[c];
                    }
                }
            },
        );
    })
}

impl GroupNormFunction {
    /// `g = dy · act'(z) · w` of one pixel; `z` is room for the activation's argument.
    #[inline(always)]
    fn output_gradient(&self, statistics: &Statistics, x: &[f32], dy: &[f32], z: &mut [f32], g: &mut [f32]) {
        // Slices of one length: the loop then has no bounds to check, and vectorises.
        let n = x.len();
        let (dy, z, g) = (&dy[..n], &mut z[..n], &mut g[..n]);
        let (scale, shift) = (&statistics.scale[..n], &statistics.shift[..n]);
        let (weight, bias) = (&self.weight[..n], &self.bias[..n]);
        for c in 0..n {
            z[c] = (x[c] * scale[c] + shift[c]) * weight[c] + bias[c];
            g[c] = dy[c] * weight[c];
        }
        if let Some(activation) = self.activation {
            activation.multiply_by_derivative(g, z);
        }
    }
}

fn statistics(norm: &GroupNormFunction, x: &[f32]) -> Statistics {
    let channels = norm.weight.len();
    // Sums are taken about the first pixel, so that a large common mean does not cancel in the variance.
    let origin = &x[..channels];
    let [sum, sum_squares] = channel_sums(x, channels, |pixels, sums, _| {
        for x in x[pixels].chunks_exact(channels) {
            let (n, origin) = (x.len(), &origin[..x.len()]);
            let [sum, sum_squares] = sums.each_mut().map(|sum| &mut sum[..n]);
            for c in 0..n {
                let d = x[c] - origin[c];
                sum[c] += d;
                sum_squares[c] += d * d;
            }
        }
    });
    let pixels = (x.len() / channels) as f64;
    let per_group = channels / norm.num_groups;
    let (mut scale, mut shift) = (vec![0f32; channels], vec![0f32; channels]);
    for g in 0..norm.num_groups {
        let group = g * per_group..(g + 1) * per_group;
        let n = pixels * per_group as f64;
        let mean = group.clone().map(|c| sum[c] + pixels * origin[c] as f64).sum::<f64>() / n;
        // Σ (x − μ)² = Σ (d + o − μ)² with d = x − o.
        let squares: f64 = group
            .clone()
            .map(|c| {
                let offset = origin[c] as f64 - mean;
                sum_squares[c] + 2.0 * offset * sum[c] + pixels * offset * offset
            })
            .sum();
        let inverse = 1.0 / (squares.max(0.0) / n + norm.eps as f64).sqrt();
        for c in group {
            scale[c] = inverse as f32;
            shift[c] = (-mean * inverse) as f32;
        }
    }
    Statistics { scale, shift }
}

/// Two sums by channel over all pixels. `add(values, sums, room)` adds a block's values, which are `x[values]`, and may use
/// two pixels' room as it likes.
fn channel_sums(
    x: &[f32],
    channels: usize,
    add: impl Fn(Range<usize>, &mut [Vec<f32>; 2], &mut [Vec<f32>; 2]) + Sync,
) -> [Vec<f64>; 2] {
    let size = BLOCK * channels;
    let partial: Vec<[Vec<f64>; 2]> = x
        .par_chunks(share(x.len() / channels, BLOCK) * channels)
        .enumerate()
        .map(|(i, part)| {
            let start = i * share(x.len() / channels, BLOCK) * channels;
            let pair = || [vec![0f32; channels], vec![0f32; channels]];
            let (mut totals, mut sums, mut room) =
                ([vec![0f64; channels], vec![0f64; channels]], pair(), pair());
            for first in (start..start + part.len()).step_by(size) {
                vectorise(
                    #[inline(always)]
                    || {
                        sums.iter_mut().for_each(|s| s.fill(0.0));
                        add(first..(first + size).min(start + part.len()), &mut sums, &mut room);
                        for (total, sum) in totals.iter_mut().zip(&sums) {
                            total.iter_mut().zip(sum).for_each(|(t, &s)| *t += s as f64);
                        }
                    },
                );
            }
            totals
        })
        .collect();
    let mut totals = [vec![0f64; channels], vec![0f64; channels]];
    for part in &partial {
        for (total, part) in totals.iter_mut().zip(part) {
            total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
        }
    }
    totals
}

/// Each channel's group mean, from sums by channel.
fn group_means(norm: &GroupNormFunction, sums: &[f64], image: usize) -> Vec<f32> {
    let per_group = sums.len() / norm.num_groups;
    let n = (image / norm.num_groups) as f64;
    sums.chunks_exact(per_group)
        .flat_map(|group| std::iter::repeat_n((group.iter().sum::<f64>() / n) as f32, per_group))
        .collect()
}
