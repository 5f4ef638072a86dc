//! `cargo xtask eval`: the method measured on held-out subjects, through the libraries, against ground truth.

mod captions;
mod experiment;
mod lab;
mod measures;
mod model;
mod questions;
mod readers;
mod report;
mod subject;

use std::io::Write as _;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use experiment::Experiment;
use lab::{Lab, Learning};
use questions::{Condition, Question, SourceCaption, TailUse};
use readers::Readers;
use report::{Report, Table};
use subject::{MOST_TARGETS, Subject};

/// The model in the repository.
const DEMO_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/hiper-cli/assets/demo-model");

/// Seeds from here on are never drawn by the training.
const FIRST_HELD_OUT_SEED: u64 = 1_000_000_000;

/// What to measure, and how.
#[derive(clap::Args, Serialize)]
pub struct Eval {
    /// Tables to make
    #[arg(value_enum, default_values = ["model", "tail"])]
    #[serde(skip)]
    questions: Vec<Question>,
    /// Model to measure, in the diffusers layout [default: the one in the repository]
    #[arg(long)]
    #[serde(skip)]
    model: Option<PathBuf>,
    /// Folder for eval.json and the sheets
    #[arg(long, default_value = "target/eval")]
    #[serde(skip)]
    out: PathBuf,
    /// Subjects, one a seed
    #[arg(long, value_parser = seeds, default_value = "1000000500..1000000508")]
    seeds: Range<u64>,
    /// Edits a subject
    #[arg(long, default_value_t = MOST_TARGETS, value_parser = clap::value_parser!(u8).range(1..=i64::from(MOST_TARGETS)))]
    targets: u8,
    /// Pictures an edit, each from its own noise
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds_per_target: u64,
    /// Pictures from full captions, of scenes from the first seed on
    #[arg(long, default_value_t = 96, value_parser = clap::value_parser!(u64).range(1..))]
    captions: u64,
    /// Steps of the optimiser
    #[arg(long, default_value_t = 1000)]
    train_steps: usize,
    /// Learning rate
    #[arg(long, default_value_t = 5e-3)]
    learning_rate: f64,
    /// Tokens of the tail
    #[arg(long, default_value_t = hiper_core::DEFAULT_N_HIPER)]
    n_hiper: usize,
    /// What the tail is multiplied by in an edit
    #[arg(long, default_value_t = hiper_core::DEFAULT_TAIL_SCALE)]
    tail_scale: f64,
    /// Denoising steps of a picture (DDIM)
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Strength of the guidance
    #[arg(long, default_value_t = 7.5)]
    guidance_scale: f64,
    /// Strength of the guidance in reconstructions
    #[arg(long, default_value_t = 2.0)]
    reconstruction_guidance_scale: f64,
}

/// Measures, prints tables, and writes `eval.json` and a sheet a table.
///
/// # Errors
/// When a setting does not fit the model, or the folder cannot be written.
pub fn run(args: &Eval) -> Result<()> {
    let command = format!("cargo xtask {}", std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    let folder = args.model.clone().unwrap_or_else(|| DEMO_MODEL.into());
    let lab = Lab::open(&folder, args.steps).with_context(|| format!("--model {}", folder.display()))?;
    let readers = Readers::load()?;
    ensure!(
        lab.size() == readers::SIZE,
        "the model draws {} pixels; the readers read {}",
        lab.size(),
        readers::SIZE
    );
    let subjects = args
        .seeds
        .clone()
        .map(|seed| Subject::of_seed(seed, args.targets, lab.size()))
        .collect::<Result<Vec<_>>>()?;
    let experiment = Experiment {
        lab: &lab,
        readers: &readers,
        subjects: &subjects,
        samples: args.seeds_per_target,
        guidance_scale: args.guidance_scale,
        reconstruction_guidance_scale: args.reconstruction_guidance_scale,
    };
    let base = Condition {
        name: String::new(),
        tail: TailUse::Own(args.tail_scale),
        learning: Learning { n_hiper: args.n_hiper, learning_rate: args.learning_rate },
        train_steps: args.train_steps,
        caption: SourceCaption::True,
    };
    std::fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
    let mut report = Report::new(command, &lab.model_hash, args);
    for &question in &args.questions {
        let mut progress = |doing: String| {
            // Nothing depends on it.
            let _ = writeln!(std::io::stderr(), "{}: {doing}", question.title());
        };
        let (table, sheet) = match question {
            Question::Model => model::measure(&experiment, args.captions, args.seeds.start, &mut progress)?,
            _ => {
                let rows = experiment.measure(&question.conditions(&base), &mut progress)?;
                (Table::of_rows(&rows, &experiment)?, report::sheet(&rows, &subjects))
            }
        };
        let name = format!("{}.png", report::file_name(question));
        let path = args.out.join(name);
        sheet.save(&path).with_context(|| format!("{}: cannot write", path.display()))?;
        writeln!(std::io::stdout(), "\n### {}\n\n{}", question.title(), table.markdown())?;
        report.push(question, table);
        // After every table: a long run that is cut off leaves those it had.
        report.write(&args.out.join("eval.json"))?;
    }
    Ok(())
}

/// `A..B`, held out.
fn seeds(text: &str) -> Result<Range<u64>, String> {
    let range = text.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    match range {
        Some(range) if range.start >= FIRST_HELD_OUT_SEED && !range.is_empty() => Ok(range),
        Some(_) => Err(format!(
            "not a range of seeds from {FIRST_HELD_OUT_SEED} on: lower ones may have been trained on"
        )),
        None => Err("expected A..B".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_held_out_seeds_are_taken() {
        assert_eq!(seeds("1000000000..1000000002"), Ok(1_000_000_000..1_000_000_002));
        for text in [
            "5..9",
            "1000000002..1000000002",
            "1000000002..1000000001",
            "1000000000",
            "a..b",
            "1000000000..=1000000001",
        ] {
            assert!(seeds(text).is_err(), "{text}");
        }
    }
}
