//! Opening a card, and recording what is launched on it.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUmemPool_attribute, CUmemoryPool, cuDriverGetVersion,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaGraph, CudaSlice, CudaStream, DevicePtr};
use candle_core::cuda_backend::{WrapErr, kernels};
use candle_core::{CudaDevice, Device, Result};

use super::super::requirements::{self, Build, Found};
use super::super::{Chip, SM90A, times};
use super::capture::Capture;
use super::{arena, fatbins};
use crate::Error;

/// Opens a card for candle and the operators here: on a stream of its own, so that a step can be captured as a graph.
pub(crate) fn device(ordinal: usize) -> Result<Device> {
    super::driver::open()?;
    let build = Build { toolkit: fatbins::TOOLKIT, candles: kernels::FILL.ptx() };
    requirements::check(&found(ordinal)?, &build)?;
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

/// What the driver says of a card and itself.
fn found(ordinal: usize) -> Result<Found> {
    result::init().w()?;
    let mut driver = 0;
    // SAFETY: the number has its place.
    #[allow(unsafe_code)]
    unsafe { cuDriverGetVersion(&raw mut driver) }.result().w()?;
    let device = result::device::get(ordinal.try_into().unwrap_or(i32::MAX)).w()?;
    // SAFETY: the driver gave this device.
    #[allow(unsafe_code)]
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) }.w();
    Ok(Found {
        ordinal,
        capability: [
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ],
        driver,
        has_pools: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? > 0,
    })
}

/// Lets the driver keep freed memory for the next step, which would otherwise go back to the system whenever the host waits.
fn keep_freed_memory(context: &CudaContext) -> Result<()> {
    let mut threshold = u64::MAX;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let pool = pool(context)?;
    // SAFETY: the pool is the device's own; this attribute's value is a 64-bit number, which is read before the call returns.
    #[allow(unsafe_code)]
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()) }.w()
}

/// Gives back what is kept and not in use.
fn return_freed_memory(context: &CudaContext) -> Result<()> {
    let pool = pool(context)?;
    // SAFETY: the pool is the device's own.
    #[allow(unsafe_code)]
    unsafe { result::mem_pool::trim_to(pool, 0) }.w()
}

/// What the device's memory comes from.
fn pool(context: &CudaContext) -> Result<CUmemoryPool> {
    // SAFETY: the device is the context's own.
    #[allow(unsafe_code)]
    unsafe { result::device::get_mem_pool(context.cu_device()) }.w()
}

/// What a card runs.
pub(crate) fn chip(context: &CudaContext) -> Result<Chip> {
    let attribute = |attribute| Ok::<_, candle_core::Error>(context.attribute(attribute).w()? as usize);
    let wanted = SM90A.load(Ordering::Relaxed);
    Ok(Chip {
        multiprocessors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        clusters: 0,
        shared_bytes: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        sm90a: wanted && context.compute_capability().w()? == (9, 0),
    })
}

pub(crate) fn free_memory(device: &CudaDevice) -> Option<u64> {
    let stream = device.cuda_stream();
    // What was freed counts only once it is given back.
    stream.synchronize().ok()?;
    return_freed_memory(stream.context()).ok()?;
    Some(stream.context().mem_get_info().ok()?.0 as u64)
}

/// A graph of launches.
pub(crate) struct Recorded {
    graph: CudaGraph,
    /// In which the graph's tensors lie.
    _block: Arc<Block>,
}

impl Recorded {
    pub(crate) fn new(device: &CudaDevice, computation: &dyn Fn() -> Result<()>) -> Result<Self> {
        // What candle sends the card for a launch (shapes, strides) is kept from the first time on, and copied there the second.
        let _kept = device.enable_cuda_graph_htod_cache();
        let stream: Arc<CudaStream> = device.cuda_stream();
        let handle = stream.cu_stream().cast();
        let (done, measured) = arena::within(handle, 0..0, || times::during(computation));
        done?;
        stream.synchronize().w()?;
        // A recording has memory of its own.
        return_freed_memory(stream.context())?;
        let block = Block::of(&stream, measured.most())?;
        let capture = Capture::of(&stream).w()?;
        let (done, arena) = arena::within(handle, block.addresses(), computation);
        done?;
        let failed = |reason| Error::Launch { kernel: "a recording".into(), reason };
        if arena.in_use() > 0 {
            return Err(failed(format!("{} bytes that it allocated are still in use", arena.in_use())).into());
        }
        let graph = capture.end().w()?.ok_or_else(|| failed("nothing was launched".into()))?;
        Ok(Self { graph, _block: block })
    }

    pub(crate) fn run(&self) -> Result<()> {
        self.graph.launch().w()
    }

    /// Microseconds of a replay on its stream.
    #[cfg(test)]
    pub(super) fn time(&self, stream: &CudaStream) -> Result<f64> {
        super::capture::time(stream, || self.graph.launch()).w()
    }
}

/// Memory of recordings: they take turns on their stream, and with it.
struct Block {
    memory: CudaSlice<u8>,
    start: u64,
}

impl Block {
    /// One of at least so many bytes: another recording's, if it is large enough.
    fn of(stream: &Arc<CudaStream>, bytes: usize) -> Result<Arc<Self>> {
        static BLOCKS: Mutex<Vec<Weak<Block>>> = Mutex::new(Vec::new());
        let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.retain(|block| block.strong_count() > 0);
        let fits =
            |block: &Arc<Self>| Arc::ptr_eq(block.memory.stream(), stream) && block.memory.len() >= bytes;
        if let Some(block) = blocks.iter().filter_map(Weak::upgrade).find(fits) {
            return Ok(block);
        }
        // SAFETY: kernels alone read what it holds, and each tensor in it is written before another reads it.
        #[allow(unsafe_code)]
        let memory = unsafe { stream.alloc::<u8>(bytes.max(1)) }.w()?;
        let start = memory.device_ptr(stream).0;
        let block = Arc::new(Self { memory, start });
        blocks.push(Arc::downgrade(&block));
        Ok(block)
    }

    fn addresses(&self) -> Range<u64> {
        self.start..self.start + self.memory.len() as u64
    }
}
