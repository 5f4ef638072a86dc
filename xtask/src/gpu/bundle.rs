//! `cargo xtask bundle --gpu`: a folder that tests and measures on a machine with a card and without Rust, by one command in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Cargo, succeed, test};
use crate::{folders, machine};

#[derive(clap::Args)]
pub struct Args {
    /// For a machine with an NVIDIA card
    #[arg(long, required = true)]
    gpu: bool,
    /// The folder, which is made anew [default: target/bundle]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What may be sent to a runner.
const MAX_BYTES: u64 = 60_000_000;

/// What the folder has as the workspace has it.
const COPIED: [&str; 4] = [
    "tools/bench/peers.py",
    "tools/fixtures/operators.py",
    "tests/fixtures/operators.safetensors",
    "crates/hiper-cli/assets/demo-model",
];

/// The command.
const RUN: &str = "run.sh";

/// Programs are packed: candle's kernels are text, eleven megabytes of it in each.
const PROGRAMS: &str = "programs.tar.xz";

/// So far back that a program's kernels are found in the one before.
const XZ: &str = "--lzma2=preset=6,dict=128MiB";

/// Builds, strips, packs, copies, and measures.
///
/// # Errors
/// When something cannot be built or copied, or the folder becomes too large.
pub fn run(args: &Args) -> Result<()> {
    let cargo = Cargo::new()?;
    let mut hiper = cargo.command("build");
    // The demo model comes as a folder, which its tests read; once is enough.
    hiper.args(["--package=hiper-cli", "--no-default-features", "--features=cuda"]);
    succeed(&mut hiper)?;
    let mut tests = cargo.command("test");
    tests.args(test::TESTS).args(["--no-run", "--message-format=json-render-diagnostics"]);
    let said = tests.stderr(std::process::Stdio::inherit()).output()?;
    if !said.status.success() {
        bail!("the tests cannot be built: {}", said.status);
    }
    let said = String::from_utf8_lossy(&said.stdout);
    let executable = |target| {
        executable(&said, target).with_context(|| format!("cargo made no test {target}: {:?}", test::TESTS))
    };

    let out = args.out.clone().unwrap_or_else(|| folders::target().join("bundle"));
    if out.exists() && !out.join(RUN).is_file() {
        bail!("{}: is there and is no bundle\nhint: name another folder with --out", out.display());
    }
    fs::remove_dir_all(&out).or_else(|error| if out.exists() { Err(error) } else { Ok(()) })?;
    let stripped = tempfile::tempdir()?;
    for (program, name) in [
        (cargo.target.join("release/hiper"), "hiper"),
        (std::env::current_exe()?, "xtask"),
        (executable("hiper_kernels")?, "operators"),
        (executable("card")?, "network"),
        (executable("hiper")?, "steps"),
    ] {
        succeed(Command::new("strip").arg("-o").arg(stripped.path().join(name)).arg(&program))
            .context("programs are stripped with binutils' strip (Debian: binutils)")?;
    }
    for path in COPIED {
        copy(&folders::workspace().join(path), &out.join(path))?;
    }
    copy(&folders::workspace().join("tools/bundle").join(RUN), &out.join(RUN))?;
    let source = out.join(machine::SOURCE);
    fs::write(&source, machine::commit(&folders::workspace()).to_string())
        .with_context(|| source.display().to_string())?;
    let mut pack = Command::new("tar");
    pack.env("XZ_OPT", XZ).arg("-cJf").arg(out.join(PROGRAMS)).arg("-C").arg(stripped.path()).arg(".");
    succeed(&mut pack).context("programs are packed with tar and xz (Debian: xz-utils)")?;

    let bytes = size(&out)?;
    println!("{}: {:.1} MB", out.display(), bytes as f64 / 1e6);
    if bytes > MAX_BYTES {
        bail!("{}: {bytes} bytes are more than the {MAX_BYTES} that a bundle may have", out.display());
    }
    Ok(())
}

/// The test of a target, among cargo's messages.
fn executable(messages: &str, target: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut tests = messages.filter(|message| {
        message["reason"] == "compiler-artifact"
            && message["profile"]["test"] == true
            && message["target"]["name"] == target
    });
    tests.find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// A file, or all of a folder.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
            let name = entry?.file_name();
            copy(&from.join(&name), &to.join(&name))?;
        }
        return Ok(());
    }
    let parent = to.parent().context("a file has a folder")?;
    fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    fs::copy(from, to).with_context(|| format!("{} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Bytes of all files in a folder.
fn size(folder: &Path) -> Result<u64> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    entries
        .map(|entry| {
            let path = entry?.path();
            if path.is_dir() { size(&path) } else { Ok(path.metadata()?.len()) }
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_found_among_messages() {
        let messages = r#"not json
{"reason":"compiler-artifact","target":{"name":"card"},"profile":{"test":false},"executable":null}
{"reason":"compiler-artifact","target":{"name":"card"},"profile":{"test":true},"executable":"/t/card-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "card"), Some("/t/card-1".into()));
        assert_eq!(executable(messages, "operators"), None);
    }

    #[test]
    fn folders_are_copied_and_measured() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b/c"));
        fs::create_dir_all(from.join("d")).unwrap();
        fs::write(from.join("x"), "123").unwrap();
        fs::write(from.join("d/y"), "4567").unwrap();
        copy(&from, &to).unwrap();
        assert_eq!((size(&to).unwrap(), fs::read_to_string(to.join("d/y")).unwrap()), (7, "4567".into()));
        assert!(copy(&from.join("none"), &to).is_err());
    }
}
