//! Subjects in a batch on the embedded model: each is what it would be alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{command, files, hiper, hiper_ok, log, photo, replace_tensor, wait_for_steps, words};

/// Name, source text, seed.
const SUBJECTS: [(&str, &str, u64); 3] =
    [("rabbit", "a rabbit standing", 7), ("mirrored", "a rabbit", 7), ("turned", "an animal lying", 3)];

/// Three photos in `photos/`, and `photos/subjects.toml` about them.
fn photographed(folder: &Path) {
    let photos = folder.join("photos");
    std::fs::create_dir(&photos).unwrap();
    let photo = image::open(photo()).unwrap();
    photo.save(photos.join("rabbit.png")).unwrap();
    photo.fliph().save(photos.join("mirrored.png")).unwrap();
    photo.rotate90().save(photos.join("turned.png")).unwrap();
    let subject = |(name, text, seed)| {
        format!("[[subject]]\nimage = \"{name}.png\"\nsource_text = \"{text}\"\nseed = {seed}\n")
    };
    std::fs::write(photos.join("subjects.toml"), SUBJECTS.map(subject).concat()).unwrap();
}

fn batch(out: &str, flags: &str) -> Vec<String> {
    words(&format!("personalize --manifest photos/subjects.toml --output-dir {out} {flags}"))
}

/// Every file of a folder with its content, but for the seconds in the log.
fn content(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |name: String| {
        let bytes = match name.as_str() {
            "log.jsonl" => log(folder).join("\n").into_bytes(),
            _ => std::fs::read(folder.join(&name)).unwrap(),
        };
        (name, bytes)
    };
    files(folder).into_iter().map(read).collect()
}

/// On a CPU no bit depends on who else is in the batch: `tests/tests/batch.rs` says why.
fn assert_same(one: &Path, other: &Path) {
    let (one_content, other_content) = (content(one), content(other));
    let names =
        |content: &[(String, Vec<u8>)]| content.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&one_content), names(&other_content));
    for ((name, a), (_, b)) in one_content.iter().zip(&other_content) {
        assert!(a == b, "{name} differs between {} and {}", one.display(), other.display());
    }
}

#[test]
fn a_batch_leaves_what_single_runs_leave() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    photographed(folder.path());
    let flags = "--train-steps 6 --checkpoint-every 4 --preview-every 5";
    let run = hiper_ok(folder.path(), &batch("together", &format!("{flags} --log-format json")));
    assert_eq!(files(&at("together")), ["mirrored", "rabbit", "turned"]);
    hiper_ok(folder.path(), &batch("in-twos", &format!("{flags} --batch-size 2")));
    for (name, text, seed) in SUBJECTS {
        let line = format!(
            "personalize --input-image photos/{name}.png --source-text '{text}' --seed {seed} --output-dir alone/{name} {flags}"
        );
        hiper_ok(folder.path(), &words(&line));
        assert!(files(&at("alone").join(name)).contains(&"hiper_step4.safetensors".to_owned()));
        assert_same(&at("together").join(name), &at("alone").join(name));
        assert_same(&at("in-twos").join(name), &at("alone").join(name));
    }
    // Every step's line tells of every subject, by its name and at its own timestep.
    let events = run.stderr.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps: Vec<serde_json::Value> = events.filter(|event| event["event"] == "step").collect();
    assert_eq!(steps.len(), 6);
    for (name, (i, _)) in SUBJECTS.iter().map(|subject| subject.0).zip(steps.iter().enumerate()) {
        let subject = &steps[i]["subjects"].as_array().unwrap()[i];
        let logged: serde_json::Value =
            serde_json::from_str(&format!("{}}}", log(&at("together").join(name))[i])).unwrap();
        assert_eq!(subject["name"], name);
        assert_eq!((&subject["timestep"], &subject["loss"]), (&logged["timestep"], &logged["loss"]));
    }
    assert_ne!(steps[0]["subjects"][0]["timestep"], steps[0]["subjects"][2]["timestep"]);
}

#[test]
fn target_texts_are_drawn_and_edit_takes_each_tail() {
    let folder = tempfile::tempdir().unwrap();
    photographed(folder.path());
    let lines = "{\"image\": \"rabbit.png\", \"source_text\": \"a rabbit\", \"target_texts\": [\"a rabbit lying\"]}\n\
                 {\"image\": \"turned.png\", \"source_text\": \"a rabbit\", \"name\": \"Max\"}\n";
    std::fs::write(folder.path().join("photos/subjects.jsonl"), lines).unwrap();
    hiper_ok(
        folder.path(),
        &words("personalize --manifest photos/subjects.jsonl --output-dir out --train-steps 2 --seed 5"),
    );
    let line = "personalize --input-image photos/rabbit.png --source-text 'a rabbit' --target-text 'a rabbit lying' \
                --output-dir alone --train-steps 2 --seed 5";
    hiper_ok(folder.path(), &words(line));
    let (out, alone) = (folder.path().join("out"), folder.path().join("alone"));
    assert_eq!(files(&out.join("rabbit")), files(&alone));
    let sheet = |folder: &Path| image::open(folder.join("contact_sheet.png")).unwrap().into_rgb8();
    assert!(sheet(&out.join("rabbit")) == sheet(&alone));
    assert_eq!(files(&out.join("Max")), ["hiper.safetensors", "log.jsonl", "settings.json"]);
    hiper_ok(
        folder.path(),
        &words("edit --embedding out/Max/hiper.safetensors --prompt rabbit --steps 1 --output-dir edits"),
    );
    assert_eq!(files(&folder.path().join("edits")), ["01-rabbit-seed0.png"]);
}

#[test]
fn killed_or_interrupted_and_resumed_is_the_uninterrupted_batch() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    photographed(folder.path());
    let flags = "--train-steps 30 --checkpoint-every 4";
    hiper_ok(folder.path(), &batch("whole", flags));
    let check = |out: &str| {
        hiper_ok(folder.path(), &batch(out, &format!("{flags} --resume")));
        SUBJECTS.iter().for_each(|(name, ..)| {
            // An interruption leaves a checkpoint of its own beside those that were due.
            let left = files(&at("whole").join(name));
            left.iter().filter(|file| !["log.jsonl"].contains(&file.as_str())).for_each(|file| {
                let read = |out: &str| std::fs::read(at(out).join(name).join(file)).unwrap();
                assert!(read(out) == read("whole"), "{out}: {name}/{file}");
            });
            assert_eq!(log(&at(out).join(name)), log(&at("whole").join(name)));
        });
    };
    // In the second batch, when the first is done; and within a batch of all.
    for (out, more, subject, steps) in [("twos", "--batch-size 2", "turned", 6), ("all", "", "mirrored", 9)] {
        let mut child =
            command(folder.path(), &batch(out, &format!("{flags} {more} --quiet"))).spawn().unwrap();
        wait_for_steps(&at(out).join(subject), steps);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!at(out).join(subject).join("hiper.safetensors").exists(), "killed too late");
        check(out);
    }
    #[cfg(unix)]
    {
        let mut child = command(folder.path(), &batch("stopped", &format!("{flags} --quiet")));
        let child = child.stderr(std::process::Stdio::piped()).spawn().unwrap();
        wait_for_steps(&at("stopped/turned"), 5);
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
        check("stopped");
    }
}

#[test]
fn a_subject_whose_loss_is_not_a_number_is_named_and_the_others_finish() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    photographed(folder.path());
    hiper_ok(folder.path(), &batch("whole", "--train-steps 6 --checkpoint-every 3"));
    hiper_ok(folder.path(), &batch("out", "--train-steps 3 --checkpoint-every 3"));
    // A tail so long that its keys overflow.
    let checkpoint = at("out/mirrored/hiper_step3.safetensors");
    replace_tensor(&checkpoint, "hiper", &[5, 128], &[1e38; 5 * 128]);
    std::fs::remove_file(at("out/mirrored/hiper.safetensors")).unwrap();
    let run = hiper(folder.path(), &batch("out", "--train-steps 6 --checkpoint-every 3 --resume"));
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    let error = run.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    assert!(
        error.starts_with("error: 1 of 3 subjects failed: mirrored: step 4: the loss is not finite"),
        "{error}"
    );
    assert!(run.stderr.contains("hint: the other subjects are done"), "{}", run.stderr);
    assert!(!at("out/mirrored/hiper.safetensors").exists());
    for name in ["rabbit", "turned"] {
        assert_same(&at("out").join(name), &at("whole").join(name));
    }
}

#[test]
fn photos_of_different_shapes_are_learned_apart() {
    let folder = tempfile::tempdir().unwrap();
    photographed(folder.path());
    let long = image::open(photo()).unwrap().resize_exact(96, 64, image::imageops::FilterType::Triangle);
    long.save(folder.path().join("photos/mirrored.png")).unwrap();
    hiper_ok(folder.path(), &batch("out", "--train-steps 2 --crop none"));
    for (name, ..) in SUBJECTS {
        assert_eq!(log(&folder.path().join("out").join(name)).len(), 2);
    }
}

#[test]
fn what_cannot_be_a_batch() {
    let folder = tempfile::tempdir().unwrap();
    photographed(folder.path());
    let manifest = folder.path().join("photos/subjects.toml");
    let good = std::fs::read_to_string(&manifest).unwrap();
    for (text, parts) in [
        (
            good.replace("turned.png", "none.png"),
            ["none: ", "photos/none.png: cannot be read", "hint: check the path"],
        ),
        (
            good.replace("turned.png", "rabbit.png"),
            [
                "photos/subjects.toml: ",
                "subjects 1 and 3 are both called \"rabbit\"",
                "hint: give each a name",
            ],
        ),
        (String::new(), ["photos/subjects.toml: ", "has no subjects", "hint: a subject has image"]),
        (
            good.replace("seed = 3", "sead = 3"),
            ["photos/subjects.toml: line 12: ", "unknown field `sead`", "hint: a subject has image"],
        ),
        (
            good.replace("\"an animal lying\"", "\"\""),
            ["photos/subjects.toml: ", "subject 3: its source_text is empty", "hint: a subject has image"],
        ),
    ] {
        std::fs::write(&manifest, text).unwrap();
        let run = hiper(folder.path(), &batch("out", "--train-steps 1"));
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        assert!(parts.iter().all(|part| run.stderr.contains(part)), "{parts:?}: {}", run.stderr);
        assert!(!folder.path().join("out").exists());
    }
    // A folder that holds another run: nothing is begun.
    std::fs::write(&manifest, &good).unwrap();
    hiper_ok(folder.path(), &batch("out", "--train-steps 1 --checkpoint-every 1"));
    std::fs::write(&manifest, good.replace("seed = 3", "seed = 4")).unwrap();
    let run = hiper(folder.path(), &batch("out", "--train-steps 2"));
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(
        run.stderr.contains(
            "error: turned: out/turned: holds checkpoints of another run: its seed is 3, now it is 4"
        ),
        "{}",
        run.stderr
    );
    assert_eq!(log(&folder.path().join("out/rabbit")).len(), 1);
}
