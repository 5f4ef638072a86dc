//! Noting what a stream is given in a graph, instead of doing it.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode, CUstreamCaptureStatus,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, DriverError};

/// A stream that is being captured. It is not any more once this is gone, whatever came between: else the stream would do
/// nothing for the rest of the program.
pub(super) struct Capture<'a> {
    stream: &'a Arc<CudaStream>,
}

impl<'a> Capture<'a> {
    /// Begins, unless something has gone wrong before that nobody was told of.
    pub(super) fn of(stream: &'a Arc<CudaStream>) -> Result<Self, DriverError> {
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        Ok(Self { stream })
    }

    /// The graph, if anything was launched.
    pub(super) fn end(self) -> Result<Option<CudaGraph>, DriverError> {
        // Returns early if something has gone wrong meanwhile that nobody was told of.
        self.stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        let stream = self.stream.cu_stream();
        // SAFETY: the stream lives, and this thread began its capture, if it is captured; nobody else has its graph.
        #[allow(unsafe_code)]
        unsafe {
            if result::stream::is_capturing(stream)
                == Ok(CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
            {
                return;
            }
            // An error says that the capture was spoilt, and it has ended all the same.
            if let Ok(graph) = result::stream::end_capture(stream)
                && !graph.is_null()
            {
                let _ = result::graph::destroy(graph);
            }
        }
    }
}

/// Microseconds of a replay, behind another that is not timed: while it runs the host has time to send the rest.
pub(super) fn time(
    stream: &CudaStream,
    replay: impl Fn() -> Result<(), DriverError>,
) -> Result<f64, DriverError> {
    let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    replay()?;
    let begin = event()?;
    replay()?;
    Ok(f64::from(begin.elapsed_ms(&event()?)?) * 1e3)
}
