//! Two passes over the picture each way: one gathers sums by channel, one writes.
//!
//! Sums by channel are gathered in `f32` over short blocks of pixels and carried in `f64`, so that neither a large
//! picture nor a mean far from zero costs digits.

use rayon::prelude::*;

use super::GroupNormFunction;
use crate::cpu::rows_per_thread;
use crate::cpu::simd::vectorise;

/// Pixels summed in `f32` before the sum moves to `f64`.
const BLOCK: usize = 16;

/// What normalises channel `c`: `x̂ = x · scale + shift` with `scale = 1/σ`, `shift = −μ/σ`.
struct Statistics {
    scale: Vec<f32>,
    shift: Vec<f32>,
}

pub(crate) fn forward(norm: &GroupNormFunction, x: &[f32], batch: usize) -> Vec<f32> {
    let channels = norm.weight.len();
    let image = x.len() / batch;
    let mut y = vec![0f32; x.len()];
    for (x, y) in x.chunks_exact(image).zip(y.chunks_exact_mut(image)) {
        let Statistics { mut scale, mut shift } = statistics(norm, x);
        for c in 0..channels {
            scale[c] *= norm.weight[c];
            shift[c] = shift[c] * norm.weight[c] + norm.bias[c];
        }
        let rows = rows_per_thread(image / channels, BLOCK) * channels;
        y.par_chunks_mut(rows).zip(x.par_chunks(rows)).for_each(|(y, x)| {
            vectorise(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                        for c in 0..channels {
                            y[c] = x[c] * scale[c] + shift[c];
                        }
                    }
                },
            );
            if let Some(activation) = norm.activation {
                activation.apply_in_place(y);
            }
        });
    }
    y
}

/// With `g = dy · act'(z) · w` and `x̂` the normalised input:
/// `dx = (g − mean(g) − x̂ · mean(g · x̂)) / σ`, means over the group.
///
/// `residual` is added: the gradient that reaches the input around the normalisation.
pub(crate) fn input_gradient(
    norm: &GroupNormFunction,
    x: &[f32],
    batch: usize,
    grad_output: &[f32],
    residual: Option<&[f32]>,
) -> Vec<f32> {
    let channels = norm.weight.len();
    let image = x.len() / batch;
    let mut dx = vec![0f32; x.len()];
    let images = x.chunks_exact(image).zip(grad_output.chunks_exact(image));
    for (i, ((x, dy), dx)) in images.zip(dx.chunks_exact_mut(image)).enumerate() {
        let Statistics { scale, shift } = statistics(norm, x);
        let rows = rows_per_thread(image / channels, BLOCK) * channels;
        // `dx` holds `g` between the passes.
        dx.par_chunks_mut(rows).zip(x.par_chunks(rows)).zip(dy.par_chunks(rows)).for_each(|((g, x), dy)| {
            let mut z = vec![0f32; channels];
            for ((g, x), dy) in
                g.chunks_exact_mut(channels).zip(x.chunks_exact(channels)).zip(dy.chunks_exact(channels))
            {
                vectorise(
                    #[inline(always)]
                    || {
                        for c in 0..channels {
                            z[c] = (x[c] * scale[c] + shift[c]) * norm.weight[c] + norm.bias[c];
                            g[c] = dy[c] * norm.weight[c];
                        }
                    },
                );
                if let Some(activation) = norm.activation {
                    activation.multiply_by_derivative(g, &z);
                }
            }
        });
        let g: &[f32] = dx;
        let [sum_g, sum_gx] = channel_sums(x, channels, |start, len, sums| {
            for p in start..start + len {
                let (x, g) = (&x[p * channels..][..channels], &g[p * channels..][..channels]);
                for c in 0..channels {
                    sums[0][c] += g[c];
                    sums[1][c] += g[c] * (x[c] * scale[c] + shift[c]);
                }
            }
        });
        let mean_g = group_means(norm, &sum_g, image);
        let mean_gx = group_means(norm, &sum_gx, image);
        dx.par_chunks_mut(rows).zip(x.par_chunks(rows)).enumerate().for_each(|(part, (dx, x))| {
            let residual = residual.map(|residual| &residual[i * image + part * rows..][..dx.len()]);
            vectorise(
                #[inline(always)]
                || {
                    for (dx, x) in dx.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                        for c in 0..channels {
                            let x_hat = x[c] * scale[c] + shift[c];
                            dx[c] = (dx[c] - mean_g[c] - x_hat * mean_gx[c]) * scale[c];
                        }
                    }
                    if let Some(residual) = residual {
                        for (dx, residual) in dx.iter_mut().zip(residual) {
                            *dx += residual;
                        }
                    }
                },
            );
        });
    }
    dx
}

fn statistics(norm: &GroupNormFunction, x: &[f32]) -> Statistics {
    let channels = norm.weight.len();
    // Sums are taken about the first pixel, so that a large common mean does not cancel in the variance.
    let origin = &x[..channels];
    let [sum, sum_squares] = channel_sums(x, channels, |start, len, sums| {
        for x in x[start * channels..(start + len) * channels].chunks_exact(channels) {
            for c in 0..channels {
                let d = x[c] - origin[c];
                sums[0][c] += d;
                sums[1][c] += d * d;
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

/// Two sums by channel over all pixels. `add(first pixel, pixels, sums)` adds a block's values.
fn channel_sums(
    x: &[f32],
    channels: usize,
    add: impl Fn(usize, usize, &mut [Vec<f32>; 2]) + Sync,
) -> [Vec<f64>; 2] {
    let pixels = x.len() / channels;
    let share = rows_per_thread(pixels, BLOCK);
    let partial: Vec<[Vec<f64>; 2]> = (0..pixels.div_ceil(share))
        .into_par_iter()
        .map(|i| {
            let end = ((i + 1) * share).min(pixels);
            let mut totals = [vec![0f64; channels], vec![0f64; channels]];
            let mut sums = [vec![0f32; channels], vec![0f32; channels]];
            for start in (i * share..end).step_by(BLOCK) {
                vectorise(
                    #[inline(always)]
                    || {
                        sums.iter_mut().for_each(|s| s.fill(0.0));
                        add(start, BLOCK.min(end - start), &mut sums);
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
