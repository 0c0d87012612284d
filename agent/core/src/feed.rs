//! The records of one assignment on their way: read, sent, answered, durable.
//!
//! Owns: which line goes out next, which are outstanding, which answers wait to be written. Every line is answered
//! once; an answer to a line that was not asked is a breach by the worker. Must not read, send or write anything.

use crate::protocol::{MAX_ANSWER_BYTES, MAX_RECORD_BYTES, Outcome, RecordResult};
use crate::results::{Answer, Chunk, Lines, MAX_CHUNK_BYTES, MAX_RANGES, chunks, output_line};
use crate::session::Nanos;
use gogrid_api::assignment::{Checkpoint, LineRange, StagedInput};
use gogrid_api::job::Progress;
use std::collections::{BTreeMap, VecDeque};

/// Records that are asked for ahead of need.
const LOW_WATER: usize = 64;

/// Something is wrong with the input, or with what the worker says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// A staged part holds another number of lines than the order says.
    #[error("staged input {part} holds {found} lines, the order says {ordered}")]
    InputMismatch {
        /// Its number.
        part: usize,
        /// Lines in it.
        found: usize,
        /// Lines according to the order.
        ordered: i32,
    },
    /// The worker speaks of a line that it was not sent, or answers one twice.
    #[error("the worker spoke of line {0}, which it was not to answer")]
    NotAsked(u64),
}

#[derive(Clone, Debug)]
struct Sent {
    at: Nanos,
    started: bool,
    text: String,
}

/// The records of one assignment.
#[derive(Clone, Debug)]
pub struct Feed {
    name: String,
    inputs: Vec<StagedInput>,
    skip: Lines,
    next_input: usize,
    reading: bool,
    queue: VecDeque<(u64, String)>,
    outstanding: BTreeMap<u64, Sent>,
    answered: Lines,
    pending: VecDeque<Answer>,
    pending_since: Option<Nanos>,
    saving: usize,
    checkpoint: Checkpoint,
    done: i64,
    failed: i64,
    tokens: u64,
}

impl Feed {
    /// Nothing read yet. `name` makes the ids of results: the job's uid.
    pub fn new(name: &str, inputs: &[StagedInput], skip: &[LineRange]) -> Self {
        Self {
            name: name.to_owned(),
            inputs: inputs.to_vec(),
            skip: Lines::from_ranges(skip),
            next_input: 0,
            reading: false,
            queue: VecDeque::new(),
            outstanding: BTreeMap::new(),
            answered: Lines::default(),
            pending: VecDeque::new(),
            pending_since: None,
            saving: 0,
            checkpoint: Checkpoint::default(),
            done: 0,
            failed: 0,
            tokens: 0,
        }
    }

    fn bounds(input: &StagedInput) -> (u64, u64) {
        let first = u64::try_from(input.first_line).unwrap_or(1);
        (
            first,
            first
                .saturating_add(u64::try_from(input.records).unwrap_or(1))
                .saturating_sub(1),
        )
    }

    /// The next staged part to read, once; parts whose lines are all answered are passed over.
    pub fn want(&mut self) -> Option<(usize, String)> {
        if self.reading || self.queue.len() >= LOW_WATER {
            return None;
        }
        while let Some(input) = self.inputs.get(self.next_input) {
            let (first, last) = Self::bounds(input);
            if !self.skip.covers(first, last) {
                self.reading = true;
                return Some((self.next_input, input.config_map.clone()));
            }
            self.next_input += 1;
        }
        None
    }

    /// The reading failed and may be tried again.
    pub fn unread(&mut self) {
        self.reading = false;
    }

    /// Takes a staged part's text. Records too long for the protocol are answered at once.
    ///
    /// # Errors
    /// [`FeedError::InputMismatch`].
    pub fn read(&mut self, part: usize, text: &str, now: Nanos) -> Result<(), FeedError> {
        let Some(input) = self.inputs.get(part).filter(|_| part == self.next_input) else {
            return Ok(());
        };
        let found = text.lines().count();
        if u64::try_from(found).ok() != u64::try_from(input.records).ok() {
            return Err(FeedError::InputMismatch {
                part,
                found,
                ordered: input.records,
            });
        }
        let (first, _) = Self::bounds(input);
        self.reading = false;
        self.next_input += 1;
        let mut long = vec![];
        for (line, record) in (first..).zip(text.lines()) {
            if self.skip.contains(line) {
                continue;
            }
            if record.len() > MAX_RECORD_BYTES {
                long.push((line, record.len()));
            } else {
                self.queue.push_back((line, record.to_owned()));
            }
        }
        for (line, length) in long {
            let message =
                format!("line {line} is {length} bytes long: it must be at most {MAX_RECORD_BYTES}");
            self.refuse(line, "RecordTooLong", message, now);
        }
        Ok(())
    }

    /// Answers a line that never reached a worker.
    pub fn refuse(&mut self, line: u64, code: &str, message: String, now: Nanos) {
        let outcome = Outcome::Error {
            code: code.to_owned(),
            message,
        };
        self.outstanding.remove(&line);
        self.take(
            &RecordResult {
                line,
                custom_id: None,
                outcome,
                started_at: 0,
                finished_at: 0,
                batch: 1,
            },
            now,
        );
    }

    /// The next record to send while fewer than `window` are unanswered and results can still be named.
    pub fn next(&mut self, window: usize, now: Nanos) -> Option<(u64, String)> {
        if self.outstanding.len() >= window || self.answered.ranges() + window >= MAX_RANGES {
            return None;
        }
        let (line, text) = self.queue.pop_front()?;
        self.outstanding.insert(
            line,
            Sent {
                at: now,
                started: false,
                text: text.clone(),
            },
        );
        Some((line, text))
    }

    /// The worker is gone and another one follows: what was sent and not answered is to be sent again, first of all.
    pub fn give_back(&mut self) {
        for (line, sent) in std::mem::take(&mut self.outstanding).into_iter().rev() {
            self.queue.push_front((line, sent.text));
        }
    }

    /// The worker has begun a record; returns when that was sent.
    ///
    /// # Errors
    /// [`FeedError::NotAsked`].
    pub fn started(&mut self, line: u64) -> Result<Nanos, FeedError> {
        let sent = self.outstanding.get_mut(&line).ok_or(FeedError::NotAsked(line))?;
        sent.started = true;
        Ok(sent.at)
    }

    /// The worker has answered a record.
    ///
    /// # Errors
    /// [`FeedError::NotAsked`].
    pub fn answer(&mut self, result: &RecordResult, now: Nanos) -> Result<(), FeedError> {
        self.outstanding
            .remove(&result.line)
            .ok_or(FeedError::NotAsked(result.line))?;
        match &result.outcome {
            Outcome::Text { text, .. } if text.len() > MAX_ANSWER_BYTES => {
                let message = format!(
                    "the answer is {} bytes long, {MAX_ANSWER_BYTES} may be",
                    text.len()
                );
                self.refuse(result.line, "AnswerTooLong", message, now);
            }
            Outcome::Text { .. } | Outcome::Error { .. } => self.take(result, now),
        }
        Ok(())
    }

    fn take(&mut self, result: &RecordResult, now: Nanos) {
        let failed = match &result.outcome {
            Outcome::Text {
                completion_tokens, ..
            } => {
                self.tokens = self.tokens.saturating_add(u64::from(*completion_tokens));
                false
            }
            Outcome::Error { .. } => true,
        };
        self.done += 1;
        self.failed += i64::from(failed);
        self.answered.insert(result.line, result.line);
        self.pending.push_back(Answer {
            line: result.line,
            text: output_line(&self.name, result),
            failed,
        });
        self.pending_since.get_or_insert(now);
    }

    /// Whether all records are answered.
    pub fn exhausted(&self) -> bool {
        let (done, all) = (self.next_input, self.inputs.len());
        let rest_skipped = || {
            self.inputs.iter().skip(done).all(|input| {
                let (first, last) = Self::bounds(input);
                self.skip.covers(first, last)
            })
        };
        !self.reading
            && self.queue.is_empty()
            && self.outstanding.is_empty()
            && (done >= all || rest_skipped())
    }

    /// Records sent and unanswered.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Records sent since `since` that have not begun.
    pub fn unstarted(&self, since: Nanos) -> usize {
        self.outstanding
            .values()
            .filter(|sent| !sent.started && sent.at >= since)
            .count()
    }

    /// Whether there is anything to send or to wait for.
    pub fn busy(&self) -> bool {
        !self.outstanding.is_empty() || !self.queue.is_empty()
    }

    /// Whether answers wait to be written or are being written.
    pub fn unsaved(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether a checkpoint is due: the oldest unsaved answer is that old, or a chunk is full.
    pub fn save_due(&self, now: Nanos, every: Nanos) -> bool {
        let bytes: usize = self.pending.iter().map(|a| a.text.len()).sum();
        self.saving == 0
            && (bytes > MAX_CHUNK_BYTES / 2
                || self
                    .pending_since
                    .is_some_and(|since| now >= since.saturating_add(every)))
    }

    /// Begins a checkpoint: the next chunk and its number. Nothing while one is on its way.
    pub fn save(&mut self) -> Option<(u32, Chunk)> {
        if self.saving > 0 {
            return None;
        }
        let chunk = chunks(self.pending.make_contiguous(), MAX_CHUNK_BYTES)
            .into_iter()
            .next()?;
        self.saving = chunk.lines.len();
        Some((u32::try_from(self.checkpoint.chunks).unwrap_or(0), chunk))
    }

    /// The checkpoint as it will stand once the chunk that is being written is durable.
    pub fn next_checkpoint(&self) -> Checkpoint {
        let mut next = self.checkpoint.clone();
        let mut lines = Lines::from_ranges(&next.lines);
        for Answer { line, text, failed } in self.pending.iter().take(self.saving) {
            lines.insert(*line, *line);
            next.failed += i64::from(*failed);
            next.bytes += i64::try_from(text.len() + 1).unwrap_or(i64::MAX);
        }
        next.chunks += i32::from(self.saving > 0);
        next.lines = lines.to_ranges();
        next
    }

    /// The chunk is durable: its lines may be acknowledged.
    pub fn saved(&mut self, now: Nanos) -> Vec<u64> {
        self.checkpoint = self.next_checkpoint();
        let lines = self
            .pending
            .drain(..self.saving.min(self.pending.len()))
            .map(|a| a.line)
            .collect();
        self.saving = 0;
        self.pending_since = (!self.pending.is_empty()).then_some(now);
        lines
    }

    /// The chunk was not written.
    pub fn not_saved(&mut self) {
        self.saving = 0;
    }

    /// What is durable.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Records that failed.
    pub fn failed(&self) -> i64 {
        self.failed
    }

    /// How far it is; `running_for` since the model was loaded.
    pub fn progress(&self, running_for: Nanos) -> Progress {
        let total: i64 = self.inputs.iter().map(|i| i64::from(i.records)).sum();
        let skipped: u64 = self
            .inputs
            .iter()
            .map(Self::bounds)
            .map(|(a, b)| self.skip.count_within(a, b))
            .sum();
        let done = self.done.saturating_add(i64::try_from(skipped).unwrap_or(0));
        let tenths = u128::from(self.tokens) * 10_000_000_000 / u128::from(running_for.max(1));
        Progress {
            done,
            failed: self.failed,
            total,
            tokens: i64::try_from(self.tokens).unwrap_or(i64::MAX),
            tokens_per_second: if running_for == 0 {
                String::new()
            } else {
                format!("{}.{}", tenths / 10, tenths % 10)
            },
            display: format!("{done}/{total}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Finish;

    fn input(first_line: i64, records: i32) -> StagedInput {
        StagedInput {
            config_map: format!("in-{first_line}"),
            first_line,
            records,
        }
    }

    fn text(line: u64) -> RecordResult {
        let outcome = Outcome::Text {
            text: "a".into(),
            prompt_tokens: 1,
            completion_tokens: 5,
            finish: Finish::Stop,
            completion: false,
        };
        RecordResult {
            line,
            custom_id: None,
            outcome,
            started_at: 1,
            finished_at: 2,
            batch: 1,
        }
    }

    #[test]
    fn skipped_lines_are_neither_read_nor_sent_and_count_as_done() {
        let mut feed = Feed::new(
            "u",
            &[input(1, 2), input(3, 2)],
            &[LineRange { first: 1, last: 3 }],
        );
        assert_eq!(feed.want(), Some((1, "in-3".into())));
        feed.read(1, "c\nd\n", 0).unwrap();
        assert_eq!(feed.next(4, 0), Some((4, "d".into())));
        assert_eq!(feed.next(4, 0), None);
        assert!(!feed.exhausted());
        feed.answer(&text(4), 0).unwrap();
        assert!(feed.exhausted());
        assert_eq!(feed.progress(1_000_000_000).display, "4/4");
        assert_eq!(feed.progress(1_000_000_000).tokens_per_second, "5.0");
    }

    #[test]
    fn a_worker_can_answer_only_what_it_was_sent_and_only_once() {
        let mut feed = Feed::new("u", &[input(1, 2)], &[]);
        feed.want();
        feed.read(0, "a\nb", 0).unwrap();
        assert_eq!(feed.answer(&text(1), 0), Err(FeedError::NotAsked(1)));
        feed.next(1, 0).unwrap();
        assert_eq!(feed.next(1, 0), None, "the window is full");
        feed.answer(&text(1), 0).unwrap();
        assert_eq!(feed.answer(&text(1), 0), Err(FeedError::NotAsked(1)));
        assert_eq!(feed.started(9), Err(FeedError::NotAsked(9)));
    }

    #[test]
    fn what_a_worker_left_unanswered_goes_to_the_next_one_in_order_and_nothing_else_does() {
        let mut feed = Feed::new("u", &[input(1, 4)], &[]);
        feed.want();
        feed.read(0, "a\nb\nc\nd", 0).unwrap();
        for _ in 0..3 {
            feed.next(3, 0).unwrap();
        }
        feed.answer(&text(1), 0).unwrap();
        feed.give_back();
        assert_eq!(feed.outstanding(), 0);
        assert_eq!(feed.answer(&text(2), 0), Err(FeedError::NotAsked(2)));
        let sent: Vec<u64> = std::iter::from_fn(|| feed.next(9, 0))
            .map(|(line, _)| line)
            .collect();
        assert_eq!(sent, [2, 3, 4]);
    }

    #[test]
    fn an_answer_too_long_to_be_stored_fails_its_record_alone() {
        let mut feed = Feed::new("u", &[input(1, 1)], &[]);
        feed.want();
        feed.read(0, "a", 0).unwrap();
        feed.next(1, 0).unwrap();
        let mut long = text(1);
        if let Outcome::Text { text, .. } = &mut long.outcome {
            *text = "\u{1}".repeat(MAX_ANSWER_BYTES + 1);
        }
        feed.answer(&long, 0).unwrap();
        assert_eq!(feed.failed(), 1);
        assert!(feed.save().unwrap().1.text.contains("AnswerTooLong"));
    }

    #[test]
    fn lines_are_acknowledged_only_after_their_chunk_is_durable() {
        let mut feed = Feed::new("u", &[input(1, 3)], &[]);
        feed.want();
        feed.read(0, "a\nb\nc", 0).unwrap();
        for line in 1..=2 {
            feed.next(9, 0).unwrap();
            feed.answer(&text(line), 10).unwrap();
        }
        assert!(!feed.save_due(19, 10) && feed.save_due(20, 10));
        let (number, chunk) = feed.save().unwrap();
        assert_eq!((number, chunk.lines.clone()), (0, vec![1, 2]));
        assert_eq!(feed.save(), None, "one at a time");
        feed.next(9, 0).unwrap();
        feed.answer(&text(3), 11).unwrap();
        let next = feed.next_checkpoint();
        assert_eq!(
            (next.chunks, &next.lines),
            (1, &vec![LineRange { first: 1, last: 2 }])
        );
        assert_eq!(feed.checkpoint().chunks, 0);
        assert_eq!(feed.saved(12), vec![1, 2]);
        assert_eq!(feed.checkpoint(), &next);
        assert_eq!(next.bytes, i64::try_from(chunk.text.len()).unwrap());
        assert_eq!(feed.save().unwrap().0, 1);
        feed.not_saved();
        assert!(
            feed.unsaved() && feed.save().is_some(),
            "a failed write is tried again"
        );
    }

    #[test]
    fn an_input_of_another_length_and_a_record_too_long_are_told_with_their_numbers() {
        let mut feed = Feed::new("u", &[input(1, 1)], &[]);
        feed.want();
        let error = feed.read(0, "a\nb", 0).unwrap_err();
        assert_eq!(
            error,
            FeedError::InputMismatch {
                part: 0,
                found: 2,
                ordered: 1
            }
        );
        feed.read(0, &"x".repeat(MAX_RECORD_BYTES + 1), 0).unwrap();
        assert!(feed.exhausted() && feed.unsaved());
        assert_eq!(feed.failed(), 1);
    }
}
