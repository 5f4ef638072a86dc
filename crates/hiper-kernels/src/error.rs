//! What can be wrong with an operator's arguments.

/// An argument that an operator cannot take.
///
/// Operators return [`candle_core::Error`]; this error is what it wraps.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor has the wrong shape.
    #[error("{op}: {argument} must be {expected}, got {got:?}")]
    Shape {
        /// The operator.
        op: &'static str,
        /// Which of its arguments.
        argument: &'static str,
        /// The shape that it takes.
        expected: String,
        /// The shape that it was given.
        got: Vec<usize>,
    },
    /// A setting is outside its range.
    #[error("{op}: {field} must be {expected}, got {got}")]
    Setting {
        /// The operator.
        op: &'static str,
        /// Which setting.
        field: &'static str,
        /// The range.
        expected: String,
        /// The value given.
        got: String,
    },
    /// An operator's tensors and weights are on different devices.
    #[error("every tensor and weight of an operator must be on the same device")]
    Device,
    /// A card has no kernel for this.
    #[error("{op}: no kernel for {what}")]
    Unsupported {
        /// The operator.
        op: &'static str,
        /// A type, a size or a setting.
        what: String,
    },
    /// A kernel was not launched, or failed.
    #[error("kernel {kernel}: {reason}")]
    Launch {
        /// Its name.
        kernel: String,
        /// What the driver says.
        reason: String,
    },
    /// A card was asked for where its driver is not.
    #[error("no NVIDIA card can be used, as NVIDIA's driver cannot be opened: {0}")]
    NoDriver(
        /// What the system says, naming the file.
        String,
    ),
    /// A card that does not run this build's kernels.
    #[error("card {ordinal}: {reason}; {remedy}")]
    Unfit {
        /// Its number.
        ordinal: usize,
        /// What it lacks.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A kind of device that this build knows nothing of.
    #[error("{0} is not compiled into this build")]
    NotCompiledIn(&'static str),
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}

/// Checks one argument's shape; `expected` is only rendered when it is wrong.
pub(crate) fn check_shape(
    ok: bool,
    op: &'static str,
    argument: &'static str,
    expected: impl FnOnce() -> String,
    got: &[usize],
) -> candle_core::Result<()> {
    if ok { Ok(()) } else { Err(wrong_shape(op, argument, expected(), got)) }
}

/// That an argument has a wrong shape.
pub(crate) fn wrong_shape(
    op: &'static str,
    argument: &'static str,
    expected: String,
    got: &[usize],
) -> candle_core::Error {
    Error::Shape { op, argument, expected, got: got.to_vec() }.into()
}
