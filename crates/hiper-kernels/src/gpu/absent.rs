//! The card of a build without CUDA: there is none.

use std::convert::Infallible;

use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Storage};

use super::{Argument, Array, Chip, Given, Gpu, Launch};
use crate::Error;

/// A card that nobody has.
pub(crate) enum Cuda {}

impl Cuda {
    /// The error that says so.
    pub(crate) fn new(_device: &CudaDevice) -> Result<Self> {
        Err(Error::NotCompiledIn("CUDA").into())
    }

    /// The same.
    pub(crate) fn of(_storage: &CudaStorage) -> Result<Self> {
        Err(Error::NotCompiledIn("CUDA").into())
    }

    #[cfg(test)]
    pub(super) fn time(&self, _launch: &dyn Fn() -> Result<()>) -> Result<f64> {
        match *self {}
    }
}

pub(super) fn device(_ordinal: usize) -> Result<Device> {
    Err(Error::NotCompiledIn("CUDA").into())
}

/// A recording that nobody makes.
pub(super) enum Recorded {}

impl Recorded {
    pub(super) fn new(_device: &CudaDevice, _computation: &dyn Fn() -> Result<()>) -> Result<Self> {
        Err(Error::NotCompiledIn("CUDA").into())
    }

    pub(super) fn run(&self) -> Result<()> {
        match *self {}
    }
}

pub(super) fn free_memory(_device: &CudaDevice) -> Option<u64> {
    None
}

impl Gpu for Cuda {
    type Buffer = Infallible;
    type Storage = CudaStorage;

    fn chip(&self) -> Chip {
        match *self {}
    }

    fn alloc(&self, _dtype: DType, _len: usize) -> Result<Array<Self>> {
        match *self {}
    }

    fn counters(&self) -> Result<Given<'_, Self>> {
        match *self {}
    }

    fn launch(&self, _launch: &Launch, _arguments: &[Argument<'_, Self>]) -> Result<()> {
        match *self {}
    }

    fn given<'a>(&self, _storage: &'a CudaStorage, _layout: &Layout) -> Result<Given<'a, Self>> {
        match *self {}
    }

    fn copy(&self, _given: Given<'_, Self>) -> Result<Array<Self>> {
        match *self {}
    }

    fn storage(&self, _array: Array<Self>) -> Result<CudaStorage> {
        match *self {}
    }

    fn storage_of(_storage: &Storage) -> Option<&CudaStorage> {
        None
    }

    fn any_storage(storage: CudaStorage) -> Storage {
        Storage::Cuda(storage)
    }
}
