//! What the user is told when something fails: one line, a hint, an exit code.

use std::path::Path;

/// Everything that ends a command early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line asks for something that cannot be.
    #[error("{0}")]
    Usage(String),
    /// A setting is well formed, but not possible with this build, model or folder.
    #[error("{message}")]
    Refused {
        /// What is wrong, naming the flag or file.
        message: String,
        /// What to do about it.
        hint: String,
    },
    /// A picture cannot be used.
    #[error("{file}: {reason}")]
    Picture {
        /// Its path.
        file: String,
        /// What is wrong with it.
        reason: String,
        /// What to do about it.
        hint: String,
    },
    /// A file or folder cannot be read or written.
    #[error("{file}: {action}: {source}")]
    Io {
        /// The path.
        file: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The checkpoint, or an argument to it.
    #[error(transparent)]
    Model(#[from] sd_models::Error),
    /// The personalisation, or a tail's file.
    #[error(transparent)]
    Core(#[from] hiper_core::Error),
    /// A tensor operation.
    #[error("the computation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// What is wrong with one of several subjects.
    #[error("{subject}: {}", error.line())]
    Subject {
        /// Its name.
        subject: String,
        /// What is wrong.
        error: Box<Error>,
    },
    /// Some subjects could not be learned; the others are done.
    #[error("{} of {total} subjects failed: {}", failed.len(), failed.iter().map(Error::line).collect::<Vec<_>>().join("; "))]
    Subjects {
        /// How many there were.
        total: usize,
        /// What was wrong with each that failed.
        failed: Vec<Error>,
    },
    /// The user pressed Ctrl-C; the step after which a checkpoint was written, if one was.
    #[error("interrupted{}", .0.map(|step| format!(" after step {step}, which is stored")).unwrap_or_default())]
    Interrupted(Option<usize>),
}

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Refused`].
    pub fn refused(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Refused { message: message.into(), hint: hint.into() }
    }

    /// The same error, said of this subject when it is one of several.
    pub fn of(self, name: Option<&str>) -> Self {
        match name {
            Some(name) => Self::Subject { subject: name.to_owned(), error: Box::new(self) },
            None => self,
        }
    }

    /// For `map_err` on operations of the file system.
    pub fn io(file: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let file = file.display().to_string();
        move |source| Self::Io { file, action, source }
    }

    /// What to do about it, where the message does not say so itself.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Subject { error, .. } => return error.hint(),
            _ if self.is_out_of_card_memory() => {
                "--memory lean needs less, and so do --dtype f16, a smaller --resolution (or --height and --width) and a smaller \
                 --batch-size; other programs on the card need some too"
            }
            Self::Usage(_) => "hiper --help lists commands, hiper COMMAND --help their flags",
            Self::Refused { hint, .. } | Self::Picture { hint, .. } => hint,
            Self::Io { source, .. } => io_hint(source)?,
            Self::Core(hiper_core::Error::Io { source, .. }) => io_hint(source)?,
            Self::Core(hiper_core::Error::Argument { argument: "HiPer tail", .. }) => {
                "give --model the checkpoint that the tail was learned with; hiper inspect TAIL names it"
            }
            Self::Model(sd_models::Error::Argument { argument: "steps", .. }) => "change --steps",
            Self::Subjects { .. } => "the other subjects are done",
            Self::Interrupted(Some(_)) => {
                "personalize --resume continues there, and so does demo when it is run again"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// The process's exit code: 1 for a failure, 2 for a wrong command line, 130 for Ctrl-C.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Interrupted(_) => 130,
            Self::Subject { error, .. } => error.exit_code(),
            _ => 1,
        }
    }

    /// Whichever library asked for it: the driver's name of the error is in every message, but
    /// not in what [`Error::line`] makes of it for several subjects.
    fn is_out_of_card_memory(&self) -> bool {
        self.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY")
    }

    /// The message in one line.
    pub fn line(&self) -> String {
        if self.is_out_of_card_memory() {
            return "the card has too little memory".into();
        }
        self.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

fn io_hint(source: &std::io::Error) -> Option<&'static str> {
    use std::io::ErrorKind;
    Some(match source.kind() {
        ErrorKind::NotFound => "check the path",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "choose a path that you may use, or change its permissions"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "free some space, or choose another --output-dir; personalize --resume continues from the newest checkpoint"
        }
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "choose another path: a file is in the way",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_without_memory_is_named_with_a_remedy() {
        let said = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")\n   0: somewhere";
        let error =
            Error::from(sd_models::Error::from(candle_core::Error::Msg(said.into()))).of(Some("rabbit"));
        assert_eq!(error.line(), "rabbit: the card has too little memory");
        assert!(error.hint().unwrap().contains("--memory lean"));
        let several = Error::Subjects { total: 3, failed: vec![error] };
        assert_eq!(several.line(), "1 of 3 subjects failed: rabbit: the card has too little memory");
        assert_eq!(several.hint().unwrap(), "the other subjects are done");
    }
}
