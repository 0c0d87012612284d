//! SentencePiece BPE (`tokenizer.ggml.model = llama`). Owns scores, the space mark and byte fallback.

use super::{Kind, TokenizerError, Vocabulary};
use gogrid_gguf::Header;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

pub(super) struct Spm {
    scores: Vec<f32>,
    space_prefix: bool,
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
}

const MARK: char = '\u{2581}';

struct Symbol {
    start: usize,
    end: usize,
    before: Option<usize>,
    after: Option<usize>,
}

/// Two neighbours that make a token; best score first, then leftmost.
struct Pair {
    score: f32,
    left: usize,
    start: usize,
    end: usize,
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Pair {}
impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
            .then(other.end.cmp(&self.end))
    }
}

impl Spm {
    pub(super) fn from_header(header: &Header, vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        let scores = header.f32s("tokenizer.ggml.scores")?.to_vec();
        if scores.len() != vocabulary.len() {
            let tokens = vocabulary.len();
            return Err(TokenizerError::Length {
                field: "scores",
                found: scores.len(),
                tokens,
            });
        }
        let bytes = (0..=u8::MAX)
            .map(|byte| vocabulary.id(&format!("<0x{byte:02X}>")))
            .collect();
        let space_prefix = header.bool_or("tokenizer.ggml.add_space_prefix", true)?;
        let unknown = header.u32_or("tokenizer.ggml.unknown_token_id", 0)?;
        let unknown = Some(unknown).filter(|id| vocabulary.kind(*id) == Kind::Unknown);
        Ok(Self {
            scores,
            space_prefix,
            bytes,
            unknown,
        })
    }

    pub(super) fn encode(
        &self,
        vocabulary: &Vocabulary,
        text: &str,
        begins: bool,
        into: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        if text.is_empty() {
            return Ok(());
        }
        let mut marked = String::with_capacity(text.len() + 3);
        if self.space_prefix && begins {
            marked.push(MARK);
        }
        marked.extend(
            text.chars()
                .map(|letter| if letter == ' ' { MARK } else { letter }),
        );
        for (start, end) in self.merge(vocabulary, &marked) {
            let piece = marked.get(start..end).unwrap_or("");
            if let Some(id) = vocabulary.id(piece) {
                into.push(id);
                continue;
            }
            for byte in piece.bytes() {
                let id = self
                    .bytes
                    .get(usize::from(byte))
                    .copied()
                    .flatten()
                    .or(self.unknown);
                into.push(id.ok_or(TokenizerError::NoByte { byte })?);
            }
        }
        Ok(())
    }

    fn merge(&self, vocabulary: &Vocabulary, text: &str) -> Vec<(usize, usize)> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(place, (start, letter))| Symbol {
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
        let push = |queue: &mut BinaryHeap<Pair>, symbols: &[Symbol], left: usize| {
            let Some(a) = symbols.get(left) else { return };
            let Some(b) = a.after.and_then(|right| symbols.get(right)) else {
                return;
            };
            let found = text.get(a.start..b.end).and_then(|piece| vocabulary.id(piece));
            if let Some(score) = found.and_then(|id| self.scores.get(crate::num::index(id))) {
                queue.push(Pair {
                    score: *score,
                    left,
                    start: a.start,
                    end: b.end,
                });
            }
        };
        for left in 0..symbols.len() {
            push(&mut queue, &symbols, left);
        }
        while let Some(Pair { left, start, end, .. }) = queue.pop() {
            // Stale unless both sides are as they were when the pair was found.
            let Some((right, middle)) = symbols
                .get(left)
                .filter(|s| s.start == start && s.end > s.start)
                .and_then(|s| Some((s.after?, s.end)))
            else {
                continue;
            };
            let Some(after) = symbols
                .get(right)
                .filter(|s| s.start == middle && s.end == end && s.end > s.start)
                .map(|s| s.after)
            else {
                continue;
            };
            if let Some(symbol) = symbols.get_mut(left) {
                (symbol.end, symbol.after) = (end, after);
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
        symbols
            .iter()
            .filter(|s| s.end > s.start)
            .map(|s| (s.start, s.end))
            .collect()
    }
}

/// Bytes of a token in an answer.
pub(super) fn bytes(text: &str, kind: Kind) -> Vec<u8> {
    if kind == Kind::Byte {
        let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        return digits
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .into_iter()
            .collect();
    }
    text.replace(MARK, " ").into_bytes()
}
