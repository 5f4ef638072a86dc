//! Memory for intermediate results, kept from one call to the next: a step in steady state asks for no new pages.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

static POOL: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

thread_local! {
    static LOCAL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Values from the pool, for all threads of one operator; what they hold is left over from before. Back to the pool when dropped.
pub(crate) struct Scratch {
    values: Vec<f32>,
    len: usize,
}

impl Scratch {
    /// `len` values: the smallest that fits of those in the pool, or the largest, grown.
    pub(crate) fn new(len: usize) -> Self {
        let mut values = {
            let mut pool = POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let fits = (0..pool.len()).filter(|&i| pool[i].len() >= len).min_by_key(|&i| pool[i].len());
            let best = fits.or_else(|| (0..pool.len()).max_by_key(|&i| pool[i].len()));
            best.map_or_else(Vec::new, |i| pool.swap_remove(i))
        };
        if values.len() < len {
            // Not `resize`: the old content is of no use, so nothing is copied.
            drop(std::mem::take(&mut values));
            values = vec![0.0; len];
        }
        Self { values, len }
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut pool = POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        pool.push(std::mem::take(&mut self.values));
    }
}

/// Calls `f` with `len` values of this thread's own; what they hold is left over from before.
pub(crate) fn with_local<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken out while in use, so that a nested call gets memory of its own.
    let mut values = LOCAL.with_borrow_mut(std::mem::take);
    if values.len() < len {
        values = vec![0.0; len];
    }
    let result = f(&mut values[..len]);
    LOCAL.with_borrow_mut(|local| {
        if local.len() < values.len() {
            *local = values;
        }
    });
    result
}
