//! One pass over memory each way: `kernels/elementwise.cu`.

use candle_core::Result;

use super::Activation;
use crate::gpu::{Argument, Array, Gpu, Launch, View, type_name};

impl Activation {
    /// As kernels are named after it.
    fn kernel(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::QuickGelu => "quick_gelu",
        }
    }
}

pub(crate) fn forward<G: Gpu>(gpu: &G, kind: Activation, x: View<'_, G>) -> Result<Array<G>> {
    let y = gpu.alloc(x.dtype, x.len)?;
    let launch = Launch::over_numbers(format!("{}_{}", kind.kernel(), type_name(x.dtype)), x.len);
    gpu.launch(&launch, &[(&y).into(), x.into(), Argument::Count(x.len)])?;
    Ok(y)
}

pub(crate) fn input_gradient<G: Gpu>(
    gpu: &G,
    kind: Activation,
    x: View<'_, G>,
    grad_output: View<'_, G>,
) -> Result<Array<G>> {
    let dx = gpu.alloc(x.dtype, x.len)?;
    let launch = Launch::over_numbers(format!("{}_gradient_{}", kind.kernel(), type_name(x.dtype)), x.len);
    gpu.launch(&launch, &[(&dx).into(), grad_output.into(), x.into(), Argument::Count(x.len)])?;
    Ok(dx)
}
