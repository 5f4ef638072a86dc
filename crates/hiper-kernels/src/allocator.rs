//! Where freed memory goes, and where what is handed out begins.

use std::alloc::{GlobalAlloc, Layout, System};

use crate::cpu::LINE;

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
/// than in two, and a step on a CPU takes less time.
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

/// The system's own alignment. An address fits between two that have it.
const ALIGN: usize = 16;

/// What the system is asked for in place of a large layout: a line more, in which the memory before the first whole line notes
/// where it begins. (Asked for aligned memory, glibc could not use a freed block again for one of the same size.)
fn with_room(layout: Layout) -> Option<Layout> {
    let large = layout.size() >= LARGE && layout.align() <= ALIGN;
    large.then(|| Layout::from_size_align(layout.size().checked_add(LINE)?, ALIGN).ok()).flatten()
}

/// The first line after `memory`, with a note of where that was.
///
/// # Safety
/// `memory` came under a layout of [`with_room`].
#[allow(unsafe_code)]
unsafe fn first_line(memory: *mut u8) -> *mut u8 {
    if memory.is_null() {
        return memory;
    }
    // SAFETY: the line is at least `ALIGN` and at most `LINE` bytes further on, and there is room for `LINE` more; the note takes
    // the last bytes before it, aligned as an address.
    unsafe {
        let line = memory.add(LINE - memory.addr() % LINE);
        line.cast::<*mut u8>().sub(1).write(memory);
        line
    }
}

// SAFETY: memory comes from `System` and goes back to it under one and the same layout: the caller's, or for a large one that of
// `with_room`, which depends on the caller's alone. A large block has `layout.size()` bytes from its first line on.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for AlignedAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the size is the caller's, who vouches that it is not zero, or a line more.
        unsafe {
            match with_room(layout) {
                Some(roomy) => first_line(System.alloc(roomy)),
                None => System.alloc(layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe {
            match with_room(layout) {
                Some(roomy) => first_line(System.alloc_zeroed(roomy)),
                None => System.alloc_zeroed(layout),
            }
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller gives the layout that `memory` was asked for with; a large one has the note of `first_line`.
        unsafe {
            match with_room(layout) {
                Some(roomy) => System.dealloc(memory.cast::<*mut u8>().sub(1).read(), roomy),
                None => System.dealloc(memory, layout),
            }
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller vouches that `size`, rounded up to the alignment, does not overflow.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if with_room(layout).is_none() && with_room(new).is_none() {
            // SAFETY: both came and go under the caller's layouts.
            return unsafe { System.realloc(memory, layout, size) };
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
