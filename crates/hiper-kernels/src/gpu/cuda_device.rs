//! Opening a card, and recording what is launched on it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUgraphInstantiate_flags, CUmemPool_attribute, CUmemoryPool, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaGraph, CudaStream};
use candle_core::{CudaDevice, Device, Result};

use super::super::{Chip, SM90A};
use crate::Error;

/// Opens a card for candle and the operators here: on a stream of its own, so that a step can be captured as a graph.
pub(crate) fn device(ordinal: usize) -> Result<Device> {
    super::driver::open()?;
    let device = Device::new_cuda_with_stream(ordinal)?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: everything runs on the device's only stream, in the order in which it was launched: there is nothing that
        // events would order.
        #[allow(unsafe_code)]
        unsafe {
            cuda.disable_event_tracking()
        };
        keep_freed_memory(cuda.cuda_stream().context())?;
    }
    Ok(device)
}

/// Lets the driver keep freed memory for the next step, which would otherwise go back to the system whenever the host waits.
fn keep_freed_memory(context: &CudaContext) -> Result<()> {
    let mut threshold = u64::MAX;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let Some(pool) = pool(context)? else { return Ok(()) };
    // SAFETY: the pool is the device's own; this attribute's value is a 64-bit number, which is read before the call returns.
    #[allow(unsafe_code)]
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()) }.w()
}

/// Gives back what is kept and not in use.
fn return_freed_memory(context: &CudaContext) -> Result<()> {
    let Some(pool) = pool(context)? else { return Ok(()) };
    // SAFETY: the pool is the device's own.
    #[allow(unsafe_code)]
    unsafe { result::mem_pool::trim_to(pool, 0) }.w()
}

/// What the device's memory comes from, if it has such a thing.
fn pool(context: &CudaContext) -> Result<Option<CUmemoryPool>> {
    if !context.has_async_alloc() {
        return Ok(None);
    }
    // SAFETY: the device is the context's own.
    #[allow(unsafe_code)]
    unsafe { result::device::get_mem_pool(context.cu_device()) }.w().map(Some)
}

/// What a card runs.
pub(crate) fn chip(context: &CudaContext) -> Result<Chip> {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let multiprocessors = context.attribute(attribute).w()? as usize;
    let wanted = SM90A.load(Ordering::Relaxed);
    Ok(Chip { multiprocessors, sm90a: wanted && context.compute_capability().w()? == (9, 0) })
}

pub(crate) fn free_memory(device: &CudaDevice) -> Option<u64> {
    Some(device.cuda_stream().context().mem_get_info().ok()?.0 as u64)
}

/// A graph of launches.
pub(crate) struct Recorded {
    graph: CudaGraph,
}

impl Recorded {
    pub(crate) fn new(device: &CudaDevice, computation: &dyn Fn() -> Result<()>) -> Result<Self> {
        // What candle sends the card for a launch (shapes, strides) is kept from the first time on, and copied there the second.
        let _kept = device.enable_cuda_graph_htod_cache();
        computation()?;
        let stream: Arc<CudaStream> = device.cuda_stream();
        stream.synchronize().w()?;
        // A recording has memory of its own.
        return_freed_memory(stream.context())?;
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let done = computation();
        // The capture ends whatever became of the computation.
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).w();
        done?;
        let nothing =
            || Error::Launch { kernel: "a recording".into(), reason: "nothing was launched".into() };
        Ok(Self { graph: graph?.ok_or_else(nothing)? })
    }

    pub(crate) fn run(&self) -> Result<()> {
        self.graph.launch().w()
    }
}
