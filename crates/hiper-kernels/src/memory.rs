//! What a step costs in memory, and where freed memory goes.

/// What to save when time and memory cannot both be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Memory {
    /// Time: blocks keep what their backward pass needs.
    #[default]
    Fast,
    /// Memory: blocks keep their input, and on a CPU what their attentions gave, and compute the rest again.
    Lean,
}

/// Asks the C library to keep freed memory for the next step rather than return it to the operating system, which would
/// clear the same gigabytes anew each step: a quarter of a step's time on Linux. Call once, when the program starts.
/// Does nothing where the C library is not glibc.
///
/// ```
/// hiper_kernels::keep_freed_memory();
/// ```
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets the allocator's parameters; it is safe to call at any time, from any thread.
    #[allow(unsafe_code)]
    unsafe {
        // Every block from the heap, none from a mapping of its own that is unmapped when freed; and the heap's free top
        // is never given back. One heap for all threads, so that a block freed by one is there for the others.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
