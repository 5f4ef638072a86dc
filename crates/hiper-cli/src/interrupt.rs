//! Ctrl-C: the first asks the work to end cleanly, the second ends it.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// The exit code after Ctrl-C: 128 + SIGINT.
const EXIT_CODE: i32 = 130;

/// Listens for Ctrl-C (and SIGTERM, SIGHUP) from now on.
pub fn listen() -> Result<()> {
    let handler = || {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(EXIT_CODE);
        }
    };
    ctrlc::set_handler(handler).map_err(|e| {
        Error::refused(format!("cannot listen for Ctrl-C: {e}"), "report this with your system's name")
    })
}

/// Whether it was pressed.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// An error when it was pressed.
pub fn check() -> Result<()> {
    if requested() { Err(Error::Interrupted(None)) } else { Ok(()) }
}
