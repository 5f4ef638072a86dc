//! Where and with what a run is made (Linux: `/proc`).

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// Parts of the instruction set that matter here; NEON is called asimd.
const FEATURES: [&str; 7] = ["avx2", "fma", "avx512", "amx", "f16c", "asimd", "sve"];

/// Model, cores, features and memory.
pub fn describe() -> Value {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    json!({
        "cpu": cpu_model(&cpu),
        "cores": cores(),
        "features": features(&cpu),
        "card": card().map(|name| json!({"name": name, "driver": of_card("driver_version")})),
        "memory_bytes": field(&memory, "MemTotal").and_then(|kb| kb.trim_end_matches("kB").trim().parse::<u64>().ok()).map(|kb| kb * 1024),
        "kernel": said("uname", &["-sr"]),
    })
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// In a bundle, which git does not know: what [`commit`] says where it is made.
pub const SOURCE: &str = "source.json";

/// `hiper`'s commit, and whether the working tree is as committed.
pub fn commit(root: &Path) -> Value {
    let made_of = std::fs::read_to_string(root.join(SOURCE)).ok();
    if let Some(source) = made_of.and_then(|source| serde_json::from_str(&source).ok()) {
        return source;
    }
    let root = root.to_string_lossy();
    let git = |args: &[&str]| said("git", &[&["-C", &*root][..], args].concat());
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|list| !list.is_empty());
    json!({ "commit": git(&["rev-parse", "HEAD"]), "changed": changed })
}

/// What a command prints, if it succeeds.
pub fn said(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The name of the NVIDIA card that programs find first.
pub fn card() -> Option<String> {
    of_card("name")
}

fn of_card(what: &str) -> Option<String> {
    said("nvidia-smi", &[&format!("--query-gpu={what}"), "--format=csv,noheader", &card_id()])
}

/// Has programs number cards as nvidia-smi does.
pub const CARD_ORDER: [&str; 2] = ["CUDA_DEVICE_ORDER", "PCI_BUS_ID"];

/// nvidia-smi's flag for the card that programs find first, if they have [`CARD_ORDER`].
pub fn card_id() -> String {
    format!("--id={}", first_card(&std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default()))
}

/// Of a list of numbers or names.
fn first_card(visible: &str) -> &str {
    visible.split(',').map(str::trim).next().filter(|first| !first.is_empty()).unwrap_or("0")
}

/// A name for files: `2026-11-23-intel-xeon-2-cores`, or with the card's name.
pub fn file_stem(on_card: bool) -> String {
    let date = said("date", &["-u", "+%F"]).unwrap_or_default();
    match card().filter(|_| on_card) {
        Some(card) => format!("{date}-{}", slug(&card)),
        None => {
            let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            format!("{date}-{}-{}-cores", slug(&cpu_model(&cpu)), cores())
        }
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name))
        .map(|(_, v)| v.trim())
}

fn cpu_model(cpuinfo: &str) -> String {
    let name = ["model name", "Model", "CPU part"].iter().find_map(|name| field(cpuinfo, name));
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}

fn features(cpuinfo: &str) -> Vec<String> {
    let flags = field(cpuinfo, "flags").or(field(cpuinfo, "Features")).unwrap_or_default();
    let known = |flag: &&str| FEATURES.iter().any(|feature| flag.starts_with(feature));
    flags.split_whitespace().filter(known).map(str::to_owned).collect()
}

/// Lower-case words joined by hyphens, without marks such as `(R)`.
fn slug(name: &str) -> String {
    let name = name.replace("(R)", " ").replace("(TM)", " ").to_lowercase();
    let words: Vec<&str> =
        name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    words.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_knows_its_commit() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(commit(folder.path())["commit"], Value::Null);
        std::fs::write(folder.path().join(SOURCE), r#"{"commit": "123", "changed": false}"#).unwrap();
        assert_eq!(commit(folder.path())["commit"], "123");
    }

    #[test]
    fn the_first_card_is_the_first_that_programs_may_see() {
        for (visible, first) in [("", "0"), ("2,1", "2"), (" GPU-4f ", "GPU-4f")] {
            assert_eq!(first_card(visible), first);
        }
    }

    #[test]
    fn a_processor_is_described() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Gold 6430\nflags\t\t: fpu fma sse avx512f avx2 sse2\n";
        assert_eq!(cpu_model(cpuinfo), "Intel(R) Xeon(R) Gold 6430");
        assert_eq!(features(cpuinfo), ["fma", "avx512f", "avx2"]);
        assert_eq!(slug(&cpu_model(cpuinfo)), "intel-xeon-gold-6430");
    }
}
