//! The agent's end of its socket without an agent: real workers, driven from a test.
//!
//! Owns: a pool, its workers, the grants they live on and the records that keep them busy. Must not judge: what a worker
//! takes is measured from outside (see [`crate::share`]).

#![allow(
    clippy::disallowed_methods,
    reason = "real processes are driven by a real clock"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use gogrid_agent_core::protocol::{
    FromPool, FromWorker, Hello, Outcome, PROTOCOL_VERSION, Readback, Role, Sampling, ToPool, ToWorker,
    Usage, WorkerLimits, body_length, decode, encode,
};
use gogrid_agent_core::rank::session_rank;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cluster::program;
use crate::process::Process;

const SECOND: u64 = 1_000_000_000;
/// Between two grants, as the agent does it.
const GRANT_EVERY: Duration = Duration::from_millis(250);
/// How long a grant lasts, as the agent's do.
const GRANT_NANOS: u64 = 750_000_000;
/// How long anything may take to answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// CLOCK_BOOTTIME in nanoseconds.
pub fn boottime() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec) * SECOND + part(time.tv_nsec)
}

pub(crate) fn send<T: Serialize>(mut stream: &UnixStream, message: &T) -> Result<()> {
    stream.write_all(&encode(message)?)?;
    Ok(())
}

pub(crate) fn receive<T: DeserializeOwned>(mut stream: &UnixStream) -> Result<T> {
    let mut header = [0; 4];
    stream.read_exact(&mut header)?;
    let mut body = vec![0; body_length(header)?];
    stream.read_exact(&mut body)?;
    Ok(decode(&body)?)
}

fn send_with(stream: &UnixStream, message: &ToWorker, file: &File) -> Result<()> {
    let frame = encode(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [file.as_fd()];
    ensure!(
        control.push(SendAncillaryMessage::ScmRights(&descriptors)),
        "no room for a descriptor"
    );
    let sent = sendmsg(stream, &[IoSlice::new(&frame)], &mut control, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(frame.get(sent..).unwrap_or_default())?;
    Ok(())
}

pub(crate) fn readable(socket: &impl AsFd, within: Duration) -> Result<bool> {
    let mut waiting = [PollFd::new(socket, PollFlags::IN)];
    let limit = Timespec::try_from(within).ok();
    Ok(rustix::io::retry_on_intr(|| poll(&mut waiting, limit.as_ref()))? > 0)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pool and the socket that it and its workers connect to.
pub struct Node {
    listener: UnixListener,
    pool: UnixStream,
    process: Process,
    next: u64,
}

impl Node {
    /// Starts a pool whose files lie in `dir`.
    pub fn start(dir: &Path) -> Result<Self> {
        Self::start_program(dir, &program("gogrid-worker")?)
    }

    /// The same with a program of one's own.
    pub fn start_program(dir: &Path, worker: &Path) -> Result<Self> {
        let socket = dir.join("agent.sock");
        let listener = UnixListener::bind(&socket)?;
        let mut command = Command::new(worker);
        command
            .args(["pool", "--die-with-parent", "--socket"])
            .arg(&socket);
        let process = Process::start_session("pool", command, Stdio::null(), &dir.join("pool.log"))?;
        let (pool, role) = accept(&listener)?;
        ensure!(matches!(role, Role::Pool { .. }), "{role:?} instead of the pool");
        Ok(Self {
            listener,
            pool,
            process,
            next: 1,
        })
    }

    /// The pool's process.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Ranks the session of pool and workers.
    pub fn rank(&self, niceness: i8) -> Result<()> {
        send(&self.pool, &ToPool::Rank { niceness })
    }

    /// Starts a worker; it has no model and no share yet.
    pub fn spawn(&mut self, limits: WorkerLimits) -> Result<Worker> {
        let worker = self.next;
        self.next += 1;
        let processors = u16::try_from(std::thread::available_parallelism()?.get())?;
        self.rank(session_rank(limits.niceness, processors))?;
        let nonce = format!("{worker:064x}");
        let order = ToPool::Spawn {
            worker,
            nonce: nonce.clone(),
            limits: limits.clone(),
            fence_at: boottime() + 60 * SECOND,
            memory_limit: 32 << 30,
        };
        send(&self.pool, &order)?;
        let pid = loop {
            match receive(&self.pool)? {
                FromPool::Spawned { worker: spawned, pid } if spawned == worker => break pid,
                FromPool::SpawnFailed { message, .. } => bail!("spawning a worker: {message}"),
                FromPool::Spawned { .. } | FromPool::Exited { .. } => {}
            }
        };
        let (stream, role) = accept(&self.listener)?;
        ensure!(role == Role::Worker { worker, nonce }, "{role:?}");
        Worker::new(worker, pid, stream, limits)
    }

    /// Kills a worker and waits until it is reaped.
    pub fn kill(&mut self, worker: Worker) -> Result<()> {
        let name = worker.name;
        send(&self.pool, &ToPool::Kill { worker: name })?;
        drop(worker);
        loop {
            if let FromPool::Exited { worker, .. } = receive(&self.pool)?
                && worker == name
            {
                return Ok(());
            }
        }
    }
}

fn accept(listener: &UnixListener) -> Result<(UnixStream, Role)> {
    ensure!(
        readable(listener, PATIENCE)?,
        "nobody connects within {PATIENCE:?}"
    );
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let hello: Hello = receive(&stream)?;
    ensure!(hello.version == PROTOCOL_VERSION, "{hello:?}");
    Ok((stream, hello.role))
}

/// Records that keep a worker busy: each is answered with `tokens` tokens, and `window` are always outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feed {
    /// Tokens of each answer.
    pub tokens: u32,
    /// Records outstanding.
    pub window: u64,
}

/// What a worker has said.
#[derive(Debug, Default)]
pub struct Said {
    /// Bytes on the device, once loaded.
    pub loaded: Option<u64>,
    /// Limits last read back.
    pub applied: Option<Readback>,
    /// Its counters.
    pub usage: Usage,
    /// When records began, CLOCK_BOOTTIME nanoseconds.
    pub starts: Vec<u64>,
    /// Answers by line.
    pub answers: BTreeMap<u64, String>,
    /// Why it failed.
    pub failure: Option<String>,
    feed: Option<Feed>,
    next_line: u64,
    outstanding: u64,
}

struct Shared {
    said: Mutex<Said>,
    heard: Condvar,
    share: Mutex<u16>,
    over: AtomicBool,
    stream: UnixStream,
}

/// One worker, kept alive by grants as long as this lives.
pub struct Worker {
    name: u64,
    pid: u32,
    limits: WorkerLimits,
    shared: Arc<Shared>,
    granter: Option<std::thread::JoinHandle<()>>,
}

impl Worker {
    fn new(name: u64, pid: u32, stream: UnixStream, limits: WorkerLimits) -> Result<Self> {
        let reader = stream.try_clone()?;
        reader.set_read_timeout(None)?;
        let shared = Arc::new(Shared {
            said: Mutex::new(Said::default()),
            heard: Condvar::new(),
            share: Mutex::new(0),
            over: AtomicBool::new(false),
            stream,
        });
        let listening = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok(message) = receive::<FromWorker>(&reader) {
                listening.take(message);
            }
            locked(&listening.said)
                .failure
                .get_or_insert_with(|| "the connection ended".into());
            listening.heard.notify_all();
        });
        let granting = Arc::clone(&shared);
        let granter = std::thread::spawn(move || {
            while !granting.over.load(Ordering::Relaxed) {
                granting.grant();
                std::thread::park_timeout(GRANT_EVERY);
            }
        });
        Ok(Self {
            name,
            pid,
            limits,
            shared,
            granter: Some(granter),
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it has said so far.
    pub fn said(&self) -> MutexGuard<'_, Said> {
        locked(&self.shared.said)
    }

    /// Gives it another share of the device, at once.
    pub fn share(&self, permille: u16) {
        *locked(&self.shared.share) = permille;
        self.shared.grant();
    }

    /// Sends it the model; it loads once it has a share.
    pub fn load(&self, model: &File, context_tokens: u32, parallel_sequences: u16) -> Result<()> {
        let load = ToWorker::Load {
            device: "cpu".into(),
            context_tokens,
            parallel_sequences,
            memory: 16 << 30,
            sampling: Sampling {
                max_tokens: context_tokens,
                temperature_milli: 0,
                top_p_milli: 1000,
                top_k: 0,
                seed: 1,
                stop: Vec::new(),
            },
        };
        send_with(&self.shared.stream, &load, model)
    }

    /// Whether the model is in memory; an error if it never will be.
    pub fn is_loaded(&self) -> Result<bool> {
        let said = self.said();
        if let Some(failure) = &said.failure {
            bail!("worker {}: {failure}", self.name);
        }
        Ok(said.loaded.is_some())
    }

    /// Sends new limits and waits until they are read back; returns how long that took.
    pub fn limit(&mut self, mut limits: WorkerLimits) -> Result<Duration> {
        limits.generation = self.limits.generation + 1;
        self.limits = limits.clone();
        let begun = Instant::now();
        let generation = limits.generation;
        send(&self.shared.stream, &ToWorker::Limits(limits))?;
        self.until("limits in force", |said| {
            said.applied.as_ref().is_some_and(|a| a.generation == generation)
        })?;
        Ok(begun.elapsed())
    }

    /// The limits it was told last.
    pub fn limits(&self) -> &WorkerLimits {
        &self.limits
    }

    /// Keeps it busy from now on; `None`: no more records.
    pub fn feed(&self, feed: Option<Feed>) {
        let mut said = self.said();
        said.feed = feed;
        self.shared.send_records(&mut said);
    }

    /// Waits until what it has said is enough.
    pub fn until(&self, what: &str, enough: impl Fn(&Said) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut said = self.said();
        while !enough(&said) {
            if let Some(failure) = &said.failure {
                bail!("worker {}: {failure}", self.name);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "waited {PATIENCE:?} for {what}");
            let waited = self.shared.heard.wait_timeout(said, left);
            said = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        if let Some(granter) = self.granter.take() {
            granter.thread().unpark();
            let _ = granter.join();
        }
        // Ends the reader, and the worker with its connection.
        let _ = self.shared.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Shared {
    fn grant(&self) {
        let share = locked(&self.share);
        let now = boottime();
        let grant = ToWorker::Grant {
            fence_at: now + 60 * SECOND,
            share_permille: *share,
            expires_at: now + GRANT_NANOS,
        };
        // A worker that is gone is found out by its reader.
        let _ = send(&self.stream, &grant);
    }

    fn take(&self, message: FromWorker) {
        let mut said = locked(&self.said);
        match message {
            FromWorker::Loaded { device_bytes } => said.loaded = Some(device_bytes),
            FromWorker::Applied(readback) => said.applied = Some(readback),
            FromWorker::Started { at, .. } => said.starts.push(at),
            FromWorker::Result(result) => {
                said.outstanding = said.outstanding.saturating_sub(1);
                let answer = match result.outcome {
                    Outcome::Text { text, .. } => text,
                    Outcome::Error { code, message } => format!("{code}: {message}"),
                };
                said.answers.insert(result.line, answer);
                let lines = vec![result.line];
                let _ = send(&self.stream, &ToWorker::Acknowledge { lines });
                self.send_records(&mut said);
            }
            FromWorker::Usage(usage) => said.usage = usage,
            FromWorker::Drained => {}
            FromWorker::Failed { reason, message } => said.failure = Some(format!("{reason}: {message}")),
        }
        drop(said);
        self.heard.notify_all();
    }

    fn send_records(&self, said: &mut Said) {
        let Some(feed) = said.feed else { return };
        while said.outstanding < feed.window {
            said.next_line += 1;
            said.outstanding += 1;
            let (line, tokens) = (said.next_line, feed.tokens);
            let text = serde_json::json!({
                "custom_id": format!("r{line}"), "method": "POST", "url": "/v1/completions",
                "body": {"prompt": format!("Say something long about {line}."), "max_tokens": tokens},
            });
            let record = ToWorker::Record {
                line,
                text: text.to_string(),
            };
            let _ = send(&self.stream, &record);
        }
    }
}
