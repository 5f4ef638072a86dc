//! `cargo xtask stand-in`: what hiper would ask of a card, without one. `kernels/driver` is the driver, under the name by which
//! NVIDIA's is opened.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Cargo, succeed};

#[derive(clap::Args)]
pub struct Args {
    /// Compute on the CPU what a card would, for small networks; without it kernels are counted, and results are zeros
    #[arg(long)]
    compute: bool,
    /// A command of hiper; `--device cuda` is added
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Builds both, runs the command, and says what was launched and how much memory was used.
///
/// # Errors
/// When something cannot be built. How the command ends is told.
pub fn run(args: &Args) -> Result<()> {
    let cargo = Cargo::stand_in();
    let driver = driver(&cargo)?;
    let mut build = cargo.command("build");
    succeed(build.args(["--package=hiper-cli", "--features=hiper-cli/cuda", "--quiet"]))?;
    let report = tempfile::NamedTempFile::new()?;
    let mut hiper = Command::new(cargo.target.join("release/hiper"));
    hiper.args(&args.command).args(["--device", "cuda"]).env("LD_LIBRARY_PATH", driver);
    hiper.env("STAND_IN_DRIVER_REPORT", report.path());
    if !args.compute {
        hiper.env("STAND_IN_DRIVER_DRY", "1");
    }
    let status = hiper.status()?;
    println!("hiper: {status}\n{}", fs::read_to_string(report.path())?);
    Ok(())
}

/// Builds the driver, and gives `LD_LIBRARY_PATH` with its folder in front.
///
/// # Errors
/// When it cannot be built or copied.
pub fn driver(cargo: &Cargo) -> Result<OsString> {
    succeed(cargo.command("build").args(["--package=stand-in-driver", "--quiet"]))?;
    let folder = cargo.target.join("stand-in-driver");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let (built, driver) = (cargo.target.join("release/libstand_in_driver.so"), folder.join("libcuda.so.1"));
    // Beside its place and moved: another command may have the one that is there open.
    let copied = tempfile::NamedTempFile::new_in(&folder)?;
    fs::copy(&built, copied.path())
        .with_context(|| format!("{} to {}", built.display(), driver.display()))?;
    copied.persist(&driver)?;
    before(&folder, &std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default())
}

fn before(folder: &Path, others: &OsStr) -> Result<OsString> {
    let folders = std::iter::once(folder.to_owned()).chain(std::env::split_paths(others));
    std::env::join_paths(folders.filter(|folder| !folder.as_os_str().is_empty())).context("LD_LIBRARY_PATH")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_comes_before_others() {
        assert_eq!(before(Path::new("/a"), OsStr::new("")).unwrap(), "/a");
        assert_eq!(before(Path::new("/a"), OsStr::new("/b:/c")).unwrap(), "/a:/b:/c");
        assert!(before(Path::new("/a:b"), OsStr::new("")).is_err());
    }
}
