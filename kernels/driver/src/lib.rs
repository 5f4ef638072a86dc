//! `libcuda.so.1` for a machine without a card: the functions of NVIDIA's driver that candle and hiper-kernels call.
//!
//! Kernels run on the CPU (`host-kernels`, and `candle.rs` for candle's); everything above them is the code that drives a card.
//! Work waits until somebody waits for it, memory holds NaN until it is written, and what a driver refuses is refused, and said
//! on the standard error: work on freed memory, shared memory that was not asked for, and, while a stream is recorded, waiting
//! for it, sending it data, or freeing what it did not allocate. Modules are not looked into, but for whose they are: kernels are
//! known by name. `toolkit/` stands in for nvcc, whose images say no more. Speed it does not show.
//!
//! - `STAND_IN_DRIVER_MEMORY`: bytes that the card has.
//! - `STAND_IN_DRIVER_CAPABILITY`: its compute capability, 9.0 if it is not said; `STAND_IN_DRIVER_CUDA`: the newest CUDA that the
//!   driver knows, as 13000 is 13.0.
//! - `STAND_IN_DRIVER_DRY`: kernels are counted and not run, but for the optimiser's and copies, for networks that a CPU would need
//!   days for.
//! - `STAND_IN_DRIVER_REPORT`: a file that is told, when the program ends, what was launched and how much memory was used.
#![allow(
    unsafe_code,
    clippy::missing_safety_doc,
    missing_docs,
    reason = "CUDA's manual has the contracts and the words"
)]
// SAFETY: of every function here: the caller gives what CUDA's manual says, pointers to values that it owns among it.
#![allow(clippy::not_unsafe_ptr_arg_deref)]

mod api;
mod candle;
mod card;
mod memory;
mod report;
mod state;
mod work;
