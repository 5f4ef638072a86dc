//! `cargo xtask bench`: operators against the machine's ceilings, and whole steps against PyTorch and OpenVINO; with `--gpu`,
//! steps and edits on an NVIDIA card against PyTorch on it.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tables are what was asked for")]

mod card;
mod card_memory;
mod ceiling;
mod child;
mod contest;
mod end_to_end;
mod lab;
mod operators;
mod random_sd15;
mod statistics;
pub mod table;
mod worker;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::{Map, Value, json};

use crate::{folders, gpu, machine};
use end_to_end::Figures;
use lab::Lab;

/// What can be measured alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// Every operator, forward and gradient.
    Operators,
    /// A HiPer step at both sizes, fast and lean: time, peak memory, start-up, page faults.
    Personalize,
    /// A sampling step with guidance.
    Sample,
    /// A forward pass of the UNet.
    Unet,
    /// The VAE, decoding and encoding.
    Vae,
    /// A HiPer step on one thread and on two.
    Scaling,
    /// All steps in one process: whether the last ones take as long as the first.
    Drift,
}

#[derive(clap::Args)]
pub struct Args {
    /// On this machine's first NVIDIA card, in f16: a HiPer step, 1000 of them, an edit, 8 subjects together
    #[arg(long, conflicts_with_all = ["only", "lean_model"])]
    gpu: bool,
    /// A release build of hiper, instead of building one; for --gpu with the feature cuda
    #[arg(long, value_name = "FILE")]
    hiper: Option<PathBuf>,
    /// Checkpoint in the diffusers layout; limits are shown where it has Stable Diffusion 1.5's shapes [default: the embedded
    /// demo model; with --gpu those shapes with random weights, 2 GB in the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The same checkpoint in f16 (tools/bench/to_f16.py), for --memory lean
    #[arg(long, value_name = "DIR")]
    lean_model: Option<PathBuf>,
    /// Steps measured of each kind, on a card twenty times as many; every process takes one more, or twenty, to warm up
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    steps: usize,
    /// Turns that ours and the peers take, with a share of the steps each; on a card all of ours come first
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = at_least_one)]
    rounds: usize,
    /// Pixels of what is measured at one size
    #[arg(long, value_name = "PIXELS", default_value_t = 512, value_parser = at_least_one)]
    size: usize,
    /// Pixels of the second size
    #[arg(long, value_name = "PIXELS", default_value_t = 256, value_parser = at_least_one)]
    small_size: usize,
    /// With --gpu, seconds after which a process is stopped, a quarter of them if it is ours and on the card: PyTorch is left out
    /// then, ours has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 400)]
    patience: u64,
    /// Threads; by default one a core
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,
    /// What to measure [default: everything; drift from --steps 20 on]
    #[arg(long, value_name = "GROUP", num_args = 1.., value_enum)]
    only: Vec<Group>,
    /// The report [default: benches/runs/DATE-MACHINE.json]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Measure one part in this process
    #[arg(long, hide = true, value_enum)]
    worker: Option<worker::Part>,
}

/// Repetitions of an operator.
const REPETITIONS: usize = 5;
/// Steps from which drift is worth a look.
const MANY: usize = 20;

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "a whole number, at least 1".into())
}

impl Args {
    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(machine::cores)
    }

    /// What to measure, in order.
    fn groups(&self) -> Vec<Group> {
        let wanted = |group: &Group| match (self.only.is_empty(), group) {
            (false, group) => self.only.contains(group),
            (true, Group::Drift) => self.steps >= MANY,
            (true, _) => true,
        };
        Group::value_variants().iter().copied().filter(wanted).collect()
    }
}

/// Measures, prints tables, and writes the report.
///
/// # Errors
/// When a process of ours fails or the report cannot be written; on a card also when a limit is missed, or what it is about could not
/// be measured, but then after everything was measured.
pub fn run(args: &Args) -> Result<()> {
    if let Some(part) = args.worker {
        return worker::run(part, args);
    }
    if args.gpu && !gpu::device(false)? {
        return Ok(());
    }
    let runs = || folders::workspace().join("benches/runs");
    let path = args.out.clone().unwrap_or_else(|| unused(&runs(), &machine::file_stem(args.gpu)));
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Before anything is built or measured.
    tempfile::tempfile_in(folder).with_context(|| format!("{} cannot be written", path.display()))?;
    let scratch = tempfile::tempdir()?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None if args.gpu => {
            random_sd15::write(scratch.path())?;
            scratch.path().to_owned()
        }
        None => folders::workspace().join("crates/hiper-cli/assets/demo-model"),
    };
    let lab = Lab::new(args, &model)?;
    let asked = is_sd15(args, &model);
    let setting = setting(&lab);
    let save = |figures: &Figures, operators: &[Value]| {
        let mut report = setting.clone();
        let rows = figures.rows.iter().map(table::Row::json).collect();
        report.insert("table".into(), rows);
        report.insert("operators".into(), operators.into());
        report.insert("samples".into(), figures.samples.clone().into());
        if args.gpu {
            report.insert("failures".into(), json!(figures.failures));
            report.insert("left_out".into(), json!(figures.left_out));
        }
        replace(&path, &(serde_json::to_string(&report)? + "\n"))
    };
    let figures = if args.gpu {
        card::measure(&lab, asked, &path, &|figures| save(figures, &[]))?
    } else {
        let groups = args.groups();
        let operators =
            if groups.contains(&Group::Operators) { measure_operators(&lab)? } else { Vec::new() };
        if !operators.is_empty() {
            println!("{}", operators::table(&operators));
        }
        let figures = end_to_end::measure(&lab, &groups, asked)?;
        save(&figures, &operators)?;
        figures
    };
    if !figures.rows.is_empty() {
        println!("{}", table::table(&figures.rows));
    }
    eprintln!("wrote {}", path.display());
    if args.gpu { judge(figures) } else { Ok(()) }
}

/// All that is not as asked, at the end, where it is seen.
fn judge(figures: Figures) -> Result<()> {
    for left_out in &figures.left_out {
        // What happened, and the last word of the program about it.
        let mut lines = left_out.lines();
        let [what, why] = [lines.next(), lines.next_back()].map(Option::unwrap_or_default);
        eprintln!("{what} {why}");
    }
    let unmet = figures.rows.iter().filter_map(table::Row::complaint);
    let complaints: Vec<String> = figures.failures.into_iter().chain(unmet).collect();
    if !complaints.is_empty() {
        bail!("not all is as it must be:\n{}", complaints.join("\n"));
    }
    Ok(())
}

/// Writes beside the file and moves: who is stopped while writing leaves the one before.
fn replace(path: &Path, text: &str) -> Result<()> {
    let part = path.with_extension("json.part");
    let written = std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, path));
    written.with_context(|| format!("{} cannot be written", path.display()))
}

/// Ceilings and operators; with peers, the best product that PyTorch reaches too.
fn measure_operators(lab: &Lab<'_>) -> Result<Vec<Value>> {
    let ours = lab.worker("hiper", "operators", REPETITIONS);
    let mut events = ours.run()?.events;
    if let Some(peer) = lab.peer("PyTorch", "gemm", lab.args.size, 1) {
        match peer.run() {
            Ok(run) => events.extend(run.events),
            Err(error) => eprintln!("PyTorch is left out: {error:#}"),
        }
    }
    Ok(events)
}

/// Whether the limits are meant for this run.
fn is_sd15(args: &Args, model: &Path) -> bool {
    let text = std::fs::read_to_string(model.join("unet/config.json")).unwrap_or_default();
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    let shapes =
        config["block_out_channels"] == json!([320, 640, 1280, 1280]) && config["cross_attention_dim"] == 768;
    shapes && (args.size, args.small_size) == (512, 256)
}

/// Machine, versions, commit and command.
fn setting(lab: &Lab<'_>) -> Map<String, Value> {
    let mut versions = Map::new();
    versions.insert("rustc".into(), json!(machine::said("rustc", &["--version"])));
    if let Some(peer) = lab.peer("versions", "versions", 0, 0) {
        let events = peer.run().map(|run| run.events).unwrap_or_default();
        versions.extend(events.into_iter().filter_map(|event| event.as_object().cloned()).flatten());
        versions.remove("event");
        versions.remove("at");
    }
    let setting = [
        ("date", json!(machine::said("date", &["-u", "+%FT%TZ"]))),
        ("machine", machine::describe()),
        ("versions", versions.into()),
        ("source", machine::commit(&lab.root)),
        ("command", command(std::env::args()).into()),
        ("threads", lab.args.threads().into()),
    ];
    setting.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
}

/// The command line, with the last part of each path alone.
fn command(args: impl Iterator<Item = String>) -> String {
    let last = |arg: String| match Path::new(&arg).file_name() {
        Some(name) if arg.contains('/') => name.to_string_lossy().into_owned(),
        _ => arg,
    };
    let words: Vec<String> = std::iter::once("cargo xtask".into()).chain(args.skip(1).map(last)).collect();
    words.join(" ")
}

/// `stem.json`, or `stem-2.json`, … in `folder`: no run overwrites another.
fn unused(folder: &Path, stem: &str) -> PathBuf {
    let name = |n: u32| if n == 1 { format!("{stem}.json") } else { format!("{stem}-{n}.json") };
    let mut n = 1;
    while folder.join(name(n)).exists() {
        n += 1;
    }
    folder.join(name(n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn groups(line: &[&str]) -> Vec<Group> {
        Line::parse_from([&["bench"][..], line].concat()).args.groups()
    }

    #[test]
    fn drift_is_measured_where_there_are_many_steps() {
        assert!(!groups(&[]).contains(&Group::Drift) && groups(&[]).contains(&Group::Vae));
        assert!(groups(&["--steps", "20"]).contains(&Group::Drift));
        assert_eq!(groups(&["--only", "unet", "drift"]), [Group::Unet, Group::Drift]);
    }

    #[test]
    fn commands_do_not_tell_folders() {
        let args = ["/home/me/target/xtask", "bench", "--model", "/home/me/sd15", "--steps", "5"];
        assert_eq!(command(args.iter().map(|s| s.to_string())), "cargo xtask bench --model sd15 --steps 5");
    }

    #[test]
    fn what_failed_and_what_missed_is_told_at_the_end() {
        let row = |ours: f64, most: f64| {
            let limits = table::Limits::AtMost([most; 2]);
            table::Row::new("x", table::Unit::Seconds, ours).limits(Some(limits))
        };
        let left_out = vec!["PyTorch".to_owned()];
        assert!(judge(Figures { rows: vec![row(1.0, 1.0)], left_out, ..Figures::default() }).is_ok());
        let failures = vec!["hiper failed".to_owned()];
        let figures = Figures { rows: vec![row(2.0, 1.0)], failures, ..Figures::default() };
        let told = judge(figures).unwrap_err().to_string();
        assert!(told.ends_with("\nhiper failed\nx: missed, must be ≤ 1.00 s"), "{told}");
    }

    #[test]
    fn a_report_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        replace(&path, "1").unwrap();
        replace(&path, "2").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "2");
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
        assert!(replace(&dir.path().join("none/a.json"), "").is_err());
    }

    #[test]
    fn no_run_overwrites_another() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(unused(dir.path(), "a"), dir.path().join("a.json"));
        std::fs::write(dir.path().join("a.json"), "").unwrap();
        assert_eq!(unused(dir.path(), "a"), dir.path().join("a-2.json"));
    }
}
