//! The card of tests, for this crate's and, with the feature `host-kernels`, for those of networks: kernels run on the CPU,
//! compiled as C++ (`kernels/host`). This crate's can run on a card instead (`test_card.rs`), with tensors on the CPU all the same.

use std::cell::Cell;

use candle_core::{CpuStorage, DType, Layout, Result, Storage};
use half::{bf16, f16};

use super::test_card::TestCard;
use super::{Argument, Array, COUNTERS, Chip, Cuda, Given, Gpu, Launch, Sizes, View};
use crate::Error;

thread_local! {
    static ON: Cell<Option<Chip>> = const { Cell::new(None) };
}

/// Stands for a card.
pub(crate) struct Host {
    /// What runs the kernels, if it is not the CPU.
    card: Option<TestCard>,
    /// What it passes for, if it is.
    chip: Chip,
}

impl Host {
    /// The card, on a thread whose tensors count as being on one.
    pub(crate) fn current() -> Option<Self> {
        #[cfg(test)]
        let card = crate::testing::card;
        #[cfg(not(test))]
        let card = || None;
        ON.get().map(|chip| Self { card: card(), chip })
    }
}

/// Calls `f` with this thread's tensors on the CPU counting as being on a card: the operators run kernels, forward and backward.
///
/// For tests: a kernel's threads take turns, some thousand times slower than a card's.
pub fn on_host<R>(f: impl FnOnce() -> R) -> R {
    on_chip(Chip::H100, f)
}

/// The same, on a card that chooses its kernels as that `chip` does.
pub(crate) fn on_chip<R>(chip: Chip, f: impl FnOnce() -> R) -> R {
    ON.set(Some(chip));
    let result = f();
    ON.set(None);
    result
}

/// Memory between guards that tests look at whenever it is read.
pub(crate) enum HostBuffer {
    F32(host_kernels::Buffer<f32>),
    F16(host_kernels::Buffer<f16>),
    BF16(host_kernels::Buffer<bf16>),
    U32(host_kernels::Buffer<u32>),
    /// Memory of a card.
    Card(<Cuda as Gpu>::Buffer),
}

// SAFETY: a test's operators and tensors stay on the thread that made them.
#[allow(unsafe_code)]
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    fn at(&self, index: usize) -> Result<host_kernels::Argument<'_>> {
        Ok(match self {
            Self::F32(buffer) => buffer.at(index),
            Self::F16(buffer) => buffer.at(index),
            Self::BF16(buffer) => buffer.at(index),
            Self::U32(buffer) => buffer.at(index),
            Self::Card(_) => return Err(Error::Device.into()),
        })
    }
}

impl Gpu for Host {
    type Buffer = HostBuffer;
    type Storage = CpuStorage;

    fn chip(&self) -> Chip {
        self.card.as_ref().map_or(self.chip, TestCard::chip)
    }

    fn alloc(&self, dtype: DType, len: usize) -> Result<Array<Self>> {
        use host_kernels::Buffer;
        if let Some(card) = &self.card {
            return card.alloc(dtype, len);
        }
        let buffer = match dtype {
            DType::F32 => HostBuffer::F32(Buffer::unwritten(len)),
            DType::F16 => HostBuffer::F16(Buffer::unwritten(len)),
            DType::BF16 => HostBuffer::BF16(Buffer::unwritten(len)),
            DType::U32 => HostBuffer::U32(Buffer::unwritten(len)),
            other => candle_core::bail!("no memory for {other:?}"),
        };
        Ok(Array { buffer, dtype, len })
    }

    fn counters(&self) -> Result<Given<'_, Self>> {
        let zeros = CpuStorage::U32(vec![0; COUNTERS]);
        Ok(Given::Copied(self.copy(self.given(&zeros, &Layout::contiguous(COUNTERS))?)?))
    }

    fn launch(&self, launch: &Launch, arguments: &[Argument<'_, Self>]) -> Result<()> {
        if let Some(card) = &self.card {
            return card.launch(launch, arguments);
        }
        let Sizes { grid, threads, shared_bytes, cluster } = launch.sizes()?;
        let arguments = arguments.iter().map(|argument| {
            Ok(match *argument {
                Argument::Pointer(View { buffer, first, .. }) => buffer.at(first)?,
                Argument::Null => host_kernels::Argument::NULL,
                Argument::Size(n) => launch.int(n)?.into(),
                Argument::Count(n) => (n as i64).into(),
                Argument::F32(x) => x.into(),
                Argument::F64(x) => x.into(),
            })
        });
        let arguments = arguments.collect::<Result<Vec<_>>>()?;
        host_kernels::Launch { name: &launch.name, grid, block: [threads, 1, 1], shared_bytes, cluster }
            .run(&arguments)
            .map_err(|error| launch.error(error))
    }

    fn given<'a>(&self, storage: &'a CpuStorage, layout: &Layout) -> Result<Given<'a, Self>> {
        use host_kernels::Buffer;
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(candle_core::Error::RequiresContiguous { op: "hiper-kernels" }.bt());
        };
        if let Some(card) = &self.card {
            let part = match storage {
                CpuStorage::F32(x) => CpuStorage::F32(x[start..end].to_vec()),
                CpuStorage::F16(x) => CpuStorage::F16(x[start..end].to_vec()),
                CpuStorage::BF16(x) => CpuStorage::BF16(x[start..end].to_vec()),
                CpuStorage::U32(x) => CpuStorage::U32(x[start..end].to_vec()),
                _ => candle_core::bail!("not a type that kernels take"),
            };
            return Ok(Given::Copied(card.upload(part, end - start)?));
        }
        let (buffer, dtype) = match storage {
            CpuStorage::F32(x) => (HostBuffer::F32(Buffer::from_slice(&x[start..end])), DType::F32),
            CpuStorage::F16(x) => (HostBuffer::F16(Buffer::from_slice(&x[start..end])), DType::F16),
            CpuStorage::BF16(x) => (HostBuffer::BF16(Buffer::from_slice(&x[start..end])), DType::BF16),
            CpuStorage::U32(x) => (HostBuffer::U32(Buffer::from_slice(&x[start..end])), DType::U32),
            _ => candle_core::bail!("not a type that kernels take"),
        };
        Ok(Given::Copied(Array { buffer, dtype, len: end - start }))
    }

    fn copy(&self, given: Given<'_, Self>) -> Result<Array<Self>> {
        match given {
            Given::Copied(array) => Ok(array),
            Given::Here(_) => candle_core::bail!("nothing of candle's is here"),
        }
    }

    fn storage(&self, array: Array<Self>) -> Result<CpuStorage> {
        Ok(match array.buffer {
            HostBuffer::F32(buffer) => CpuStorage::F32(buffer.to_vec()),
            HostBuffer::F16(buffer) => CpuStorage::F16(buffer.to_vec()),
            HostBuffer::BF16(buffer) => CpuStorage::BF16(buffer.to_vec()),
            HostBuffer::U32(buffer) => CpuStorage::U32(buffer.to_vec()),
            HostBuffer::Card(buffer) => match &self.card {
                Some(card) => card.download(buffer, array.dtype, array.len)?,
                None => return Err(Error::Device.into()),
            },
        })
    }

    fn storage_of(storage: &Storage) -> Option<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    fn any_storage(storage: CpuStorage) -> Storage {
        Storage::Cpu(storage)
    }
}
