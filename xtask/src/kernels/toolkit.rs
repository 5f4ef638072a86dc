//! A CUDA compiler: the user's, or one fetched from PyPI into the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Error, Result, bail};

#[path = "../../../crates/hiper-kernels/nvcc.rs"]
mod release;

use release::release;

/// Parts of one toolkit. All are pinned: a part of another release speaks another PTX.
const WHEELS: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];
/// From a Python's packages to the compiler.
const NVCC: &str = "nvidia/cu13/bin/nvcc";
const REMEDY: &str =
    "hint: install python3 with its venv module (Debian: python3-venv), or set NVCC to a CUDA compiler";

/// `$NVCC`, one on the `PATH` that is new enough, or one in `venv`, which is made unless `offline`.
///
/// # Errors
/// When there is none, or `$NVCC` is too old, with what to do.
pub fn nvcc(venv: &Path, offline: bool) -> Result<PathBuf> {
    if let Some(nvcc) = std::env::var_os("NVCC").filter(|path| !path.is_empty()) {
        let nvcc = PathBuf::from(nvcc);
        release(&nvcc).map_err(Error::msg)?;
        return Ok(nvcc);
    }
    if release(Path::new("nvcc")).is_ok() {
        return Ok("nvcc".into());
    }
    if let Some(nvcc) = fetched(venv) {
        return Ok(nvcc);
    }
    if offline {
        bail!(
            "no nvcc of {} or later is here\nhint: set NVCC, or run once without --offline, which fetches nvcc from PyPI (104 MB) to {}",
            release::OLDEST,
            venv.display()
        );
    }
    fetch(venv)?;
    fetched(venv).with_context(|| format!("{} has no {NVCC} after its installation", venv.display()))
}

/// The folder of the toolkit that has this compiler in `bin`, as `CUDA_HOME` names it.
///
/// # Errors
/// When the compiler is not in such a folder.
pub fn home(nvcc: &Path) -> Result<PathBuf> {
    let on_path =
        || std::env::split_paths(&std::env::var_os("PATH")?).map(|p| p.join(nvcc)).find(|p| p.is_file());
    let file = if nvcc.components().count() > 1 { Some(nvcc.to_owned()) } else { on_path() };
    let file = file.and_then(|file| file.canonicalize().ok());
    let home = file.as_deref().and_then(Path::parent).and_then(Path::parent);
    home.map(Path::to_owned).with_context(|| {
        format!("{}: not in a CUDA toolkit\nhint: set NVCC to the bin/nvcc of one", nvcc.display())
    })
}

/// The file that says what was installed, and that all of it was.
fn stamp(venv: &Path) -> PathBuf {
    venv.join("wheels.txt")
}

/// The compiler in `venv`, if it has the wheels named here.
fn fetched(venv: &Path) -> Option<PathBuf> {
    if fs::read_to_string(stamp(venv)).ok()? != WHEELS.join("\n") {
        return None;
    }
    let pythons = fs::read_dir(venv.join("lib")).ok()?;
    let nvcc = |python: PathBuf| python.join("site-packages").join(NVCC);
    pythons.filter_map(|python| Some(nvcc(python.ok()?.path()))).find(|nvcc| nvcc.is_file())
}

fn fetch(venv: &Path) -> Result<()> {
    let said = Command::new("python3").args(["-m", "venv", "--clear"]).arg(venv).output();
    let said = said.with_context(|| format!("python3 does not start, to fetch nvcc\n{REMEDY}"))?;
    if !said.status.success() {
        let why = String::from_utf8_lossy(&said.stdout) + String::from_utf8_lossy(&said.stderr);
        bail!("python3 -m venv {}: {}\n{why}\n{REMEDY}", venv.display(), said.status);
    }
    let said = Command::new(venv.join("bin/python"))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(WHEELS)
        .stdin(Stdio::null())
        .output()
        .with_context(|| venv.display().to_string())?;
    if !said.status.success() {
        bail!(
            "nvcc cannot be fetched from PyPI: {}\n{}\nhint: set NVCC to a CUDA compiler that is here",
            said.status,
            String::from_utf8_lossy(&said.stderr)
        );
    }
    fs::write(stamp(venv), WHEELS.join("\n")).with_context(|| venv.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_toolkit_counts_once_all_of_it_is_there() {
        let venv = tempfile::tempdir().unwrap();
        let nvcc = venv.path().join("lib/python3.11/site-packages").join(NVCC);
        fs::create_dir_all(nvcc.parent().unwrap()).unwrap();
        fs::write(&nvcc, "").unwrap();
        assert_eq!(fetched(venv.path()), None);
        fs::write(stamp(venv.path()), "nvidia-cuda-nvcc==12.0").unwrap();
        assert_eq!(fetched(venv.path()), None);
        fs::write(stamp(venv.path()), WHEELS.join("\n")).unwrap();
        assert_eq!(fetched(venv.path()), Some(nvcc.clone()));
        assert!(home(&nvcc).unwrap().ends_with("nvidia/cu13"));
        assert!(home(&venv.path().join("none")).is_err());
    }
}
