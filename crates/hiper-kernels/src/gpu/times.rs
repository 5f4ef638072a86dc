//! How long kernels take, for whoever makes them faster.

#[cfg(feature = "cuda")]
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// All launches of a kernel on one grid.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// As in `kernels/*.cu`.
    pub kernel: String,
    /// Blocks in x, y, z.
    pub grid: [usize; 3],
    /// How many there were.
    pub launches: usize,
    /// Of all of them together.
    pub microseconds: f64,
}

static WANTED: AtomicBool = AtomicBool::new(false);
static TIMES: Mutex<Vec<KernelTime>> = Mutex::new(Vec::new());

#[cfg(feature = "cuda")]
thread_local! {
    static MEASURING: Cell<bool> = const { Cell::new(false) };
}

/// From now on, measures each kernel of this project's when a card is given something to record: it repeats every launch
/// twenty times, one behind the other in a graph, so weights and pictures that fit into a cache are read from there. What is
/// recorded then stays the same.
///
/// ```
/// hiper_kernels::time_kernels();
/// assert!(hiper_kernels::kernel_times().is_empty(), "nothing was recorded");
/// ```
pub fn time_kernels() {
    WANTED.store(true, Ordering::Relaxed);
}

/// What was measured, the longest first.
pub fn kernel_times() -> Vec<KernelTime> {
    let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner).clone();
    times.sort_by(|a, b| b.microseconds.total_cmp(&a.microseconds).then_with(|| a.kernel.cmp(&b.kernel)));
    times
}

/// Measures the launches of `f`, if that is wanted.
#[cfg(feature = "cuda")]
pub(super) fn during<R>(f: impl FnOnce() -> R) -> R {
    MEASURING.set(WANTED.load(Ordering::Relaxed));
    let done = f();
    MEASURING.set(false);
    done
}

/// Whether this thread's launches are measured.
#[cfg(feature = "cuda")]
pub(super) fn measuring() -> bool {
    MEASURING.get()
}

/// One launch more.
#[cfg(any(test, feature = "cuda"))]
pub(super) fn note(kernel: &str, grid: [usize; 3], microseconds: f64) {
    let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
    match times.iter_mut().find(|time| time.kernel == kernel && time.grid == grid) {
        Some(time) => {
            time.launches += 1;
            time.microseconds += microseconds;
        }
        None => times.push(KernelTime { kernel: kernel.into(), grid, launches: 1, microseconds }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_of_one_grid_are_added_and_the_longest_come_first() {
        for (kernel, grid, microseconds) in [("a", 1, 2.0), ("b", 1, 3.0), ("a", 1, 2.0), ("a", 2, 1.0)] {
            note(kernel, [grid, 1, 1], microseconds);
        }
        let times = kernel_times();
        let seen: Vec<_> =
            times.iter().map(|t| (t.kernel.as_str(), t.grid[0], t.launches, t.microseconds)).collect();
        assert_eq!(seen, [("a", 1, 2, 4.0), ("b", 1, 1, 3.0), ("a", 2, 1, 1.0)]);
    }
}
