//! Pre-tokenizers: how a text is cut into words before merges apply. Owns the patterns; each is the one llama.cpp uses
//! for the same name.

use super::{TokenizerError, shown};
use regex::Regex;

/// Cuts text into words.
pub(crate) struct PreTokenizer {
    passes: Vec<Regex>,
    /// Whether runs that end in a line break are taken by an alternative of their own.
    line_breaks: bool,
    /// Whether a word that is a token is taken whole, without merges.
    pub(super) ignore_merges: bool,
    /// Whether files of this kind begin a text with BOS unless they say otherwise.
    pub(super) adds_bos: bool,
}

const CONTRACTIONS: &str = "'s|'t|'re|'ve|'m|'ll|'d";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const KNOWN: &[&str] = &[
    "default",
    "gpt-2",
    "phi-2",
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "smaug-bpe",
    "qwen2",
    "deepseek-r1-qwen",
];

impl PreTokenizer {
    pub(crate) fn named(name: &str) -> Result<Self, TokenizerError> {
        let llama3 = |digits: &str| {
            format!(
                r"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+"
            )
        };
        let (patterns, line_breaks) = match name {
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "smaug-bpe" => {
                (vec![llama3(r"\p{N}{1,3}")], true)
            }
            "qwen2" | "deepseek-r1-qwen" => (vec![llama3(r"\p{N}")], true),
            "gpt-2" | "phi-2" => (vec![GPT2.to_owned()], false),
            "default" => (
                vec![
                    r"[\p{P}\$\+<=>\^~\|]+".to_owned(),
                    GPT2.to_owned(),
                    r"\p{N}+".to_owned(),
                    "[0-9][0-9][0-9]".to_owned(),
                ],
                false,
            ),
            other => {
                return Err(TokenizerError::UnknownPre {
                    pre: shown(other),
                    known: KNOWN.join(", "),
                });
            }
        };
        let whole = matches!(name, "llama3" | "llama-v3" | "llama-bpe" | "falcon3");
        Ok(Self {
            passes: patterns
                .iter()
                .map(|pattern| Regex::new(pattern))
                .collect::<Result<_, _>>()?,
            line_breaks,
            ignore_merges: whole,
            adds_bos: whole,
        })
    }

    /// The words of `text`; together they are the text.
    pub(crate) fn words<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut words = vec![text];
        for pass in &self.passes {
            words = words
                .into_iter()
                .flat_map(|word| self.split(pass, word))
                .collect();
        }
        words
    }

    fn split<'t>(&self, pass: &Regex, text: &'t str) -> Vec<&'t str> {
        let mut words = Vec::new();
        let mut at = 0;
        while let Some(found) = pass.find_at(text, at) {
            if found.is_empty() {
                break;
            }
            let end = self.given_back(text, found.start(), found.end());
            // What no alternative takes stays a word of its own.
            words.extend(text.get(at..found.start()).filter(|gap| !gap.is_empty()));
            words.extend(text.get(found.start()..end));
            at = end;
        }
        words.extend(text.get(at..).filter(|rest| !rest.is_empty()));
        words
    }

    /// Every pattern ends in `\s+(?!\S)|\s+`: of a run of white space before a word, the last character belongs to what
    /// follows. `regex` has no look-ahead, so this is done by hand.
    fn given_back(&self, text: &str, start: usize, end: usize) -> usize {
        let run = text.get(start..end).unwrap_or("");
        let Some(last) = run.chars().next_back() else {
            return end;
        };
        let only_space = run.chars().all(char::is_whitespace);
        let own_alternative = self.line_breaks && matches!(last, '\r' | '\n');
        if only_space && !own_alternative && end < text.len() && run.len() > last.len_utf8() {
            end - last.len_utf8()
        } else {
            end
        }
    }
}
