//! `hiper_step{K}.safetensors`: the run after step K, with all that the next step depends on.

use std::path::{Path, PathBuf};

use hiper_core::{Checkpoint, HiperMetadata, Personalisation};

use crate::console::Console;
use crate::output::Output;
use crate::{Error, Result};

const PREFIX: &str = "hiper_step";
const SUFFIX: &str = ".safetensors";

/// The checkpoints of one folder, by step.
pub struct Checkpoints(Vec<(usize, PathBuf)>);

impl Checkpoints {
    /// Lists them.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(folder: &Path) -> Result<Self> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "cannot be read"))? {
            let path = entry.map_err(Error::io(folder, "cannot be read"))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let step = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
            if let Some(step) = step.and_then(|step| step.parse().ok()) {
                found.push((step, path));
            }
        }
        found.sort();
        Ok(Self(found))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The newest that is whole and not beyond `last_step`. Damaged ones are said and passed over.
    pub fn newest(&self, last_step: usize, console: &Console) -> Option<(usize, PathBuf, Checkpoint)> {
        self.0.iter().rev().filter(|(step, _)| *step <= last_step).find_map(|(step, path)| {
            let checkpoint = Checkpoint::load(path);
            match checkpoint {
                Ok(checkpoint) if checkpoint.adam.steps == *step => {
                    return Some((*step, path.clone(), checkpoint));
                }
                Ok(other) => {
                    console.warn(format!("{}: holds step {}, passed over", path.display(), other.adam.steps))
                }
                Err(error) => console.warn(format!("{error}; passed over")),
            }
            None
        })
    }
}

/// Writes the checkpoint after the run's last step.
///
/// # Errors
/// When the folder cannot be written or the disk is full.
pub fn save(run: &Personalisation, metadata: HiperMetadata, output: &Output<'_>) -> Result<PathBuf> {
    let path = output.path(&format!("{PREFIX}{}{SUFFIX}", run.steps_taken()));
    Checkpoint { metadata, ..run.checkpoint() }.save(&path)?;
    output.wrote(&path, "checkpoint");
    Ok(path)
}
