//! The records of one assignment on their way: read, sent, answered, durable.
//!
//! Owns: which line goes out next, which are outstanding, which answers wait to be written, and whether those go into the
//! order's status or, where they are too many for that, into a chunk. Every line is answered once; an answer to a line
//! that was not asked is a breach by the worker. Must not read, send or write anything.

use crate::protocol::{MAX_ANSWER_BYTES, MAX_RECORD_BYTES, Outcome, RecordResult};
use crate::results::{Answer, Chunk, Lines, MAX_CHUNK_BYTES, MAX_RANGES, chunks, output_line};
use crate::session::Nanos;
use gogrid_api::assignment::{Checkpoint, INLINE_BYTES, LineRange, StagedInput};
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

/// Where the next answers are to be made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Save {
    /// In the order's status, with [`Feed::checkpoint`].
    Status,
    /// In the chunk of that number.
    Chunk(u32, Chunk),
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
    /// Answers that are in no chunk.
    pending: VecDeque<Answer>,
    /// Their bytes, with line feeds.
    pending_bytes: usize,
    /// Since when the oldest of them that the checkpoint does not carry waits.
    pending_since: Option<Nanos>,
    /// How many of them the checkpoint carries.
    carried: usize,
    /// How many of them a status is known to hold.
    kept: usize,
    /// How many of them are in the chunk that is being written.
    saving: usize,
    /// What is durable in chunks.
    chunked: Checkpoint,
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
            pending_bytes: 0,
            pending_since: None,
            carried: 0,
            kept: 0,
            saving: 0,
            chunked: Checkpoint::default(),
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
    pub fn want(&mut self) -> Option<(usize, StagedInput)> {
        if self.reading || self.queue.len() >= LOW_WATER {
            return None;
        }
        while let Some(input) = self.inputs.get(self.next_input) {
            let (first, last) = Self::bounds(input);
            if !self.skip.covers(first, last) {
                self.reading = true;
                return Some((self.next_input, input.clone()));
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
        let text = output_line(&self.name, result);
        self.pending_bytes = self.pending_bytes.saturating_add(text.len() + 1);
        self.pending.push_back(Answer {
            line: result.line,
            text,
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

    /// Whether more answers are in no chunk than the order's status can carry: a last report would leave some out.
    pub fn unsaved(&self) -> bool {
        self.pending_bytes > INLINE_BYTES
    }

    /// Whether a checkpoint is due: the oldest unsaved answer is that old, or a chunk is full.
    pub fn save_due(&self, now: Nanos, every: Nanos) -> bool {
        self.saving == 0
            && (self.pending_bytes > MAX_CHUNK_BYTES / 2
                || self
                    .pending_since
                    .is_some_and(|since| now >= since.saturating_add(every)))
    }

    /// Has the checkpoint carry all answers that are in no chunk, if it can.
    pub fn carry(&mut self) {
        if !self.unsaved() {
            self.carried = self.pending.len();
            self.pending_since = None;
        }
    }

    /// Begins to make answers durable. Nothing while a chunk is on its way, or where there is nothing new.
    pub fn save(&mut self) -> Option<Save> {
        if self.saving > 0 || self.carried == self.pending.len() {
            return None;
        }
        if !self.unsaved() {
            self.carry();
            return Some(Save::Status);
        }
        // What the status carries comes first and goes along: it is dropped from there once it is in the chunk.
        let chunk = chunks(self.pending.make_contiguous(), MAX_CHUNK_BYTES)
            .into_iter()
            .next()?;
        self.saving = chunk.lines.len();
        let number = u32::try_from(self.chunked.chunks).unwrap_or(0);
        Some(Save::Chunk(number, chunk))
    }

    /// What is in chunks, and that many more answers.
    fn with(&self, answers: usize) -> Checkpoint {
        let mut checkpoint = self.chunked.clone();
        let mut lines = Lines::from_ranges(&checkpoint.lines);
        for Answer { line, text, failed } in self.pending.iter().take(answers) {
            lines.insert(*line, *line);
            checkpoint.failed += i64::from(*failed);
            checkpoint.bytes += i64::try_from(text.len() + 1).unwrap_or(i64::MAX);
        }
        checkpoint.lines = lines.to_ranges();
        checkpoint
    }

    /// The chunk is durable: these lines may be acknowledged.
    pub fn saved(&mut self, now: Nanos) -> Vec<u64> {
        self.chunked = self.with(self.saving);
        self.chunked.chunks += 1;
        let saved: Vec<Answer> = self
            .pending
            .drain(..self.saving.min(self.pending.len()))
            .collect();
        self.pending_bytes = self.pending.iter().map(|a| a.text.len() + 1).sum();
        self.pending_since = (!self.pending.is_empty()).then_some(now);
        let kept = std::mem::take(&mut self.kept);
        (self.carried, self.saving) = (0, 0);
        saved.into_iter().skip(kept).map(|a| a.line).collect()
    }

    /// The chunk was not written.
    pub fn not_saved(&mut self) {
        self.saving = 0;
    }

    /// The checkpoint for the order's status. It never says less than one of before did, whether or not that was written.
    pub fn checkpoint(&self) -> Checkpoint {
        let carried = self.pending.iter().take(self.carried);
        let text: String = carried.flat_map(|a| [a.text.as_str(), "\n"]).collect();
        Checkpoint {
            text: (!text.is_empty()).then_some(text),
            ..self.with(self.carried)
        }
    }

    /// A status with that checkpoint is durable: these lines may be acknowledged.
    pub fn reported(&mut self, checkpoint: &Checkpoint) -> Vec<u64> {
        // Answers that went into a chunk while it was written were acknowledged with that.
        if checkpoint.chunks != self.chunked.chunks {
            return vec![];
        }
        let text = checkpoint.text.as_deref().unwrap_or_default();
        let now = text.matches('\n').count().max(self.kept);
        let before = std::mem::replace(&mut self.kept, now);
        let new = self.pending.iter().take(now).skip(before);
        new.map(|a| a.line).collect()
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
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn input(first_line: i64, records: i32) -> StagedInput {
        StagedInput {
            config_map: Some(format!("in-{first_line}")),
            text: None,
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
        assert_eq!(feed.want(), Some((1, input(3, 2))));
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
        feed.carry();
        assert!(feed.checkpoint().text.unwrap().contains("AnswerTooLong"));
    }

    /// A feed that has read that many lines and sent them all.
    fn asked(records: i32) -> Feed {
        let mut feed = Feed::new("u", &[input(1, records)], &[]);
        feed.want();
        feed.read(0, &"a\n".repeat(usize::try_from(records).unwrap()), 0)
            .unwrap();
        while feed.next(100, 0).is_some() {}
        feed
    }

    /// An answer of about that many bytes.
    fn long(line: u64, bytes: usize) -> RecordResult {
        let mut result = text(line);
        if let Outcome::Text { text, .. } = &mut result.outcome {
            *text = "b".repeat(bytes);
        }
        result
    }

    fn first_chunk(feed: &mut Feed) -> (u32, Chunk) {
        match feed.save() {
            Some(Save::Chunk(number, chunk)) => (number, chunk),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn few_answers_go_into_the_status_and_are_acknowledged_only_after_it_is_durable() {
        let mut feed = asked(3);
        for line in 1..=2 {
            feed.answer(&text(line), 10).unwrap();
        }
        assert!(!feed.save_due(19, 10) && feed.save_due(20, 10));
        assert_eq!(feed.checkpoint(), Checkpoint::default());
        assert_eq!(feed.save(), Some(Save::Status));
        assert!(feed.save().is_none() && !feed.save_due(99, 10), "it is told once");
        let told = feed.checkpoint();
        let carried = told.text.clone().unwrap();
        assert_eq!((told.chunks, carried.lines().count()), (0, 2));
        assert_eq!(told.lines, [LineRange { first: 1, last: 2 }]);
        assert_eq!(told.bytes, i64::try_from(carried.len()).unwrap());
        feed.answer(&text(3), 11).unwrap();
        assert_eq!(feed.checkpoint(), told, "the third is not carried yet");
        assert_eq!(feed.reported(&told), [1, 2]);
        assert_eq!(feed.reported(&told), [0_u64; 0]);
        feed.carry();
        assert!(feed.checkpoint().text.unwrap().starts_with(&carried));
        assert!(feed.exhausted() && !feed.unsaved());
    }

    #[test]
    fn what_the_status_held_moves_into_a_chunk_once_there_is_too_much_and_leaves_it_only_after_that() {
        let mut feed = asked(3);
        feed.answer(&text(1), 10).unwrap();
        assert_eq!(feed.save(), Some(Save::Status));
        let told = feed.checkpoint();
        feed.answer(&long(2, INLINE_BYTES), 11).unwrap();
        assert!(feed.unsaved() && feed.save_due(21, 10));
        let (number, chunk) = first_chunk(&mut feed);
        assert_eq!((number, chunk.lines), (0, vec![1, 2]));
        assert_eq!(feed.save(), None, "one at a time");
        assert_eq!(feed.checkpoint(), told, "it is not durable yet");
        feed.answer(&text(3), 12).unwrap();
        assert_eq!(feed.saved(13), [1, 2]);
        assert_eq!(feed.reported(&told), [0_u64; 0], "that status was of before");
        let now = feed.checkpoint();
        assert_eq!((now.chunks, &now.text), (1, &None));
        assert_eq!(now.lines, [LineRange { first: 1, last: 2 }]);
        assert_eq!(feed.save(), Some(Save::Status));
        let last = feed.checkpoint();
        assert_eq!((last.chunks, last.text.unwrap().lines().count()), (1, 1));
    }

    #[test]
    fn a_chunk_that_was_not_written_is_tried_again_with_what_came_meanwhile() {
        let mut feed = asked(2);
        feed.answer(&long(1, INLINE_BYTES), 0).unwrap();
        assert_eq!(first_chunk(&mut feed).1.lines, [1]);
        feed.answer(&text(2), 0).unwrap();
        feed.not_saved();
        assert!(feed.unsaved());
        assert_eq!(
            first_chunk(&mut feed),
            (0, {
                let mut both = chunks(feed.pending.make_contiguous(), MAX_CHUNK_BYTES);
                both.remove(0)
            })
        );
        assert_eq!(feed.saved(1), [1, 2]);
    }

    /// An API server, as far as answers are concerned: chunks by number, and the checkpoint in the status.
    #[derive(Default)]
    struct Server {
        chunks: BTreeMap<u32, String>,
        status: Checkpoint,
    }

    impl Server {
        /// Lines that whoever reads the status finds, in the order of their place.
        fn lines(&self) -> Vec<u64> {
            let named = 0..u32::try_from(self.status.chunks).unwrap();
            let chunks = named.map(|n| self.chunks[&n].as_str());
            let texts = chunks.chain(self.status.text.as_deref());
            let line = |text: &str| -> u64 {
                let value: serde_json::Value = serde_json::from_str(text).unwrap();
                value["line"].as_u64().unwrap()
            };
            texts.flat_map(str::lines).map(line).collect()
        }
    }

    proptest! {
        /// Whatever is answered, written, refused, lost or late in whatever order: who reads the status finds every line that
        /// was ever in it exactly once, and what was acknowledged is never lost.
        #[test]
        fn no_record_is_lost_or_doubled_on_its_way_from_the_status_into_chunks(
            sizes in prop::collection::vec(0_usize..6_000, 1..40),
            moves in prop::collection::vec((0_u8..7, any::<bool>()), 1..200),
        ) {
            let mut feed = asked(i32::try_from(sizes.len()).unwrap());
            let mut server = Server::default();
            let mut unanswered = (1_u64..).zip(&sizes);
            let (mut writing, mut chunk) = (None, None);
            let (mut acknowledged, mut seen) = (vec![], BTreeSet::new());
            for (what, good) in moves {
                match what {
                    0 | 1 => if let Some((line, bytes)) = unanswered.next() {
                        feed.answer(&long(line, *bytes), 0).unwrap();
                    },
                    2 | 3 => if let Some(Save::Chunk(number, new)) = feed.save() {
                        chunk = Some((number, new.text));
                    },
                    4 => { writing.get_or_insert_with(|| feed.checkpoint()); }
                    // The answer to a write may be lost though it was carried out.
                    5 => if let Some(told) = writing.take() {
                        server.status = told;
                        if good {
                            acknowledged.extend(feed.reported(&server.status));
                        }
                    },
                    _ => if let Some((number, text)) = chunk.take() {
                        server.chunks.insert(number, text);
                        if good {
                            acknowledged.extend(feed.saved(0));
                        } else {
                            feed.not_saved();
                        }
                    },
                }
                let found = server.lines();
                let once: BTreeSet<u64> = found.iter().copied().collect();
                prop_assert_eq!(once.len(), found.len());
                prop_assert!(once.is_superset(&seen));
                let told = Lines::from_ranges(&server.status.lines);
                prop_assert!(once.iter().all(|line| told.contains(*line)));
                prop_assert_eq!(told.count_within(1, 100), u64::try_from(once.len()).unwrap());
                prop_assert!(server.status.text.as_ref().is_none_or(|t| t.len() <= INLINE_BYTES));
                seen = once;
            }
            // The end: everything is answered, made durable and read.
            for (line, bytes) in unanswered {
                feed.answer(&long(line, *bytes), 0).unwrap();
            }
            if let Some((number, text)) = chunk {
                server.chunks.insert(number, text);
                acknowledged.extend(feed.saved(0));
            }
            while feed.unsaved() {
                let (number, new) = first_chunk(&mut feed);
                server.chunks.insert(number, new.text);
                acknowledged.extend(feed.saved(0));
            }
            feed.carry();
            server.status = feed.checkpoint();
            acknowledged.extend(feed.reported(&server.status));
            let mut found = server.lines();
            found.sort_unstable();
            acknowledged.sort_unstable();
            let all: Vec<u64> = (1..=u64::try_from(sizes.len()).unwrap()).collect();
            prop_assert_eq!(&found, &all);
            prop_assert_eq!(&acknowledged, &all);
        }
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
        assert!(feed.exhausted());
        assert_eq!((feed.failed(), feed.save()), (1, Some(Save::Status)));
    }
}
