//! One pass over memory each way: `kernels/elementwise.cu`.

use candle_core::Result;

use crate::gpu::{Array, Gpu, Launch, View, type_name};

/// `x [.., 2C]` to `y [.., C]`.
pub(crate) fn forward<G: Gpu>(gpu: &G, x: View<'_, G>, c: usize) -> Result<Array<G>> {
    let y = gpu.alloc(x.dtype, x.len / 2)?;
    let rows = y.len / c;
    let launch = Launch::over_rows(format!("geglu_{}", type_name(x.dtype)), rows, &[c]);
    gpu.launch(&launch, &[(&y).into(), x.into(), rows.into(), c.into()])?;
    Ok(y)
}

pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    x: View<'_, G>,
    c: usize,
    grad_output: View<'_, G>,
) -> Result<Array<G>> {
    let dx = gpu.alloc(x.dtype, x.len)?;
    let rows = grad_output.len / c;
    let launch = Launch::over_rows(format!("geglu_gradient_{}", type_name(x.dtype)), rows, &[c]);
    gpu.launch(&launch, &[(&dx).into(), grad_output.into(), x.into(), rows.into(), c.into()])?;
    Ok(dx)
}
