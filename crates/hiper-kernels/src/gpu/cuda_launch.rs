//! A launch, as the driver takes it.

use std::ffi::{c_uint, c_void};
use std::ptr;

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUevent_flags, CUgraphNodeType, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchConfig, CUstreamCaptureStatus, cuGraphNodeGetType, cuLaunchKernelEx, cuStreamGetCaptureInfo_v3,
};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaStream, DriverError};

/// Blocks in x, y, z, threads of a block in one dimension, bytes of dynamic shared memory.
pub(super) type Sizes = ([c_uint; 3], c_uint, c_uint);

/// Launches a kernel of this project's behind what the stream has been given. `early`: its blocks may come to the card while the
/// kernel before still runs, and wait there (`take_turn` in `kernels/device.cuh`), so that a launch takes no time of its own.
///
/// # Safety
/// Each argument points to a value of the type of the kernel's parameter, and pointers among them to memory on the card as the kernel
/// wants it, until it has ended.
#[allow(unsafe_code)]
pub(super) unsafe fn on_stream(
    stream: &CudaStream,
    function: &CudaFunction,
    ([grid_x, grid_y, grid_z], threads, shared_bytes): Sizes,
    arguments: &mut [*mut c_void],
    early: bool,
) -> Result<(), DriverError> {
    stream.context().bind_to_thread()?;
    let mut may_begin_early = CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = CUlaunchConfig {
        gridDimX: grid_x,
        gridDimY: grid_y,
        gridDimZ: grid_z,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared_bytes,
        hStream: stream.cu_stream(),
        attrs: &raw mut may_begin_early,
        numAttrs: (early && follows_a_kernel(stream)).into(),
    };
    // SAFETY: the configuration lives until the call returns; of function and arguments as the caller says.
    unsafe {
        cuLaunchKernelEx(&raw const config, function.cu_function(), arguments.as_mut_ptr(), ptr::null_mut())
    }
    .result()
}

/// Microseconds of a launch, of twenty one behind the other.
pub(super) fn time(
    stream: &CudaStream,
    mut launch: impl FnMut() -> Result<(), DriverError>,
) -> Result<f64, DriverError> {
    const TIMES: usize = 20;
    let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let begin = event()?;
    (0..TIMES).try_for_each(|_| launch())?;
    let milliseconds = begin.elapsed_ms(&event()?)?;
    Ok(f64::from(milliseconds) * 1e3 / TIMES as f64)
}

/// Whether a recording's last node is a kernel: nothing else has an end that blocks can wait for on the card. A stream that is not
/// recorded sees to that itself.
fn follows_a_kernel(stream: &CudaStream) -> bool {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
    let (mut nodes, mut edges, mut count) = (ptr::null(), ptr::null(), 0);
    // SAFETY: each result has its place, those that may be null are not wanted; the nodes are read before anything is recorded.
    #[allow(unsafe_code)]
    let known = unsafe {
        let asked = cuStreamGetCaptureInfo_v3(
            stream.cu_stream(),
            &raw mut status,
            ptr::null_mut(),
            ptr::null_mut(),
            &raw mut nodes,
            &raw mut edges,
            &raw mut count,
        );
        asked.result().and_then(|()| match count {
            1 => cuGraphNodeGetType(*nodes, &raw mut kind).result(),
            _ => Ok(()),
        })
    };
    let recorded = status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    known.is_ok() && (!recorded || kind == CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL)
}
