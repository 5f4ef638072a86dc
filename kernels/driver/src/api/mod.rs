//! The driver's functions, by what they are about; here those about the card.
//!
//! CUDA's manual has their contracts.

mod kernels;
mod memory;
mod streams;

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::state::{Result, State, Status};

/// What handles that nobody looks into are.
const SOMETHING: u64 = 0x10;

static STATE: Mutex<Option<State>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// A thread's context, none at first.
    static CONTEXT: Cell<u64> = const { Cell::new(0) };
}

/// Does what wants a context.
fn within_context(f: impl FnOnce(&mut State) -> Result) -> c_uint {
    with(|state| match CONTEXT.get() {
        0 => state.refuse(Status::INVALID_CONTEXT, "a thread without a context"),
        _ => f(state),
    })
}

fn with(f: impl FnOnce(&mut State) -> Result) -> c_uint {
    match lock().as_mut().ok_or(Status::NOT_INITIALIZED).and_then(f) {
        Ok(()) => 0,
        Err(status) => status.0,
    }
}

/// Gives the caller a value.
fn give<T>(to: *mut T, value: T) -> Result {
    if to.is_null() {
        return Err(Status::INVALID_VALUE);
    }
    unsafe { to.write(value) };
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_uint {
    extern "C" fn report() {
        let Some(path) = std::env::var_os("STAND_IN_DRIVER_REPORT") else { return };
        if let Some(state) = lock().as_ref() {
            let _ = std::fs::write(path, state.report.text());
        }
    }
    let mut state = lock();
    if state.is_none() {
        *state = Some(State::new());
        unsafe { libc::atexit(report) };
    }
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_uint {
    with(|state| give(version, state.card.driver))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_uint {
    with(|_| if ordinal == 0 { give(device, 0) } else { Err(Status::INVALID_DEVICE) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, _device: c_int) -> c_uint {
    with(|state| match attribute {
        16 => give(value, 132),                      // multiprocessors, an H100's
        75 => give(value, state.card.capability[0]), // compute capability
        76 => give(value, state.card.capability[1]),
        97 => give(value, state.card.shared_bytes as c_int), // of a block that asks
        115 => give(value, 1),                               // memory pools
        _ => Err(Status::INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: *mut u64, _device: c_int) -> c_uint {
    with(|_| give(context, SOMETHING))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_uint {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: u64) -> c_uint {
    CONTEXT.set(context);
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(context: *mut u64) -> c_uint {
    with(|_| give(context, CONTEXT.get()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_uint {
    within_context(|state| {
        state.check_nobody_records("waiting for the card")?;
        state.finish()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(_context: u64) -> c_uint {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(status: c_uint, name: *mut *const c_char) -> c_uint {
    let text = match Status(status) {
        Status(0) => c"CUDA_SUCCESS",
        Status::INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        Status::OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        Status::NOT_INITIALIZED => c"CUDA_ERROR_NOT_INITIALIZED",
        Status::INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        Status::INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        Status::INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
        Status::NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        Status::LAUNCH_FAILED => c"CUDA_ERROR_LAUNCH_FAILED",
        Status::CAPTURE_UNSUPPORTED => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        Status::CAPTURE_INVALIDATED => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        Status::CAPTURE_UNMATCHED => c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
        Status::CAPTURE_ISOLATION => c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
        Status::CAPTURE_IMPLICIT => c"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
        Status::CAPTURE_WRONG_THREAD => c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
        _ => c"CUDA_ERROR_UNKNOWN",
    };
    give(name, text.as_ptr()).map_or_else(|status| status.0, |()| 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(status: c_uint, text: *mut *const c_char) -> c_uint {
    cuGetErrorName(status, text)
}
