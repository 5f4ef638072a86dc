//! `log.jsonl`: one line a step, on disk as soon as the step is done.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use hiper_core::Step;
use serde::Serialize;

use crate::output::Output;
use crate::{Error, Result};

const NAME: &str = "log.jsonl";

#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    step: Step,
    seconds: f64,
}

/// The open log.
pub struct StepLog {
    path: PathBuf,
    file: File,
    length: u64,
}

impl StepLog {
    /// Opens the log so that it holds the steps up to `step` and nothing else: what a killed run logged after its last
    /// checkpoint will be logged again.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn after(step: usize, output: &Output<'_>) -> Result<Self> {
        let path = output.path(NAME);
        let old = match std::fs::read_to_string(&path) {
            Ok(text) if step > 0 => text,
            _ => String::new(),
        };
        let number = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?.get("step")?.as_u64();
        let kept: String = old
            .split_inclusive('\n')
            .take_while(|line| line.ends_with('\n') && number(line).is_some_and(|n| n <= step as u64))
            .collect();
        output.write(NAME, kept.as_bytes())?;
        let file =
            OpenOptions::new().append(true).open(&path).map_err(Error::io(&path, "cannot be opened"))?;
        Ok(Self { path, file, length: kept.len() as u64 })
    }

    /// Adds a step; a line that does not fit on the disk is taken back.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn append(&mut self, step: Step, seconds: f64) -> Result<()> {
        let mut line = serde_json::to_string(&Line { step, seconds }).unwrap_or_default();
        line.push('\n');
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            let _ = self.file.set_len(self.length);
            return Err(Error::io(&self.path, "cannot be written")(error));
        }
        self.length += line.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::LogFormat;
    use crate::console::Console;

    #[test]
    fn a_log_is_cut_to_the_checkpoint_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::new(LogFormat::Text, true);
        let output = Output::create(dir.path(), &console).unwrap();
        let line = |step| Step { step, timestep: 7, loss: 0.25 };
        let mut log = StepLog::after(0, &output).unwrap();
        (1..=5).for_each(|step| log.append(line(step), 0.5).unwrap());
        // Killed in the middle of a line.
        log.file.write_all(b"{\"step\":6,\"ti").unwrap();
        let mut log = StepLog::after(3, &output).unwrap();
        log.append(line(4), 1.5).unwrap();
        let text = std::fs::read_to_string(output.path(NAME)).unwrap();
        let steps: Vec<&str> = text.lines().map(|l| &l[..9]).collect();
        assert_eq!(steps, ["{\"step\":1", "{\"step\":2", "{\"step\":3", "{\"step\":4"]);
        assert!(text.ends_with("{\"step\":4,\"timestep\":7,\"loss\":0.25,\"seconds\":1.5}\n"), "{text}");
    }
}
