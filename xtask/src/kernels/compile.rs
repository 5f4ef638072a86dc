//! One source to one fatbin: machine code for 8.0 and 9.0, and PTX for cards to come; or for Hopper alone.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

const FLAGS: [&str; 5] = ["-std=c++17", "-O3", "--fatbin", "-Xptxas", "-v"];

/// What a source is compiled for, and what the PTX is called that is kept: `*_sm90a.cu` is Hopper's alone.
fn architectures(name: &str) -> (&'static [&'static str], String) {
    if name.ends_with("_sm90a") {
        return (&["-gencode", "arch=compute_90a,code=sm_90a"], format!("{name}.ptx"));
    }
    let both =
        &["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"];
    (both, format!("{name}.compute_90.ptx"))
}

/// How sources are compiled.
pub struct Compiler {
    /// The program.
    pub nvcc: PathBuf,
    /// Where fatbins go.
    pub out: PathBuf,
    /// What a source may include.
    pub headers: Vec<PathBuf>,
}

/// A source, compiled.
pub struct Compiled {
    /// `group_norm`
    pub name: String,
    /// What the compiler said.
    pub messages: String,
    /// For 9.0.
    pub ptx: String,
    /// Whether it was compiled just now.
    pub fresh: bool,
}

impl Compiler {
    /// Compiles `source`, unless it was, as it is.
    ///
    /// # Errors
    /// When it does not compile; the error is the compiler's.
    pub fn compile(&self, source: &Path) -> Result<Compiled> {
        let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let [fatbin, ptx, messages, key] =
            ["fatbin", "ptx", "messages", "key"].map(|kind| self.out.join(format!("{name}.{kind}")));
        let (architectures, kept) = architectures(&name);
        let hash = self.key(source, architectures)?;
        let fresh = !fatbin.is_file() || fs::read_to_string(&key).ok() != Some(hash.clone());
        if fresh {
            // Files are made beside their place and moved; the key is last, so that it speaks for the others.
            let scratch = tempfile::tempdir_in(&self.out)?;
            let made = scratch.path().join("fatbin");
            let said = Command::new(&self.nvcc)
                .args(FLAGS)
                .args(architectures)
                .arg("--keep")
                .arg("--keep-dir")
                .arg(scratch.path())
                .arg("-o")
                .arg(&made)
                .arg(source)
                .stdin(Stdio::null())
                .output()
                .with_context(|| self.nvcc.display().to_string())?;
            let text = String::from_utf8_lossy(&said.stderr) + String::from_utf8_lossy(&said.stdout);
            if !said.status.success() {
                bail!("{}: nvcc: {}\n{text}", source.display(), said.status);
            }
            let [new_messages, new_key] = ["messages", "key"].map(|kind| scratch.path().join(kind));
            fs::write(&new_messages, text.as_bytes())?;
            fs::write(&new_key, &hash)?;
            let new_ptx = scratch.path().join(kept);
            for (from, to) in
                [(&made, &fatbin), (&new_ptx, &ptx), (&new_messages, &messages), (&new_key, &key)]
            {
                fs::rename(from, to).with_context(|| to.display().to_string())?;
            }
        }
        let read = |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
        Ok(Compiled { messages: read(&messages)?, ptx: read(&ptx)?, name, fresh })
    }

    /// What a result depends on: the compiler, its flags, the source and all headers.
    fn key(&self, source: &Path, architectures: &[&str]) -> Result<String> {
        let mut hasher = DefaultHasher::new();
        (&self.nvcc, FLAGS, architectures).hash(&mut hasher);
        for path in self.headers.iter().map(PathBuf::as_path).chain([source]) {
            fs::read(path).with_context(|| path.display().to_string())?.hash(&mut hasher);
        }
        Ok(format!("{:016x}", hasher.finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A compiler that is a script: it keeps PTX, and counts its runs.
    fn fake(folder: &Path, script: &str) -> Compiler {
        let nvcc = folder.join("nvcc");
        fs::write(&nvcc, format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755)).unwrap();
        let header = folder.join("device.cuh");
        fs::write(&header, "// words").unwrap();
        Compiler { nvcc, out: folder.to_owned(), headers: vec![header] }
    }

    #[test]
    fn only_what_changed_is_compiled() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("add.cu");
        fs::write(&source, "// add").unwrap();
        // nvcc FLAGS --keep --keep-dir DIR -o FILE SOURCE
        let script = "shift 11; echo ptx > $1/add.compute_90.ptx; echo binary > $3; echo said >&2";
        let compiler = fake(folder.path(), script);
        let compile = || compiler.compile(&source).unwrap();
        let first = compile();
        assert_eq!(
            (first.fresh, &*first.ptx, &*first.messages, &*first.name),
            (true, "ptx\n", "said\n", "add")
        );
        let second = compile();
        assert_eq!((second.fresh, second.ptx, second.messages), (false, first.ptx, first.messages));
        fs::write(&compiler.headers[0], "// other words").unwrap();
        assert!(compile().fresh);
        fs::remove_file(folder.path().join("add.fatbin")).unwrap();
        assert!(compile().fresh && !compile().fresh);
    }

    #[test]
    fn what_does_not_compile_is_told_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("add.cu");
        fs::write(&source, "// add").unwrap();
        let compiler = fake(folder.path(), "echo 'add.cu(1): error: wrong' >&2; exit 2");
        let error = compiler.compile(&source).err().unwrap().to_string();
        assert!(error.contains("add.cu(1): error: wrong"), "{error}");
        let left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}"); // source, header, compiler
    }
}
