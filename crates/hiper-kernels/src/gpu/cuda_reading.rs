//! Reading what is on the card: when the call returns, it is here.
//!
//! candle takes that for granted of `cuMemcpyDtoHAsync`. CUDA's manual once promised it of memory that is not pinned, and now says that
//! such a call "might be synchronous". `cuda_driver.rs` leads what candle asks here.

// SAFETY: of the whole file: the function has the driver's signature, and what it is given goes on to the driver as it is.
#![allow(unsafe_code)]

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

type Read = unsafe extern "C" fn(*mut c_void, u64, usize, *mut c_void) -> c_uint;
type Wait = unsafe extern "C" fn(*mut c_void) -> c_uint;

/// The driver's own `cuMemcpyDtoHAsync` and `cuStreamSynchronize`.
static DRIVERS: [AtomicPtr<c_void>; 2] = [const { AtomicPtr::new(std::ptr::null_mut()) }; 2];

/// The function that takes the first one's place.
pub(super) fn instead_of(drivers: [*mut c_void; 2]) -> *mut c_void {
    for (slot, function) in DRIVERS.iter().zip(drivers) {
        slot.store(function, Ordering::Release);
    }
    read as Read as *mut c_void
}

unsafe extern "C" fn read(to: *mut c_void, from: u64, bytes: usize, stream: *mut c_void) -> c_uint {
    // SAFETY: the slots were filled before this function could be reached, with the driver's functions of these signatures.
    let (read, wait): (Read, Wait) = unsafe {
        let [read, wait] = [0, 1].map(|i| DRIVERS[i].load(Ordering::Acquire));
        (std::mem::transmute::<*mut c_void, Read>(read), std::mem::transmute::<*mut c_void, Wait>(wait))
    };
    // SAFETY: as it was asked.
    match unsafe { read(to, from, bytes, stream) } {
        // SAFETY: the stream is there, as the driver has just seen.
        0 => unsafe { wait(stream) },
        status => status,
    }
}
