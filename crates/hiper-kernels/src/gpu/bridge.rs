//! Between candle's tensors and what kernels take.

use std::any::Any;

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Result, Tensor};

#[cfg(any(test, feature = "host-kernels"))]
use super::host::Host;
use super::product::Layer;
use super::{Array, Cuda, Gpu, View};
use crate::{Error, Weight};

/// Bytes to which kernels want their pointers aligned.
const ALIGNMENT: usize = 16;

/// The card that a tensor is on.
pub(crate) enum Card {
    Cuda(Cuda),
    #[cfg(any(test, feature = "host-kernels"))]
    Host(Host),
}

impl Card {
    /// None for the CPU.
    pub(crate) fn of(device: &Device) -> Result<Option<Self>> {
        match device {
            #[cfg(any(test, feature = "host-kernels"))]
            Device::Cpu => Ok(Host::current().map(Self::Host)),
            #[cfg(not(any(test, feature = "host-kernels")))]
            Device::Cpu => Ok(None),
            Device::Cuda(device) => Ok(Some(Self::Cuda(Cuda::new(device)?))),
            Device::Metal(_) => Err(Error::NotCompiledIn("Metal").into()),
        }
    }

    /// The card that an operator's tensor must be on.
    pub(crate) fn needed(tensor: &Tensor, op: &'static str) -> Result<Self> {
        let on_cpu = || Error::Unsupported { op, what: "tensors on a CPU".into() };
        Ok(Self::of(tensor.device())?.ok_or_else(on_cpu)?)
    }
}

/// The same expression for each kind of card.
macro_rules! on_card {
    ($card:expr, $gpu:ident => $body:expr) => {
        match $card {
            $crate::gpu::Card::Cuda($gpu) => $body,
            #[cfg(any(test, feature = "host-kernels"))]
            $crate::gpu::Card::Host($gpu) => $body,
        }
    };
}
pub(crate) use on_card;

/// Whether kernels of a card compute a device's tensors, in `f16` and `bf16` too.
pub fn is_card(device: &Device) -> bool {
    !matches!(Card::of(device), Ok(None))
}

/// Refuses a type that an operator does not take on this device: a CPU computes in `f32`, a card in 16 bits too.
pub(crate) fn check_dtype(tensor: &Tensor, op: &'static str) -> Result<()> {
    let ok = match tensor.dtype() {
        DType::F32 => true,
        DType::F16 | DType::BF16 => Card::of(tensor.device())?.is_some(),
        _ => false,
    };
    if ok { Ok(()) } else { Err(candle_core::Error::UnsupportedDTypeForOp(tensor.dtype(), op).bt()) }
}

/// Refuses a tensor whose type is not that of another.
pub(crate) fn check_same_dtype(tensor: &Tensor, like: &Tensor, op: &'static str) -> Result<()> {
    let (lhs, rhs) = (like.dtype(), tensor.dtype());
    if lhs == rhs { Ok(()) } else { Err(candle_core::Error::DTypeMismatchBinaryOp { lhs, rhs, op }.bt()) }
}

/// The tensor, contiguous, and where kernels read it at an address that suits them.
pub(crate) fn dense(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    let skipped = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
    let copy = !skipped.is_multiple_of(ALIGNMENT) && Card::of(tensor.device())?.is_some();
    if copy { tensor.force_contiguous() } else { Ok(tensor) }
}

/// A tensor's numbers, where they lie or copied to the card.
pub(crate) enum Given<'a, G: Gpu> {
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Here(View<'a, G>),
    #[cfg(any(test, feature = "host-kernels"))]
    Copied(Array<G>),
}

impl<G: Gpu> Given<'_, G> {
    pub(crate) fn view(&self) -> View<'_, G> {
        match self {
            Self::Here(view) => *view,
            #[cfg(any(test, feature = "host-kernels"))]
            Self::Copied(array) => array.view(),
        }
    }
}

/// Calls `f` with the numbers of `N` tensors on a card.
pub(crate) fn with_views<G: Gpu, const N: usize, R>(
    gpu: &G,
    tensors: [&Tensor; N],
    f: impl FnOnce([View<'_, G>; N]) -> Result<R>,
) -> Result<R> {
    let dense = tensors.iter().map(|tensor| dense(tensor)).collect::<Result<Vec<Tensor>>>()?;
    let guards: Vec<_> = dense.iter().map(Tensor::storage_and_layout).collect();
    let given = guards.iter().map(|(storage, layout)| match G::storage_of(storage) {
        Some(storage) => gpu.given(storage, layout),
        None => Err(Error::Device.into()),
    });
    let given = given.collect::<Result<Vec<_>>>()?;
    f(std::array::from_fn(|i| given[i].view()))
}

/// The same of a tensor that there may be.
pub(crate) fn with_optional_view<G: Gpu, R>(
    gpu: &G,
    tensor: Option<&Tensor>,
    f: impl FnOnce(Option<View<'_, G>>) -> Result<R>,
) -> Result<R> {
    match tensor {
        Some(tensor) => with_views(gpu, [tensor], |[view]| f(Some(view))),
        None => f(None),
    }
}

/// A copy of a tensor's numbers that stays on the card.
pub(crate) fn keep<G: Gpu>(gpu: &G, tensor: &Tensor) -> Result<Array<G>> {
    let tensor = dense(tensor)?;
    let (storage, layout) = tensor.storage_and_layout();
    match G::storage_of(&storage) {
        Some(storage) => gpu.copy(gpu.given(storage, layout)?),
        None => Err(Error::Device.into()),
    }
}

impl<G: Gpu> Array<G> {
    /// As a tensor without a history.
    pub(crate) fn into_tensor(self, gpu: &G, shape: &[usize]) -> Result<Tensor> {
        let storage = G::any_storage(gpu.storage(self)?);
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }
}

/// What an operator keeps on a card, whichever card that is: weights, and results for the backward pass.
pub(crate) struct Kept(Box<dyn Any + Send + Sync>);

impl Kept {
    pub(crate) fn new<T: Send + Sync + 'static>(value: T) -> Self {
        Self(Box::new(value))
    }

    /// What was kept, if it is of this card's kind.
    pub(crate) fn get<T: 'static>(&self) -> Result<&T> {
        self.0.downcast_ref().ok_or_else(|| Error::Device.into())
    }
}

/// `packs`: if the card has use for it.
fn keep_layer<G: Gpu>(gpu: &G, weight: &Tensor, bias: Option<&Tensor>, packs: bool) -> Result<Layer<G>> {
    let bias = bias.map(|bias| {
        check_same_device(weight, bias)?;
        keep(gpu, &bias.to_dtype(weight.dtype())?)
    });
    let bias = bias.transpose()?;
    let packed = packs && gpu.chip().sm90a && weight.dtype() != DType::F32 && can_be_packed(weight);
    let weight = match weight.rank() {
        _ if packed => pack(weight)?,
        4 => weight.permute((0, 2, 3, 1))?,
        _ => weight.clone(),
    };
    Ok(Layer::new(keep(gpu, &weight)?, packed, bias))
}

/// Whether inputs and outputs of `[O, I, …]` are multiples of 8.
fn can_be_packed(weight: &Tensor) -> bool {
    weight.dims().iter().take(2).all(|channels| channels.is_multiple_of(8))
}

/// `[O, I, …]` as [`Layer::new`] has it.
fn pack(weight: &Tensor) -> Result<Tensor> {
    let (outputs, inputs) = (weight.dim(0)?, weight.dim(1)?);
    weight.reshape((outputs / 8, 8, inputs / 8, 8, ()))?.permute((0, 4, 2, 1, 3))
}

fn check_same_device(a: &Tensor, b: &Tensor) -> Result<()> {
    if a.device().same_device(b.device()) { Ok(()) } else { Err(Error::Device.into()) }
}

/// What a layer kept on this card, if it is there.
pub(crate) fn kept<T: 'static>(card: &Option<Kept>) -> Result<&T> {
    card.as_ref().ok_or(Error::Device)?.get()
}

/// A normalisation's weights, `[C]` each, in `f32`.
pub(crate) struct Affine<G: Gpu> {
    pub weight: Array<G>,
    pub bias: Array<G>,
}

impl Kept {
    /// A layer's weights, if they are on a card: `[O, I]` or `[O, I, KH, KW]`, and `[O]`.
    pub(crate) fn layer(weight: &Weight, bias: Option<&Tensor>) -> Result<Option<Self>> {
        let Some(weight) = weight.tensor() else { return Ok(None) };
        let Some(card) = Card::of(weight.device())? else { return Ok(None) };
        on_card!(card, gpu => Ok(Some(Self::new(keep_layer(&gpu, weight, bias, true)?))))
    }

    /// The same of layers `[O, I]` and `[O]` of one input: one behind the other, if either all of them or none has a bias.
    pub(crate) fn layers(layers: &[(Weight, Option<Tensor>)]) -> Result<Option<Vec<Self>>> {
        let weights: Option<Vec<&Tensor>> = layers.iter().map(|(weight, _)| weight.tensor()).collect();
        let biases: Vec<&Tensor> = layers.iter().filter_map(|(_, bias)| bias.as_ref()).collect();
        let Some(weights) = weights.filter(|_| biases.is_empty() || biases.len() == layers.len()) else {
            return Ok(None);
        };
        let Some(first) = weights.first() else { return Ok(None) };
        let Some(card) = Card::of(first.device())? else { return Ok(None) };
        let bias = if biases.is_empty() { None } else { Some(Tensor::cat(&biases, 0)?) };
        let joined = Tensor::cat(&weights, 0)?;
        on_card!(card, gpu => {
            let packs = weights.iter().all(|weight| can_be_packed(weight));
            let joined = keep_layer(&gpu, &joined, bias.as_ref(), packs)?;
            let mut first = 0;
            let of_each = weights.iter().map(|weight| {
                let layer = joined.later(first);
                first += weight.dim(0)?;
                Ok(Self::new(layer))
            });
            of_each.collect::<Result<_>>().map(Some)
        })
    }

    /// A normalisation's weights, if they are on a card.
    pub(crate) fn affine(weight: &Tensor, bias: &Tensor) -> Result<Option<Self>> {
        let Some(card) = Card::of(weight.device())? else { return Ok(None) };
        check_same_device(weight, bias)?;
        let (weight, bias) = (weight.to_dtype(DType::F32)?, bias.to_dtype(DType::F32)?);
        on_card!(card, gpu => {
            Ok(Some(Self::new(Affine { weight: keep(&gpu, &weight)?, bias: keep(&gpu, &bias)? })))
        })
    }
}
