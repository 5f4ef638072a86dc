//! A tail on disk: the finished file, checkpoints, the composed conditioning, and the paper authors' own format.
//!
//! The only part of the crate that touches the filesystem. Every reader takes bytes of unknown origin: it allocates no more
//! than the file is long, and answers with [`Error::File`] where something is not as it should be.

mod atomic;
mod checkpoint;
mod metadata;
mod tensors;
mod torch;

use std::path::Path;

use candle_core::Tensor;

pub use atomic::write_atomically;
pub use checkpoint::Checkpoint;
pub use metadata::HiperMetadata;

use crate::{Error, HiperEmbedding, Result};
use tensors::TensorFile;

/// The largest file read: a tail is some kilobytes, a file of torch that holds a whole embedding not much more.
const MAX_BYTES: u64 = 16 << 20;

/// A tail and where it comes from: `hiper.safetensors`, tensor `hiper` of `[N, D]` in `f32`.
///
/// This is not a Textual Inversion embedding (those live before the text encoder, a tail behind it): tools that load such
/// embeddings cannot use it. For them there is [`write_conditioning`].
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// use hiper_core::{HiperEmbedding, HiperFile, HiperMetadata};
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path();
/// let tail = HiperEmbedding::new(Tensor::zeros((5, 768), DType::F32, &Device::Cpu)?)?;
/// let metadata = HiperMetadata { source_text: Some("a standing dog".into()), ..Default::default() };
/// HiperFile { tail, metadata }.save(&folder.join("hiper.safetensors"))?;
/// let file = HiperFile::load(&folder.join("hiper.safetensors"))?;
/// assert_eq!((file.tail.n_hiper(), file.metadata.source_text.as_deref()), (5, Some("a standing dog")));
/// # Ok::<(), hiper_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct HiperFile {
    /// The tail.
    pub tail: HiperEmbedding,
    /// Where it comes from.
    pub metadata: HiperMetadata,
}

impl HiperFile {
    /// Writes the file beside its place, then renames it. Equal tails and metadata give equal bytes.
    ///
    /// # Errors
    /// When the folder cannot be written or the disk is full; an older file of the same name then stays.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut file = TensorFile::default();
        file.push("hiper", self.tail.tensor())?;
        self.metadata.write(&self.tail, &mut file.metadata);
        write_atomically(path, &file.to_bytes())
    }

    /// Reads a tail: our own file, a checkpoint of ours, or the paper authors' `hiper_embeddings_step*.pt` (a tensor
    /// `[1, N, D]` or `[N, D]` of `f16`, `bf16`, `f32` or `f64`, saved by torch 1.6 or later). The content decides, not the
    /// name.
    ///
    /// # Errors
    /// When it is not one; the error says what is wrong with which field.
    pub fn load(path: &Path) -> Result<Self> {
        Self::from_bytes(&read(path)?, path)
    }

    /// [`load`](Self::load) from memory; `path` is the name that errors show.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        let name = FileName(path);
        if torch::is_torch_file(bytes) {
            let tail = torch::read_tail(bytes, name)?;
            return Ok(Self { tail, metadata: HiperMetadata::default() });
        }
        let file = TensorFile::from_bytes(bytes, name)?;
        let tail = file.tail(name)?;
        let metadata = HiperMetadata::read(&file.metadata, &tail, name)?;
        Ok(Self { tail, metadata })
    }
}

/// Writes a composed conditioning `[1, T, D]` for other tools, as tensor `encoder_hidden_states` in `f32`: what diffusers takes
/// as `prompt_embeds` and ComfyUI calls `CONDITIONING`.
///
/// # Errors
/// When it has another shape or the file cannot be written.
pub fn write_conditioning(path: &Path, conditioning: &Tensor) -> Result<()> {
    if !matches!(conditioning.dims(), [1, _, _]) {
        return Err(Error::argument("conditioning", "[1, T, D]", format!("{:?}", conditioning.dims())));
    }
    let mut file = TensorFile::default();
    file.push("encoder_hidden_states", conditioning)?;
    write_atomically(path, &file.to_bytes())
}

/// The whole file, if it is small enough to be a tail.
fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |source| Error::Io { file: path.display().to_string(), action: "cannot read", source };
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > MAX_BYTES {
        let (expected, got) = (format!("at most {MAX_BYTES} bytes, as a tail has"), format!("{size} bytes"));
        return Err(FileName(path).error("size", expected, got, "is this a checkpoint of a model?"));
    }
    std::fs::read(path).map_err(io)
}

/// A file's name, for its errors.
#[derive(Clone, Copy)]
struct FileName<'a>(&'a Path);

/// The remedy when a file is damaged.
const COPY_AGAIN: &str = "the file is damaged: copy or make it again";
/// The remedy when a file is something else.
const GIVE_A_TAIL: &str =
    "give a tail: hiper.safetensors, hiper_step*.safetensors, or the authors' hiper_embeddings_step*.pt";

impl FileName<'_> {
    fn error(
        self,
        field: impl Into<String>,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
        remedy: &'static str,
    ) -> Error {
        Error::File {
            file: self.0.display().to_string(),
            field: field.into(),
            expected: expected.to_string(),
            got: got.to_string(),
            remedy,
        }
    }
}
