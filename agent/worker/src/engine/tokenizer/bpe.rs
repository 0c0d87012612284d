//! Byte-level BPE (`tokenizer.ggml.model = gpt2`). Owns merges and the byte alphabet.

use super::pre::PreTokenizer;
use super::{TokenizerError, Vocabulary};
use crate::num::{index, narrow};
use gogrid_gguf::{FieldError, Header};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

pub(super) struct Bpe {
    pre: PreTokenizer,
    /// Rank and result of each pair of symbols.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Symbols: the vocabulary's tokens first, then texts that only occur in merges.
    extra: Vec<Box<str>>,
    /// Symbol of each character that is a symbol.
    letters: HashMap<char, u32>,
    alphabet: Vec<char>,
    bytes: HashMap<char, u8>,
    ignore_merges: bool,
}

/// A character that is no symbol: it never merges.
const NONE: u32 = u32::MAX;

impl Bpe {
    pub(super) fn from_header(header: &Header, vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        let name = match header.str("tokenizer.ggml.pre") {
            Err(FieldError::Missing { .. }) => "(missing)",
            found => found?,
        };
        let pre = PreTokenizer::named(name)?;
        let alphabet = alphabet();
        let bytes = (0..=u8::MAX)
            .zip(&alphabet)
            .map(|(byte, letter)| (*letter, byte))
            .collect();
        let ignore_merges = pre.ignore_merges || header.bool_or("tokenizer.ggml.ignore_merges", false)?;
        let mut bpe = Self {
            pre,
            merges: HashMap::new(),
            extra: Vec::new(),
            letters: HashMap::new(),
            alphabet,
            bytes,
            ignore_merges,
        };
        bpe.read_merges(header, vocabulary)?;
        for (id, text) in vocabulary.texts.iter().enumerate() {
            let mut letters = text.chars();
            if let (Some(letter), None) = (letters.next(), letters.next()) {
                // The lookup by text wins where a text occurs twice.
                bpe.letters
                    .insert(letter, vocabulary.id(text).unwrap_or(narrow(id)));
            }
        }
        Ok(bpe)
    }

    fn read_merges(&mut self, header: &Header, vocabulary: &Vocabulary) -> Result<(), TokenizerError> {
        let merges = match header.strings("tokenizer.ggml.merges") {
            Ok(merges) => merges,
            // A vocabulary without merges: some writers leave the key out, some store an empty array of another type.
            Err(FieldError::Missing { .. }) => return Ok(()),
            Err(error) => {
                let empty = matches!(
                    header.get("tokenizer.ggml.merges"),
                    Some(gogrid_gguf::Value::Array(array)) if array.is_empty()
                );
                return if empty { Ok(()) } else { Err(error.into()) };
            }
        };
        let mut extra_ids: HashMap<Box<str>, u32> = HashMap::new();
        for (rank, merge) in merges.iter().enumerate() {
            // The space that separates is the first one after the first character, as in llama.cpp.
            let mut places = merge
                .char_indices()
                .skip(1)
                .filter(|(_, c)| *c == ' ')
                .map(|(at, _)| at);
            let (left, right) = places
                .next()
                .and_then(|at| Some((merge.get(..at)?, merge.get(at + 1..)?)))
                .ok_or(TokenizerError::Merge { index: rank })?;
            let mut symbol = |text: &str| {
                vocabulary.id(text).unwrap_or_else(|| {
                    let next = narrow(vocabulary.len() + self.extra.len());
                    *extra_ids.entry(text.into()).or_insert_with(|| {
                        self.extra.push(text.into());
                        next
                    })
                })
            };
            let pair = (symbol(left), symbol(right));
            let merged = symbol(&format!("{left}{right}"));
            self.merges.entry(pair).or_insert((narrow(rank), merged));
        }
        for (text, id) in extra_ids {
            let mut letters = text.chars();
            if let (Some(letter), None) = (letters.next(), letters.next()) {
                self.letters.insert(letter, id);
            }
        }
        Ok(())
    }

    pub(super) fn adds_bos(&self) -> bool {
        self.pre.adds_bos
    }

    pub(super) fn encode(
        &self,
        vocabulary: &Vocabulary,
        text: &str,
        into: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        for word in self.pre.words(text) {
            let word: String = word
                .bytes()
                .map(|byte| self.alphabet.get(usize::from(byte)).copied().unwrap_or('?'))
                .collect();
            if self.ignore_merges
                && let Some(id) = vocabulary.id(&word)
            {
                into.push(id);
                continue;
            }
            for symbol in self.merge(&word) {
                if index(symbol.id) < vocabulary.len() {
                    into.push(symbol.id);
                    continue;
                }
                // No token for the whole symbol: its bytes one by one.
                for letter in word.get(symbol.start..symbol.end).unwrap_or("").chars() {
                    let id = self
                        .letters
                        .get(&letter)
                        .filter(|id| index(**id) < vocabulary.len());
                    let byte = self.bytes.get(&letter).copied().unwrap_or_default();
                    into.push(*id.ok_or(TokenizerError::NoByte { byte })?);
                }
            }
        }
        Ok(())
    }

    /// Merges neighbours, lowest rank first and leftmost among equals, in O(n log n).
    fn merge(&self, word: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = word
            .char_indices()
            .enumerate()
            .map(|(place, (start, letter))| Symbol {
                id: self.letters.get(&letter).copied().unwrap_or(NONE),
                start,
                end: start + letter.len_utf8(),
                before: place.checked_sub(1),
                after: Some(place + 1),
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.after = None;
        }
        let mut queue = BinaryHeap::new();
        let push = |queue: &mut BinaryHeap<_>, symbols: &[Symbol], left: usize| {
            let (Some(a), Some(right)) = (
                symbols.get(left),
                symbols.get(left).and_then(|symbol| symbol.after),
            ) else {
                return;
            };
            let Some(b) = symbols.get(right) else { return };
            if let Some((rank, merged)) = self.merges.get(&(a.id, b.id)) {
                queue.push(Reverse((*rank, left, a.id, b.id, *merged)));
            }
        };
        for left in 0..symbols.len() {
            push(&mut queue, &symbols, left);
        }
        while let Some(Reverse((_, left, a, b, merged))) = queue.pop() {
            // Stale if either side has merged since.
            let Some(right) = symbols
                .get(left)
                .filter(|symbol| symbol.alive() && symbol.id == a)
                .and_then(|s| s.after)
            else {
                continue;
            };
            let Some((end, after)) = symbols
                .get(right)
                .filter(|s| s.alive() && s.id == b)
                .map(|s| (s.end, s.after))
            else {
                continue;
            };
            if let Some(symbol) = symbols.get_mut(left) {
                (symbol.id, symbol.end, symbol.after) = (merged, end, after);
            }
            if let Some(gone) = symbols.get_mut(right) {
                gone.end = gone.start;
            }
            if let Some(next) = after.and_then(|after| symbols.get_mut(after)) {
                next.before = Some(left);
            }
            if let Some(before) = symbols.get(left).and_then(|symbol| symbol.before) {
                push(&mut queue, &symbols, before);
            }
            push(&mut queue, &symbols, left);
        }
        symbols.retain(Symbol::alive);
        symbols
    }

    /// Bytes that a token's text stands for; letters outside the alphabet stand for themselves.
    pub(super) fn bytes(&self, text: &str) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(text.len());
        for letter in text.chars() {
            match self.bytes.get(&letter) {
                Some(byte) => bytes.push(*byte),
                None => bytes.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        bytes
    }
}

struct Symbol {
    id: u32,
    start: usize,
    end: usize,
    before: Option<usize>,
    after: Option<usize>,
}

impl Symbol {
    fn alive(&self) -> bool {
        self.end > self.start
    }
}

/// GPT-2's letter for each byte: printable ones stand for themselves, the others are numbered from U+0100.
fn alphabet() -> Vec<char> {
    let mut next = 0x100_u32;
    (0..=u8::MAX)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                let letter = char::from_u32(next).unwrap_or('?');
                next += 1;
                letter
            }
        })
        .collect()
}
