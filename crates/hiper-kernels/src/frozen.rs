//! The bridge between slices and candle's graph: a frozen function of one tensor as a `CustomOp1`.

use std::sync::Arc;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};

use crate::gpu::{Array, Card, Cuda, Gpu, View, check_dtype, dense, on_card, with_views};
use crate::tape::{Tape, Value};

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

    /// Whether its weights are on a card; none of a function without any.
    fn weights_on_card(&self) -> Option<bool> {
        None
    }

    /// The same on a card, in the type of `x`.
    fn forward_on<G: Gpu>(&self, _gpu: &G, x: View<'_, G>, _shape: &[usize]) -> Result<Array<G>> {
        let what = format!("{} on a card", x.dtype.as_str());
        Err(crate::Error::Unsupported { op: Self::NAME, what }.into())
    }

    /// The same on a card, in the type of `x`.
    fn input_gradient_on<G: Gpu>(
        &self,
        _gpu: &G,
        x: View<'_, G>,
        _shape: &[usize],
        _grad_output: View<'_, G>,
    ) -> Result<Array<G>> {
        let what = format!("{} on a card", x.dtype.as_str());
        Err(crate::Error::Unsupported { op: Self::NAME, what }.into())
    }
}

/// Applies `function` to `x` as one node of candle's graph.
pub(crate) fn apply<F: FrozenFunction>(function: &Arc<F>, x: &Tensor) -> Result<Tensor> {
    dense(x)?.apply_op1(Node::of(function, x)?)
}

/// The same on a tape.
pub(crate) fn apply_on<F: FrozenFunction>(function: &Arc<F>, tape: &mut Tape, x: &Value) -> Result<Value> {
    tape.apply1(x, Node::of(function, x.tensor())?)
}

/// Refuses a tensor that is on a card where the function's weights are not, or the other way round.
pub(crate) fn check_device<F: FrozenFunction>(function: &F, x: &Tensor) -> Result<()> {
    let on_card = Card::of(x.device())?.is_some();
    if function.weights_on_card().is_some_and(|weights| weights != on_card) {
        return Err(crate::Error::Device.into());
    }
    Ok(())
}

struct Node<F>(Arc<F>);

impl<F: FrozenFunction> Node<F> {
    /// To be applied to a tensor that fits.
    fn of(function: &Arc<F>, x: &Tensor) -> Result<Self> {
        check_dtype(x, F::NAME)?;
        check_device(function.as_ref(), x)?;
        function.output_shape(x.dims())?;
        Ok(Self(function.clone()))
    }

    fn forward_on<G: Gpu>(&self, gpu: &G, x: &G::Storage, layout: &Layout) -> Result<(G::Storage, Shape)> {
        let y = self.0.forward_on(gpu, gpu.given(x, layout)?.view(), layout.dims())?;
        Ok((gpu.storage(y)?, self.0.output_shape(layout.dims())?.into()))
    }
}

impl<F: FrozenFunction> CustomOp1 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        #[cfg(any(test, feature = "host-kernels"))]
        if let Some(host) = crate::gpu::host::Host::current() {
            return self.forward_on(&host, storage, layout);
        }
        let shape = layout.dims();
        let y = self.0.forward(cpu_slice(storage, layout)?, shape);
        Ok((CpuStorage::F32(y), self.0.output_shape(shape)?.into()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward_on(&Cuda::of(storage)?, storage, layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad_output: &Tensor) -> Result<Option<Tensor>> {
        if let Some(card) = Card::of(x.device())? {
            return on_card!(card, gpu => {
                let dx = with_views(&gpu, [x, grad_output], |[x_view, dy]| {
                    self.0.input_gradient_on(&gpu, x_view, x.dims(), dy)
                })?;
                Ok(Some(dx.into_tensor(&gpu, x.dims())?))
            });
        }
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
            _ => return Err(crate::Error::Device.into()),
        };
    }
    Ok(f(slices))
}
