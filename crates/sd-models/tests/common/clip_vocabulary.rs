//! CLIP's real vocabulary, from the fixture's merges. For tests and fuzzing.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Writes `vocab.json` and `merges.txt` below `checkpoint/tokenizer`.
pub fn write(checkpoint: &Path) {
    let merges = unpack("merges.txt.gz");
    let folder = checkpoint.join("tokenizer");
    std::fs::write(folder.join("vocab.json"), vocabulary(std::str::from_utf8(&merges).unwrap())).unwrap();
    std::fs::write(folder.join("merges.txt"), merges).unwrap();
}

/// A file of the fixture.
pub fn unpack(name: &str) -> Vec<u8> {
    // Cargo.toml of the crate, or of its fuzz targets.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.ancestors().find(|folder| folder.join("tests/fixtures/tokenizer").is_dir()).unwrap();
    let packed = std::fs::File::open(root.join("tests/fixtures/tokenizer").join(name)).unwrap();
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    bytes
}

/// CLIP's `vocab.json`: bytes in the order of GPT-2's printable alphabet, the same ending a word, merges, special tokens.
fn vocabulary(merges: &str) -> String {
    let printable: Vec<u32> = (0x21..=0x7E).chain(0xA1..=0xAC).chain(0xAE..=0xFF).collect();
    let others = 256 - printable.len() as u32;
    let bytes: Vec<String> =
        printable.into_iter().chain(256..256 + others).filter_map(char::from_u32).map(String::from).collect();
    let ends = bytes.iter().map(|byte| format!("{byte}</w>"));
    let merged = merges.lines().skip(1).map(|line| line.replace(' ', ""));
    let special = ["<|startoftext|>", "<|endoftext|>"].map(String::from);
    let tokens = bytes.iter().cloned().chain(ends).chain(merged).chain(special);
    let ids: BTreeMap<String, usize> = tokens.enumerate().map(|(id, token)| (token, id)).collect();
    serde_json::to_string(&ids).unwrap()
}
