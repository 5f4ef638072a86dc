//! Pictures from sentences: `edit`, `generate`, and what `inspect` says of their parts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{files, hiper, hiper_ok, words, write_tail};
use image::RgbImage;

fn picture(folder: &Path, name: &str) -> RgbImage {
    image::open(folder.join(name)).unwrap().into_rgb8()
}

#[test]
fn image_i_has_the_seed_plus_i() {
    let folder = tempfile::tempdir().unwrap();
    let line = "generate --steps 2 --prompt 'a rabbit sitting' 'A bird, lying!' --output-dir out --images 2 --seed 6";
    hiper_ok(folder.path(), &words(line));
    let out = folder.path().join("out");
    let names = [
        "01-a-rabbit-sitting-seed6.png",
        "01-a-rabbit-sitting-seed7.png",
        "02-a-bird-lying-seed6.png",
        "02-a-bird-lying-seed7.png",
    ];
    assert_eq!(files(&out), names);
    let line = "generate --steps 2 --prompt 'A bird, lying!' --output-dir again --seed 7 --threads 1";
    hiper_ok(folder.path(), &words(line));
    let again = folder.path().join("again");
    assert_eq!(picture(&again, "01-a-bird-lying-seed7.png"), picture(&out, names[3]));
    assert_ne!(picture(&out, names[2]), picture(&out, names[3]));
}

#[test]
fn a_picture_says_how_it_was_made() {
    let folder = tempfile::tempdir().unwrap();
    write_tail(&folder.path().join("tail.safetensors"), 3, 128);
    let line = "edit --embedding tail.safetensors --prompt 'a rabbit' --negative-prompt snow --steps 2 --scheduler euler-a \
                --tail-scale 0.5 --output-dir out --height 32 --width 96";
    hiper_ok(folder.path(), &words(line));
    let file = std::fs::File::open(folder.path().join("out/01-a-rabbit-seed0.png")).unwrap();
    let reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().unwrap();
    let info = reader.info();
    assert_eq!((info.width, info.height), (96, 32));
    let text = |key: &str| &info.uncompressed_latin1_text.iter().find(|t| t.keyword == key).unwrap().text;
    let parameters =
        "a rabbit\nNegative prompt: snow\nSteps: 2, Sampler: Euler a, CFG scale: 7.5, Seed: 0, Size: 96x32, ";
    assert!(text("parameters").starts_with(parameters), "{}", text("parameters"));
    let json: serde_json::Value = serde_json::from_str(text("hiper")).unwrap();
    assert_eq!(json["embedding"]["n_hiper"], 3);
    assert_eq!(json["embedding"]["tail_scale"], 0.5);
    assert_eq!(json["scheduler"], "euler-a");
}

#[test]
fn every_scheduler_draws() {
    let folder = tempfile::tempdir().unwrap();
    for scheduler in ["ddpm", "ddim", "pndm", "euler", "euler-a", "dpm++", "unipc"] {
        let line = format!(
            "generate --steps 4 --prompt rabbit --scheduler {scheduler} --output-dir {scheduler} --height 32 --width 32"
        );
        hiper_ok(folder.path(), &words(&line));
        assert_eq!(files(&folder.path().join(scheduler)), ["01-rabbit-seed0.png"]);
    }
}

#[test]
fn a_long_sentence_is_said() {
    let folder = tempfile::tempdir().unwrap();
    write_tail(&folder.path().join("tail.safetensors"), 5, 128);
    let sentence = |words: usize| vec!["rabbit"; words].join(" ");
    // 70 words, begin and end are 72 tokens: all the room that a tail of 5 leaves.
    for (count, warned) in [(70, false), (71, true)] {
        let line = format!(
            "edit --embedding tail.safetensors --prompt '{}' --steps 1 --output-dir out --quiet",
            sentence(count)
        );
        let run = hiper_ok(folder.path(), &words(&line));
        assert_eq!(run.stderr.contains("73 tokens, but there is room for 72"), warned, "{}", run.stderr);
    }
    let line = format!("generate --prompt '{}' --steps 1 --output-dir out --log-format json", sentence(76));
    let run = hiper_ok(folder.path(), &words(&line));
    let warning = run.stderr.lines().find(|line| line.contains("\"warning\"")).unwrap();
    assert!(warning.contains("78 tokens, but there is room for 77"), "{warning}");
}

#[test]
fn inspect_shows_tails_checkpoints_and_sentences() {
    let folder = tempfile::tempdir().unwrap();
    write_tail(&folder.path().join("tail.safetensors"), 3, 128);
    let tail = hiper_ok(folder.path(), &words("inspect tail.safetensors"));
    assert!(tail.stdout.contains("a HiPer tail of 3 tokens, width 128"), "{}", tail.stdout);

    let model = common::model(folder.path());
    let checkpoint = hiper_ok(folder.path(), &["inspect", model.to_str().unwrap(), "--log-format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&checkpoint.stdout).unwrap();
    assert_eq!((&json["kind"], &json["prediction_type"]), (&"checkpoint".into(), &"epsilon".into()));
    assert_eq!(json["components"].as_array().unwrap().len(), 3);

    let text = hiper_ok(folder.path(), &words("inspect 'a rabbit sitting' --n-hiper 7"));
    assert!(text.stdout.contains("5 tokens; head 0..69, tail 70..76 (7 tokens)"), "{}", text.stdout);
    assert!(text.stdout.contains("head  rabbit</w>"), "{}", text.stdout);

    let missing = hiper(folder.path(), &words("inspect nowhere/tail.safetensors"));
    assert_eq!(missing.code, Some(1));
    assert!(missing.stderr.contains("no such file"), "{}", missing.stderr);
}
