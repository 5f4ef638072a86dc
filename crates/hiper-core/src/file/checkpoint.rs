//! Everything that the next step depends on, in one file.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::metadata::number;
use super::tensors::TensorFile;
use super::{COPY_AGAIN, FileName, HiperMetadata, read, write_atomically};
use crate::{Adam, AdamConfig, GeneratorState, HiperEmbedding, Result, TorchGenerator};

const FIRST_MOMENT: &str = "adam.first_moment";
const SECOND_MOMENT: &str = "adam.second_moment";
const STEPS: &str = "adam.steps";
const WORDS: &str = "generator.words";
const INDEX: &str = "generator.index";
const CACHED_NORMAL: &str = "generator.cached_normal";
const LAST_LOSS: &str = "last_loss";

/// Everything that the next step depends on: `hiper_step{K}.safetensors`.
///
/// | tensor | |
/// | --- | --- |
/// | `hiper` | `[N, D]` `f32`, the tail: whatever reads a tail reads a checkpoint |
/// | `adam.first_moment`, `adam.second_moment` | `[N, D]` `f32` |
/// | `generator.words` | `[624]` `u32`, mt19937 |
///
/// The metadata holds [`HiperMetadata`], Adam's constants and steps, and the rest of the generator; numbers read back exactly.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The tail.
    pub tail: HiperEmbedding,
    /// The optimiser.
    pub adam: Adam,
    /// The random numbers.
    pub generator: TorchGenerator,
    /// The loss of the last step.
    pub last_loss: Option<f64>,
    /// Where it comes from. A run does not look at it.
    pub metadata: HiperMetadata,
}

impl Checkpoint {
    /// Writes the file beside its place, then renames it. Equal checkpoints give equal bytes.
    ///
    /// # Errors
    /// When the folder cannot be written or the disk is full; an older file of the same name then stays.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut file = TensorFile::default();
        let moment = |values: &[f32]| Tensor::from_slice(values, self.tail.tensor().shape(), &Device::Cpu);
        file.push("hiper", self.tail.tensor())?;
        file.push(FIRST_MOMENT, &moment(&self.adam.first_moment)?)?;
        file.push(SECOND_MOMENT, &moment(&self.adam.second_moment)?)?;
        let GeneratorState { words, index, cached_normal } = self.generator.state();
        file.push_words(WORDS, &words);
        self.metadata.write(&self.tail, &mut file.metadata);
        let AdamConfig { learning_rate, beta1, beta2, eps } = self.adam.config;
        let numbers = [("learning_rate", learning_rate), ("beta1", beta1), ("beta2", beta2), ("eps", eps)];
        file.metadata.extend(numbers.map(|(key, value)| (format!("adam.{key}"), format!("{value:?}"))));
        file.metadata.insert(STEPS.into(), self.adam.steps.to_string());
        file.metadata.insert(INDEX.into(), index.to_string());
        if let Some(bits) = cached_normal {
            file.metadata.insert(CACHED_NORMAL.into(), bits.to_string());
        }
        if let Some(loss) = self.last_loss {
            file.metadata.insert(LAST_LOSS.into(), format!("{loss:?}"));
        }
        write_atomically(path, &file.to_bytes())
    }

    /// Reads a checkpoint.
    ///
    /// # Errors
    /// When it is not one, or is damaged.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_bytes(&read(path)?, path)
    }

    /// [`load`](Self::load) from memory; `path` is the name that errors show.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        let name = FileName(path);
        let file = TensorFile::from_bytes(bytes, name)?;
        let tail = file.tail(name)?;
        let metadata = HiperMetadata::read(&file.metadata, &tail, name)?;
        let adam = read_adam(&file, &tail, name)?;
        let state = GeneratorState {
            words: file.words(WORDS, name)?,
            index: required(&file, INDEX, name)?,
            cached_normal: number(&file.metadata, CACHED_NORMAL, name)?,
        };
        let Some(generator) = TorchGenerator::from_state(state) else {
            return Err(name.error(WORDS, "a state of mt19937", "another length or index", COPY_AGAIN));
        };
        let last_loss = number(&file.metadata, LAST_LOSS, name)?;
        Ok(Self { tail, adam, generator, last_loss, metadata })
    }
}

fn read_adam(file: &TensorFile, tail: &HiperEmbedding, name: FileName<'_>) -> Result<Adam> {
    let constant = |key: &str| required(file, &format!("adam.{key}"), name);
    let config = AdamConfig {
        learning_rate: constant("learning_rate")?,
        beta1: constant("beta1")?,
        beta2: constant("beta2")?,
        eps: constant("eps")?,
    };
    config.check().map_err(|e| name.error("adam", "constants of Adam", format!("“{e}”"), COPY_AGAIN))?;
    let moment = |key: &str| -> Result<Vec<f32>> {
        let moment = file.tensor(key, name)?;
        let (expected, got) = (tail.tensor().dims(), moment.dims());
        if expected != got {
            let expected = format!("shape {expected:?}, as the tail");
            return Err(name.error(key, expected, format!("{got:?}"), COPY_AGAIN));
        }
        Ok(moment.flatten_all()?.to_vec1()?)
    };
    let (first_moment, second_moment) = (moment(FIRST_MOMENT)?, moment(SECOND_MOMENT)?);
    if let Some(value) = second_moment.iter().find(|&&v| v < 0.0) {
        return Err(name.error(SECOND_MOMENT, "means of squares", value, COPY_AGAIN));
    }
    let steps: u32 = required(file, STEPS, name)?;
    Ok(Adam { config, first_moment, second_moment, steps: steps as usize })
}

fn required<T: std::str::FromStr>(file: &TensorFile, key: &str, name: FileName<'_>) -> Result<T> {
    number(&file.metadata, key, name)?.ok_or_else(|| {
        let got = "none: this is a finished tail, or another tool's";
        name.error(key, "a metadata field of this name", got, "give a checkpoint, hiper_step*.safetensors")
    })
}
