//! What can go wrong with a checkpoint or with arguments to its parts.

use crate::ModelFiles;

/// A typed error: which file, which field, what was expected, what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the checkpoint is not there.
    #[error("{file}: not found; {remedy}")]
    MissingFile {
        /// The path, or what was looked for.
        file: String,
        /// What to do about it.
        remedy: String,
    },
    /// One file was given where a folder is needed.
    #[error(
        "{file}: a single file, not a folder in the diffusers layout; convert it once with diffusers: \
         StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
    )]
    SingleFile {
        /// The path.
        file: String,
    },
    /// A file could not be read.
    #[error("{file}: cannot be read: {source}")]
    Read {
        /// The path.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file's content is not what its format says.
    #[error("{file}: {reason}; fetch or export the file again")]
    Malformed {
        /// The path.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A field of a configuration asks for something that is not built here.
    #[error("{file}: {field} is {got}; supported: {expected}")]
    UnsupportedConfig {
        /// The path.
        file: String,
        /// The field.
        field: String,
        /// Its value.
        got: String,
        /// What is supported.
        expected: String,
    },
    /// A tensor is not in the file.
    #[error("{file}: no tensor {field}; the file does not belong to the component's config.json")]
    MissingTensor {
        /// The path.
        file: String,
        /// The tensor's name.
        field: String,
    },
    /// A tensor's shape disagrees with the configuration.
    #[error(
        "{file}: tensor {field} has shape {got:?}, config.json asks for {expected:?}; weights and config.json must come from the same model"
    )]
    TensorShape {
        /// The path.
        file: String,
        /// The tensor's name.
        field: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A tensor has a type that is not read.
    #[error("{file}: tensor {field} is stored as {got}; supported: F32, F16, BF16")]
    TensorDType {
        /// The path.
        file: String,
        /// The tensor's name.
        field: String,
        /// The type in the file.
        got: String,
    },
    /// A weight is NaN or infinite.
    #[error("{file}: tensor {field} holds NaN or infinity; the file is damaged, fetch or export it again")]
    NotFinite {
        /// The path.
        file: String,
        /// The tensor's name.
        field: String,
    },
    /// An argument is outside what the operation takes.
    #[error("{argument}: expected {expected}, got {got}")]
    Argument {
        /// Which argument.
        argument: &'static str,
        /// What it may be.
        expected: String,
        /// What it was.
        got: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Says which checkpoint a configuration belongs to, where the error names it by its place in the folder alone.
    pub(crate) fn in_checkpoint(mut self, files: &ModelFiles) -> Self {
        if let Self::UnsupportedConfig { file, .. } = &mut self
            && files.exists(file)
        {
            *file = files.path_of(file);
        }
        self
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}
