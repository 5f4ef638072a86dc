//! What a card has given to programs, as nvidia-smi tells.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

/// Between two looks.
const LOOK: &str = "--loop-ms=20";

/// Looks at the first card's memory until it is asked.
pub struct CardMemory {
    before: f64,
    looking: Child,
    /// The largest figure, MiB.
    peak: Option<JoinHandle<f64>>,
}

impl CardMemory {
    /// Begins to look; none where nvidia-smi does not answer.
    pub fn watch() -> Option<Self> {
        let used = || {
            let mut smi = Command::new("nvidia-smi");
            smi.args(["--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]);
            smi
        };
        let before = String::from_utf8_lossy(&used().output().ok()?.stdout).trim().parse().ok()?;
        let looking = used().arg(LOOK).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut looking = looking.ok()?;
        let lines = BufReader::new(looking.stdout.take()?).lines();
        let peak = std::thread::spawn(move || largest(lines.map_while(Result::ok)));
        Some(Self { before, looking, peak: Some(peak) })
    }

    /// The most that all programs had together since, without what they had before, bytes.
    pub fn peak(mut self) -> Option<f64> {
        self.stop();
        let peak = self.peak.take()?.join().ok()?;
        Some((peak - self.before).max(0.0) * 1024.0 * 1024.0)
    }

    fn stop(&mut self) {
        let _ = self.looking.kill();
        let _ = self.looking.wait();
    }
}

/// Also where what was watched failed.
impl Drop for CardMemory {
    fn drop(&mut self) {
        self.stop();
    }
}

fn largest(lines: impl Iterator<Item = String>) -> f64 {
    lines.filter_map(|line| line.trim().parse().ok()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_and_other_lines_are_not() {
        let lines = ["512", " 4096 ", "[N/A]", "1024"].map(String::from);
        assert_eq!(largest(lines.into_iter()), 4096.0);
    }
}
