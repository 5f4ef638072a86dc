//! Memory for intermediate results, kept from one call to the next: a step in steady state asks for no new pages.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use super::LINE;

/// A line of the cache: memory made of lines starts with one, so that no vector of it lies in two.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; VALUES]);

/// Values of a line.
const VALUES: usize = LINE / size_of::<f32>();

static POOL: Mutex<Vec<Vec<Line>>> = Mutex::new(Vec::new());

thread_local! {
    static LOCAL: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Values from the pool, for all threads of one operator; what they hold is left over from before. Back to the pool when dropped.
pub(crate) struct Scratch {
    lines: Vec<Line>,
    len: usize,
}

impl Scratch {
    /// `len` values: the smallest that fits of those in the pool, or the largest, grown.
    pub(crate) fn new(len: usize) -> Self {
        let needed = len.div_ceil(VALUES);
        let mut lines = {
            let mut pool = POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let fits = (0..pool.len()).filter(|&i| pool[i].len() >= needed).min_by_key(|&i| pool[i].len());
            let best = fits.or_else(|| (0..pool.len()).max_by_key(|&i| pool[i].len()));
            best.map_or_else(Vec::new, |i| pool.swap_remove(i))
        };
        if lines.len() < needed {
            // Not `resize`: the old content is of no use, so nothing is copied.
            drop(std::mem::take(&mut lines));
            lines = vec![Line([0.0; VALUES]); needed];
        }
        Self { lines, len }
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut pool = POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        pool.push(std::mem::take(&mut self.lines));
    }
}

/// Calls `f` with `len` values of this thread's own; what they hold is left over from before.
pub(crate) fn with_local<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken out while in use, so that a nested call gets memory of its own.
    let mut lines = LOCAL.with_borrow_mut(std::mem::take);
    if lines.len() < len.div_ceil(VALUES) {
        lines = vec![Line([0.0; VALUES]); len.div_ceil(VALUES)];
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut lines)[..len]);
    LOCAL.with_borrow_mut(|local| {
        if local.len() < lines.len() {
            *local = lines;
        }
    });
    result
}

#[cfg(test)]
mod tests {
    use super::{LINE, Scratch, with_local};

    #[test]
    fn memory_begins_with_a_line_and_has_the_length_asked_for() {
        for len in [0, 1, 16, 17, 1000] {
            let scratch = Scratch::new(len);
            assert_eq!((scratch.len(), scratch.as_ptr().addr() % LINE), (len, 0));
            with_local(len, |local| assert_eq!((local.len(), local.as_ptr().addr() % LINE), (len, 0)));
        }
    }
}
