//! A warp to a row: `kernels/layer_norm.cu`.

use candle_core::Result;

use super::LayerNormFunction;
use crate::gpu::{Affine, Argument, Array, Gpu, Launch, View, kept, type_name};

/// Rows of a block.
const ROWS: usize = 8;

pub(crate) fn forward<G: Gpu>(gpu: &G, norm: &LayerNormFunction, x: View<'_, G>) -> Result<Array<G>> {
    let Affine { weight, bias } = kept::<Affine<G>>(&norm.card)?;
    let y = gpu.alloc(x.dtype, x.len)?;
    let rows = x.len / norm.weight.len();
    let launch = Launch::new(format!("layer_norm_{}", type_name(x.dtype)), [rows.div_ceil(ROWS), 1, 1]);
    let sizes = [rows.into(), norm.weight.len().into(), norm.eps.into()];
    gpu.launch(&launch, &[&[(&y).into(), x.into(), weight.into(), bias.into()], sizes.as_slice()].concat())?;
    Ok(y)
}

/// `residual` is added: the gradient that reaches the input around the normalisation.
pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    norm: &LayerNormFunction,
    x: View<'_, G>,
    grad_output: View<'_, G>,
    residual: Option<View<'_, G>>,
) -> Result<Array<G>> {
    let Affine { weight, .. } = kept::<Affine<G>>(&norm.card)?;
    let dx = gpu.alloc(x.dtype, x.len)?;
    let rows = x.len / norm.weight.len();
    let name = format!("layer_norm_gradient_{}", type_name(x.dtype));
    let pointers: [Argument<'_, G>; 5] =
        [(&dx).into(), grad_output.into(), x.into(), residual.into(), weight.into()];
    let sizes = [rows.into(), norm.weight.len().into(), norm.eps.into()];
    gpu.launch(&Launch::new(name, [rows.div_ceil(ROWS), 1, 1]), &[&pointers, sizes.as_slice()].concat())?;
    Ok(dx)
}
