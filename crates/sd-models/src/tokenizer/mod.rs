//! transformers' `CLIPTokenizer`.

mod special_tokens;
mod vocabulary;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use self::special_tokens::SpecialTokens;
use self::vocabulary::Vocabulary;
use crate::{Error, ModelFiles, Result};

/// The words of a prompt: special tokens, English contractions, runs of letters, single digits, runs of anything else.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's byte-pair encoder: text to the ids that the text encoder takes.
///
/// Text is normalised to NFC, white space folded and letters lowercased; words are split as [CLIP's own pattern] splits
/// them and encoded by merges of their UTF-8 bytes. Any text works: every byte is a token of its own.
///
/// # Source
/// `CLIPTokenizer` of transformers 5, and `CLIPTokenizerFast` of transformers 4, give these ids. The slow `CLIPTokenizer` of
/// transformers 4 differs on unusual text: it first repairs broken encodings and HTML entities (`ftfy`), or, without
/// `ftfy`, removes control characters and accents.
///
/// [CLIP's own pattern]: https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py
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
    /// Loads `tokenizer/`: `vocab.json` and `merges.txt`, or `tokenizer.json`; and the special tokens as
    /// `tokenizer_config.json` and `special_tokens_map.json` name them, where these files are present.
    ///
    /// # Errors
    /// When a file is missing or malformed, a merge or a special token is not in the vocabulary, or the configuration asks
    /// for padding or truncation on the left.
    ///
    /// ```no_run
    /// # fn main() -> sd_models::Result<()> {
    /// let files = sd_models::ModelFiles::from_dir("stable-diffusion-v1-5")?;
    /// let tokens = sd_models::ClipTokenizer::load(&files)?.encode("a photo of a dog")?;
    /// assert_eq!(tokens.ids[..7], [49406, 320, 1125, 539, 320, 1929, 49407]);
    /// assert_eq!((tokens.ids.len(), tokens.num_tokens), (77, 7));
    /// # Ok(())
    /// # }
    /// ```
    pub fn load(files: &ModelFiles) -> Result<Self> {
        let Vocabulary { file, merges_file, ids, merges, mut added_tokens } = Vocabulary::load(files)?;
        let malformed_in = |file, reason| Error::Malformed { file: files.path_of(file), reason };
        let malformed = |reason: String| malformed_in(file, reason);
        let special = SpecialTokens::load(files, &mut added_tokens)?;
        for (field, token) in special.named() {
            if !ids.contains_key(token) && !added_tokens.values().any(|added| added.content == token) {
                return Err(malformed(format!("no token {token:?}, which {field} names")));
            }
        }
        let bpe = BPE::builder()
            .vocab_and_merges(ids.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
            .end_of_word_suffix("</w>".into())
            .continuing_subword_prefix(String::new())
            .unk_token(special.unk.content.clone())
            .build()
            .map_err(|e| malformed_in(merges_file, e.to_string()))?;
        let added = special.to_add(added_tokens);
        let bpe = pipeline(bpe, added).map_err(|e| malformed(e.to_string()))?;
        let id = |token: &str| bpe.token_to_id(token).ok_or_else(|| malformed(format!("no token {token:?}")));
        Ok(Self {
            bos: id(&special.bos.content)?,
            eos: id(&special.eos.content)?,
            pad: id(&special.pad.content)?,
            max_length: special.max_length,
            bpe,
        })
    }

    /// Tokens a prompt is padded or cut to: 77.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// Begin, prompt, end and padding: exactly [`max_length`](Self::max_length) ids. A longer prompt keeps its first
    /// `max_length − 2` tokens, and [`Tokens::num_truncated`] says how many were cut.
    ///
    /// # Errors
    /// When the byte-pair encoder fails, which no text is known to cause.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let words = self.tokenize(text)?;
        let kept = words.len().min(self.max_length - 2);
        let mut ids = Vec::with_capacity(self.max_length);
        ids.push(self.bos);
        ids.extend_from_slice(&words[..kept]);
        ids.push(self.eos);
        ids.resize(self.max_length, self.pad);
        Ok(Tokens { ids, num_tokens: words.len() + 2 })
    }

    /// The ids of the text alone: without begin and end, neither cut nor padded.
    ///
    /// # Errors
    /// When the byte-pair encoder fails, which no text is known to cause.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.bpe.encode_fast(text, false).map_err(|e| Error::Argument {
            argument: "prompt",
            expected: "a text that can be tokenised".into(),
            got: e.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of one token, `</w>` marking a word's end.
    pub fn token(&self, id: u32) -> Option<String> {
        self.bpe.id_to_token(id)
    }
}

/// What comes before the merges, and the tokens that are never split.
fn pipeline(bpe: BPE, added: Vec<tokenizers::AddedToken>) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    tokenizer.with_normalizer(Some(Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))?;
    let split = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    tokenizer.with_pre_tokenizer(Some(PreSequence::new(vec![split.into(), bytes.into()])));
    tokenizer.add_tokens(added)?;
    Ok(tokenizer)
}
