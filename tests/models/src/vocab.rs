//! The demo model's vocabulary: two control tokens, the 256 GPT-2 bytes, and the words of its questions.

use std::collections::HashMap;

/// Begin of sequence.
pub const BOS: u32 = 0;
/// End of sequence: the model's last token of every answer.
pub const EOS: u32 = 1;

/// The weekdays, Monday first.
pub const WEEKDAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// The words of the questions, as they are split off: with their leading space where they have one.
const WORDS: [&str; 23] = [
    "What",
    " is",
    " plus",
    "Add",
    " and",
    " minus",
    "Take",
    " from",
    " day",
    " days",
    " after",
    " before",
    "It",
    " What",
    " it",
    " later",
    " was",
    " ago",
    "Spell",
    " backwards",
    "Write",
    " in",
    " reverse",
];

/// The one merge of the demo tokenizer. It can never fire (its left half is no single byte), but loaders refuse an
/// empty list, and some writers give an empty array the wrong type.
pub const MERGE: &str = "\u{120}day s";

/// Renders each byte with a printable character, as the GPT-2 tokenizer stores it: byte 0x20 is `Ġ`.
pub fn byte_symbol(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        // The 68 bytes that do not print are numbered from U+0100 in order.
        0..=0x20 => shifted(u32::from(byte)),
        0x7f..=0xa0 => shifted(u32::from(byte) - 0x7f + 33),
        0xad => shifted(67),
    }
}

fn shifted(index: u32) -> char {
    char::from_u32(0x100 + index).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Rewrites text into the symbols under which the vocabulary stores it.
pub fn symbols(text: &str) -> String {
    text.bytes().map(byte_symbol).collect()
}

/// The token list in order of id, as it goes into `tokenizer.ggml.tokens`.
pub fn tokens() -> Vec<String> {
    let mut list = vec!["<s>".to_owned(), "</s>".to_owned()];
    list.extend((0..=255).map(|byte| byte_symbol(byte).to_string()));
    list.extend(WORDS.iter().map(|word| symbols(word)));
    list.extend(WEEKDAYS.iter().map(|day| symbols(&format!(" {day}"))));
    list.extend(WEEKDAYS.iter().map(|day| (*day).to_owned()));
    list
}

/// `tokenizer.ggml.token_type` of a vocabulary of `count` tokens that starts with BOS and EOS: 3 is control, 1 normal.
pub fn token_types(count: usize) -> Vec<i32> {
    (0..count).map(|id| if id < 2 { 3 } else { 1 }).collect()
}

/// Encodes the demo's own questions and answers. An engine's tokenizer must agree with it on them; for other text
/// (accents, tabs, …) use a full tokenizer.
#[derive(Debug)]
pub struct Encoder {
    words: HashMap<String, u32>,
    names: Vec<String>,
}

impl Default for Encoder {
    fn default() -> Self {
        let names = tokens();
        let words = names
            .iter()
            .zip(0..)
            .skip(2)
            .map(|(name, id): (&String, u32)| (name.clone(), id))
            .collect();
        Self { words, names }
    }
}

impl Encoder {
    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Never true; here because `len` is.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The token ids of `text`, without BOS or EOS.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        for piece in pieces(text) {
            if let Some(id) = self.words.get(&symbols(piece)) {
                ids.push(*id);
            } else {
                ids.extend(piece.bytes().map(|byte| u32::from(byte) + 2));
            }
        }
        ids
    }

    /// The text of `ids`; control tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let by_symbol: HashMap<char, u8> = (0..=255).map(|byte| (byte_symbol(byte), byte)).collect();
        let mut bytes = Vec::new();
        for id in ids.iter().filter(|id| **id > EOS) {
            let name = usize::try_from(*id).ok().and_then(|id| self.names.get(id));
            bytes.extend(
                name.iter()
                    .flat_map(|name| name.chars())
                    .filter_map(|c| by_symbol.get(&c)),
            );
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether `word`, with or without a space before it, is one token. The model never sees the letters of such
    /// a word, so nobody may ask it to spell one.
    pub fn is_one_token(&self, word: &str) -> bool {
        self.words.contains_key(word) || self.words.contains_key(&symbols(&format!(" {word}")))
    }
}

/// Splits text as the `llama3` pre-tokenizer does, for ASCII text: a word with the one character before it, up to
/// three digits, punctuation with the line ends after it, or white space.
fn pieces(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let at = |i: usize| bytes.get(i).copied().unwrap_or(0);
    let run =
        |from: usize, of: fn(u8) -> bool| (from..bytes.len()).find(|i| !of(at(*i))).unwrap_or(bytes.len());
    let letter: fn(u8) -> bool = |b| b.is_ascii_alphabetic();
    let digit: fn(u8) -> bool = |b| b.is_ascii_digit();
    let line_end: fn(u8) -> bool = |b| matches!(b, b'\r' | b'\n');
    let space: fn(u8) -> bool = |b| b.is_ascii_whitespace();
    let other: fn(u8) -> bool = |b| !b.is_ascii_alphanumeric() && !b.is_ascii_whitespace();
    let mut found = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let first = at(start);
        let end = if letter(first) || (!digit(first) && !line_end(first) && letter(at(start + 1))) {
            run(start + 1, letter)
        } else if digit(first) {
            run(start, digit).min(start + 3)
        } else if other(first) || (first == b' ' && other(at(start + 1))) {
            run(run(start + 1, other), line_end)
        } else {
            run(start, space)
        };
        found.extend(text.get(start..end));
        start = end;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_symbol() {
        let mut all: Vec<char> = (0..=255).map(byte_symbol).collect();
        assert_eq!(all[0x20], 'Ġ');
        assert_eq!(all[usize::from(b'\n')], 'Ċ');
        assert_eq!(all[0xad], '\u{143}');
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 256);
    }

    #[test]
    fn no_token_is_listed_twice() {
        let mut list = tokens();
        let count = list.len();
        assert_eq!(count, 295);
        list.sort();
        list.dedup();
        assert_eq!(list.len(), count);
    }

    #[test]
    fn questions_split_as_the_llama3_pattern_splits_them() {
        assert_eq!(
            pieces("What is 47 plus 5?\n"),
            ["What", " is", " ", "47", " plus", " ", "5", "?\n"]
        );
        assert_eq!(
            pieces("It is Monday. What"),
            ["It", " is", " Monday", ".", " What"]
        );
    }

    #[test]
    fn encoding_and_decoding_give_the_text_back() {
        let encoder = Encoder::default();
        for text in [
            "What is 47 plus 35?\n",
            "Spell cat backwards.\n",
            "Tuesday",
            "It is Friday. What day is it",
        ] {
            assert_eq!(encoder.decode(&encoder.encode(text)), text);
        }
        assert_eq!(encoder.encode("Monday").len(), 1);
        assert_eq!(encoder.encode("82"), [u32::from(b'8') + 2, u32::from(b'2') + 2]);
    }

    #[test]
    fn a_word_of_the_vocabulary_is_known_as_one_token() {
        let encoder = Encoder::default();
        assert!(encoder.is_one_token("day") && encoder.is_one_token("What"));
        assert!(!encoder.is_one_token("cat"));
    }
}
