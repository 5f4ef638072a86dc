//! Runs the binary and looks at what it leaves.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "a test fails by panicking, and each test program uses its own part"
)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// What a run of the binary gave.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The binary with these arguments, in `folder`.
pub fn command<S: AsRef<OsStr>>(folder: &Path, args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hiper"));
    command.args(args).current_dir(folder).stdin(Stdio::null());
    command
}

/// Runs it to the end.
pub fn hiper<S: AsRef<OsStr>>(folder: &Path, args: &[S]) -> Run {
    run(&mut command(folder, args))
}

pub fn run(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs it and expects success.
pub fn hiper_ok<S: AsRef<OsStr>>(folder: &Path, args: &[S]) -> Run {
    let run = hiper(folder, args);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    run
}

/// Splits a command line at white space; `'…'` keeps its spaces.
pub fn words(line: &str) -> Vec<String> {
    let pieces = line.split('\'').enumerate();
    let quoted = |(i, piece): (usize, &str)| match i % 2 {
        0 => piece.split_whitespace().map(str::to_owned).collect(),
        _ => vec![piece.to_owned()],
    };
    pieces.flat_map(quoted).collect()
}

/// The photo of the demo.
pub fn photo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-photo.png")
}

/// A checkpoint folder like the embedded one, whose files may be changed.
pub fn model(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-model"), &model);
    model
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target)
        } else {
            std::fs::write(target, std::fs::read(path).unwrap()).unwrap()
        }
    }
}

/// Replaces one tensor of a safetensors file; its metadata stays.
pub fn replace_tensor(file: &Path, name: &str, shape: &[usize], values: &[f32]) {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let views = tensors.tensors().into_iter().map(|(other, view)| {
        let replaced = || TensorView::new(Dtype::F32, shape.to_vec(), &data).unwrap();
        if other == name { (other, replaced()) } else { (other, view) }
    });
    let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone();
    let changed = safetensors::serialize(views, metadata).unwrap();
    std::fs::write(file, changed).unwrap();
}

/// Writes a tail of so many tokens and width.
pub fn write_tail(file: &Path, n_hiper: usize, width: usize) {
    let data = vec![0u8; n_hiper * width * 4];
    let view = TensorView::new(Dtype::F32, vec![n_hiper, width], &data).unwrap();
    std::fs::write(file, safetensors::serialize([("hiper", view)], None).unwrap()).unwrap();
}

/// Waits until a run's log has so many steps.
pub fn wait_for_steps(folder: &Path, steps: usize) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while std::fs::read_to_string(folder.join("log.jsonl")).unwrap_or_default().lines().count() < steps {
        assert!(Instant::now() < deadline, "no step {steps} in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Names of the files in a folder, sorted; none when there is no folder.
pub fn files(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The steps in `log.jsonl`: step, timestep and loss as text.
pub fn log(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("log.jsonl")).unwrap();
    text.lines().map(|line| line.split(",\"seconds\"").next().unwrap().to_owned()).collect()
}
