//! One worker's life: greet the agent, load the model, answer records inside the limits.
//!
//! Owns: the order of things and the words to the agent. One thread owns all state; what the agent says comes through
//! the inbox. Must not use the device but through a permit.

use crate::engine::EngineError;
use crate::engine::batch::{Answer, Batch, Event};
use crate::engine::load::Size;
use crate::failure::SessionError;
use crate::inbox::Message;
use crate::permit::{Keeper, Wait};
use crate::records::{self, Input, Record};
use crate::resident::{Pace, PromptError, Resident, Source};
use crate::stamps::Stamps;
use crate::wire::Sender;
use crate::worker::{at_most, cores};
use crate::{clock, limits};
use gogrid_agent_core::protocol::{
    FromWorker, MAX_ANSWER_BYTES, Outcome, Readback, RecordResult, Sampling, ToWorker, Usage, WorkerLimits,
};
use gogrid_agent_core::throttle::{Grant, RequestGate, Slot};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::time::Duration;

/// Why [`Session::run`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    /// It is to go on with another number of threads.
    Threads,
    /// The agent is gone.
    Over,
}

/// How often counters are sent while anything runs, and how often the threads are swept.
const USAGE_INTERVAL: u64 = 1_000_000_000;
/// Records that may wait here; the agent's credit is far below.
const MAX_WAITING: usize = 4096;

struct Begun {
    custom_id: String,
    completion: bool,
    started_at: u64,
}

/// The state of a worker.
pub(crate) struct Session {
    sender: Sender,
    stamps: Option<Stamps>,
    limits: WorkerLimits,
    /// Limits last read back.
    applied: Option<Readback>,
    swept_at: u64,
    /// Threads of the pool that it runs in.
    pool: usize,
    /// Cores of the CPU device.
    cores: usize,
    keeper: Keeper<Resident>,
    gate: RequestGate,
    /// The place of the record at the head of the queue.
    place: Option<Slot>,
    job: Option<Sampling>,
    batch: Option<Batch>,
    pace: Pace,
    waiting: VecDeque<(u64, Record)>,
    begun: BTreeMap<u64, Begun>,
    unacknowledged: BTreeSet<u64>,
    draining: bool,
    drained: bool,
    usage: Usage,
    usage_sent_at: u64,
    blocked_since: Option<u64>,
}

/// What to do next.
enum Next {
    /// Look again at once.
    Now,
    /// Nothing until then, or until a message.
    At(u64),
    /// Nothing until a message.
    Message,
}

impl Session {
    pub(crate) fn new(sender: Sender, limits: WorkerLimits, stamps: Option<Stamps>) -> Self {
        // Asking costs a dozen files: once is enough.
        let cores = cores();
        let keeper = Keeper::new(candle_core::Device::Cpu, Resident::Empty, cores);
        Self {
            sender,
            stamps,
            gate: RequestGate::new(limits.request_interval),
            pool: at_most(limits.threads, cores),
            cores,
            limits,
            applied: None,
            swept_at: 0,
            keeper,
            place: None,
            job: None,
            batch: None,
            pace: Pace::default(),
            waiting: VecDeque::new(),
            begun: BTreeMap::new(),
            unacknowledged: BTreeSet::new(),
            draining: false,
            drained: false,
            usage: Usage::default(),
            usage_sent_at: 0,
            blocked_since: None,
        }
    }

    /// Threads of the pool that it is to run in.
    pub(crate) fn threads(&self) -> usize {
        self.pool
    }

    /// Sets limits on every thread and tells what is in force, unless that is known.
    fn apply_limits(&mut self) -> Result<(), SessionError> {
        let readback = limits::sweep(&self.limits).map_err(SessionError::Limits)?;
        self.swept_at = clock::boottime();
        self.gate.set_interval(self.limits.request_interval);
        if self.applied.as_ref() != Some(&readback) {
            self.sender.send(&FromWorker::Applied(readback.clone()))?;
            self.applied = Some(readback);
        }
        Ok(())
    }

    /// Tells the agent why this worker ends.
    pub(crate) fn fail(&mut self, reason: &str, message: String) {
        let reason = reason.to_owned();
        let _ = self.sender.send(&FromWorker::Failed { reason, message });
    }

    /// Works until the agent is gone or another number of threads is wanted.
    pub(crate) fn run(&mut self, inbox: &mut mpsc::Receiver<Message>) -> Result<Pause, SessionError> {
        // The pool's threads are new.
        self.apply_limits()?;
        loop {
            loop {
                match inbox.try_recv() {
                    Ok(message) => self.take(message)?,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Ok(Pause::Over),
                }
            }
            let threads = at_most(self.limits.threads, self.cores);
            if threads != self.pool {
                self.pool = threads;
                return Ok(Pause::Threads);
            }
            let now = clock::boottime();
            if now.saturating_sub(self.swept_at) >= USAGE_INTERVAL {
                self.apply_limits()?;
            }
            let next = self.step(now)?;
            self.tell_usage(clock::boottime())?;
            let message = match next {
                Next::Now => continue,
                Next::At(at) => {
                    let left = at
                        .min(now.saturating_add(USAGE_INTERVAL))
                        .saturating_sub(clock::boottime());
                    match inbox.recv_timeout(Duration::from_nanos(left)) {
                        Ok(message) => message,
                        Err(RecvTimeoutError::Timeout) => continue,
                        Err(RecvTimeoutError::Disconnected) => return Ok(Pause::Over),
                    }
                }
                Next::Message => match inbox.recv() {
                    Ok(message) => message,
                    Err(_) => return Ok(Pause::Over),
                },
            };
            self.take(message)?;
        }
    }

    fn take(&mut self, (message, descriptor): Message) -> Result<(), SessionError> {
        match message {
            ToWorker::Load {
                device,
                context_tokens,
                parallel_sequences,
                memory,
                sampling,
            } => {
                if self.job.is_some() {
                    return Err(SessionError::Protocol(
                        "a second model was sent; a worker loads one".into(),
                    ));
                }
                if device != "cpu" {
                    let text = format!("device {device:?}: this build computes on \"cpu\" only");
                    return Err(EngineError::UnsupportedFeature(text).into());
                }
                let file = descriptor
                    .ok_or_else(|| SessionError::Protocol("Load came without a descriptor".into()))?;
                let size = Size {
                    context_tokens,
                    parallel_sequences: parallel_sequences.max(1),
                    memory,
                };
                self.job = Some(sampling);
                self.keeper.place(Resident::Opened(File::from(file), size));
                self.batch = Some(Batch::new(usize::from(size.parallel_sequences)));
            }
            ToWorker::Limits(limits) => {
                self.limits = limits;
                self.apply_limits()?;
            }
            ToWorker::Grant {
                fence_at,
                share_permille,
                expires_at,
            } => {
                self.keeper.grant(
                    clock::boottime(),
                    Grant {
                        share_permille,
                        expires_at,
                        fence_at,
                    },
                );
            }
            ToWorker::Record { line, text } => self.record(line, &text)?,
            ToWorker::Acknowledge { lines } => {
                for line in lines {
                    self.unacknowledged.remove(&line);
                }
            }
            ToWorker::Drain => self.draining = true,
        }
        Ok(())
    }

    fn record(&mut self, line: u64, text: &str) -> Result<(), SessionError> {
        let job = self
            .job
            .as_ref()
            .ok_or_else(|| SessionError::Protocol("a record came before a model".into()))?;
        let known = self.begun.contains_key(&line)
            || self.unacknowledged.contains(&line)
            || self.waiting.iter().any(|(waiting, _)| *waiting == line);
        if known {
            return Err(SessionError::Protocol(format!("line {line} was sent twice")));
        }
        if self.waiting.len() >= MAX_WAITING {
            return Err(SessionError::Protocol(format!(
                "more than {MAX_WAITING} records wait"
            )));
        }
        match records::parse(line, text, job) {
            Ok(record) => {
                self.waiting.push_back((line, record));
                Ok(())
            }
            Err(invalid) => {
                let message = invalid.to_string();
                let outcome = Outcome::Error {
                    code: "InvalidRecord".into(),
                    message,
                };
                self.answer(line, invalid.custom_id, outcome, 0, 0)
            }
        }
    }

    /// One thing: a piece of loading, a new sequence or a slice of a step.
    fn step(&mut self, now: u64) -> Result<Next, SessionError> {
        if self.keeper.peek().is_loading() {
            let result = self.keeper.run(now, |device, resident| {
                let ready = resident.load(device)?;
                Ok::<_, EngineError>(ready.then(|| resident.bytes()))
            });
            let result = match result {
                Ok(result) => result,
                Err(wait) => return Ok(self.blocked(wait, now)),
            };
            self.unblocked(now);
            if let Some(device_bytes) = result? {
                // Loading may have started threads.
                self.apply_limits()?;
                self.sender.send(&FromWorker::Loaded { device_bytes })?;
            }
            return Ok(Next::Now);
        }
        let Some(batch) = &self.batch else {
            return Ok(Next::Message);
        };
        let most = usize::from(self.limits.max_batch.max(1));
        let in_step = batch.in_step();
        let mut gate_at = None;
        if !self.draining && !in_step && !self.waiting.is_empty() && batch.has_room() && batch.len() < most {
            let slot = *self.place.get_or_insert_with(|| self.gate.reserve(now).slot);
            match self.gate.start_at(slot, now) {
                Some(at) if at > now => gate_at = Some(at),
                Some(_) => return self.begin(slot, now),
                None => self.place = None,
            }
        }
        if self.batch.as_ref().is_some_and(|batch| !batch.is_empty()) {
            return self.advance(now);
        }
        self.unblocked(now);
        if self.draining && !self.drained {
            self.drained = true;
            self.sender.send(&FromWorker::Drained)?;
        }
        Ok(gate_at.map_or(Next::Message, Next::At))
    }

    /// Makes the prompt of the first waiting record and starts it.
    fn begin(&mut self, slot: Slot, now: u64) -> Result<Next, SessionError> {
        let Some((line, record)) = self.waiting.pop_front() else {
            return Ok(Next::Now);
        };
        let source = match &record.input {
            Input::Messages(messages) => Source::Messages(messages),
            Input::Prompt(text) => Source::Text(text),
        };
        let prompt = match self.keeper.run(now, |_, resident| resident.prompt(&source)) {
            Ok(prompt) => prompt,
            Err(wait) => {
                self.waiting.push_front((line, record));
                return Ok(self.blocked(wait, now));
            }
        };
        self.unblocked(now);
        let tokens = match prompt {
            Ok(tokens) => tokens,
            Err(PromptError::Engine(error)) => return Err(error.into()),
            Err(error) => {
                let outcome = Outcome::Error {
                    code: error.code().into(),
                    message: format!("line {line}: {error}"),
                };
                self.answer(line, Some(record.custom_id), outcome, 0, 0)?;
                return Ok(Next::Now);
            }
        };
        let at = clock::boottime();
        if self.gate.start(slot, at).is_err() {
            // The interval grew meanwhile.
            self.waiting.push_front((line, record));
            return Ok(Next::Now);
        }
        self.place = None;
        self.sender.send(&FromWorker::Started { line, at })?;
        if let Some(batch) = &mut self.batch {
            batch.add(line, tokens, &record.sampling)?;
        }
        let completion = matches!(record.input, Input::Prompt(_));
        self.begun.insert(
            line,
            Begun {
                custom_id: record.custom_id,
                completion,
                started_at: at,
            },
        );
        Ok(Next::Now)
    }

    fn advance(&mut self, now: u64) -> Result<Next, SessionError> {
        let Some(batch) = &mut self.batch else {
            return Ok(Next::Message);
        };
        let pace = &mut self.pace;
        let stamps = &mut self.stamps;
        let mut mark = || {
            if let Some(stamps) = stamps.as_mut() {
                stamps.mark(clock::boottime());
            }
        };
        let mut step = |resident: &mut Resident| {
            mark();
            let events = resident.advance(batch, pace);
            mark();
            events
        };
        let events = match self.keeper.run(now, |_, resident| step(resident)) {
            Ok(events) => events,
            Err(wait) => return Ok(self.blocked(wait, now)),
        };
        (self.usage.tokens, self.usage.prompt_tokens) = batch.tokens();
        self.unblocked(now);
        for event in events?.into_iter().flatten() {
            if let Event::Finished(line, answer) = event {
                self.finished(line, answer)?;
            }
        }
        Ok(Next::Now)
    }

    fn finished(&mut self, line: u64, answer: Answer) -> Result<(), SessionError> {
        let Some(begun) = self.begun.remove(&line) else {
            return Ok(());
        };
        let batch = answer.batch;
        let outcome = if answer.bytes() > MAX_ANSWER_BYTES {
            let message = format!(
                "line {line}: the answer has {} bytes, more than {MAX_ANSWER_BYTES}",
                answer.bytes()
            );
            Outcome::Error {
                code: "AnswerTooLong".into(),
                message,
            }
        } else {
            let Answer {
                text,
                prompt_tokens,
                completion_tokens,
                finish,
                batch: _,
            } = answer;
            Outcome::Text {
                text,
                prompt_tokens,
                completion_tokens,
                finish,
                completion: begun.completion,
            }
        };
        self.answer(line, Some(begun.custom_id), outcome, begun.started_at, batch)
    }

    fn answer(
        &mut self,
        line: u64,
        custom_id: Option<String>,
        outcome: Outcome,
        started_at: u64,
        batch: u16,
    ) -> Result<(), SessionError> {
        let finished_at = clock::boottime();
        self.unacknowledged.insert(line);
        let result = RecordResult {
            line,
            custom_id,
            outcome,
            started_at,
            finished_at,
            batch,
        };
        self.sender.send(&FromWorker::Result(result))?;
        Ok(())
    }

    fn blocked(&mut self, wait: Wait, now: u64) -> Next {
        let since = *self.blocked_since.get_or_insert(now);
        self.usage.waited = self.usage.waited.saturating_add(now.saturating_sub(since));
        self.blocked_since = Some(now);
        match wait {
            Wait::Until(at) => Next::At(at),
            // Only a grant changes that, and it is a message; counters go on meanwhile.
            Wait::Grant => Next::At(now.saturating_add(USAGE_INTERVAL)),
        }
    }

    fn unblocked(&mut self, now: u64) {
        if let Some(since) = self.blocked_since.take() {
            self.usage.waited = self.usage.waited.saturating_add(now.saturating_sub(since));
        }
    }

    /// About once a second while anything runs or waits for its share.
    fn tell_usage(&mut self, now: u64) -> Result<(), SessionError> {
        let idle = self.begun.is_empty() && self.waiting.is_empty() && !self.keeper.peek().is_loading();
        let due = now.saturating_sub(self.usage_sent_at) >= USAGE_INTERVAL;
        let fresh = self.usage.device != self.keeper.billed();
        if !due || (idle && !fresh) {
            return Ok(());
        }
        self.usage_sent_at = now;
        self.usage.cpu = clock::process_cpu();
        self.usage.device = self.keeper.billed();
        self.usage.outside = self.keeper.outside();
        self.usage.peak_bytes = self.usage.peak_bytes.max(self.keeper.peek().bytes());
        self.sender.send(&FromWorker::Usage(self.usage))?;
        Ok(())
    }
}
