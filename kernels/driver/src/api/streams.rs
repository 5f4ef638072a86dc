//! Streams, events, recordings.

use std::ffi::c_uint;

use super::{give, with, within_context};
use crate::state::{State, Status};
use crate::work::Work;

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: *mut u64, _flags: c_uint) -> c_uint {
    within_context(|state| give(stream, state.handle()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(_stream: u64) -> c_uint {
    with(State::finish)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: u64) -> c_uint {
    with(|state| {
        state.check_not_recorded(stream, "waiting")?;
        state.finish()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: u64, event: u64, _flags: c_uint) -> c_uint {
    with(|state| state.wait_for_event(stream, event))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: u64, _mode: c_uint) -> c_uint {
    with(|state| state.begin_capture(stream))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamEndCapture(stream: u64, graph: *mut u64) -> c_uint {
    with(|state| {
        let recording = state.end_capture(stream)?;
        give(graph, recording)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamIsCapturing(stream: u64, status: *mut c_uint) -> c_uint {
    with(|state| give(status, state.capture_status(stream)))
}

/// What a recording's nodes are known by: `CU_GRAPH_NODE_TYPE_KERNEL`, or something else.
static NODES: [[u64; 1]; 2] = [[0x10], [0x20]];

/// `ids`, `graph` and `edges` are not looked at.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetCaptureInfo_v3(
    stream: u64,
    status: *mut c_uint,
    _ids: *mut u64,
    _graph: *mut u64,
    nodes: *mut *const u64,
    edges: *mut *const u64,
    count: *mut usize,
) -> c_uint {
    with(|state| {
        give(status, state.capture_status(stream))?;
        let Some(last) = state.last_recorded(stream) else { return Ok(()) };
        if state.capture_status(stream) != 1 {
            // Nothing else is valid, but nobody says that it is not there.
            return give(nodes, std::ptr::null()).and_then(|()| give(count, 1));
        }
        if edges.is_null() {
            return state.refuse(Status::INVALID_VALUE, "nodes without what is known of their edges");
        }
        give(nodes, NODES[usize::from(!matches!(last, Some(Work::Launch(_))))].as_ptr())?;
        give(count, last.is_some().into())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphNodeGetType(node: u64, kind: *mut c_uint) -> c_uint {
    with(|_| match node {
        0x10 => give(kind, 0),
        0x20 => give(kind, 1),
        _ => Err(Status::INVALID_HANDLE),
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphInstantiateWithFlags(executable: *mut u64, graph: u64, _flags: u64) -> c_uint {
    with(|_| give(executable, graph))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(executable: u64, stream: u64) -> c_uint {
    with(|state| {
        state.check_not_recorded(stream, "a recording's replay")?;
        state.replay(executable)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(_graph: u64) -> c_uint {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(executable: u64) -> c_uint {
    with(|state| {
        state.check_no_capture("cuGraphExecDestroy")?;
        state.destroy_recording(executable)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: *mut u64, _flags: c_uint) -> c_uint {
    within_context(|state| {
        let new = state.new_event();
        give(event, new)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: u64) -> c_uint {
    with(|state| state.destroy_event(event))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: u64, stream: u64) -> c_uint {
    with(|state| state.record_event(event, stream))
}

/// Of kernels that a CPU runs nobody wants to know.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, _begin: u64, _end: u64) -> c_uint {
    within_context(|state| {
        state.check_no_capture("waiting for an event")?;
        give(milliseconds, 0.0)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(_event: u64) -> c_uint {
    with(|state| {
        state.check_no_capture("waiting for an event")?;
        state.finish()
    })
}
