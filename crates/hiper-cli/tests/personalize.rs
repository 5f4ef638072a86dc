//! The whole job on the embedded model: steps, files, interruption and resumption.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{command, files, hiper, hiper_ok, log, photo, wait_for_steps, words};

/// Enough to be interrupted in the middle, few enough to wait for.
const STEPS: usize = 40;

fn line(out: &str, flags: &str) -> Vec<String> {
    let photo = photo().display().to_string();
    words(&format!(
        "personalize --input-image '{photo}' --source-text 'a rabbit standing' --output-dir {out} --seed 7 \
         --train-steps {STEPS} --checkpoint-every 5 {flags}"
    ))
}

/// The finished tail's file, all of it.
fn tail(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("hiper.safetensors")).unwrap()
}

#[test]
fn killed_or_interrupted_and_resumed_is_the_uninterrupted_run() {
    let folder = tempfile::tempdir().unwrap();
    hiper_ok(folder.path(), &line("whole", ""));
    let whole = folder.path().join("whole");
    let checkpoints: Vec<String> =
        (1..=STEPS / 5).map(|k| format!("hiper_step{}.safetensors", 5 * k)).collect();
    assert!(checkpoints.iter().all(|file| whole.join(file).is_file()));
    assert_eq!(log(&whole).len(), STEPS);

    // At any step, also between checkpoints; the last steps are left, so that the run is still there to be killed.
    for (i, steps) in (0..3).map(|i| (i, 1 + random() % (STEPS - 6))) {
        let name = format!("killed{i}");
        let killed = folder.path().join(&name);
        let mut child = command(folder.path(), &line(&name, "--quiet")).spawn().unwrap();
        wait_for_steps(&killed, steps);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!killed.join("hiper.safetensors").exists(), "killed too late after step {steps}");
        hiper_ok(folder.path(), &line(&name, "--resume"));
        assert!(tail(&killed) == tail(&whole), "killed after step {steps}");
        assert_eq!(log(&killed), log(&whole));
    }

    #[cfg(unix)]
    {
        let stopped = folder.path().join("stopped");
        let mut child = command(folder.path(), &line("stopped", "--quiet"));
        let child = child.stderr(std::process::Stdio::piped()).spawn().unwrap();
        wait_for_steps(&stopped, 4);
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{message}");
        assert!(message.contains("error: interrupted after step"), "{message}");
        assert!(files(&stopped).iter().any(|file| file.starts_with("hiper_step")));
        hiper_ok(folder.path(), &line("stopped", "--resume"));
        assert!(tail(&stopped) == tail(&whole));
    }
}

/// A number that differs from run to run; a failure names the step that it led to.
fn random() -> usize {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish() as usize
}

#[test]
fn a_folder_keeps_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let short = "--train-steps 5";
    let run = |flags: &str| {
        let photo = photo().display().to_string();
        let line = format!(
            "personalize --input-image '{photo}' --source-text 'a rabbit standing' --output-dir out --checkpoint-every 5 {flags}"
        );
        hiper(folder.path(), &words(&line))
    };
    assert_eq!(run(short).code, Some(0));
    let out = folder.path().join("out");
    let first = tail(&out);
    for (flags, field) in [
        ("--train-steps 9 --resume --seed 1", "seed"),
        ("--train-steps 9 --resume --n-hiper 4", "n_hiper"),
        ("--train-steps 9 --learning-rate 1e-2", "learning_rate"),
    ] {
        let refused = run(flags);
        assert_eq!(refused.code, Some(1), "{flags}");
        assert!(refused.stderr.contains(&format!("another run: its {field} is")), "{}", refused.stderr);
        assert!(tail(&out) == first);
    }
    // A longer run goes on where the shorter one ended.
    let longer = run("--train-steps 9 --resume");
    assert!(longer.stderr.contains("continuing after step 5"), "{}", longer.stderr);
    assert_eq!(log(&out).len(), 9);
    // A damaged checkpoint is passed over.
    std::fs::write(out.join("hiper_step9.safetensors"), b"half a fi").unwrap();
    let again = run("--train-steps 9 --resume");
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert!(
        again.stderr.contains("passed over") && again.stderr.contains("continuing after step 5"),
        "{}",
        again.stderr
    );
}

#[test]
fn a_json_log_tells_every_step() {
    let folder = tempfile::tempdir().unwrap();
    let photo = photo().display().to_string();
    let line = format!(
        "personalize --input-image '{photo}' --source-text 'a rabbit' --output-dir out --train-steps 3 --log-format json"
    );
    let run = hiper_ok(folder.path(), &words(&line));
    assert_eq!(run.stdout, "");
    let events: Vec<serde_json::Value> =
        run.stderr.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let kinds: Vec<&str> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["photo", "model_loaded", "step", "step", "step", "wrote", "done"]);
    let logged = log(&folder.path().join("out"));
    assert!(logged[2].contains(&format!(
        "\"step\":3,\"timestep\":{},\"loss\":{}",
        events[4]["timestep"], events[4]["loss"]
    )));
    // And inspect reads the tail.
    let inspect = hiper_ok(folder.path(), &words("inspect out/hiper.safetensors"));
    for part in ["a HiPer tail of 5 tokens, width 128", "a rabbit", "hiper-demo", "final loss"] {
        assert!(inspect.stdout.contains(part), "{}", inspect.stdout);
    }
}

#[test]
fn photos_of_any_size_are_brought_to_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let photo = image::open(photo()).unwrap();
    photo
        .resize_exact(300, 200, image::imageops::FilterType::Triangle)
        .to_luma16()
        .save(folder.path().join("grey16.png"))
        .unwrap();
    for (crop, size) in [("center", "64x64"), ("random", "64x64"), ("none", "96x64")] {
        let line = format!(
            "personalize --input-image grey16.png --source-text rabbit --output-dir {crop} --train-steps 1 --crop {crop}"
        );
        let run = hiper_ok(folder.path(), &words(&line));
        assert!(run.stderr.contains("(300x200, used as ") && run.stderr.contains(size), "{}", run.stderr);
    }
}

#[test]
fn the_demo_tells_the_whole_story() {
    let folder = tempfile::tempdir().unwrap();
    hiper_ok(folder.path(), &words("demo --out story"));
    let story = folder.path().join("story");
    let left = files(&story);
    for file in ["contact_sheet.png", "hiper.safetensors", "log.jsonl", "photo.png", "reconstruction.png"] {
        assert!(left.iter().any(|name| name == file), "{left:?}");
    }
    let losses: Vec<f64> = log(&story)
        .iter()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(&format!("{line}}}")).unwrap()["loss"].as_f64().unwrap()
        })
        .collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (start, end) = losses.split_at(losses.len() / 2);
    assert!(mean(end) < mean(start), "the loss does not fall: {} {}", mean(start), mean(end));
    let sheet = image::open(story.join("contact_sheet.png")).unwrap();
    assert!(sheet.width() > 1000 && sheet.height() > 500, "{}x{}", sheet.width(), sheet.height());
}

#[test]
fn previews_come_while_it_learns() {
    let folder = tempfile::tempdir().unwrap();
    let photo = photo().display().to_string();
    let line = format!(
        "personalize --input-image '{photo}' --source-text 'a rabbit' --target-text 'a rabbit lying' --output-dir out \
         --train-steps 2 --preview-every 2"
    );
    hiper_ok(folder.path(), &words(&line));
    let out = folder.path().join("out");
    let left = files(&out);
    assert!(
        left.contains(&"preview_step2.png".to_owned())
            && left.contains(&"edit-01-a-rabbit-lying.png".to_owned()),
        "{left:?}"
    );
    // A preview draws nothing from the run's generator.
    let plain = line
        .replace("--preview-every 2", "--preview-every 0")
        .replace("--output-dir out", "--output-dir plain");
    hiper_ok(folder.path(), &words(&plain));
    assert!(tail(&out) == tail(&folder.path().join("plain")));
}
