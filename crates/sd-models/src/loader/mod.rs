//! From a checkpoint's files to tensors.

mod model_files;
mod weights;

pub use model_files::ModelFiles;
pub use weights::Weights;
