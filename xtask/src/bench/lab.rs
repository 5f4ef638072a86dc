//! What the measurements share: programs, checkpoint, photo, a scratch folder.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::Args;
use super::child::Events;
use super::contest::Contestant;
use crate::{folders, gpu};

const SOURCE: &str = "a dog standing on the grass";
const TARGET: &str = "a dog sitting on the beach";

/// Everything a contestant's process needs.
pub struct Lab<'a> {
    /// What was asked.
    pub args: &'a Args,
    /// The Python that has the peers.
    pub python: Option<PathBuf>,
    /// The workspace.
    pub root: PathBuf,
    model: &'a Path,
    scratch: TempDir,
    hiper: PathBuf,
    own: PathBuf,
}

impl<'a> Lab<'a> {
    /// Builds `hiper`, unless one was given, and prepares the scratch folder.
    ///
    /// # Errors
    /// When the build fails or there is no checkpoint.
    pub fn new(args: &'a Args, model: &'a Path) -> Result<Self> {
        let (root, own) = (folders::workspace(), std::env::current_exe()?);
        let hiper = match &args.hiper {
            Some(hiper) => hiper.clone(),
            None => build_hiper(args.gpu, &own)?,
        };
        if !hiper.is_file() {
            bail!("{} is not there: run a release build of xtask (cargo xtask bench)", hiper.display());
        }
        let python = std::env::var_os("PEER_PYTHON").filter(|p| !p.is_empty()).map(PathBuf::from);
        Ok(Self { args, python, root, model, scratch: TempDir::new()?, hiper, own })
    }

    /// A file of this run.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Draws the photo at each size.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn draw_photo(&self, size: usize) -> Result<()> {
        let size = u32::try_from(size).context("--size")?;
        let wave = |v: u32| (127.5 + 127.5 * (f64::from(v) * 12.0 / f64::from(size)).sin()) as u8;
        let photo = image::RgbImage::from_fn(size, size, |x, y| image::Rgb([wave(x), wave(y), wave(x + y)]));
        Ok(photo.save(self.photo(size as usize))?)
    }

    fn photo(&self, size: usize) -> PathBuf {
        self.scratch(&format!("photo-{size}.png"))
    }

    /// `hiper personalize`; its tail is [`Lab::tail`].
    pub fn personalize(&'a self, name: &'static str, run: Personalize) -> Contestant<'a> {
        let command = move || {
            let model = match (&self.args.lean_model, run.memory) {
                (Some(lean), "lean") => lean.as_path(),
                _ => self.model,
            };
            read_once(model);
            let mut command = self.hiper(run.threads, run.on_card);
            command.arg("personalize").arg("--model").arg(model).args([
                "--memory",
                run.memory,
                "--source-text",
                SOURCE,
            ]);
            command
                .arg("--input-image")
                .arg(self.photo(run.size))
                .arg("--output-dir")
                .arg(self.folder(run.on_card));
            command.args(["--checkpoint-every", "0", "--train-steps"]).arg(run.steps.to_string());
            command.arg("--resolution").arg(run.size.to_string());
            command
        };
        self.ours(name, run.on_card, command)
    }

    /// The same, with a table of how long each kernel of a step takes.
    pub fn personalize_timed(
        &'a self,
        name: &'static str,
        run: Personalize,
        table: &'a Path,
    ) -> Contestant<'a> {
        let untimed = self.personalize(name, run);
        let command = move || {
            let mut command = (untimed.command)();
            command.env("HIPER_KERNEL_TIMES", table);
            command
        };
        Contestant { command: Box::new(command), ..self.personalize(name, run) }
    }

    /// What the last [`Lab::personalize`] on a card, or on the CPU, learned.
    pub fn tail(&self, on_card: bool) -> PathBuf {
        self.folder(on_card).join("hiper.safetensors")
    }

    fn folder(&self, on_card: bool) -> PathBuf {
        self.scratch(if on_card { "personalize-card" } else { "personalize" })
    }

    /// `hiper personalize` of several subjects in a batch, each with the same photo.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub fn personalize_together(
        &'a self,
        name: &'static str,
        run: Personalize,
        subjects: usize,
    ) -> Result<Contestant<'a>> {
        let photo = self.photo(run.size);
        let entry =
            |i| serde_json::json!({"name": format!("subject-{i}"), "image": photo, "source_text": SOURCE});
        let manifest = self.scratch("subjects.json");
        std::fs::write(&manifest, serde_json::Value::from_iter((0..subjects).map(entry)).to_string())?;
        let command = move || {
            let mut command = self.hiper(run.threads, run.on_card);
            command.arg("personalize").arg("--model").arg(self.model).args(["--memory", run.memory]);
            command.arg("--manifest").arg(&manifest).arg("--output-dir").arg(self.scratch("together"));
            command.args(["--batch-size", &subjects.to_string(), "--checkpoint-every", "0"]);
            command.args(["--train-steps", &run.steps.to_string(), "--resolution", &run.size.to_string()]);
            command
        };
        Ok(self.ours(name, run.on_card, command))
    }

    /// `hiper edit` with guidance, so many pictures; the tail is the last [`Lab::personalize`]'s.
    pub fn edit(&'a self, name: &'static str, steps: usize, pictures: usize) -> Contestant<'a> {
        let command = move || {
            let size = self.args.size.to_string();
            let mut command = self.hiper(self.args.threads(), self.args.gpu);
            command.arg("edit").arg("--model").arg(self.model).args(["--prompt", TARGET, "--memory", "fast"]);
            command.arg("--embedding").arg(self.tail(self.args.gpu));
            command.arg("--output-dir").arg(self.scratch("edit")).args(["--height", &size, "--width", &size]);
            command.args(["--steps", &steps.to_string(), "--images", &pictures.to_string()]);
            command
        };
        self.ours(name, self.args.gpu, command)
    }

    /// A command of hiper's.
    fn ours(&self, name: &'static str, on_card: bool, command: impl Fn() -> Command + 'a) -> Contestant<'a> {
        // A card's work is short: what takes long hangs.
        let patience = if on_card { self.patience().map(|patience| patience / 4) } else { self.patience() };
        Contestant {
            name,
            command: Box::new(command),
            events: Events::Stderr,
            peer: false,
            on_card,
            patience,
        }
    }

    /// Beside a card, which may be lent for minutes; on a CPU anything may take long.
    fn patience(&self) -> Option<Duration> {
        self.args.gpu.then(|| Duration::from_secs(self.args.patience))
    }

    fn hiper(&self, threads: usize, on_card: bool) -> Command {
        let mut command = Command::new(&self.hiper);
        command.args(["--log-format", "json", "--threads", &threads.to_string()]);
        // A build for cards would choose one where nothing is asked for.
        command.args(if on_card {
            ["--device", "cuda", "--dtype", "f16"]
        } else {
            ["--device", "cpu", "--dtype", "f32"]
        });
        command
    }

    /// This program's worker.
    pub fn worker(&'a self, name: &'static str, part: &'static str, steps: usize) -> Contestant<'a> {
        let command = move || {
            let mut command = Command::new(&self.own);
            command.args(["bench", "--worker", part, "--model"]).arg(self.model);
            command.args(["--size", &self.args.size.to_string(), "--steps", &steps.to_string()]);
            command.args(["--threads", &self.args.threads().to_string()]);
            command
        };
        let (events, command) = (Events::Stdout, Box::new(command));
        Contestant { name, command, events, peer: false, on_card: false, patience: None }
    }

    /// A peer's part, if there is a Python for it.
    pub fn peer(
        &'a self,
        name: &'static str,
        part: &'static str,
        size: usize,
        steps: usize,
    ) -> Option<Contestant<'a>> {
        self.peer_with(name, part, size, steps, &[])
    }

    /// The same, with flags.
    pub fn peer_with(
        &'a self,
        name: &'static str,
        part: &'static str,
        size: usize,
        steps: usize,
        extra: &'static [&'static str],
    ) -> Option<Contestant<'a>> {
        let python = self.python.as_ref()?;
        let command = move || {
            let mut command = Command::new(python);
            command.arg(self.root.join("tools/bench/peers.py")).arg(part).arg("--model").arg(self.model);
            command.arg("--ir").arg(self.scratch("unet.xml"));
            command.args(["--size", &size.to_string(), "--steps", &steps.to_string()]);
            command.args(["--threads", &self.args.threads().to_string()]);
            if self.args.gpu {
                command.args(["--device", "cuda", "--dtype", "float16"]);
            }
            // Compiled, it says where it does without CUDA graphs.
            command.args(extra).env("TORCH_LOGS", "perf_hints").env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
            command
        };
        let (on_card, patience) = (self.args.gpu, self.patience());
        Some(Contestant {
            name,
            command: Box::new(command),
            events: Events::Stdout,
            peer: true,
            on_card,
            patience,
        })
    }
}

/// Builds `hiper` in the profile of this program, with the feature `cuda` for a card.
fn build_hiper(on_card: bool, own: &Path) -> Result<PathBuf> {
    let name = format!("hiper{}", std::env::consts::EXE_SUFFIX);
    let (mut command, hiper) = if on_card {
        let cargo = gpu::Cargo::new()?;
        let mut command = cargo.command("build");
        command.arg("--features=cuda");
        (command, cargo.target.join("release").join(name))
    } else {
        (folders::cargo("build"), own.with_file_name(name))
    };
    if !command.args(["--quiet", "-p", "hiper-cli"]).status()?.success() {
        bail!("hiper cannot be built");
    }
    Ok(hiper)
}

/// How `hiper personalize` runs.
#[derive(Debug, Clone, Copy)]
pub struct Personalize {
    /// Pixels.
    pub size: usize,
    /// `fast` or `lean`.
    pub memory: &'static str,
    /// Of the optimiser.
    pub steps: usize,
    /// Of the processor.
    pub threads: usize,
    /// On a card, in `f16`; else on the CPU.
    pub on_card: bool,
}

/// Reads a checkpoint's files, so that start-up is the program's and not the disk's. A file that cannot be read is the program's to
/// complain about.
fn read_once(model: &Path) {
    let entries = |folder: &Path| folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    for file in entries(model).flat_map(|folder| entries(&folder).collect::<Vec<_>>()) {
        let _ = std::fs::File::open(file).and_then(|mut file| std::io::copy(&mut file, &mut std::io::sink()));
    }
}
