//! Begin, end, padding: which tokens they are, and how text matches them.

use std::collections::BTreeMap;

use serde::Deserialize;
use tokenizers::AddedToken;

use crate::{Error, ModelFiles, Result};

/// The length when `model_max_length` names none: that of every CLIP text encoder.
const DEFAULT_MAX_LENGTH: u64 = 77;

/// What `tokenizer_config.json` and `special_tokens_map.json` say.
pub(super) struct SpecialTokens {
    pub bos: AddedToken,
    pub eos: AddedToken,
    pub unk: AddedToken,
    pub pad: AddedToken,
    pub max_length: usize,
}

const CONFIG: &str = "tokenizer/tokenizer_config.json";
const MAP: &str = "tokenizer/special_tokens_map.json";
const ADDED: &str = "tokenizer/added_tokens.json";

impl SpecialTokens {
    /// Reads the special tokens; `added_tokens` gains what the configuration adds.
    ///
    /// As in transformers, `special_tokens_map.json` precedes `tokenizer_config.json` (Stable Diffusion 2 names its padding
    /// there) unless the latter has an `added_tokens_decoder`.
    pub fn load(files: &ModelFiles, added_tokens: &mut BTreeMap<u32, AddedToken>) -> Result<Self> {
        let config: TokenizerConfig = read_or_default(files, CONFIG)?;
        check(files, "padding_side", config.padding_side.as_deref())?;
        check(files, "truncation_side", config.truncation_side.as_deref())?;
        let mut named = config.special_tokens;
        if let Some(decoder) = config.added_tokens_decoder {
            for (id, token) in decoder {
                added_tokens.entry(id).or_insert(token.into());
            }
        } else {
            let map: NamedTokens = read_or_default(files, MAP)?;
            named = map.or(named);
            let added: BTreeMap<String, u32> = read_or_default(files, ADDED)?;
            for (content, id) in added {
                let special = named.contains(&content);
                added_tokens.entry(id).or_insert(AddedToken::from(content, special));
            }
        }
        // A token that was saved with its properties keeps them.
        let token = |named: Option<Token>, default: &str| {
            let token = named.map_or_else(|| AddedToken::from(default, true), Into::into).special(true);
            added_tokens.values().find(|added| added.content == token.content).cloned().unwrap_or(token)
        };
        let max_length = config.model_max_length.and_then(|n| n.as_u64()).unwrap_or(DEFAULT_MAX_LENGTH);
        if !(3..=1024).contains(&max_length) {
            return Err(Error::UnsupportedConfig {
                file: files.path_of(CONFIG),
                field: "model_max_length".into(),
                got: max_length.to_string(),
                expected: "3 to 1024".into(),
            });
        }
        Ok(Self {
            bos: token(named.bos_token, "<|startoftext|>"),
            eos: token(named.eos_token, "<|endoftext|>"),
            unk: token(named.unk_token, "<|endoftext|>"),
            pad: token(named.pad_token, "<|endoftext|>"),
            max_length: max_length as usize,
        })
    }

    /// Field and token of each.
    pub fn named(&self) -> [(&'static str, &str); 4] {
        [
            ("bos_token", &self.bos.content),
            ("eos_token", &self.eos.content),
            ("unk_token", &self.unk.content),
            ("pad_token", &self.pad.content),
        ]
    }

    /// All tokens that text is searched for before it is split, in the order in which they are added: when two are alike,
    /// the properties of the last one count.
    pub fn to_add(&self, added_tokens: BTreeMap<u32, AddedToken>) -> Vec<AddedToken> {
        let mut tokens: Vec<AddedToken> = added_tokens.into_values().collect();
        let saved = tokens.len();
        for token in [&self.bos, &self.eos, &self.unk, &self.pad] {
            if !tokens[..saved].iter().any(|added| added.content == token.content) {
                tokens.push(token.clone());
            }
        }
        tokens
    }
}

fn read_or_default<T: serde::de::DeserializeOwned + Default>(files: &ModelFiles, file: &str) -> Result<T> {
    if files.exists(file) { files.read_config(file) } else { Ok(T::default()) }
}

fn check(files: &ModelFiles, field: &str, side: Option<&str>) -> Result<()> {
    match side {
        None | Some("right") => Ok(()),
        Some(other) => Err(Error::UnsupportedConfig {
            file: files.path_of(CONFIG),
            field: field.into(),
            got: format!("{other:?}"),
            expected: "right".into(),
        }),
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenizerConfig {
    #[serde(flatten)]
    special_tokens: NamedTokens,
    /// A huge number where it is not known.
    model_max_length: Option<serde_json::Number>,
    padding_side: Option<String>,
    truncation_side: Option<String>,
    added_tokens_decoder: Option<BTreeMap<u32, TokenObject>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct NamedTokens {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
}

impl NamedTokens {
    fn or(self, other: Self) -> Self {
        Self {
            bos_token: self.bos_token.or(other.bos_token),
            eos_token: self.eos_token.or(other.eos_token),
            unk_token: self.unk_token.or(other.unk_token),
            pad_token: self.pad_token.or(other.pad_token),
        }
    }

    fn contains(&self, content: &str) -> bool {
        let tokens = [&self.bos_token, &self.eos_token, &self.unk_token, &self.pad_token];
        tokens.into_iter().flatten().any(|token| match token {
            Token::Text(text) => text == content,
            Token::Object(object) => object.content == content,
        })
    }
}

/// A token, by its text alone or with its properties.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a token: a string, or an object with its content")]
enum Token {
    Text(String),
    Object(TokenObject),
}

impl From<Token> for AddedToken {
    fn from(token: Token) -> Self {
        match token {
            Token::Text(text) => Self::from(text, true),
            Token::Object(object) => object.into(),
        }
    }
}

/// A token with its properties: whether it must stand alone, swallows white space, or is searched in normalised text.
#[derive(Deserialize)]
pub(super) struct TokenObject {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl From<TokenObject> for AddedToken {
    fn from(object: TokenObject) -> Self {
        let token = Self::from(object.content, object.special)
            .single_word(object.single_word)
            .lstrip(object.lstrip)
            .rstrip(object.rstrip);
        match object.normalized {
            Some(normalized) => token.normalized(normalized),
            None => token,
        }
    }
}
