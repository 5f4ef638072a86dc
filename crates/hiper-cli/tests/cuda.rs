//! The program on a card against the same on a CPU. Built with the feature `cuda` alone: `cargo xtask test --gpu` runs it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{command, hiper, hiper_ok, photo, run, words};
use serde_json::Value;

const CPU: &str = "--device cpu --dtype f32";
const CARD: &str = "--device cuda --dtype f16";

/// Of a loss, and of a picture's colours, in `f16`.
const LOSS: f64 = 2e-3;
const COLOUR: f64 = 2.0;

fn losses(folder: &Path) -> Vec<f64> {
    let log = std::fs::read_to_string(folder.join("log.jsonl")).unwrap();
    log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
}

/// How far colours of two pictures are apart, of 255.
fn distance(a: &Path, b: &Path) -> f64 {
    let [a, b] = [a, b].map(|path| image::open(path).unwrap().into_rgb8());
    assert_eq!(a.dimensions(), b.dimensions());
    let squares: f64 = a.iter().zip(b.iter()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    (squares / a.len() as f64).sqrt()
}

#[test]
fn a_card_learns_resumes_and_draws_as_a_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let learn = |name: &str, steps: usize, flags: &str| {
        let line = format!(
            "personalize --input-image {} --source-text 'a rabbit standing' --train-steps {steps} \
             --checkpoint-every 2 --output-dir {name} {flags}",
            photo().display()
        );
        hiper_ok(folder.path(), &words(&line));
    };
    learn("cpu", 3, CPU);
    learn("card", 3, CARD);
    let (got, expected) = (losses(&at("card")), losses(&at("cpu")));
    assert_eq!(got.len(), 3);
    for (got, expected) in got.iter().zip(&expected) {
        assert!((got / expected - 1.0).abs() < LOSS, "{got} {expected}");
    }

    // The third step again, from the checkpoint before it.
    let tail = std::fs::read(at("card/hiper.safetensors")).unwrap();
    for file in ["hiper.safetensors", "hiper_step3.safetensors"] {
        let _ = std::fs::remove_file(at("card").join(file));
    }
    learn("card", 3, &format!("{CARD} --resume"));
    assert!(std::fs::read(at("card/hiper.safetensors")).unwrap() == tail, "resuming gives another tail");

    for (name, flags) in [("on-cpu", CPU), ("on-card", CARD)] {
        let line = format!(
            "edit --embedding card/hiper.safetensors --prompt 'a rabbit sitting' --steps 2 --output-dir {name} {flags}"
        );
        hiper_ok(folder.path(), &words(&line));
    }
    let picture = "01-a-rabbit-sitting-seed0.png";
    let distance = distance(&at("on-card").join(picture), &at("on-cpu").join(picture));
    assert!(distance < COLOUR, "{distance}");
}

/// The driver that stands in for a card tells what it was given to record; NVIDIA's leaves no such report.
#[test]
fn a_recorded_step_allocates_nothing_and_most_of_its_launches_come_early() {
    let folder = tempfile::tempdir().unwrap();
    let (report, times) = (folder.path().join("report.txt"), folder.path().join("times.tsv"));
    let line = format!(
        "personalize --input-image {} --source-text 'a rabbit standing' --train-steps 1 --output-dir card {CARD}",
        photo().display()
    );
    let mut command = command(folder.path(), &words(&line));
    command.env("STAND_IN_DRIVER_DRY", "1").env("STAND_IN_DRIVER_REPORT", &report);
    let run = run(command.env("HIPER_KERNEL_TIMES", &times));
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let times = std::fs::read_to_string(times).unwrap();
    assert!(times.contains("\tadam_f16\t"), "{times}");
    let Ok(report) = std::fs::read_to_string(report) else { return };
    let (counts, recording) = report.split_once("\nthe last recording").unwrap();
    let names: Vec<&str> = recording.lines().skip(1).filter_map(|line| line.split('\t').next()).collect();
    assert!(names.len() > 100 && !names.contains(&"(allocation)"), "{recording}");
    let early = counts
        .lines()
        .find_map(|line| line.strip_prefix("of the last recording's kernels may begin early\t"));
    let early: usize = early.unwrap().parse().unwrap();
    let kernels = names.iter().filter(|name| !name.starts_with('(')).count();
    assert!(early * 10 > kernels * 8, "{early} of {kernels}");
}

/// The driver that stands in for a card can be an old one, or a card's that is; NVIDIA's cannot, and leaves no report.
#[test]
fn an_unfit_card_is_an_error_that_says_what_to_do_and_auto_takes_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.txt");
    let on = |device: &str, [variable, value]: [&str; 2]| {
        let line =
            format!("generate --prompt 'a rabbit' --steps 1 --dtype f16 --output-dir out --device {device}");
        let mut command = command(folder.path(), &words(&line));
        run(command
            .env(variable, value)
            .env("STAND_IN_DRIVER_DRY", "1")
            .env("STAND_IN_DRIVER_REPORT", &report))
    };
    let old = ["STAND_IN_DRIVER_CAPABILITY", "7.5"];
    let turing = on("cuda", old);
    if !report.exists() {
        return;
    }
    assert!(turing.code != Some(0) && turing.stderr.contains("7.5"), "{}", turing.stderr);
    let driver = on("cuda", ["STAND_IN_DRIVER_CUDA", "12040"]);
    assert!(driver.code != Some(0) && driver.stderr.contains("580"), "{}", driver.stderr);
    let auto = on("auto", old);
    assert!(auto.stderr.contains("the CPU computes in f32 only"), "{}", auto.stderr);
}

#[test]
fn a_card_that_is_not_there_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let run = hiper(folder.path(), &words("generate --prompt 'a rabbit' --output-dir out --device cuda:99"));
    assert_ne!(run.code, Some(0));
    assert!(run.stderr.contains("cuda:99"), "{}", run.stderr);
}
