//! What an nvcc says of itself: for `build.rs`, and for xtask, which looks for one too.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

/// 13.0.88
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub [u32; 3]);

/// Before it ptxas compiles products of Hopper's wrongly whose operands lie transposed and unswizzled, and says nothing.
pub const OLDEST: Release = Release([13, 0, 88]);

impl Release {
    /// Of what `nvcc --version` says: `Cuda compilation tools, release 13.0, V13.0.88`.
    fn read(said: &str) -> Option<Self> {
        let (_, release) = said.split_once(", V")?;
        let mut numbers = release.split_whitespace().next()?.split('.').map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(Self([next()?, next()?, next()?]))
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.0;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// That of an nvcc which compiles the kernels as they are meant.
///
/// # Errors
/// When it is older, or does not say.
pub fn release(nvcc: &Path) -> Result<Release, String> {
    let name = nvcc.display();
    let said = Command::new(nvcc).arg("--version").stdin(Stdio::null()).output();
    let said =
        said.map_err(|error| format!("{name} does not start: {error}\nhint: set NVCC to CUDA's compiler"))?;
    match Release::read(&String::from_utf8_lossy(&said.stdout)) {
        Some(release) if release >= OLDEST => Ok(release),
        Some(release) => Err(format!(
            "{name} is {release}: nvcc before {OLDEST} compiles some kernels wrongly\n\
             hint: set NVCC to a newer one; where it is not set, `cargo xtask kernels` fetches one and says where it is"
        )),
        None => {
            Err(format!("{name} does not answer --version as nvcc does\nhint: set NVCC to CUDA's compiler"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_nvcc_that_is_too_old_or_none_is_refused_with_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        let nvcc = folder.path().join("nvcc");
        let of = |said: &str| {
            std::fs::write(&nvcc, format!("#!/bin/sh\necho '{said}'")).unwrap();
            std::fs::set_permissions(&nvcc, std::fs::Permissions::from_mode(0o755)).unwrap();
            release(&nvcc)
        };
        assert_eq!(of("Cuda compilation tools, release 13.0, V13.0.88"), Ok(OLDEST));
        let error = of("Cuda compilation tools, release 12.9, V12.9.86").unwrap_err();
        assert!(error.contains("12.9.86") && error.contains("hint: set NVCC"), "{error}");
        assert!(of("gcc").unwrap_err().contains("hint"));
        assert!(release(&folder.path().join("none")).unwrap_err().contains("does not start"));
    }

    #[test]
    fn releases_are_read_and_compared() {
        let said = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0";
        assert_eq!(Release::read(said), Some(OLDEST));
        assert_eq!(OLDEST.to_string(), "13.0.88");
        let read = |numbers| Release::read(&format!("release, V{numbers}"));
        assert!(read("13.0.48") < Some(OLDEST) && read("12.9.99") < Some(OLDEST));
        assert!(read("13.1.80") > Some(OLDEST));
        assert_eq!((Release::read("gcc 12"), read("13.0")), (None, None));
    }
}
