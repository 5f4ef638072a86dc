//! Copies of pixels, and sums of copies: `kernels/elementwise.cu`.

use candle_core::{DType, Result};

use crate::gpu::{Array, Gpu, Launch, View, type_name};

pub(super) fn forward<G: Gpu>(
    gpu: &G,
    x: View<'_, G>,
    shape: &[usize],
    size: [usize; 2],
) -> Result<Array<G>> {
    let [batch, h, w, channels] = [shape[0], shape[1], shape[2], shape[3]];
    let y = gpu.alloc(x.dtype, batch * size[0] * size[1] * channels)?;
    let launch = launch("upsample_nearest", x.dtype, [batch, size[0], size[1], channels]);
    let sizes = [h, w, size[0], size[1], channels].map(Into::into);
    gpu.launch(&launch, &[&[(&y).into(), x.into()], sizes.as_slice()].concat())?;
    Ok(y)
}

pub(super) fn input_gradient<G: Gpu>(
    gpu: &G,
    shape: &[usize],
    size: [usize; 2],
    grad_output: View<'_, G>,
) -> Result<Array<G>> {
    let [batch, h, w, channels] = [shape[0], shape[1], shape[2], shape[3]];
    let dx = gpu.alloc(grad_output.dtype, batch * h * w * channels)?;
    let launch = launch("upsample_nearest_gradient", grad_output.dtype, [batch, h, w, channels]);
    let sizes = [h, w, size[0], size[1], channels].map(Into::into);
    gpu.launch(&launch, &[&[(&dx).into(), grad_output.into()], sizes.as_slice()].concat())?;
    Ok(dx)
}

/// A thread to some neighbouring channels of what is written, `[B, H, W, C]`.
fn launch(kernel: &str, dtype: DType, [batch, height, width, channels]: [usize; 4]) -> Launch {
    let row = Launch::over_rows(format!("{kernel}_{}", type_name(dtype)), width, &[channels]);
    Launch { grid: [row.grid[0], height, batch], ..row }
}
