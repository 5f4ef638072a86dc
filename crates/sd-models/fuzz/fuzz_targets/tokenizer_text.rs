//! Any text has ids of the vocabulary, framed and padded.
#![no_main]

#[path = "../../tests/common/clip_vocabulary.rs"]
mod clip_vocabulary;
#[path = "../../tests/common/mod.rs"]
mod common;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sd_models::{ClipTokenizer, ModelFiles};

static TOKENIZER: LazyLock<ClipTokenizer> = LazyLock::new(|| {
    let dir = common::empty_checkpoint();
    clip_vocabulary::write(dir.path());
    ClipTokenizer::load(&ModelFiles::from_dir(dir.path()).unwrap()).unwrap()
});

fuzz_target!(|text: &str| {
    let tokens = TOKENIZER.encode(text).unwrap();
    assert_eq!(tokens.ids.len(), 77);
    assert_eq!(tokens.ids[0], 49406);
    assert!(tokens.ids.iter().all(|&id| id < 49408));
    assert_eq!(tokens.num_tokens, TOKENIZER.tokenize(text).unwrap().len() + 2);
});
