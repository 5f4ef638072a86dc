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
    /// The loss, its gradient or the moved tail is NaN or infinite.
    #[error(
        "step {step}: {quantity} is not finite (loss {loss}); the run before this step is intact. Lower the learning rate, or \
         check the model's weights and the precision they are computed in"
    )]
    NotFinite {
        /// The step that failed, counted from 1.
        step: usize,
        /// What is not finite.
        quantity: &'static str,
        /// The loss.
        loss: f64,
    },
    /// The network returned no gradient to the embedding.
    #[error(
        "no gradient reached the text embedding: an operation of the network has no backward pass. candle-nn's softmax_last_dim, \
         fused layer_norm and rms_norm cut the graph silently; use their differentiable forms, or implement losses_and_gradients"
    )]
    NoGradient,
    /// The network's gradient is not the slope of its loss.
    #[error(
        "the gradient differs from the slope of the loss by {relative_error:.1e}, more than {tolerance:.1e}: an operation of the \
         network drops a part of it. candle-nn's softmax_last_dim, fused layer_norm and rms_norm cut the graph silently; use \
         their differentiable forms, or implement losses_and_gradients"
    )]
    WrongGradient {
        /// Relative L2 error of the slopes along random directions.
        relative_error: f64,
        /// What was allowed.
        tolerance: f64,
    },
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
    #[error("{file}: {field}: expected {expected}, got {got}; {remedy}")]
    File {
        /// The path.
        file: String,
        /// The tensor, metadata field or part of the file.
        field: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn argument(
        argument: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Argument { argument, expected: expected.to_string(), got: got.to_string() }
    }
}

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;
