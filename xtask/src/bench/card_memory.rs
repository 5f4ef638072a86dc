//! What a card has given to programs, as nvidia-smi tells.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::machine;

/// Between two looks.
const LOOK: &str = "--loop-ms=20";
/// Between two looks of those that do not rely on [`LOOK`], whose lines may stay in a buffer.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// That nvidia-smi has to end by itself, so that what it has to say is read.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Looks at the first card's memory until it is asked.
pub struct CardMemory {
    before: f64,
    looking: Child,
    threads: Vec<JoinHandle<()>>,
    seen: Arc<Seen>,
}

/// What the looks share.
#[derive(Default)]
struct Seen {
    /// The largest figure, MiB; none before the first.
    peak: Mutex<Option<f64>>,
    ended: AtomicBool,
}

impl CardMemory {
    /// Begins to look; none where nvidia-smi does not answer.
    pub fn watch() -> Option<Self> {
        let before = look()?;
        let looking = query().arg(LOOK).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut looking = looking.ok()?;
        let lines = BufReader::new(looking.stdout.take()?).lines();
        let seen = Arc::new(Seen::default());
        let (by_lines, by_looks) = (seen.clone(), seen.clone());
        let threads = vec![
            std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| by_lines.see(&line))),
            std::thread::spawn(move || by_looks.look_while_nothing_is_seen()),
        ];
        Some(Self { before, looking, threads, seen })
    }

    /// The most that all programs had together since, without what they had before, bytes; none if nothing was seen, or no more than
    /// before: a program that computes on a card has memory there, and somebody does not tell.
    pub fn peak(mut self) -> Option<f64> {
        self.stop();
        let more = self.seen.peak()? - self.before;
        (more > 0.0).then_some(more * 1024.0 * 1024.0)
    }

    fn stop(&mut self) {
        self.seen.ended.store(true, Ordering::Relaxed);
        // The shell has it built in; small containers have no such program.
        let terminate = format!("kill -TERM {}", self.looking.id());
        let _ = Command::new("sh").args(["-c", &terminate]).stderr(Stdio::null()).status();
        let asked = Instant::now();
        while asked.elapsed() < LAST_WORDS && matches!(self.looking.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.looking.kill();
        let _ = self.looking.wait();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Also where what was watched failed.
impl Drop for CardMemory {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.stop();
        }
    }
}

impl Seen {
    fn peak(&self) -> Option<f64> {
        *self.peak.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line that is no figure says nothing.
    fn see(&self, line: &str) {
        if let Ok(figure) = line.trim().parse::<f64>() {
            let mut peak = self.peak.lock().unwrap_or_else(PoisonError::into_inner);
            *peak = Some(peak.map_or(figure, |peak| peak.max(figure)));
        }
    }

    /// One process a look, which is slower, but comes to its end; lines, once they come, tell of all the time before.
    fn look_while_nothing_is_seen(&self) {
        let mut looks: Vec<f64> = Vec::new();
        std::thread::sleep(LOOK_AGAIN);
        while self.peak().is_none() && !self.ended.load(Ordering::Relaxed) {
            looks.extend(look());
            std::thread::sleep(LOOK_AGAIN);
        }
        looks.iter().for_each(|figure| self.see(&figure.to_string()));
    }
}

fn query() -> Command {
    let mut smi = Command::new("nvidia-smi");
    smi.args(["--query-gpu=memory.used", "--format=csv,noheader,nounits"]).arg(machine::card_id());
    smi
}

/// MiB that all programs have now.
fn look() -> Option<f64> {
    String::from_utf8_lossy(&query().output().ok()?.stdout).trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_and_other_lines_are_not() {
        let seen = Seen::default();
        seen.see("[N/A]");
        assert_eq!(seen.peak(), None);
        ["512", " 4096 ", "[N/A]", "1024"].iter().for_each(|line| seen.see(line));
        assert_eq!(seen.peak(), Some(4096.0));
    }
}
