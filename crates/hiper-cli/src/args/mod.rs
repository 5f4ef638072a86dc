//! The command line as it is typed. What needs more than one flag, or the machine, to be judged is checked in `config`.

mod config;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use sd_models::schedulers::SchedulerKind;

pub use config::{check, look};
pub use values::{Crop, DTypeChoice, DeviceChoice, LogFormat, Memory};
use values::{positive, prompt, rate, scheduler, strength, text, threads};

/// The most tokens a tail may have: of 77, the begin token and one word of the sentence must stay.
pub const MAX_N_HIPER: u16 = 75;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong command line, 130 interrupted (Ctrl-C).";

/// Learn the subject of one photo, then edit the photo with a sentence.
#[derive(Parser)]
#[command(name = "hiper", version, about, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Flags that every command takes.
    #[command(flatten)]
    pub common: Common,
}

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// The whole story on the embedded model: personalise, edit, contact sheet
    Demo(Demo),
    /// Learn the subject of a photo into a tail, and edit it with --target-text
    Personalize(Personalize),
    /// Edit a personalised photo with sentences
    Edit(Edit),
    /// Draw sentences, without a personalised photo
    Generate(Generate),
    /// Show what a tail, a checkpoint or a tokenised sentence holds
    Inspect(Inspect),
}

/// Flags that every command takes.
#[derive(Args)]
pub struct Common {
    /// Where to compute
    #[arg(
        long,
        global = true,
        value_name = "DEVICE",
        default_value = "auto",
        help_heading = "Common options",
        help = "Where to compute: auto, cpu, cuda[:N] or metal; auto is the best device of this build"
    )]
    pub device: DeviceChoice,
    /// Precision of the networks: auto, f32, f16 or bf16. The CPU computes in f32, and auto chooses that; on a card, f16
    #[arg(
        long,
        global = true,
        value_name = "DTYPE",
        default_value = "auto",
        help_heading = "Common options",
        hide_possible_values = true
    )]
    pub dtype: DTypeChoice,
    /// What to save when both cannot be had: fast (time), lean (memory: steps compute again what they could keep), or auto,
    /// which is fast where the networks fit what is free
    #[arg(
        long,
        global = true,
        value_name = "MEMORY",
        default_value = "auto",
        help_heading = "Common options",
        hide_possible_values = true
    )]
    pub memory: Memory,
    /// Threads to compute with; by default one a core
    #[arg(long, global = true, value_name = "N", value_parser = threads, help_heading = "Common options")]
    pub threads: Option<usize>,
    /// Say warnings and errors only
    #[arg(long, global = true, help_heading = "Common options")]
    pub quiet: bool,
    /// How the log on standard error is written: text, or json (one object a line)
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        default_value = "text",
        help_heading = "Common options",
        hide_possible_values = true
    )]
    pub log_format: LogFormat,
}

/// Which checkpoint.
#[derive(Args)]
pub struct Model {
    /// Checkpoint: a folder in the diffusers layout, or the ID of a model in the local Hugging Face cache [default: the
    /// embedded demo model]
    #[arg(long = "model", value_name = "DIR|FILE|HUB-ID")]
    pub path: Option<PathBuf>,
}

/// `hiper demo`.
#[derive(Args)]
pub struct Demo {
    /// Folder for the results; made if need be
    #[arg(long, value_name = "DIR", default_value = "hiper-demo")]
    pub out: PathBuf,
}

/// `hiper personalize`.
#[derive(Args)]
#[command(override_usage = "hiper personalize [OPTIONS] --output-dir <DIR> \
    (--input-image <FILE> --source-text <TEXT> | --manifest <FILE>)")]
pub struct Personalize {
    /// The photo: PNG, JPEG, WebP, BMP, TIFF or GIF
    #[arg(long, value_name = "FILE", required_unless_present = "manifest")]
    pub input_image: Option<PathBuf>,
    /// What the photo shows. Name what an edit shall change (pose, place) and leave the subject's looks to the tail
    #[arg(long, value_name = "TEXT", required_unless_present = "manifest", value_parser = prompt())]
    pub source_text: Option<String>,
    /// Sentences to edit the photo with afterwards
    #[arg(long, value_name = "TEXT", num_args = 1.., value_parser = prompt())]
    pub target_text: Vec<String>,
    /// Several photos instead of one, learned together: a .toml, .json or .jsonl file of subjects with image, source_text and,
    /// if need be, name, target_texts and seed
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input_image", "source_text", "target_text"])]
    pub manifest: Option<PathBuf>,
    /// Most subjects of the manifest in one pass of the network [default: as many as memory allows, up to 8]
    #[arg(long, value_name = "B", conflicts_with = "input_image", value_parser = positive)]
    pub batch_size: Option<usize>,
    /// Folder for the results, of a manifest in a folder for each subject; made if need be
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    #[command(flatten)]
    pub model: Model,
    #[command(flatten)]
    pub learning: Learning,
}

/// How a tail is learned.
#[derive(Args)]
pub struct Learning {
    /// Tokens of the tail, 1 to 75: more overfit, fewer lose the subject
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_N_HIPER)))]
    pub n_hiper: u16,
    /// Steps of the optimiser
    #[arg(long, value_name = "N", default_value = "1000", value_parser = positive)]
    pub train_steps: usize,
    /// Step size of the optimiser (Adam)
    #[arg(long, value_name = "RATE", default_value = "5e-3", value_parser = rate)]
    pub learning_rate: f64,
    /// Seed of the random numbers; the same as in PyTorch gives the same run
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Pixels of the photo's shorter side, as the model sees it [default: the model's own]
    #[arg(long, value_name = "R", value_parser = positive)]
    pub resolution: Option<usize>,
    /// What becomes of a photo that is not square: center or random (by --seed) cut a square, none keeps all of it
    #[arg(long, value_name = "CROP", default_value = "center", hide_possible_values = true)]
    pub crop: Crop,
    /// Steps between checkpoints, 0 for none
    #[arg(long, value_name = "K", default_value_t = 100)]
    pub checkpoint_every: usize,
    /// Steps between previews (source, edit, and target without the tail), 0 for none
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub preview_every: usize,
    /// Continue from the newest checkpoint in the output folder; the result is the uninterrupted run's, bit for bit
    #[arg(long)]
    pub resume: bool,
}

/// How pictures are drawn.
#[derive(Args)]
pub struct Sampling {
    /// Sentences to draw
    #[arg(long, value_name = "TEXT", required = true, num_args = 1.., value_parser = prompt())]
    pub prompt: Vec<String>,
    /// Folder for the pictures; made if need be
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    #[command(flatten)]
    pub model: Model,
    /// Pictures a sentence; picture i has the seed SEED + i
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive)]
    pub images: usize,
    /// Denoising steps
    #[arg(long, value_name = "N", default_value = "50", value_parser = positive)]
    pub steps: usize,
    /// How strongly pictures follow the sentence; 1 switches guidance off
    #[arg(long, value_name = "G", default_value = "7.5", value_parser = strength, allow_negative_numbers = true)]
    pub guidance_scale: f64,
    /// What pictures should not show
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = text())]
    pub negative_prompt: String,
    /// ddpm, ddim, pndm, euler, euler-a, dpm++ or unipc
    #[arg(long, value_name = "NAME", default_value = "ddim", value_parser = scheduler)]
    pub scheduler: SchedulerKind,
    /// Seed of the first picture; the same as in diffusers gives the same picture
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Height in pixels [default: the model's own]
    #[arg(long, value_name = "H", value_parser = positive)]
    pub height: Option<usize>,
    /// Width in pixels [default: the model's own]
    #[arg(long, value_name = "W", value_parser = positive)]
    pub width: Option<usize>,
}

/// `hiper edit`.
#[derive(Args)]
pub struct Edit {
    /// The tail: hiper.safetensors, or the paper authors' hiper_embeddings_step*.pt
    #[arg(long, value_name = "FILE")]
    pub embedding: PathBuf,
    #[command(flatten)]
    pub sampling: Sampling,
    /// What the tail is multiplied by: less follows the sentence, more keeps the subject
    #[arg(long, value_name = "S", default_value = "0.8", value_parser = strength, allow_negative_numbers = true)]
    pub tail_scale: f64,
}

/// `hiper generate`.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    pub sampling: Sampling,
}

/// `hiper inspect`.
#[derive(Args)]
pub struct Inspect {
    /// A tail's file, a checkpoint's folder, or a sentence
    #[arg(value_name = "FILE|DIR|TEXT")]
    pub what: std::ffi::OsString,
    #[command(flatten)]
    pub model: Model,
    /// Tokens of the tail, to show which words of a sentence it covers
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_N_HIPER)))]
    pub n_hiper: u16,
}
