//! Memory: the pool's, sending, reading, copying.

use std::ffi::{c_int, c_uint, c_void};

use super::{SOMETHING, give, with, within_context};
use crate::state::{Result, State, Status};
use crate::work::Work;

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetMemPool(pool: *mut u64, _device: c_int) -> c_uint {
    with(|_| give(pool, SOMETHING))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolSetAttribute(_pool: u64, attribute: c_uint, value: *mut c_void) -> c_uint {
    with(|state| {
        state.check_no_capture("cuMemPoolSetAttribute")?;
        if attribute == 4 && !value.is_null() { Ok(()) } else { Err(Status::INVALID_VALUE) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolTrimTo(_pool: u64, _bytes_to_keep: usize) -> c_uint {
    with(|state| {
        state.check_no_capture("cuMemPoolTrimTo")?;
        state.report.trimmed();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_uint {
    within_context(|state| {
        give(free, state.size.saturating_sub(state.report.kept()))?;
        give(total, state.size)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: u64) -> c_uint {
    with(|state| {
        let allocated = state.allocate(Some(stream), bytes)?;
        give(address, allocated)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, stream: u64) -> c_uint {
    with(|state| state.free(stream, address))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_uint {
    within_context(|state| {
        state.check_no_capture("cuMemAlloc")?;
        let allocated = state.allocate(None, bytes)?;
        give(address, allocated)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> c_uint {
    within_context(|state| {
        state.check_no_capture("cuMemFree")?;
        state.free(0, address)?;
        state.finish()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) -> c_uint {
    within_context(|_| give(address, unsafe { libc::malloc(bytes) }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: *mut c_void) -> c_uint {
    with(|state| {
        state.finish()?;
        unsafe { libc::free(address) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> c_uint {
    within_context(|state| state.enqueue(stream, Work::Copy { to, from, bytes }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> c_uint {
    within_context(|state| {
        state.check_no_capture("cuMemcpyDtoD")?;
        state.enqueue(0, Work::Copy { to, from, bytes })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeerAsync(to: u64, _: u64, from: u64, _: u64, bytes: usize, stream: u64) -> c_uint {
    cuMemcpyDtoDAsync_v2(to, from, bytes, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: u64) -> c_uint {
    within_context(|state| {
        state.check_not_recorded(stream, "reading")?;
        // CUDA's manual promises no more.
        state.enqueue(stream, Work::Read { to: to as usize, from, bytes })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> c_uint {
    within_context(|state| {
        state.check_no_capture("cuMemcpyDtoH")?;
        state.enqueue(0, Work::Read { to: to as usize, from, bytes })?;
        state.finish()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: u64) -> c_uint {
    within_context(|state| {
        state.check_not_recorded(stream, "sending data")?;
        write(state, to, from, bytes, stream)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> c_uint {
    within_context(|state| {
        state.check_no_capture("cuMemcpyHtoD")?;
        write(state, to, from, bytes, 0)
    })
}

fn write(state: &mut State, to: u64, from: *const c_void, bytes: usize, stream: u64) -> Result {
    let data = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) }.to_vec();
    state.enqueue(stream, Work::Upload { to, data })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, byte: u8, bytes: usize, stream: u64) -> c_uint {
    within_context(|state| state.enqueue(stream, Work::Fill { to, byte, bytes }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8_v2(to: u64, byte: u8, bytes: usize) -> c_uint {
    within_context(|state| {
        state.check_no_capture("cuMemsetD8")?;
        state.enqueue(0, Work::Fill { to, byte, bytes })
    })
}
