//! Text to tokens and back, exactly as llama.cpp does it for the same file.
//!
//! Owns: the vocabulary and which tokens are special. An unknown model or pre-tokenizer is an error, never a default.
//! Must not know about models, requests or templates.

mod bpe;
mod detokenizer;
mod pre;
mod spm;

pub(crate) use detokenizer::Detokenizer;

use crate::num::{index, narrow};
use gogrid_gguf::{FieldError, Header};
use std::collections::{HashMap, HashSet};

/// Why a tokenizer can't be built or a text can't be split.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenizerError {
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("tokenizer.ggml.model {model:?} is not supported; gpt2 and llama are")]
    UnknownModel { model: String },
    #[error("tokenizer.ggml.pre {pre:?} is not supported; supported: {known}")]
    UnknownPre { pre: String, known: String },
    #[error("tokenizer.ggml.{field} has {found} entries for {tokens} tokens")]
    Length {
        field: &'static str,
        found: usize,
        tokens: usize,
    },
    #[error("tokenizer.ggml.{field} is {id}, but there are {tokens} tokens")]
    IdOutside {
        field: &'static str,
        id: u32,
        tokens: usize,
    },
    #[error("merge {index} is not two parts with a space between")]
    Merge { index: usize },
    #[error("the model has {rows} embeddings for {tokens} tokens")]
    Vocabulary { rows: u32, tokens: usize },
    #[error("no token stands for byte {byte:#04x}")]
    NoByte { byte: u8 },
    #[error("pattern: {0}")]
    Pattern(#[from] regex::Error),
}

impl TokenizerError {
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::UnknownModel { .. } | Self::UnknownPre { .. } => "UnsupportedTokenizer",
            _ => "InvalidModel",
        }
    }
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Splits text into tokens of one model.
pub(crate) struct Tokenizer {
    vocabulary: Vocabulary,
    algorithm: Algorithm,
    /// Special tokens, longest first.
    special: Vec<(String, u32, Kind)>,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    ends: HashSet<u32>,
}

enum Algorithm {
    Bpe(bpe::Bpe),
    Spm(spm::Spm),
}

/// Tokens by number and by text.
pub(crate) struct Vocabulary {
    texts: Vec<Box<str>>,
    kinds: Vec<Kind>,
    ids: HashMap<Box<str>, u32>,
}

impl Vocabulary {
    fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    fn len(&self) -> usize {
        self.texts.len()
    }

    fn text(&self, token: u32) -> &str {
        self.texts.get(index(token)).map_or("", |text| text)
    }

    fn kind(&self, token: u32) -> Kind {
        self.kinds.get(index(token)).copied().unwrap_or(Kind::Unused)
    }

    fn from_header(header: &Header) -> Result<Self, TokenizerError> {
        let tokens = header.strings("tokenizer.ggml.tokens")?;
        let kinds = match header.get("tokenizer.ggml.token_type") {
            None => vec![Kind::Normal; tokens.len()],
            Some(_) => header
                .i32s("tokenizer.ggml.token_type")?
                .iter()
                .map(|kind| match kind {
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    _ => Kind::Normal,
                })
                .collect(),
        };
        if kinds.len() != tokens.len() {
            return Err(TokenizerError::Length {
                field: "token_type",
                found: kinds.len(),
                tokens: tokens.len(),
            });
        }
        let texts: Vec<Box<str>> = tokens.iter().map(Box::from).collect();
        let ids = texts
            .iter()
            .enumerate()
            .map(|(id, text)| (text.clone(), narrow(id)))
            .collect();
        Ok(Self { texts, kinds, ids })
    }
}

/// Texts of control tokens that end a turn even where the metadata don't say so.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "</s>",
];

impl Tokenizer {
    /// Builds the tokenizer that the file describes.
    pub(crate) fn from_header(header: &Header) -> Result<Self, TokenizerError> {
        let vocabulary = Vocabulary::from_header(header)?;
        let tokens = vocabulary.len();
        let (algorithm, default_bos) = match header.str("tokenizer.ggml.model")? {
            "gpt2" => {
                let bpe = bpe::Bpe::from_header(header, &vocabulary)?;
                let bos = bpe.adds_bos();
                (Algorithm::Bpe(bpe), bos)
            }
            "llama" => (Algorithm::Spm(spm::Spm::from_header(header, &vocabulary)?), true),
            other => return Err(TokenizerError::UnknownModel { model: shown(other) }),
        };
        let id = |field: &'static str| -> Result<Option<u32>, TokenizerError> {
            let key = format!("tokenizer.ggml.{field}");
            if header.get(&key).is_none() {
                return Ok(None);
            }
            let id = header.u32(&key)?;
            if id == u32::MAX {
                return Ok(None);
            }
            if index(id) < tokens {
                Ok(Some(id))
            } else {
                Err(TokenizerError::IdOutside { field, id, tokens })
            }
        };
        let (bos, eos) = (id("bos_token_id")?, id("eos_token_id")?);
        let mut ends: HashSet<u32> = eos
            .into_iter()
            .chain(id("eot_token_id")?)
            .chain(id("eom_token_id")?)
            .collect();
        for text in END_TEXTS {
            ends.extend(
                vocabulary
                    .id(text)
                    .filter(|id| vocabulary.kind(*id) == Kind::Control),
            );
        }
        let mut special: Vec<(String, u32, Kind)> = (0..narrow(tokens))
            .map(|id| (id, vocabulary.kind(id)))
            .filter(|(_, kind)| matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown))
            .map(|(id, kind)| (vocabulary.text(id).to_owned(), id, kind))
            .filter(|(text, ..)| !text.is_empty())
            .collect();
        special.sort_by_key(|(text, id, _)| (std::cmp::Reverse(text.len()), *id));
        Ok(Self {
            add_bos: header.bool_or("tokenizer.ggml.add_bos_token", default_bos)?,
            add_eos: header.bool_or("tokenizer.ggml.add_eos_token", false)?,
            vocabulary,
            algorithm,
            special,
            bos,
            eos,
            ends,
        })
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.vocabulary.len()
    }

    /// Text of a token as it stands in the file.
    pub(crate) fn text(&self, token: u32) -> &str {
        self.vocabulary.text(token)
    }

    /// Whether a token ends a generation.
    pub(crate) fn ends(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Tokens of a prompt: special tokens in the text count as such, and the first token is added where the model wants
    /// it and the text doesn't begin with it.
    pub(crate) fn prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = Vec::new();
        if self.add_bos
            && let Some(bos) = self.bos
            && !text.starts_with(self.text(bos))
        {
            tokens.push(bos);
        }
        tokens.extend(self.encode(text, true)?);
        if self.add_eos {
            tokens.extend(self.eos);
        }
        Ok(tokens)
    }

    /// Tokens of a text; with `control`, texts of control tokens become those tokens.
    pub(crate) fn encode(&self, text: &str, control: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = Vec::new();
        let mut after_special = false;
        let mut first = true;
        for piece in self.partition(text, control) {
            match piece {
                Piece::Token(id) => {
                    tokens.push(id);
                    after_special = true;
                }
                Piece::Text(text) => match &self.algorithm {
                    Algorithm::Bpe(bpe) => bpe.encode(&self.vocabulary, text, &mut tokens)?,
                    Algorithm::Spm(spm) => {
                        spm.encode(&self.vocabulary, text, first || after_special, &mut tokens)?;
                        after_special = false;
                    }
                },
            }
            first = false;
        }
        Ok(tokens)
    }

    /// Cuts special tokens out of a text, longest first, as llama.cpp does.
    fn partition<'t>(&self, text: &'t str, control: bool) -> Vec<Piece<'t>> {
        let mut pieces = vec![Piece::Text(text)];
        for (special, id, kind) in &self.special {
            if (!control && *kind != Kind::UserDefined) || !text.contains(special.as_str()) {
                continue;
            }
            pieces = pieces
                .into_iter()
                .flat_map(|piece| match piece {
                    Piece::Token(_) => vec![piece],
                    Piece::Text(text) => {
                        let mut parts = Vec::new();
                        for (part, fragment) in text.split(special.as_str()).enumerate() {
                            if part > 0 {
                                parts.push(Piece::Token(*id));
                            }
                            parts.push(Piece::Text(fragment));
                        }
                        parts
                    }
                })
                .filter(|piece| !matches!(piece, Piece::Text("")))
                .collect();
        }
        pieces
    }

    /// Bytes of a token in an answer; control tokens have none.
    pub(crate) fn bytes(&self, token: u32) -> Vec<u8> {
        let text = self.vocabulary.text(token);
        match (self.vocabulary.kind(token), &self.algorithm) {
            (Kind::Control | Kind::Unused | Kind::Unknown, _) => Vec::new(),
            (Kind::UserDefined, Algorithm::Bpe(_)) => text.as_bytes().to_vec(),
            (_, Algorithm::Bpe(bpe)) => bpe.bytes(text),
            (kind, Algorithm::Spm(_)) => spm::bytes(text, kind),
        }
    }
}

enum Piece<'t> {
    Text(&'t str),
    Token(u32),
}

/// A name from the file, short and harmless enough for a message.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

#[cfg(test)]
mod tests;
