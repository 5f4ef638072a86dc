//! Hostile tokenizer files are refused, or tokenise.
//!
//! The input is five files, separated by lines `---`: vocab.json, merges.txt, tokenizer_config.json,
//! special_tokens_map.json, and a text. When the first is empty, the second is tokenizer.json.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sd_models::{ClipTokenizer, ModelFiles};
use tempfile::TempDir;

static CHECKPOINT: LazyLock<TempDir> = LazyLock::new(common::empty_checkpoint);
static SAVED: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = common::empty_checkpoint();
    std::fs::remove_file(dir.path().join("tokenizer/vocab.json")).unwrap();
    dir
});

fuzz_target!(|input: &str| {
    let mut parts = input.split("\n---\n");
    let mut part = || parts.next().unwrap_or_default().as_bytes();
    let (vocab, merges) = (part(), part());
    let dir = if vocab.is_empty() { &SAVED } else { &CHECKPOINT };
    if vocab.is_empty() {
        common::write(dir, "tokenizer/tokenizer.json", merges);
    } else {
        common::write(dir, "tokenizer/vocab.json", vocab);
        common::write(dir, "tokenizer/merges.txt", merges);
    }
    common::write(dir, "tokenizer/tokenizer_config.json", part());
    common::write(dir, "tokenizer/special_tokens_map.json", part());
    let text = std::str::from_utf8(part()).unwrap();
    if let Ok(tokenizer) = ClipTokenizer::load(&ModelFiles::from_dir(dir.path()).unwrap())
        && let Ok(tokens) = tokenizer.encode(text)
    {
        assert_eq!(tokens.ids.len(), tokenizer.max_length());
    }
});
