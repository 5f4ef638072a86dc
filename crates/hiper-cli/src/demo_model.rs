//! The checkpoint, photo and sentences in the binary (feature `demo-model`; the table is made by `build.rs`).

mod table {
    include!(concat!(env!("OUT_DIR"), "/demo_model.rs"));
}

use sd_models::ModelFiles;
use serde::Deserialize;

use crate::{Error, Result};

/// How messages call it.
const NAME: &str = "hiper-demo";

/// What the demo tells: `assets/demo.json`.
#[derive(Deserialize)]
pub struct Story {
    /// What the photo shows.
    pub source_text: String,
    /// Sentences to edit it with.
    pub target_texts: Vec<String>,
    /// Steps of the optimiser.
    #[serde(default = "default_train_steps")]
    pub train_steps: usize,
    /// Denoising steps a picture.
    #[serde(default = "default_steps")]
    pub steps: usize,
    /// Seed of the random numbers.
    #[serde(default)]
    pub seed: u64,
}

fn default_train_steps() -> usize {
    300
}

fn default_steps() -> usize {
    30
}

/// The embedded checkpoint.
///
/// # Errors
/// When this build has none.
pub fn files() -> Result<ModelFiles> {
    present()?;
    Ok(ModelFiles::from_embedded(NAME, table::FILES))
}

/// The embedded photo, a PNG.
///
/// # Errors
/// When this build has none.
pub fn photo() -> Result<&'static [u8]> {
    present()?;
    Ok(table::PHOTO)
}

/// The embedded sentences.
///
/// # Errors
/// When this build has none.
pub fn story() -> Result<Story> {
    present()?;
    serde_json::from_slice(table::TEXTS).map_err(|e| {
        Error::refused(format!("the embedded demo.json: {e}"), "correct assets/demo.json and build again")
    })
}

fn present() -> Result<()> {
    if table::FILES.is_empty() {
        return Err(Error::refused(
            "this build of hiper has no embedded model",
            "give --model DIR, or build with the default feature demo-model",
        ));
    }
    Ok(())
}
