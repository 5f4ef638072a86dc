//! What a step costs in memory, where freed memory goes, and where what is handed out begins.

use std::alloc::{GlobalAlloc, Layout, System};

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

/// The system's allocator, but whatever is large begins with a line of the cache: a tensor's vectors lie in one line each rather
/// than in two. A program that has it takes a few percent less for a step on a CPU.
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: hiper_kernels::AlignedAllocator = hiper_kernels::AlignedAllocator;
/// # fn main() {
/// assert!(vec![0f32; 10_000].as_ptr().addr().is_multiple_of(64));
/// # }
/// ```
#[derive(Debug)]
pub struct AlignedAllocator;

/// Bytes from which on memory is aligned.
const LARGE: usize = 4096;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The layout that the system is asked for. It depends on the layout alone, so it is the same when memory is given back.
fn aligned(layout: Layout) -> Layout {
    if layout.size() < LARGE { layout } else { layout.align_to(LINE).unwrap_or(layout) }
}

// SAFETY: memory comes from `System` and goes back to it under one and the same layout, `aligned`, which asks for no less than
// the caller does. Memory is only grown in place by the system where that layout's alignment stays what it is.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for AlignedAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the size is the caller's, who vouches that it is not zero.
        unsafe { System.alloc(aligned(layout)) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(aligned(layout)) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller gives the layout that `memory` was asked for with, so it came under `aligned` of it.
        unsafe { System.dealloc(memory, aligned(layout)) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller vouches that `size`, rounded up to the alignment, does not overflow.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if aligned(layout).align() == aligned(new).align() {
            // SAFETY: `memory` came under this layout; the alignment stays.
            return unsafe { System.realloc(memory, aligned(layout), size) };
        }
        // SAFETY: new memory does not overlap the old, and holds as much of it as is copied; the old goes back as it came.
        unsafe {
            let to = self.alloc(new);
            if !to.is_null() {
                to.copy_from_nonoverlapping(memory, layout.size().min(size));
                self.dealloc(memory, layout);
            }
            to
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Grown and shrunk across the limit, memory keeps what it holds and is aligned as it should be.
    #[test]
    fn memory_keeps_its_content_and_large_memory_begins_with_a_line() {
        let mut layout = Layout::from_size_align(24, 8).unwrap();
        // SAFETY: no size is zero; each layout is the last one asked for; what is written and read lies inside.
        #[allow(unsafe_code)]
        unsafe {
            let mut memory = AlignedAllocator.alloc_zeroed(layout);
            assert_eq!(memory.read(), 0);
            memory.write_bytes(7, 24);
            for size in [4095, 4096, 100_000, 5000, 24] {
                memory = AlignedAllocator.realloc(memory, layout, size);
                layout = Layout::from_size_align(size, 8).unwrap();
                assert!(memory.addr().is_multiple_of(if size < LARGE { 8 } else { LINE }));
                assert!((0..24).all(|i| memory.add(i).read() == 7));
            }
            AlignedAllocator.dealloc(memory, layout);
        }
    }
}
