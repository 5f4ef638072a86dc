//! `settings.json`: what a run's result depends on, so that `--resume` never mixes two runs.

use serde::Serialize;
use serde_json::Value;

use crate::args::Crop;
use crate::output::Output;
use crate::{Error, Result};

const NAME: &str = "settings.json";

/// Everything but the number of steps: a run may be made longer.
#[derive(Debug, Clone, Serialize)]
pub struct Settings {
    /// The source text.
    pub source_text: String,
    /// Tokens of the tail.
    pub n_hiper: usize,
    /// Step size of the optimiser.
    pub learning_rate: f64,
    /// Seed of the random numbers.
    pub seed: u64,
    /// How the photo was cropped.
    pub crop: Crop,
    /// Pixels, as the model sees the photo.
    pub width: u32,
    /// Pixels, as the model sees the photo.
    pub height: u32,
    /// SHA-256 of the photo's file.
    pub image_hash: String,
    /// The checkpoint's fingerprint.
    pub base_model_hash: String,
}

impl Settings {
    /// Refuses a folder that holds checkpoints of a run with other settings.
    ///
    /// # Errors
    /// Naming the setting that differs.
    pub fn check_same_run(&self, output: &Output<'_>) -> Result<()> {
        let folder = output.folder().display();
        let hint = "repeat the command of that run, or choose another --output-dir";
        let Ok(text) = std::fs::read(output.path(NAME)) else {
            return Err(Error::refused(
                format!("{folder}: holds checkpoints, but {NAME} of their run is missing"),
                hint,
            ));
        };
        let theirs: Value = serde_json::from_slice(&text).map_err(|e| {
            Error::refused(format!("{}: not readable: {e}", output.path(NAME).display()), hint)
        })?;
        let ours = self.json();
        let differs =
            ours.as_object().into_iter().flatten().find(|(key, value)| theirs.get(key) != Some(value));
        match differs {
            None => Ok(()),
            Some((key, value)) => {
                let other = theirs.get(key).unwrap_or(&Value::Null);
                let message = format!(
                    "{folder}: holds checkpoints of another run: its {key} is {other}, now it is {value}"
                );
                Err(Error::refused(message, hint))
            }
        }
    }

    /// Writes them to the folder.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, output: &Output<'_>) -> Result<()> {
        output.write(NAME, format!("{:#}\n", self.json()).as_bytes())?;
        Ok(())
    }

    fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}
