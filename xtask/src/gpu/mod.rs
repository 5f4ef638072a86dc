//! What needs the feature `cuda`: whether there is a card, builds for it, tests on it, and a folder that takes both to another
//! machine. This program itself needs no CUDA.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what was asked for is told")]

pub mod bundle;
pub mod stand_in;
pub mod test;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::kernels::toolkit;
use crate::{folders, machine};

/// CUDA 13.0, as the toolkit that is fetched.
const CUDA: &str = "13000";
/// For which candle's own kernels are compiled: every card of it or later runs them, those compiled for 90 Hopper alone.
const CAPABILITY: &str = "80";

/// Whether this machine has an NVIDIA card, without opening it.
pub fn has_device() -> bool {
    Path::new("/dev/nvidia0").exists()
        || machine::said("nvidia-smi", &["-L"]).is_some_and(|list| list.starts_with("GPU "))
}

/// [`has_device`], and says so if not.
///
/// # Errors
/// When one is `required`, and there is none.
pub fn device(required: bool) -> Result<bool> {
    let found = has_device();
    match (found, required) {
        (false, true) => bail!(
            "this machine has no NVIDIA card: there is no /dev/nvidia0 and nvidia-smi lists none\n\
             hint: run without --require-gpu, or on a machine with a card and its driver"
        ),
        (false, false) => println!("skipped, no device"),
        _ => {}
    }
    Ok(found)
}

/// Builds with the feature `cuda`. Those with a compiler are in a folder of their own: the one that stands in for it, in
/// `.ci/run` too, leaves names instead of kernels in the usual one.
pub struct Cargo {
    nvcc: PathBuf,
    cuda_home: PathBuf,
    /// Where it builds.
    pub target: PathBuf,
}

impl Cargo {
    /// With the nvcc of `cargo xtask kernels`.
    ///
    /// # Errors
    /// When there is none and none can be fetched.
    pub fn new() -> Result<Self> {
        let nvcc = toolkit::nvcc(&folders::target().join("nvcc"), false)?;
        Ok(Self { cuda_home: toolkit::home(&nvcc)?, nvcc, target: folders::target().join("gpu") })
    }

    /// Without a compiler: kernels are names, for the [stand-in driver](stand_in).
    pub fn stand_in() -> Self {
        let home = folders::workspace().join("kernels/driver/toolkit");
        Self { nvcc: home.join("bin/nvcc"), cuda_home: home, target: folders::target() }
    }

    /// `cargo COMMAND --release`.
    pub fn command(&self, command: &str) -> Command {
        let mut cargo = folders::cargo(command);
        cargo.env("CARGO_TARGET_DIR", &self.target).env("NVCC", &self.nvcc).env("CUDA_HOME", &self.cuda_home);
        // What the user says of these holds.
        for (variable, value) in [
            ("CUDARC_CUDA_VERSION", CUDA),
            ("CUDA_COMPUTE_CAP", CAPABILITY),
            ("NVCC_APPEND_FLAGS", "--compress-mode=size"),
        ] {
            if std::env::var_os(variable).is_none() {
                cargo.env(variable, value);
            }
        }
        cargo
    }
}

/// Runs a command that must not fail.
fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}
