//! The invariants of ARCHITECTURE.md that a look at the sources can check.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Sources of a crate, `(path, text)`, without its tests.
fn sources(crate_name: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("crates").join(crate_name).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_owned();
                found.push((path.display().to_string(), code));
            }
        }
    }
    assert!(!found.is_empty(), "{crate_name} has no sources");
    found
}

fn code_lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim_start().starts_with("//"))
}

const LIBRARIES: [&str; 3] = ["hiper-kernels", "sd-models", "hiper-core"];

#[test]
fn libraries_do_not_print_read_the_environment_or_draw_by_themselves() {
    for library in LIBRARIES {
        // The environment names the card that tests run on; and tests have files of their own.
        let of_tests = |path: &str| path.ends_with("gpu/test_card.rs") || path.ends_with("/tests.rs");
        for (path, text) in sources(library).into_iter().filter(|(path, _)| !of_tests(path)) {
            for line in code_lines(&text) {
                for forbidden in ["println!", "print!", "env::var", "thread_rng", "rand::"] {
                    assert!(!line.contains(forbidden), "{path}: {line}");
                }
            }
        }
    }
}

#[test]
fn unsafe_code_is_where_it_may_be_and_says_why() {
    for library in [LIBRARIES.as_slice(), &["hiper-cli"]].concat() {
        for (path, text) in sources(library) {
            let allowed = library == "hiper-kernels" || path.ends_with("model_files.rs");
            let uses = code_lines(&text).filter(|line| line.contains("unsafe {")).count();
            assert!(uses == 0 || allowed, "{path} has unsafe code");
            assert!(
                text.matches("SAFETY:").count() >= uses,
                "{path}: an unsafe block without its SAFETY: line"
            );
        }
    }
}

#[test]
fn kernels_are_the_same_for_card_and_cpu() {
    for entry in std::fs::read_dir(root().join("kernels")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir()
            || ["device.cuh", "warpgroup.cuh", "cluster.cuh"].iter().any(|words| path.ends_with(words))
        {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("// "), "{} does not begin with what it is", path.display());
        for line in code_lines(&text) {
            for forbidden in ["asm", "#if", "__CUDA", "atomic"] {
                assert!(!line.contains(forbidden), "{}: {line}", path.display());
            }
        }
    }
}

/// Products know what they read before their turn: they are defined in a header, and call it themselves.
#[test]
fn kernels_begin_with_their_turn() {
    for entry in std::fs::read_dir(root().join("kernels")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "cu") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for entry_point in text.split("KERNEL(").skip(1) {
            let body = entry_point.split_once(") {").map_or("", |(_, body)| body);
            let first = body.trim_start_matches([' ', '\\', '\n']);
            let name = entry_point.split(',').next().unwrap();
            assert!(first.starts_with("take_turn();"), "{}: {name} does not", path.display());
        }
    }
}

#[test]
fn dependencies_point_down() {
    let tree = |package: &str| {
        let output = Command::new(env!("CARGO"))
            .args([
                "tree",
                "--package",
                package,
                "--edges",
                "normal",
                "--prefix",
                "none",
                "--offline",
                "--locked",
            ])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for (package, forbidden) in [
        ("hiper-core", ["sd-models", "hiper-kernels", "hiper-cli", "clap"].as_slice()),
        ("sd-models", &["hiper-core", "hiper-cli", "clap"]),
        ("hiper-kernels", &["sd-models", "hiper-core", "hiper-cli", "clap"]),
    ] {
        let tree = tree(package);
        for name in forbidden {
            assert!(
                !tree.lines().any(|line| line.starts_with(&format!("{name} "))),
                "{package} depends on {name}"
            );
        }
    }
}
