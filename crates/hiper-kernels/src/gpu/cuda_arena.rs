//! Memory that a thread asks for and gives back while a stream is recorded: places in an [`Arena`], not nodes of the graph.
//!
//! The driver would have a node for each allocation and each release, more of them than kernels, and a launch comes early only where
//! a kernel is right before it. candle asks the driver for memory; `cuda_driver.rs` leads what it asks here.

// SAFETY: of the whole file: the functions have the driver's signatures, and what they are given goes on to the driver as it is,
// unless an arena has the answer.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ffi::{c_uint, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::super::arena::Arena;

type Allocate = unsafe extern "C" fn(*mut u64, usize, *mut c_void) -> c_uint;
type Free = unsafe extern "C" fn(u64, *mut c_void) -> c_uint;

/// The driver's own `cuMemAllocAsync` and `cuMemFreeAsync`.
static DRIVERS: [AtomicPtr<c_void>; 2] = [const { AtomicPtr::new(std::ptr::null_mut()) }; 2];

thread_local! {
    /// Of the stream that this thread watches or records.
    static ARENA: RefCell<Option<(*mut c_void, Arena)>> = const { RefCell::new(None) };
}

/// Does something with what it asks for on a stream in an arena over this block. Returns the arena as it is then.
pub(super) fn within<R>(stream: *mut c_void, block: Range<u64>, f: impl FnOnce() -> R) -> (R, Arena) {
    /// Nothing of it is left if `f` panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            ARENA.take();
        }
    }
    let end = End;
    ARENA.set(Some((stream, Arena::new(block))));
    let done = f();
    let arena = ARENA.take().map_or_else(|| Arena::new(0..0), |(_, arena)| arena);
    drop(end);
    (done, arena)
}

/// The functions that take the place of the driver's `cuMemAllocAsync` and `cuMemFreeAsync`.
pub(super) fn instead_of(drivers: [*mut c_void; 2]) -> [*mut c_void; 2] {
    for (slot, function) in DRIVERS.iter().zip(drivers) {
        slot.store(function, Ordering::Release);
    }
    [allocate as Allocate as *mut c_void, free as Free as *mut c_void]
}

/// Asks the arena of a stream that this thread watches or records; none while the thread ends, either.
fn ask<R>(stream: *mut c_void, f: impl FnOnce(&mut Arena) -> R) -> Option<R> {
    let asked = ARENA.try_with(|arena| match &mut *arena.borrow_mut() {
        Some((of, arena)) if *of == stream => Some(f(arena)),
        _ => None,
    });
    asked.ok().flatten()
}

unsafe extern "C" fn allocate(address: *mut u64, bytes: usize, stream: *mut c_void) -> c_uint {
    // SAFETY: the slot was filled before this function could be reached, with the driver's function of this signature.
    let driver: Allocate = unsafe { std::mem::transmute(DRIVERS[0].load(Ordering::Acquire)) };
    let elsewhere = || {
        let mut there = 0;
        // SAFETY: one address is written.
        match unsafe { driver(&raw mut there, bytes, stream) } {
            0 => Ok(there),
            status => Err(status),
        }
    };
    match ask(stream, |arena| arena.allocate(bytes, elsewhere)).unwrap_or_else(elsewhere) {
        Ok(place) => {
            // SAFETY: whoever asks for memory has a place for its address.
            unsafe { address.write(place) };
            0
        }
        Err(status) => status,
    }
}

unsafe extern "C" fn free(address: u64, stream: *mut c_void) -> c_uint {
    // SAFETY: as in `allocate`.
    let driver: Free = unsafe { std::mem::transmute(DRIVERS[1].load(Ordering::Acquire)) };
    match ask(stream, |arena| arena.free(address)) {
        Some(true) => 0,
        // SAFETY: as it was asked.
        _ => unsafe { driver(address, stream) },
    }
}
