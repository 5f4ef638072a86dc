//! A launch, as the driver takes it.

use std::ffi::{c_uint, c_void};
use std::ptr;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphNodeType, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1 as ClusterDimension, CUlaunchConfig, CUstreamCaptureStatus,
    cuGraphNodeGetType, cuLaunchKernelEx, cuOccupancyMaxActiveClusters, cuStreamGetCaptureInfo_v3,
};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaStream, DriverError};

use super::Sizes;
use super::capture::{self, Capture};

/// Launches a kernel of this project's behind what the stream has been given. `early`: in a recording its blocks may come to the card
/// while the kernel before still runs, and wait there (`take_turn` in `kernels/device.cuh`), so that a launch takes no time of its own.
///
/// # Safety
/// The thread's context is the stream's. Each argument points to a value of the type of the kernel's parameter, and pointers among them to memory on the card as the kernel
/// wants it, until it has ended.
#[allow(unsafe_code)]
pub(super) unsafe fn on_stream(
    stream: &CudaStream,
    function: &CudaFunction,
    sizes: Sizes,
    arguments: &mut [*mut c_void],
    early: bool,
) -> Result<(), DriverError> {
    let mut attributes = attributes(sizes, early && follows_a_kernel(stream));
    let config = config(stream, sizes, &mut attributes);
    // SAFETY: configuration and attributes live until the call returns; of function and arguments as the caller says.
    unsafe {
        cuLaunchKernelEx(&raw const config, function.cu_function(), arguments.as_mut_ptr(), ptr::null_mut())
    }
    .result()
}

/// How many of a kernel's clusters run beside each other, asked in the stream's context.
pub(super) fn most_clusters(
    stream: &CudaStream,
    function: &CudaFunction,
    sizes: Sizes,
) -> Result<usize, DriverError> {
    let mut attributes = attributes(sizes, false);
    let config = config(stream, sizes, &mut attributes);
    let mut clusters = 0;
    // SAFETY: the result has its place; configuration and attributes live until the call returns.
    #[allow(unsafe_code)]
    let known =
        unsafe { cuOccupancyMaxActiveClusters(&raw mut clusters, function.cu_function(), &raw const config) };
    known.result()?;
    Ok(usize::try_from(clusters).unwrap_or(0))
}

fn attributes(sizes: Sizes, early: bool) -> Vec<CUlaunchAttribute> {
    let attribute = |id, value| CUlaunchAttribute { id, pad: [0; 4], value };
    let mut attributes = Vec::with_capacity(2);
    if early {
        attributes.push(attribute(
            CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        ));
    }
    if sizes.cluster > 1 {
        let cluster = ClusterDimension { x: sizes.cluster, y: 1, z: 1 };
        attributes.push(attribute(
            CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            CUlaunchAttributeValue { clusterDim: cluster },
        ));
    }
    attributes
}

fn config(stream: &CudaStream, sizes: Sizes, attributes: &mut [CUlaunchAttribute]) -> CUlaunchConfig {
    let [x, y, z] = sizes.grid;
    CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: sizes.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: sizes.shared_bytes,
        hStream: stream.cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as c_uint,
    }
}

/// How often a launch is repeated to be timed.
pub(super) const TIMES: usize = 20;

/// Microseconds of a launch, of [`TIMES`] one behind the other in a graph: by itself the host takes longer to send a small kernel
/// than the card to run it.
pub(super) fn time(
    stream: &Arc<CudaStream>,
    mut launch: impl FnMut() -> Result<(), DriverError>,
) -> Result<f64, DriverError> {
    let capture = Capture::of(stream)?;
    (0..TIMES).try_for_each(|_| launch())?;
    let Some(graph) = capture.end()? else { return Ok(0.0) };
    Ok(capture::time(stream, || graph.launch())? / TIMES as f64)
}

/// Whether a stream is recorded, and what comes before is a kernel: nothing else has an end that blocks can wait for on the card,
/// and of a stream that is not recorded nobody says what it was given before.
fn follows_a_kernel(stream: &CudaStream) -> bool {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
    let (mut nodes, mut edges, mut count) = (ptr::null(), ptr::null(), 0);
    // SAFETY: each result has its place, those that may be null are not wanted.
    #[allow(unsafe_code)]
    let asked = unsafe {
        cuStreamGetCaptureInfo_v3(
            stream.cu_stream(),
            &raw mut status,
            ptr::null_mut(),
            ptr::null_mut(),
            &raw mut nodes,
            &raw mut edges,
            &raw mut count,
        )
    };
    // Of a recording that something has spoilt nothing else is valid.
    let active = status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
    if asked.result().is_err() || !active || count != 1 {
        return false;
    }
    // SAFETY: there is one node, and the result has its place.
    #[allow(unsafe_code)]
    let known = unsafe { cuGraphNodeGetType(*nodes, &raw mut kind) };
    known.result().is_ok() && kind == CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL
}
