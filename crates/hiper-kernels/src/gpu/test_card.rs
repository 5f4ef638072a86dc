//! A card for tests whose tensors are on the CPU: what kernels read is copied to it, what they write is copied back.

use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};

use super::bridge::keep;
use super::host::{Host, HostBuffer, on_host};
use super::{Argument, Array, Chip, Cuda, Gpu, Launch, View};
use crate::Error;

/// Calls `f` with the device of tensors that a card's kernels compute: the card that `HIPER_TEST_DEVICE=cuda:0` names, or else
/// the CPU, [as a card](on_host).
///
/// One test at a time has the card: what others launch meanwhile would go into its recordings.
pub fn on_test_device<R>(f: impl FnOnce(&Device) -> R) -> R {
    static TURN: Mutex<()> = Mutex::new(());
    match test_device() {
        Some(card) => {
            let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
            f(&card)
        }
        None => on_host(|| f(&Device::Cpu)),
    }
}

/// The card that tests run on, if `HIPER_TEST_DEVICE` names one.
///
/// # Panics
/// When it cannot be opened: tests that should run there must not run elsewhere.
pub(crate) fn test_device() -> Option<Device> {
    static DEVICE: LazyLock<Option<Device>> = LazyLock::new(|| {
        let name = std::env::var("HIPER_TEST_DEVICE").ok()?;
        if std::env::var("HIPER_SM90A").is_ok_and(|wanted| wanted == "0") {
            super::forgo_sm90a();
        }
        let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        let card = ordinal.ok_or_else(|| "expected cuda:N".to_owned());
        let card = card.and_then(|ordinal| crate::cuda_device(ordinal).map_err(|error| error.to_string()));
        Some(card.unwrap_or_else(|error| panic!("HIPER_TEST_DEVICE={name}: {error}")))
    });
    DEVICE.clone()
}

/// Whether `HIPER_TEST_UNET_SIZES` asks a card for what takes minutes there.
#[cfg(test)]
pub(crate) fn at_sizes_of_a_unet() -> bool {
    std::env::var_os("HIPER_TEST_UNET_SIZES").is_some()
}

/// Kernels on a card, tensors on the CPU.
pub(crate) struct TestCard {
    device: Device,
    card: Cuda,
}

impl TestCard {
    #[cfg(test)]
    pub(crate) fn new(device: Device) -> Result<Self> {
        let card = Cuda::new(device.as_cuda_device()?)?;
        Ok(Self { device, card })
    }

    pub(crate) fn chip(&self) -> Chip {
        self.card.chip()
    }

    pub(crate) fn alloc(&self, dtype: DType, len: usize) -> Result<Array<Host>> {
        self.card.alloc(dtype, len).map(hosted)
    }

    pub(crate) fn launch(&self, launch: &Launch, arguments: &[Argument<'_, Host>]) -> Result<()> {
        let arguments = arguments.iter().map(|argument| {
            Ok(match *argument {
                Argument::Pointer(View { buffer: HostBuffer::Card(buffer), dtype, first, len }) => {
                    Argument::Pointer(View { buffer, dtype, first, len })
                }
                Argument::Pointer(_) => return Err(Error::Device.into()),
                Argument::Null => Argument::Null,
                Argument::Size(n) => Argument::Size(n),
                Argument::Count(n) => Argument::Count(n),
                Argument::F32(x) => Argument::F32(x),
                Argument::F64(x) => Argument::F64(x),
            })
        });
        self.card.launch(launch, &arguments.collect::<Result<Vec<_>>>()?)
    }

    /// Microseconds of what `launch` launches.
    #[cfg(test)]
    pub(crate) fn time(&self, launch: &dyn Fn() -> Result<()>) -> Result<f64> {
        self.card.time(launch)
    }

    /// Numbers of the CPU's, on the card.
    pub(crate) fn upload(&self, numbers: CpuStorage, len: usize) -> Result<Array<Host>> {
        let numbers = Tensor::from_storage(Storage::Cpu(numbers), len, BackpropOp::none(), false);
        keep(&self.card, &numbers.to_device(&self.device)?).map(hosted)
    }

    /// Numbers of the card's, on the CPU.
    pub(crate) fn download(
        &self,
        buffer: <Cuda as Gpu>::Buffer,
        dtype: DType,
        len: usize,
    ) -> Result<CpuStorage> {
        let numbers = Array { buffer, dtype, len }.into_tensor(&self.card, &[len])?;
        let numbers = numbers.to_device(&Device::Cpu)?;
        match &*numbers.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok(storage.clone()),
            _ => Err(Error::Device.into()),
        }
    }
}

fn hosted(array: Array<Cuda>) -> Array<Host> {
    Array { buffer: HostBuffer::Card(array.buffer), dtype: array.dtype, len: array.len }
}
