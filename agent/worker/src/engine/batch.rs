//! Continuous batching: which tokens of which sequences go into the next step.
//!
//! Owns: slots, the order of prompts, the end of a generation, and the texts. A sequence joins as soon as a slot is free
//! and leaves when it ends; nothing waits for the longest. Must not know about records, clocks or shares.

use super::model::{Pass, Row};
use super::sampler::Sampler;
use super::tokenizer::{Detokenizer, Tokenizer};
use super::{Engine, EngineError};
use crate::num::{narrow, wide};
use gogrid_agent_core::protocol::{Finish, Sampling};

/// Names a sequence for whoever submitted it.
pub(crate) type Key = u64;

/// Something that happened to a sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// More text.
    Text(Key, String),
    /// It ended.
    Finished(Key, Answer),
}

/// A complete answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) finish: Finish,
    /// Most sequences decoded together with it, itself included.
    pub(crate) batch: u16,
}

struct Sequence {
    key: Key,
    slot: usize,
    prompt: Vec<u32>,
    /// Tokens of the prompt that went through the layers.
    read: usize,
    /// Last generated token, which the next step reads.
    last: Option<u32>,
    generated: u32,
    max_tokens: u32,
    stop: Vec<String>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    text: String,
    /// Bytes of `text` that were handed out.
    sent: usize,
    batch: u16,
}

/// The sequences being decoded.
pub(crate) struct Batch {
    sequences: Vec<Sequence>,
    free: Vec<usize>,
    pass: Option<Pass>,
    generated: u64,
    read: u64,
    rows: u64,
}

impl Batch {
    /// A batch with this many slots.
    pub(crate) fn new(slots: usize) -> Self {
        Self {
            sequences: Vec::new(),
            free: (0..slots).rev().collect(),
            pass: None,
            generated: 0,
            read: 0,
            rows: 0,
        }
    }

    /// Sequences in flight.
    pub(crate) fn len(&self) -> usize {
        self.sequences.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Whether another sequence finds a slot.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether a step was begun and not completed.
    pub(crate) fn in_step(&self) -> bool {
        self.pass.is_some()
    }

    /// Rows of the step under way or just completed.
    pub(crate) fn rows_in_step(&self) -> u64 {
        self.rows
    }

    /// Tokens generated and prompt tokens read so far.
    pub(crate) fn tokens(&self) -> (u64, u64) {
        (self.generated, self.read)
    }

    /// Adds a sequence; the prompt must hold 1 to `context` tokens, and there must be room.
    pub(crate) fn add(&mut self, key: Key, prompt: Vec<u32>, sampling: &Sampling) -> Result<(), EngineError> {
        if prompt.is_empty() {
            return Err(EngineError::Internal("empty prompt"));
        }
        let slot = self.free.pop().ok_or(EngineError::Internal("no free slot"))?;
        self.sequences.push(Sequence {
            key,
            slot,
            prompt,
            read: 0,
            last: None,
            generated: 0,
            max_tokens: sampling.max_tokens.max(1),
            stop: sampling
                .stop
                .iter()
                .filter(|text| !text.is_empty())
                .cloned()
                .collect(),
            sampler: Sampler::new(sampling),
            detokenizer: Detokenizer::default(),
            text: String::new(),
            sent: 0,
            batch: 0,
        });
        Ok(())
    }

    /// Goes on with the step, one layer; begins one when none is under way, with about `rows` rows (every sequence that
    /// is past its prompt gets its row, and prompts half of the bound at least). Returns the events of a completed step.
    pub(crate) fn advance(
        &mut self,
        engine: &mut Engine,
        rows: usize,
    ) -> Result<Option<Vec<Event>>, EngineError> {
        let mut pass = if let Some(pass) = self.pass.take() {
            pass
        } else {
            let rows = self.plan(rows);
            if rows.is_empty() {
                return Ok(Some(Vec::new()));
            }
            self.rows = wide(rows.len());
            engine.model.begin(rows)?
        };
        if !engine.model.advance(&mut pass, &mut engine.cache)? {
            self.pass = Some(pass);
            return Ok(None);
        }
        Ok(Some(self.complete(
            &pass,
            &engine.tokenizer,
            engine.model.vocabulary(),
            engine.cache.context(),
        )))
    }

    /// One row for every sequence past its prompt, the rest of the room for prompts in the order they came.
    fn plan(&mut self, most: usize) -> Vec<Row> {
        let mut rows = Vec::new();
        for sequence in &self.sequences {
            if let Some(token) = sequence.last {
                let position =
                    narrow(sequence.prompt.len()).saturating_add(sequence.generated.saturating_sub(1));
                rows.push(Row {
                    slot: sequence.slot,
                    position,
                    token,
                    scored: true,
                });
            }
        }
        // Half of the room stays for prompts however many decode, or a long batch would starve those that wait.
        let most = most.max(rows.len().saturating_add(most.div_ceil(2).max(1)));
        for sequence in &self.sequences {
            let room = most.saturating_sub(rows.len());
            let prompt = sequence.prompt.iter().enumerate().skip(sequence.read).take(room);
            for (position, token) in prompt {
                let scored = position + 1 == sequence.prompt.len();
                rows.push(Row {
                    slot: sequence.slot,
                    position: narrow(position),
                    token: *token,
                    scored,
                });
            }
        }
        rows
    }

    fn complete(
        &mut self,
        pass: &Pass,
        tokenizer: &Tokenizer,
        vocabulary: usize,
        context: usize,
    ) -> Vec<Event> {
        let mut events = Vec::new();
        let mut taking_part: Vec<usize> = pass.rows().iter().map(|row| row.slot).collect();
        taking_part.sort_unstable();
        taking_part.dedup();
        let together = u16::try_from(taking_part.len()).unwrap_or(u16::MAX);
        for row in pass.rows() {
            if let Some(sequence) = self
                .sequences
                .iter_mut()
                .find(|sequence| sequence.slot == row.slot)
            {
                sequence.batch = sequence.batch.max(together);
                if sequence.last.is_none() {
                    sequence.read += 1;
                    self.read += 1;
                }
            }
        }
        let scored = pass.rows().iter().filter(|row| row.scored);
        for (row, scores) in scored.zip(pass.scores().chunks(vocabulary.max(1))) {
            let Some(place) = self
                .sequences
                .iter()
                .position(|sequence| sequence.slot == row.slot)
            else {
                continue;
            };
            let Some(sequence) = self.sequences.get_mut(place) else {
                continue;
            };
            let token = sequence.sampler.next(scores);
            self.generated += 1;
            match sequence.take(token, tokenizer, context) {
                None => {
                    let text = sequence.sendable();
                    if !text.is_empty() {
                        events.push(Event::Text(sequence.key, text));
                    }
                }
                Some(finish) => {
                    let sequence = self.sequences.remove(place);
                    self.free.push(sequence.slot);
                    events.extend(sequence.finished(finish));
                }
            }
        }
        events
    }
}

impl Sequence {
    /// Takes a generated token; `Some` when the generation is over.
    fn take(&mut self, token: u32, tokenizer: &Tokenizer, context: usize) -> Option<Finish> {
        if tokenizer.ends(token) {
            self.text.push_str(&self.detokenizer.finish());
            return Some(Finish::Stop);
        }
        self.generated = self.generated.saturating_add(1);
        self.last = Some(token);
        let fresh = self.detokenizer.push(tokenizer, token);
        let searched_from = self.text.len();
        self.text.push_str(&fresh);
        if let Some(cut) = self.stop_at(searched_from) {
            self.text.truncate(cut);
            return Some(Finish::Stop);
        }
        let used = wide(self.prompt.len()).saturating_add(u64::from(self.generated));
        if self.generated >= self.max_tokens || used > wide(context) {
            self.text.push_str(&self.detokenizer.finish());
            return Some(Finish::Length);
        }
        None
    }

    /// Where the first stop text begins that ends in the bytes from `from` on.
    fn stop_at(&self, from: usize) -> Option<usize> {
        let starts = self.stop.iter().filter_map(|stop| {
            let mut start = from.saturating_sub(stop.len());
            while !self.text.is_char_boundary(start) {
                start -= 1;
            }
            self.text.get(start..)?.find(stop.as_str()).map(|at| start + at)
        });
        starts.min()
    }

    /// New text, less a tail that might be the beginning of a stop text.
    fn sendable(&mut self) -> String {
        let fresh = self.text.get(self.sent..).unwrap_or("");
        let held = self
            .stop
            .iter()
            .flat_map(|stop| {
                stop.char_indices()
                    .map(|(at, _)| stop.get(..at).unwrap_or(""))
                    .filter(|s| !s.is_empty())
            })
            .filter(|start| fresh.ends_with(start))
            .map(str::len)
            .max()
            .unwrap_or(0);
        let text = fresh
            .get(..fresh.len().saturating_sub(held))
            .unwrap_or("")
            .to_owned();
        self.sent += text.len();
        text
    }

    fn finished(self, finish: Finish) -> Vec<Event> {
        let rest = self.text.get(self.sent..).unwrap_or("").to_owned();
        let answer = Answer {
            prompt_tokens: narrow(self.prompt.len()),
            completion_tokens: self.generated,
            finish,
            batch: self.batch,
            text: self.text,
        };
        let text = (!rest.is_empty()).then_some(Event::Text(self.key, rest));
        text.into_iter()
            .chain([Event::Finished(self.key, answer)])
            .collect()
    }
}

impl Answer {
    /// Length of the text in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.text.len()
    }
}
