//! What can go wrong in a personalisation.

/// A typed error: what was asked, what was found, what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    /// The loss or its gradient is NaN or infinite.
    #[error(
        "step {step}: the loss is not finite ({loss}); the tail before this step is intact. Lower --learning-rate, or check the \
         model's weights"
    )]
    NotFinite {
        /// The step that failed, counted from 1.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// The network returned no gradient to the embedding.
    #[error(
        "no gradient reached the text embedding: an operation of the network has no backward pass. candle-nn's softmax_last_dim, \
         fused layer_norm and rms_norm cut the graph silently; use their differentiable forms, or implement loss_and_gradient"
    )]
    NoGradient,
    /// A file could not be read or written.
    #[error("{file}: {action}: {source}")]
    Io {
        /// The path.
        file: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{file}: {field}: {reason}")]
    File {
        /// The path.
        file: String,
        /// The tensor or metadata field.
        field: String,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;
