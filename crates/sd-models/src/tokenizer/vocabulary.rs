//! The tokens and the merges that build them.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use tokenizers::AddedToken;

use super::special_tokens::TokenObject;
use crate::{Error, ModelFiles, Result};

/// A byte-pair vocabulary, and where it was read.
pub(super) struct Vocabulary {
    /// The file that holds the tokens.
    pub file: &'static str,
    /// The file that holds the merges.
    pub merges_file: &'static str,
    pub ids: HashMap<String, u32>,
    /// Pairs of tokens, the most frequent first.
    pub merges: Vec<(String, String)>,
    /// Tokens that are not built from merges, by the id they had when they were saved.
    pub added_tokens: BTreeMap<u32, AddedToken>,
}

const TOKENIZER: &str = "tokenizer/tokenizer.json";
const VOCAB: &str = "tokenizer/vocab.json";
const MERGES: &str = "tokenizer/merges.txt";

impl Vocabulary {
    /// `tokenizer.json`, which transformers 5 writes alone, where there is one; else `vocab.json` and `merges.txt`.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        if files.exists(TOKENIZER) {
            Self::from_tokenizer_json(files)
        } else {
            Self::from_vocab_and_merges(files)
        }
    }

    fn from_vocab_and_merges(files: &ModelFiles) -> Result<Self> {
        let ids = files.read_config(VOCAB)?;
        let bytes = files.read(MERGES)?;
        let malformed = |reason| Error::Malformed { file: files.path_of(MERGES), reason };
        let text = std::str::from_utf8(&bytes).map_err(|e| malformed(e.to_string()))?;
        let lines = text.lines().enumerate();
        let lines = lines.filter(|(_, line)| !line.starts_with("#version") && !line.trim().is_empty());
        let merges = lines.map(|(i, line)| {
            pair(line).ok_or_else(|| malformed(format!("line {}: {line:?} is not a pair of tokens", i + 1)))
        });
        let merges = merges.collect::<Result<_>>()?;
        Ok(Self { file: VOCAB, merges_file: MERGES, ids, merges, added_tokens: BTreeMap::new() })
    }

    fn from_tokenizer_json(files: &ModelFiles) -> Result<Self> {
        let TokenizerJson { model, added_tokens } = files.read_config(TOKENIZER)?;
        let merges = model.merges.into_iter().map(|merge| match merge {
            Merge::Pair(a, b) => Ok((a, b)),
            Merge::Line(line) => pair(&line).ok_or_else(|| Error::Malformed {
                file: files.path_of(TOKENIZER),
                reason: format!("merge {line:?} is not a pair of tokens"),
            }),
        });
        Ok(Self {
            file: TOKENIZER,
            merges_file: TOKENIZER,
            ids: model.vocab,
            merges: merges.collect::<Result<_>>()?,
            added_tokens: added_tokens.into_iter().map(|token| (token.id, token.object.into())).collect(),
        })
    }
}

fn pair(line: &str) -> Option<(String, String)> {
    let (a, b) = line.trim_end().split_once(' ')?;
    (!a.is_empty() && !b.is_empty() && !b.contains(' ')).then(|| (a.to_owned(), b.to_owned()))
}

/// The part of `tokenizer.json` that is read: normalisation and splitting are CLIP's, whatever the file says.
#[derive(Deserialize)]
struct TokenizerJson {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<IndexedToken>,
}

#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a merge: a pair of tokens, or both in one string")]
enum Merge {
    Pair(String, String),
    Line(String),
}

#[derive(Deserialize)]
struct IndexedToken {
    id: u32,
    #[serde(flatten)]
    object: TokenObject,
}
