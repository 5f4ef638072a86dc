//! The bridge between slices and candle's graph: a frozen function of one tensor as a `CustomOp1`.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor};

/// A function of one tensor, with its vector–Jacobian product. Weights live in `self`.
pub(crate) trait FrozenFunction: Send + Sync + 'static {
    /// The operator's name, for error messages.
    const NAME: &'static str;

    /// The result's shape; errors when the input's is wrong.
    fn output_shape(&self, input: &[usize]) -> Result<Vec<usize>>;

    /// `y = f(x)`, with `x` of shape `shape`, row-major.
    fn forward(&self, x: &[f32], shape: &[usize]) -> Vec<f32>;

    /// `dx = dyᵀ ∂f/∂x`.
    fn input_gradient(&self, x: &[f32], shape: &[usize], grad_output: &[f32]) -> Vec<f32>;
}

/// Applies `function` to `x` as one node of candle's graph.
pub(crate) fn apply<F: FrozenFunction>(function: &Arc<F>, x: &Tensor) -> Result<Tensor> {
    if x.dtype() != DType::F32 {
        return Err(candle_core::Error::UnsupportedDTypeForOp(x.dtype(), F::NAME).bt());
    }
    function.output_shape(x.dims())?;
    x.contiguous()?.apply_op1(Node(function.clone()))
}

struct Node<F>(Arc<F>);

impl<F: FrozenFunction> CustomOp1 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = layout.dims();
        let y = self.0.forward(cpu_slice(storage, layout)?, shape);
        Ok((CpuStorage::F32(y), self.0.output_shape(shape)?.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad_output: &Tensor) -> Result<Option<Tensor>> {
        let dx =
            with_cpu_slices([x, grad_output], |[x_data, dy]| self.0.input_gradient(x_data, x.dims(), dy))?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// The contiguous `f32` data behind a storage.
pub(crate) fn cpu_slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op: "hiper-kernels" }.bt()),
    }
}

/// Calls `f` with the contiguous data of `N` tensors that live on the CPU.
pub(crate) fn with_cpu_slices<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> R,
) -> Result<R> {
    let contiguous: Vec<Tensor> = tensors.iter().map(|t| t.contiguous()).collect::<Result<_>>()?;
    let guards: Vec<_> = contiguous.iter().map(|t| t.storage_and_layout()).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *slice = match &**storage {
            Storage::Cpu(cpu) => cpu_slice(cpu, layout)?,
            _ => candle_core::bail!("hiper-kernels: every tensor of an operator must be on the same device"),
        };
    }
    Ok(f(slices))
}
