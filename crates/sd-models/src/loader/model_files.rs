//! Where a checkpoint's bytes come from: a folder in the diffusers layout, or the program itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use hiper_kernels::Memory;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::weights::{data_start, weight_files};
use crate::{Error, Result};

/// The files of one checkpoint in the diffusers layout (`unet/config.json`, `tokenizer/vocab.json`, …).
#[derive(Clone)]
pub struct ModelFiles {
    name: String,
    source: Source,
    memory: Memory,
    dtype: DType,
}

#[derive(Clone)]
enum Source {
    Folder(PathBuf),
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// A file's content: mapped, or part of the program.
#[derive(Clone)]
pub enum Bytes {
    /// Memory-mapped from a file.
    Mapped(Arc<memmap2::Mmap>),
    /// Part of the program.
    Static(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

impl Bytes {
    /// The same bytes, for who keeps them.
    pub(super) fn shared(&self) -> Arc<dyn AsRef<[u8]> + Send + Sync> {
        match self {
            Self::Mapped(map) => map.clone(),
            Self::Static(bytes) => Arc::new(*bytes),
        }
    }

    /// Says that a range has been read and copied: a map need not keep its pages in this process's memory.
    pub(super) fn release(&self, range: std::ops::Range<usize>) {
        /// Whole pages inside the range, whatever the page's size.
        const PAGE: usize = 64 * 1024;
        let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
        #[cfg(unix)]
        if let (Self::Mapped(map), true) = (self, start < end) {
            // SAFETY: the map is read-only and of a file: a page that is dropped is read again from the file when it is
            // next touched, with the same content as far as that of `map` goes.
            #[allow(unsafe_code)]
            let advised =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            // Advice alone: where the system does not take it, the pages stay.
            advised.unwrap_or_default();
        }
        #[cfg(not(unix))]
        let _ = (start, end);
    }
}

/// What a diffusers folder must hold to be a Stable Diffusion: one file of each of these.
const REQUIRED: [&[&str]; 5] = [
    &["unet/config.json"],
    &["vae/config.json"],
    &["text_encoder/config.json"],
    &["tokenizer/vocab.json", "tokenizer/tokenizer.json"],
    &["scheduler/scheduler_config.json"],
];

impl ModelFiles {
    /// Opens a checkpoint folder.
    ///
    /// # Errors
    /// When the path is not a folder in the diffusers layout; the error names what is missing.
    ///
    /// ```no_run
    /// # fn main() -> sd_models::Result<()> {
    /// let files = sd_models::ModelFiles::from_dir("stable-diffusion-v1-5")?;
    /// let model = sd_models::StableDiffusion::load(&files, &candle_core::Device::Cpu)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_dir(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        if path.is_file() {
            return Err(Error::SingleFile { file: name });
        }
        if !path.is_dir() {
            let remedy =
                "give a folder in the diffusers layout, or the ID of a model in the local Hugging Face cache";
            return Err(Error::MissingFile { file: name, remedy: remedy.into() });
        }
        let files = Self {
            name,
            source: Source::Folder(path.to_path_buf()),
            memory: Memory::Fast,
            dtype: DType::F32,
        };
        match REQUIRED.iter().find(|alternatives| !alternatives.iter().any(|file| files.exists(file))) {
            Some(missing) => Err(Error::MissingFile {
                file: files.path_of(missing[0]),
                remedy: "a checkpoint in the diffusers layout has unet/, vae/, text_encoder/, tokenizer/ and scheduler/".into(),
            }),
            None => Ok(files),
        }
    }

    /// A checkpoint that is part of the program: pairs of relative path and content.
    pub fn from_embedded(name: impl Into<String>, files: &'static [(&'static str, &'static [u8])]) -> Self {
        Self { name: name.into(), source: Source::Embedded(files), memory: Memory::Fast, dtype: DType::F32 }
    }

    /// Finds `org/name` in a Hugging Face cache folder (`~/.cache/huggingface/hub` unless the user moved it): the revision
    /// in `models--org--name/snapshots/` that `refs/main` names, else the only one there is.
    ///
    /// # Errors
    /// When the cache does not hold the model, or holds several revisions and none is `main`. Nothing is downloaded.
    ///
    /// ```no_run
    /// # fn main() -> sd_models::Result<()> {
    /// let files = sd_models::ModelFiles::from_hub_cache("/home/me/.cache/huggingface/hub", "CompVis/stable-diffusion-v1-4")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_hub_cache(cache: impl AsRef<Path>, id: &str) -> Result<Self> {
        let folder = cache.as_ref().join(format!("models--{}", id.replace('/', "--")));
        let snapshots = folder.join("snapshots");
        let main = std::fs::read_to_string(folder.join("refs/main")).map(|name| snapshots.join(name.trim()));
        let mut found: Vec<PathBuf> = match main {
            Ok(main) => vec![main],
            Err(_) => std::fs::read_dir(&snapshots)
                .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
                .unwrap_or_default(),
        };
        found.retain(|path| path.is_dir());
        let file = format!("{id} in {}", cache.as_ref().display());
        match found.as_slice() {
            [snapshot] => Self::from_dir(snapshot),
            [] => {
                let remedy = format!("give a folder, or fetch the model first: hf download {id}");
                Err(Error::MissingFile { file, remedy })
            }
            several => {
                let remedy = format!("{} revisions are, none is main: give the folder of one", several.len());
                Err(Error::MissingFile { file, remedy })
            }
        }
    }

    /// The same files, for networks that compute in another type than `f32` where they are on a card: `f16` or `bf16`. A CPU
    /// computes in `f32` whatever is said here. Networks take and give `f32` all the same.
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// What networks loaded from these files compute in on a card.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The same files, for networks that save time (the default) or memory.
    ///
    /// ```no_run
    /// # fn main() -> sd_models::Result<()> {
    /// use sd_models::{Memory, ModelFiles, StableDiffusion};
    ///
    /// let files = ModelFiles::from_dir("stable-diffusion-v1-5")?.with_memory(Memory::Lean);
    /// let model = StableDiffusion::load(&files, &candle_core::Device::Cpu)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_memory(self, memory: Memory) -> Self {
        Self { memory, ..self }
    }

    /// What networks loaded from these files save.
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// How messages call this checkpoint: its path, or the name given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How messages call one of its files.
    pub fn path_of(&self, relative: &str) -> String {
        format!("{}/{relative}", self.name)
    }

    /// Whether the checkpoint has this file.
    pub fn exists(&self, relative: &str) -> bool {
        match &self.source {
            Source::Folder(folder) => folder.join(relative).is_file(),
            Source::Embedded(files) => files.iter().any(|(path, _)| *path == relative),
        }
    }

    /// The content of a file.
    ///
    /// # Errors
    /// When it is not there or cannot be mapped.
    pub fn read(&self, relative: &str) -> Result<Bytes> {
        let missing = || Error::MissingFile {
            file: self.path_of(relative),
            remedy: "the checkpoint is incomplete, fetch or export it again".into(),
        };
        match &self.source {
            Source::Embedded(files) => {
                let found = files.iter().find(|(path, _)| *path == relative);
                found.map(|(_, bytes)| Bytes::Static(bytes)).ok_or_else(missing)
            }
            Source::Folder(folder) => {
                let path = folder.join(relative);
                if !path.is_file() {
                    return Err(missing());
                }
                map(&path).map_err(|source| Error::Read { file: self.path_of(relative), source })
            }
        }
    }

    /// Reads a JSON file into `T`.
    ///
    /// # Errors
    /// When it is not there, or not JSON, or a field is missing or has the wrong type; the error names field and line.
    ///
    /// ```no_run
    /// #[derive(serde::Deserialize)]
    /// struct Config {
    ///     sample_size: usize,
    /// }
    /// # fn main() -> sd_models::Result<()> {
    /// let files = sd_models::ModelFiles::from_dir("stable-diffusion-v1-5")?;
    /// let Config { sample_size } = files.read_config("unet/config.json")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn read_config<T: DeserializeOwned>(&self, relative: &str) -> Result<T> {
        let bytes = self.read(relative)?;
        let json = &mut serde_json::Deserializer::from_slice(&bytes);
        serde_path_to_error::deserialize(&mut *json)
            .map_err(|e| match e.path().to_string().as_str() {
                // The whole file, or nothing that can be said.
                "." | "?" => e.to_string(),
                field => format!("field {field}: {}", e.inner()),
            })
            .and_then(|config| json.end().map(|()| config).map_err(|e| e.to_string()))
            .map_err(|reason| Error::Malformed { file: self.path_of(relative), reason })
    }

    /// A fingerprint of the weights: SHA-256, in hexadecimal, over each weight file's name, size, safetensors header (names,
    /// types and shapes of all tensors), and the first and last 64 KiB of its data.
    ///
    /// It tells checkpoints apart, not single changed weights: reading gigabytes at every start would cost seconds.
    ///
    /// # Errors
    /// When a component's weights are not there.
    pub fn hash(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for component in ["text_encoder", "unet", "vae"] {
            for file in weight_files(self, component)? {
                let bytes = self.read(&file)?;
                let data = data_start(&bytes).min(bytes.len());
                hash.update(file.as_bytes());
                hash.update((bytes.len() as u64).to_le_bytes());
                hash.update(&bytes[..bytes.len().min(data.saturating_add(HASHED_BYTES))]);
                hash.update(&bytes[bytes.len().saturating_sub(HASHED_BYTES).max(data)..]);
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Bytes of a weight file's data, at either end, that enter [`ModelFiles::hash`].
const HASHED_BYTES: usize = 64 * 1024;

#[allow(unsafe_code)]
fn map(path: &Path) -> std::io::Result<Bytes> {
    let file = std::fs::File::open(path)?;
    // SAFETY: the map is only ever read. It lives as long as the network whose weights it holds; a checkpoint that another
    // program truncates or writes to meanwhile would fault or change them, as with every reader of mapped weights. Files
    // are replaced by renaming, which leaves the mapped one intact.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(Bytes::Mapped(Arc::new(map)))
}

#[cfg(test)]
mod tests {
    use super::*;

    static FILES: [(&str, &[u8]); 1] = [("unet/config.json", b"{\"a\": 1}")];

    #[test]
    fn embedded_files_are_read_and_missing_ones_named() {
        let files = ModelFiles::from_embedded("demo", &FILES);
        assert_eq!(&*files.read("unet/config.json").unwrap(), b"{\"a\": 1}");
        let error = files.read("vae/config.json").err().unwrap().to_string();
        assert!(error.contains("demo/vae/config.json: not found"), "{error}");
    }

    #[test]
    fn what_is_not_a_checkpoint_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = ModelFiles::from_dir(dir.path()).err().unwrap().to_string();
        assert!(error.contains("unet/config.json: not found"), "{error}");
        let file = dir.path().join("model.safetensors");
        std::fs::write(&file, b"x").unwrap();
        assert!(ModelFiles::from_dir(&file).err().unwrap().to_string().contains("single file"));
        assert!(ModelFiles::from_dir(dir.path().join("no")).is_err());
        assert!(
            ModelFiles::from_hub_cache(dir.path(), "org/name")
                .err()
                .unwrap()
                .to_string()
                .contains("hf download")
        );
    }

    #[test]
    fn a_config_that_is_not_json_names_the_place() {
        let dir = tempfile::tempdir().unwrap();
        for file in REQUIRED.map(|alternatives| alternatives[0]) {
            std::fs::create_dir_all(dir.path().join(file).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(file), b"{\"a\": ").unwrap();
        }
        let files = ModelFiles::from_dir(dir.path()).unwrap();
        let error = files.read_config::<serde_json::Value>("unet/config.json").unwrap_err().to_string();
        assert!(error.contains("unet/config.json") && error.contains("line 1"), "{error}");
    }
}
