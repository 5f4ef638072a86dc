//! Token ids against transformers' CLIPTokenizer. Fixture: `tools/fixtures/tokenizer.py`.
#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "common/clip_vocabulary.rs"]
mod clip_vocabulary;
mod common;

use std::sync::LazyLock;

use proptest::prelude::*;
use safetensors::SafeTensors;
use sd_models::{ClipTokenizer, Error, ModelFiles};
use sha2::{Digest, Sha256};

const BOS: u32 = 49406;
const EOS: u32 = 49407;

/// Tokenizer of the configuration `name` of the fixture.
fn tokenizer(name: &str) -> ClipTokenizer {
    let dir = checkpoint(name);
    ClipTokenizer::load(&ModelFiles::from_dir(dir.path()).unwrap()).unwrap()
}

#[test]
fn ids_equal_those_of_transformers_on_ten_thousand_strings() {
    let fixture = Fixture::read();
    let strings = tokenizer("strings");
    let (texts, ids) = (fixture.texts(), fixture.rows("strings.ids"));
    assert_eq!((texts.len(), ids.len()), (10_000, 10_000));
    for (text, ids) in texts.iter().zip(&ids) {
        let mut got = vec![BOS];
        got.extend(strings.tokenize(text).unwrap());
        got.push(EOS);
        assert_eq!(&got, ids, "{text:?}");
        assert_eq!(strings.encode(text).unwrap().num_tokens, ids.len());
    }
    // The other configurations differ only where a text holds a special token.
    for name in ["sd1", "sd2"] {
        let tokenizer = tokenizer(name);
        let mut expected = ids.clone();
        for (row, ids) in
            fixture.numbers(&format!("{name}.changed")).iter().zip(fixture.rows(&format!("{name}.ids")))
        {
            expected[*row as usize] = ids;
        }
        for (text, ids) in texts.iter().zip(&expected) {
            assert_eq!(tokenizer.tokenize(text).unwrap(), ids[1..ids.len() - 1], "{name}: {text:?}");
        }
    }
}

#[test]
fn padded_and_cut_prompts_equal_those_of_transformers() {
    let fixture = Fixture::read();
    let texts = fixture.texts();
    for name in ["strings", "sd1", "sd2"] {
        let tokenizer = tokenizer(name);
        let rows = fixture.numbers(&format!("{name}.padded"));
        let mut cut = 0;
        for (text, ids) in texts.iter().step_by(10).zip(rows.chunks(77)) {
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(tokens.ids, ids, "{name}: {text:?}");
            cut += usize::from(tokens.num_truncated() > 0);
        }
        assert!(cut > 0, "the fixture has long prompts");
    }
}

/// Letters, digits, white space, case and composition as in the regular expressions of transformers, for all of Unicode.
#[test]
fn every_code_point_is_split_as_by_transformers() {
    let tokenizer = tokenizer("strings");
    let blocks = Fixture::read().bytes("strings.blocks");
    let mut different = Vec::new();
    for (block, expected) in blocks.chunks(32).enumerate() {
        let mut hash = Sha256::new();
        let first = block as u32 * 4096;
        for line in (first..first + 4096).step_by(256) {
            let text: String =
                (line..line + 256).filter_map(char::from_u32).map(|c| format!("a{c}1 ")).collect();
            let words = tokenizer.tokenize(&text).unwrap();
            for id in [BOS].iter().chain(&words).chain(&[EOS]) {
                hash.update((*id as u16).to_le_bytes());
            }
        }
        if hash.finalize()[..] != *expected {
            different.push(format!("U+{first:04X}"));
        }
    }
    assert!(different.is_empty(), "blocks {different:?}");
}

#[test]
fn a_prompt_too_long_says_how_much_was_cut() {
    let tokenizer = tokenizer("strings");
    let tokens = tokenizer.encode(&"dog ".repeat(80)).unwrap();
    assert_eq!((tokens.ids.len(), tokens.num_tokens, tokens.num_truncated()), (77, 82, 5));
    assert_eq!((tokens.ids[0], tokens.ids[75], tokens.ids[76]), (BOS, 1929, EOS));
    assert_eq!(tokenizer.token(1929).as_deref(), Some("dog</w>"));
    assert_eq!(tokenizer.token(u32::MAX), None);
    let empty = tokenizer.encode("").unwrap();
    assert_eq!((empty.num_tokens, empty.num_truncated()), (2, 0));
}

/// transformers 5 saves `tokenizer.json` alone.
#[test]
fn tokenizer_json_is_read_like_vocab_and_merges() {
    let dir = checkpoint("strings");
    let folder = dir.path().join("tokenizer");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let merges = read("merges.txt");
    let added = |id: u32, content: &str| serde_json::json!({"id": id, "content": content, "normalized": false, "special": true});
    for pairs in [false, true] {
        let merge = |line: &str| match pairs {
            false => serde_json::json!(line),
            true => serde_json::json!(line.split(' ').collect::<Vec<_>>()),
        };
        let json = serde_json::json!({
            "model": {
                "type": "BPE",
                "vocab": serde_json::from_str::<serde_json::Value>(&read("vocab.json")).unwrap(),
                "merges": merges.lines().skip(1).map(merge).collect::<Vec<_>>(),
            },
            "added_tokens": [added(BOS, "<|startoftext|>"), added(EOS, "<|endoftext|>")],
        });
        let alone = checkpoint("strings");
        for file in ["vocab.json", "merges.txt", "special_tokens_map.json"] {
            std::fs::remove_file(alone.path().join("tokenizer").join(file)).unwrap();
        }
        std::fs::write(alone.path().join("tokenizer/tokenizer.json"), json.to_string()).unwrap();
        let alone = ClipTokenizer::load(&ModelFiles::from_dir(alone.path()).unwrap()).unwrap();
        let both = tokenizer("strings");
        for text in Fixture::read().texts().iter().step_by(20) {
            assert_eq!(alone.encode(text).unwrap(), both.encode(text).unwrap(), "{text:?}");
        }
    }
}

#[test]
fn an_added_token_keeps_its_id() {
    for (file, json) in [
        ("added_tokens.json", r#"{"<cat-toy>": 49408}"#),
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": {"49408": {"content": "<cat-toy>"}}, "model_max_length": 1e30}"#,
        ),
    ] {
        let dir = checkpoint("sd1");
        std::fs::write(dir.path().join("tokenizer").join(file), json).unwrap();
        let tokenizer = ClipTokenizer::load(&ModelFiles::from_dir(dir.path()).unwrap()).unwrap();
        assert_eq!(tokenizer.tokenize("a <cat-toy>").unwrap(), [320, 49408], "{file}");
        assert_eq!(tokenizer.max_length(), 77);
    }
}

#[test]
fn hostile_files_are_refused_by_name() {
    let cases: [(&str, &[u8], &str); 15] = [
        ("vocab.json", b"", "vocab.json"),
        ("vocab.json", b"[1, 2]", "vocab.json"),
        ("vocab.json", br#"{"a": -1}"#, "vocab.json"),
        ("vocab.json", br#"{"a": 4294967296}"#, "vocab.json"),
        ("vocab.json", b"{}", "bos_token"),
        ("merges.txt", b"\xff\xfe", "merges.txt"),
        ("merges.txt", b"one\n", "line 1: \"one\" is not a pair"),
        ("merges.txt", b"a b c\n", "not a pair"),
        ("merges.txt", b"a zzzzzz\n", "merges.txt"),
        ("merges.txt", "a \u{1F600}\n".as_bytes(), "merges.txt"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json"),
        ("tokenizer_config.json", br#"{"bos_token": 3}"#, "expected a token"),
        ("tokenizer_config.json", br#"{"model_max_length": 2}"#, "model_max_length"),
        ("tokenizer_config.json", br#"{"padding_side": "left"}"#, "padding_side"),
        ("special_tokens_map.json", br#"{"pad_token": "[PAD]"}"#, "pad_token"),
    ];
    for (file, content, says) in cases {
        let dir = checkpoint("strings");
        std::fs::write(dir.path().join("tokenizer").join(file), content).unwrap();
        let error = ClipTokenizer::load(&ModelFiles::from_dir(dir.path()).unwrap()).err();
        let error = error.unwrap_or_else(|| panic!("{file} {:?}", String::from_utf8_lossy(content)));
        assert!(matches!(error, Error::Malformed { .. } | Error::UnsupportedConfig { .. }));
        assert!(error.to_string().contains(says), "{error}");
    }
}

static STRINGS: LazyLock<ClipTokenizer> = LazyLock::new(|| tokenizer("strings"));

proptest! {
    #[test]
    fn any_text_is_tokenised(text in any::<String>()) {
        let tokens = STRINGS.encode(&text).unwrap();
        prop_assert_eq!(tokens.ids.len(), 77);
        prop_assert!(tokens.ids.iter().all(|&id| id <= EOS));
        prop_assert!(tokens.ids.contains(&EOS) && tokens.num_tokens >= 2);
        prop_assert_eq!(tokens.num_tokens, STRINGS.tokenize(&text).unwrap().len() + 2);
    }

    #[test]
    fn case_and_white_space_do_not_matter(words in proptest::collection::vec("[a-z]{1,8}|[0-9]{1,4}", 1..12)) {
        let plain = STRINGS.tokenize(&words.join(" ")).unwrap();
        let spaced = format!("\t {} \n", words.join(" \u{a0}\t").to_uppercase());
        prop_assert_eq!(STRINGS.tokenize(&spaced).unwrap(), plain);
    }

    #[test]
    fn words_are_encoded_on_their_own(left in "[a-z]{0,8}", right in "[a-z]{0,8}") {
        let both = STRINGS.tokenize(&format!("{left} {right}")).unwrap();
        let apart = [STRINGS.tokenize(&left).unwrap(), STRINGS.tokenize(&right).unwrap()].concat();
        prop_assert_eq!(both, apart);
    }
}

/// A checkpoint folder with CLIP's vocabulary and the configuration `name`; the rest of it is empty.
fn checkpoint(name: &str) -> tempfile::TempDir {
    let dir = common::empty_checkpoint();
    clip_vocabulary::write(dir.path());
    let (config, map) = Fixture::read().config(name);
    common::write(&dir, "tokenizer/tokenizer_config.json", config.as_bytes());
    common::write(&dir, "tokenizer/special_tokens_map.json", map.as_bytes());
    dir
}

struct Fixture(Vec<u8>);

impl Fixture {
    fn read() -> Self {
        Self(clip_vocabulary::unpack("cases.safetensors.gz"))
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    /// `u16` or `i32` numbers.
    fn numbers(&self, name: &str) -> Vec<u32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        match tensor.dtype().bitsize() / 8 {
            2 => tensor.data().as_chunks().0.iter().map(|&b| u16::from_le_bytes(b).into()).collect(),
            _ => tensor.data().as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect(),
        }
    }

    fn rows(&self, name: &str) -> Vec<Vec<u32>> {
        split(&self.numbers(name), &self.numbers(&format!("{name}_ends")))
    }

    fn texts(&self) -> Vec<String> {
        let rows = split(&self.bytes("text"), &self.numbers("text_ends"));
        rows.into_iter().map(|row| String::from_utf8(row).unwrap()).collect()
    }

    /// `tokenizer_config.json` and `special_tokens_map.json`.
    fn config(&self, name: &str) -> (String, String) {
        let (_, metadata) = SafeTensors::read_metadata(&self.0).unwrap();
        let configs = &metadata.metadata().as_ref().unwrap()["configs"];
        let configs: serde_json::Value = serde_json::from_str(configs).unwrap();
        (configs[name][0].to_string(), configs[name][1].to_string())
    }
}

fn split<T: Clone>(values: &[T], ends: &[u32]) -> Vec<Vec<T>> {
    let starts = [0].into_iter().chain(ends.iter().copied());
    starts.zip(ends).map(|(start, &end)| values[start as usize..end as usize].to_vec()).collect()
}
