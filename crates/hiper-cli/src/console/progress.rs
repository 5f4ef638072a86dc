//! How often progress is said where there is no terminal to draw a bar on.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of progress.
const INTERVAL: Duration = Duration::from_secs(10);

/// Remembers when the last line was written.
#[derive(Default)]
pub struct Pace(Mutex<Option<Instant>>);

impl Pace {
    /// Begins to wait.
    pub fn restart(&self) {
        *self.last() = Some(Instant::now());
    }

    /// Whether a line is due; if so, begins to wait for the next.
    pub fn is_due(&self) -> bool {
        let due = self.last().is_none_or(|last| last.elapsed() >= INTERVAL);
        if due {
            self.restart();
        }
        due
    }

    fn last(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
