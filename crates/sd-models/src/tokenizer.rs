//! transformers' `CLIPTokenizer`.

use std::collections::HashMap;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use crate::{Error, ModelFiles, Result};

/// The words of a prompt: special tokens, English contractions, runs of letters, single digits, runs of anything else.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's byte-pair encoder, equal to `CLIPTokenizer` of transformers 5 (which normalises to NFC, folds white space and
/// lowercases; transformers 4 with `ftfy` installed also repaired broken encodings first).
pub struct ClipTokenizer {
    bpe: Tokenizer,
    bos: u32,
    eos: u32,
    pad: u32,
    max_length: usize,
}

/// A tokenised prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// Exactly [`ClipTokenizer::max_length`] ids: begin, prompt, end, padding.
    pub ids: Vec<u32>,
    /// How many tokens the prompt has with begin and end, before anything was cut or padded.
    pub num_tokens: usize,
}

impl Tokens {
    /// How many tokens of the prompt were cut.
    pub fn num_truncated(&self) -> usize {
        self.num_tokens.saturating_sub(self.ids.len())
    }
}

impl ClipTokenizer {
    /// Loads `tokenizer/vocab.json`, `merges.txt` and, where present, `tokenizer_config.json` and
    /// `special_tokens_map.json`.
    ///
    /// # Errors
    /// When a file is missing or malformed, or a merge names a token that the vocabulary lacks.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        let malformed = |file: &str, reason: String| Error::Malformed { file: files.path_of(file), reason };
        let vocab: HashMap<String, u32> = files.read_config("tokenizer/vocab.json")?;
        let bytes = files.read("tokenizer/merges.txt")?;
        let merges =
            std::str::from_utf8(&bytes).map_err(|e| malformed("tokenizer/merges.txt", e.to_string()))?;
        let merges: Vec<(String, String)> = merges
            .lines()
            .filter(|line| !line.starts_with("#version") && !line.trim().is_empty())
            .map(|line| {
                let pair = line.split_once(' ').map(|(a, b)| (a.to_owned(), b.trim_end().to_owned()));
                pair.ok_or_else(|| {
                    malformed("tokenizer/merges.txt", format!("{line:?} is not a pair of tokens"))
                })
            })
            .collect::<Result<_>>()?;
        let special = SpecialTokens::load(files)?;
        let id = |field: &str, token: &str| {
            let reason = || format!("no token {token:?}, which {field} names");
            vocab.get(token).copied().ok_or_else(|| malformed("tokenizer/vocab.json", reason()))
        };
        let (bos, eos, pad) =
            (id("bos_token", &special.bos)?, id("eos_token", &special.eos)?, id("pad_token", &special.pad)?);
        let added: Vec<AddedToken> =
            [&special.bos, &special.eos, &special.pad].map(|t| AddedToken::from(t.clone(), true)).into();
        let bpe = build(vocab.into_iter().collect(), merges, &special, added)
            .map_err(|e| malformed("tokenizer/merges.txt", e.to_string()))?;
        Ok(Self { bpe, bos, eos, pad, max_length: special.max_length })
    }

    /// Tokens a prompt is padded or cut to: 77.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Tokenises any text. A longer one is cut after `max_length − 1` tokens, and [`Tokens::num_tokens`] says so.
    ///
    /// # Errors
    /// When the byte-pair encoder fails, which no text is known to cause.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let encoding = self.bpe.encode_fast(text, false).map_err(|e| Error::Argument {
            argument: "prompt",
            expected: "a text that can be tokenised".into(),
            got: e.to_string(),
        })?;
        let words = encoding.get_ids();
        let kept = words.len().min(self.max_length - 2);
        let mut ids = Vec::with_capacity(self.max_length);
        ids.push(self.bos);
        ids.extend_from_slice(&words[..kept]);
        ids.push(self.eos);
        ids.resize(self.max_length, self.pad);
        Ok(Tokens { ids, num_tokens: words.len() + 2 })
    }

    /// The text of one token, `</w>` marking a word's end.
    pub fn token(&self, id: u32) -> Option<String> {
        self.bpe.id_to_token(id)
    }
}

fn build(
    vocab: tokenizers::models::bpe::Vocab,
    merges: Vec<(String, String)>,
    special: &SpecialTokens,
    added: Vec<AddedToken>,
) -> tokenizers::Result<Tokenizer> {
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .end_of_word_suffix("</w>".into())
        .continuing_subword_prefix(String::new())
        .unk_token(special.unk.clone())
        .build()?;
    let mut tokenizer = Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    tokenizer.with_normalizer(Some(Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))?;
    let split = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    tokenizer.with_pre_tokenizer(Some(PreSequence::new(vec![split.into(), bytes.into()])));
    tokenizer.add_special_tokens(added)?;
    Ok(tokenizer)
}

/// What the tokenizer's two small files say.
struct SpecialTokens {
    bos: String,
    eos: String,
    pad: String,
    unk: String,
    max_length: usize,
}

impl SpecialTokens {
    fn load(files: &ModelFiles) -> Result<Self> {
        let read = |file: &str| -> Result<serde_json::Value> {
            if files.exists(file) { files.read_config(file) } else { Ok(serde_json::Value::Null) }
        };
        let map = read("tokenizer/special_tokens_map.json")?;
        let config = read("tokenizer/tokenizer_config.json")?;
        // A token is a string, or an object with its `content`.
        let token = |field: &str| {
            let text =
                |v: &serde_json::Value| v.as_str().or_else(|| v.get("content")?.as_str()).map(String::from);
            [&config, &map].iter().find_map(|json| text(json.get(field)?))
        };
        let end = "<|endoftext|>";
        let max_length = config.get("model_max_length").and_then(serde_json::Value::as_u64).unwrap_or(77);
        if !(3..=1024).contains(&max_length) {
            return Err(Error::UnsupportedConfig {
                file: files.path_of("tokenizer/tokenizer_config.json"),
                field: "model_max_length".into(),
                got: max_length.to_string(),
                expected: "3 to 1024".into(),
            });
        }
        Ok(Self {
            bos: token("bos_token").unwrap_or_else(|| "<|startoftext|>".into()),
            eos: token("eos_token").unwrap_or_else(|| end.into()),
            pad: token("pad_token").unwrap_or_else(|| end.into()),
            unk: token("unk_token").unwrap_or_else(|| end.into()),
            max_length: max_length as usize,
        })
    }
}
