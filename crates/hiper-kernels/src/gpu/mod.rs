//! Launching kernels on a card.
//!
//! An operator's `cuda.rs` says which kernels it runs, on which grids, with which arguments. It is written for a [`Gpu`] and
//! names no CUDA type, so that the same code runs the kernels on a card (`cuda.rs`) and, in tests, on the CPU (`host.rs`). In
//! a build without CUDA a card without values (`absent.rs`) stands in, and says so when a tensor asks for it.

// Without a card nobody reads what is launched.
#![cfg_attr(not(any(test, feature = "cuda", feature = "host-kernels")), allow(dead_code))]

#[cfg(any(test, feature = "cuda"))]
mod arena;
mod bridge;
#[cfg_attr(not(feature = "cuda"), path = "absent.rs")]
mod cuda;
#[cfg(any(test, feature = "cuda"))]
mod files;
#[cfg(any(test, feature = "host-kernels"))]
pub(crate) mod host;
pub(crate) mod product;
mod replay;
#[cfg(any(test, feature = "cuda"))]
mod requirements;
#[cfg(any(test, feature = "host-kernels"))]
pub(crate) mod test_card;
mod times;

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Layout, Result, Storage};

pub(crate) use bridge::{
    Affine, Card, Given, Kept, check_dtype, check_same_dtype, dense, kept, on_card, with_optional_view,
    with_views,
};
pub(crate) use cuda::Cuda;

#[cfg(test)]
pub(crate) use test_card::{TestCard, test_device};

pub use bridge::is_card;
pub use replay::Replay;
pub use times::{KernelTime, kernel_times, time_kernels};

use crate::Error;

/// The NVIDIA card number `ordinal`, for tensors and frozen networks.
///
/// # Errors
/// When there is no such card, it or its driver does not run this build's kernels, or this build knows nothing of cards (feature
/// `cuda`).
pub fn cuda_device(ordinal: usize) -> Result<candle_core::Device> {
    cuda::device(ordinal)
}

static SM90A: AtomicBool = AtomicBool::new(true);

/// Leaves out the kernels that only Hopper has, on every card opened from now on: to compare them with those that Ampere has too.
///
/// ```
/// hiper_kernels::forgo_sm90a();
/// ```
pub fn forgo_sm90a() {
    SM90A.store(false, Ordering::Relaxed);
}

/// Bytes that a card has free; nothing is known of a CPU's.
pub fn free_memory(device: &candle_core::Device) -> Option<u64> {
    match device {
        candle_core::Device::Cuda(device) => cuda::free_memory(device),
        _ => None,
    }
}

/// What kind of card it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chip {
    /// How many blocks run beside each other, but for those that share one.
    pub multiprocessors: usize,
    /// How many clusters of four blocks, each alone on a multiprocessor: these are in groups, which are no multiples of four.
    pub clusters: usize,
    /// Dynamic shared memory that a block may ask for.
    pub shared_bytes: usize,
    /// Whether it runs what is compiled for 9.0a: Hopper, and nothing before or after it.
    pub sm90a: bool,
}

impl Chip {
    /// What tests on a CPU launch for.
    #[cfg(any(test, feature = "host-kernels"))]
    pub(crate) const H100: Self =
        Self { multiprocessors: 132, clusters: 32, shared_bytes: 227 * 1024, sm90a: true };
    /// Ada Lovelace, 8.9: blocks have less shared memory than those of 8.0, as on 8.6 and 12.0.
    #[cfg(test)]
    pub(crate) const RTX4090: Self =
        Self { multiprocessors: 128, clusters: 0, shared_bytes: 99 * 1024, sm90a: false };
    /// For which the largest blocks are best even for small products: those of Hopper, and those that Ampere has too.
    #[cfg(test)]
    pub(crate) const SINGLE: [Self; 2] = [
        Self { multiprocessors: 1, clusters: 0, shared_bytes: 227 * 1024, sm90a: true },
        Self { multiprocessors: 1, clusters: 0, shared_bytes: 163 * 1024, sm90a: false },
    ];

    /// How many blocks run beside each other in clusters of `size`: 1, 2 or 4.
    pub(crate) fn at_once(self, size: usize) -> usize {
        if size == 4 { 4 * self.clusters } else { self.multiprocessors / size * size }
    }
}

/// A card: memory, and kernels that run one after the other.
pub(crate) trait Gpu: Sized + 'static {
    /// Memory on the card, freed when dropped: by then every kernel launched before is done with it, as far as one can tell.
    type Buffer: Send + Sync + 'static;
    /// What candle calls memory on the card.
    type Storage;

    /// What decides between kernels.
    fn chip(&self) -> Chip;

    /// `len` numbers that nobody has written.
    fn alloc(&self, dtype: DType, len: usize) -> Result<Array<Self>>;

    /// [`COUNTERS`] whole numbers, all 0 whenever a kernel begins and when it ends.
    fn counters(&self) -> Result<Given<'_, Self>>;

    /// Runs a kernel after those launched before.
    fn launch(&self, launch: &Launch, arguments: &[Argument<'_, Self>]) -> Result<()>;

    /// A contiguous tensor of candle's as an argument.
    fn given<'a>(&self, storage: &'a Self::Storage, layout: &Layout) -> Result<Given<'a, Self>>;

    /// A copy that stays.
    fn copy(&self, given: Given<'_, Self>) -> Result<Array<Self>>;

    /// A result as candle wants it.
    fn storage(&self, array: Array<Self>) -> Result<Self::Storage>;

    /// Of any storage, if it is this kind of card's.
    fn storage_of(storage: &Storage) -> Option<&Self::Storage>;

    /// As any storage.
    fn any_storage(storage: Self::Storage) -> Storage;
}

/// A type as kernels are named after it.
pub(crate) fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// By which the blocks of a kernel find out which of them comes last.
const COUNTERS: usize = 1024;

/// Threads of a block of most kernels.
const THREADS: usize = 256;

/// What a kernel is launched with beside its arguments.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    /// As in `kernels/*.cu`.
    pub name: String,
    /// Blocks in x, y, z.
    pub grid: [usize; 3],
    /// Threads of a block, in one dimension.
    pub threads: usize,
    /// Dynamic shared memory.
    pub shared_bytes: usize,
    /// Blocks in x that run together: more than 1 on Hopper alone.
    pub cluster: usize,
}

/// The same of a [`Launch`], as the driver takes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared_bytes: u32,
    pub cluster: u32,
}

impl Launch {
    /// Blocks of 256 threads without shared memory.
    pub(crate) fn new(name: String, grid: [usize; 3]) -> Self {
        Self { name, grid, threads: THREADS, shared_bytes: 0, cluster: 1 }
    }

    /// A pass over numbers of any shape, eight to a thread.
    pub(crate) fn over_numbers(name: String, count: usize) -> Self {
        Self::new(name, [count.div_ceil(8 * THREADS), 1, 1])
    }

    /// A pass over rows of one part or several: eight numbers to a thread if all widths are a multiple of that, else one.
    pub(crate) fn over_rows(name: String, rows: usize, widths: &[usize]) -> Self {
        let each = if widths.iter().all(|width| width.is_multiple_of(8)) { 8 } else { 1 };
        Self::new(name, [(rows * widths.iter().sum::<usize>() / each).div_ceil(THREADS), 1, 1])
    }

    /// Its sizes as the driver takes them.
    pub(crate) fn sizes(&self) -> Result<Sizes> {
        let size = |n: usize| u32::try_from(n).map_err(|_| self.error(format!("a size of {n}")));
        let [x, y, z] = self.grid;
        Ok(Sizes {
            grid: [size(x)?, size(y)?, size(z)?],
            threads: size(self.threads)?,
            shared_bytes: size(self.shared_bytes)?,
            cluster: size(self.cluster)?,
        })
    }

    /// A whole number as kernels take it.
    pub(crate) fn int(&self, n: usize) -> Result<i32> {
        i32::try_from(n).map_err(|_| self.error(format!("{n} numbers are more than it counts")))
    }

    /// Why it was not launched.
    pub(crate) fn error(&self, reason: impl std::fmt::Display) -> candle_core::Error {
        Error::Launch { kernel: self.name.clone(), reason: reason.to_string() }.into()
    }
}

/// Numbers on a card.
pub(crate) struct Array<G: Gpu> {
    pub buffer: G::Buffer,
    pub dtype: DType,
    pub len: usize,
}

impl<G: Gpu> Array<G> {
    /// All of them.
    pub(crate) fn view(&self) -> View<'_, G> {
        View { buffer: &self.buffer, dtype: self.dtype, first: 0, len: self.len }
    }
}

/// A part of an [`Array`], borrowed. Kernels write through it too: a card's memory is not Rust's.
pub(crate) struct View<'a, G: Gpu> {
    pub buffer: &'a G::Buffer,
    pub dtype: DType,
    /// The first number's place in the buffer.
    pub first: usize,
    pub len: usize,
}

impl<G: Gpu> Clone for View<'_, G> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<G: Gpu> Copy for View<'_, G> {}

impl<G: Gpu> View<'_, G> {
    /// From number `first` on.
    pub(crate) fn from(self, first: usize) -> Self {
        Self { first: self.first + first, len: self.len.saturating_sub(first), ..self }
    }
}

/// A kernel's argument.
pub(crate) enum Argument<'a, G: Gpu> {
    /// To the first of some numbers.
    Pointer(View<'a, G>),
    /// To nothing, where a kernel allows it.
    Null,
    /// An `int`, checked to be one when the kernel is launched.
    Size(usize),
    /// An `int64_t`.
    Count(usize),
    /// A `float`.
    F32(f32),
    /// A `double`.
    F64(f64),
}

impl<G: Gpu> Clone for Argument<'_, G> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<G: Gpu> Copy for Argument<'_, G> {}

impl<'a, G: Gpu> From<View<'a, G>> for Argument<'a, G> {
    fn from(view: View<'a, G>) -> Self {
        Self::Pointer(view)
    }
}

impl<'a, G: Gpu> From<&'a Array<G>> for Argument<'a, G> {
    fn from(array: &'a Array<G>) -> Self {
        Self::Pointer(array.view())
    }
}

impl<'a, G: Gpu, T: Into<Argument<'a, G>>> From<Option<T>> for Argument<'a, G> {
    fn from(argument: Option<T>) -> Self {
        argument.map_or(Self::Null, Into::into)
    }
}

impl<G: Gpu> From<usize> for Argument<'_, G> {
    fn from(n: usize) -> Self {
        Self::Size(n)
    }
}

impl<G: Gpu> From<bool> for Argument<'_, G> {
    fn from(flag: bool) -> Self {
        Self::Size(flag.into())
    }
}

impl<G: Gpu> From<f32> for Argument<'_, G> {
    fn from(x: f32) -> Self {
        Self::F32(x)
    }
}

impl<G: Gpu> From<f64> for Argument<'_, G> {
    fn from(x: f64) -> Self {
        Self::F64(x)
    }
}
