//! The command line's own words, kept in `snapshots/`. HIPER_UPDATE_SNAPSHOTS=1 writes them anew.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{hiper, words};

fn check(name: &str, got: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(format!("{name}.txt"));
    if std::env::var_os("HIPER_UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, got).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default().replace("\r\n", "\n");
    assert!(got == expected, "{}: expected\n{expected}\ngot\n{got}", path.display());
}

#[test]
fn help() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["", "demo", "personalize", "edit", "generate", "inspect"] {
        let run = hiper(folder.path(), &words(&format!("{command} --help")));
        assert_eq!(run.code, Some(0));
        let name = if command.is_empty() { "help".to_owned() } else { format!("help-{command}") };
        check(&name, &run.stdout);
    }
}

#[test]
fn wrong_command_lines() {
    let folder = tempfile::tempdir().unwrap();
    let mut all = String::new();
    for line in [
        "bogus",
        "personalize",
        "personalize --input-image a.png --source-text '' --output-dir out",
        "personalize --input-image a.png --source-text dog --output-dir out --n-hiper 0",
        "personalize --input-image a.png --source-text dog --output-dir out --n-hiper 77",
        "personalize --input-image a.png --source-text dog --output-dir out --train-steps 0",
        "personalize --input-image a.png --source-text dog --output-dir out --learning-rate fast",
        "personalize --input-image a.png --source-text dog --output-dir out --crop left",
        "personalize --manifest m.toml --input-image a.png --output-dir out",
        "personalize --input-image a.png --source-text dog --output-dir out --batch-size 2",
        "personalize --manifest m.toml --output-dir out --batch-size 0",
        "edit --embedding t.safetensors --output-dir out",
        "edit --embedding t.safetensors --prompt ' ' --output-dir out",
        "edit --embedding t.safetensors --prompt dog --output-dir out --scheduler heun",
        "edit --embedding t.safetensors --prompt dog --output-dir out --guidance-scale -1",
        "edit --embedding t.safetensors --prompt dog --output-dir out --seed -1",
        "generate --prompt dog --output-dir out --steps 0",
        "generate --prompt dog --output-dir out --device gpu",
        "generate --prompt dog --output-dir out --threads 0",
        "generate --prompt dog --output-dir out --log-format xml",
        "inspect ''",
    ] {
        let run = hiper(folder.path(), &words(line));
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{line}");
        assert_eq!(run.stderr.lines().count(), 2, "{}", run.stderr);
        all += &format!("$ hiper {line}\n{}", run.stderr);
    }
    assert!(common::files(folder.path()).is_empty());
    check("wrong-command-lines", &all);
}

#[test]
fn errors_in_json() {
    let folder = tempfile::tempdir().unwrap();
    for (line, code) in [
        ("generate --prompt dog --output-dir out --log-format json --images 0", 2),
        ("personalize --input-image no.png --source-text dog --output-dir out --log-format json", 1),
    ] {
        let run = hiper(folder.path(), &words(line));
        assert_eq!(run.code, Some(code));
        let json: serde_json::Value = serde_json::from_str(run.stderr.trim()).unwrap();
        assert_eq!((&json["event"], &json["exit_code"]), (&"error".into(), &code.into()));
        assert!(json["message"].is_string() && json["hint"].is_string());
    }
}

#[cfg(unix)]
#[test]
fn a_sentence_that_is_not_utf8() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    let folder = tempfile::tempdir().unwrap();
    let broken = || OsString::from_vec(b"a d\xffg".to_vec());
    for flags in [
        vec!["generate".into(), "--output-dir".into(), "out".into(), "--prompt".into(), broken()],
        vec!["inspect".into(), broken()],
        vec![
            "generate".into(),
            "--output-dir".into(),
            "out".into(),
            "--prompt=dog".into(),
            "--negative-prompt".into(),
            broken(),
        ],
    ] {
        let run = hiper(folder.path(), &flags);
        assert_eq!(run.code, Some(2));
        assert!(run.stderr.contains("must be valid UTF-8"), "{}", run.stderr);
    }
}
