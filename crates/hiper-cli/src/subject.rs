//! What one personalisation learns, and draws afterwards.

use std::path::PathBuf;

/// A photo, its sentences, and its random numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// What messages and its folder are called, when it is one of several.
    pub name: Option<String>,
    /// The photo's path.
    pub image: PathBuf,
    /// What the photo shows.
    pub source_text: String,
    /// Sentences to edit the photo with.
    pub target_texts: Vec<String>,
    /// Seed of its random numbers.
    pub seed: u64,
}
