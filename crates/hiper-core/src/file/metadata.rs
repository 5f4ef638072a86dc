//! Where a tail comes from, as text in its file.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{COPY_AGAIN, FileName};
use crate::{HiperEmbedding, Result};

/// What the metadata field `format` says.
const FORMAT: &str = "hiper-1";

/// Where a tail comes from; every field is optional, so that tails of other tools can be read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HiperMetadata {
    /// The checkpoint it was learned with: a path or a name.
    pub base_model: Option<String>,
    /// That checkpoint's fingerprint.
    pub base_model_hash: Option<String>,
    /// SHA-256 of the picture's file.
    pub image_hash: Option<String>,
    /// The source text.
    pub source_text: Option<String>,
    /// Steps taken.
    pub train_steps: Option<usize>,
    /// Learning rate.
    pub learning_rate: Option<f64>,
    /// Seed of the random numbers.
    pub seed: Option<u64>,
    /// Loss of the last step.
    pub final_loss: Option<f64>,
}

impl HiperMetadata {
    /// Writes the fields that are there, and the tail's format and shape.
    pub(super) fn write(&self, tail: &HiperEmbedding, text: &mut BTreeMap<String, String>) {
        let Self {
            base_model,
            base_model_hash,
            image_hash,
            source_text,
            train_steps,
            learning_rate,
            seed,
            final_loss,
        } = self;
        // Debug prints the shortest decimal that reads back as the same number.
        let number = |value: &f64| format!("{value:?}");
        let fields = [
            ("format", Some(FORMAT.to_owned())),
            ("n_hiper", Some(tail.n_hiper().to_string())),
            ("width", Some(tail.width().to_string())),
            ("base_model", base_model.clone()),
            ("base_model_hash", base_model_hash.clone()),
            ("image_hash", image_hash.clone()),
            ("source_text", source_text.clone()),
            ("train_steps", train_steps.as_ref().map(usize::to_string)),
            ("learning_rate", learning_rate.as_ref().map(number)),
            ("seed", seed.as_ref().map(u64::to_string)),
            ("final_loss", final_loss.as_ref().map(number)),
        ];
        text.extend(fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
    }

    /// Reads the fields that are there.
    pub(super) fn read(
        text: &BTreeMap<String, String>,
        tail: &HiperEmbedding,
        file: FileName<'_>,
    ) -> Result<Self> {
        if let Some(format) = text.get("format").filter(|format| *format != FORMAT) {
            return Err(file.error("format", FORMAT, format!("{format:?}"), "read it with a newer version"));
        }
        for (key, size) in [("n_hiper", tail.n_hiper()), ("width", tail.width())] {
            if number::<usize>(text, key, file)?.is_some_and(|stated| stated != size) {
                return Err(file.error(key, format!("{size}, as the tensor has"), &text[key], COPY_AGAIN));
            }
        }
        let string = |key| text.get(key).cloned();
        Ok(Self {
            base_model: string("base_model"),
            base_model_hash: string("base_model_hash"),
            image_hash: string("image_hash"),
            source_text: string("source_text"),
            train_steps: number(text, "train_steps", file)?,
            learning_rate: number(text, "learning_rate", file)?,
            seed: number(text, "seed", file)?,
            final_loss: number(text, "final_loss", file)?,
        })
    }
}

/// A number that may be missing.
pub(super) fn number<T: FromStr>(
    text: &BTreeMap<String, String>,
    key: &str,
    file: FileName<'_>,
) -> Result<Option<T>> {
    let Some(value) = text.get(key) else { return Ok(None) };
    let malformed = |_| file.error(key, "a number", format!("{value:?}"), COPY_AGAIN);
    value.parse().map(Some).map_err(malformed)
}
