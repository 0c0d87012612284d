//! What agent, pool and workers say to each other over one Unix socket.
//!
//! Owns: message types, bounds and the frame format (4 bytes little-endian length, then JSON). Must not do I/O.
//! The agent treats everything from a worker as hostile: frames are bounded before they are read, numbers before they
//! are used, and texts are data. The agent listens; pool and workers connect and speak first.

use crate::session::nanos;
use gogrid_api::effective::Limits;
use gogrid_api::profile::IoClass;
use serde::{Deserialize, Serialize};

/// Both sides must speak exactly this version.
pub const PROTOCOL_VERSION: u16 = 2;
/// Longest frame body in bytes, in both directions.
pub const MAX_FRAME_BYTES: usize = 1 << 20;
/// Longest input record in bytes.
pub const MAX_RECORD_BYTES: usize = 256 << 10;
/// Longest answer text in bytes; a longer one fails its record.
pub const MAX_ANSWER_BYTES: usize = 128 << 10;

/// Names one worker within an agent session.
pub type WorkerId = u64;

/// First frame of every connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// Sender's [`PROTOCOL_VERSION`].
    pub version: u16,
    /// Who connects.
    pub role: Role,
}

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Role {
    /// The pool; it says which of its workers still live (none: it kills them when it loses its agent).
    Pool {
        /// Workers still alive.
        alive: Vec<WorkerId>,
    },
    /// A worker, with the nonce that the agent gave to the pool for it.
    Worker {
        /// Which.
        worker: WorkerId,
        /// 64 hexadecimal digits, used once.
        nonce: String,
    },
}

/// Agent → pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum ToPool {
    /// Start a worker.
    Spawn {
        /// Its name.
        worker: WorkerId,
        /// What it must say in its hello.
        nonce: String,
        /// Limits to set before its first thread starts.
        limits: WorkerLimits,
        /// First fence: CLOCK_BOOTTIME nanoseconds.
        fence_at: u64,
        /// RLIMIT_DATA in bytes, 0 = none.
        memory_limit: u64,
    },
    /// Rank the session that pool and workers are behind other sessions, all of it together.
    Rank {
        /// Nice value of its autogroup, −20 to 19.
        niceness: i8,
    },
    /// Kill it now (SIGKILL).
    Kill {
        /// Which.
        worker: WorkerId,
    },
    /// Wake it after a fence (SIGCONT); a new grant was sent before.
    Continue {
        /// Which.
        worker: WorkerId,
    },
}

/// Pool → agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum FromPool {
    /// It runs.
    Spawned {
        /// Which.
        worker: WorkerId,
        /// Its process id in the pool's PID namespace.
        pid: u32,
    },
    /// It could not be started.
    SpawnFailed {
        /// Which.
        worker: WorkerId,
        /// The system's words.
        message: String,
    },
    /// It ended and was reaped.
    Exited {
        /// Which.
        worker: WorkerId,
        /// Exit code, if it exited.
        code: Option<i32>,
        /// Signal, if it was killed.
        signal: Option<i32>,
    },
}

/// I/O class as set by `ioprio_set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoPriority {
    /// Leave the kernel's default.
    None,
    /// Best effort, level 0 to 7.
    BestEffort(u8),
    /// Idle.
    Idle,
}

impl IoPriority {
    /// What a profile asks for.
    pub fn under(limits: &Limits) -> Self {
        match limits.io_class {
            IoClass::None => Self::None,
            IoClass::BestEffort => Self::BestEffort(limits.io_level),
            IoClass::Idle => Self::Idle,
        }
    }

    /// The kernel's number: class << 13 | level.
    pub fn number(self) -> i32 {
        match self {
            Self::None => 0,
            Self::BestEffort(level) => (2 << 13) | i32::from(level.min(7)),
            Self::Idle => 3 << 13,
        }
    }
}

/// Limits of one worker; each new set replaces the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerLimits {
    /// Counts sets of limits; the worker answers [`FromWorker::Applied`] with it.
    pub generation: u64,
    /// Nice value of every thread, −20 to 19.
    pub niceness: i8,
    /// I/O priority of every thread.
    pub io: IoPriority,
    /// Sequences decoded together at most, ≥ 1.
    pub max_batch: u16,
    /// Shortest time between two request starts, in nanoseconds.
    pub request_interval: u64,
    /// Threads of the worker's compute pool at most, ≥ 1.
    pub threads: u16,
}

impl WorkerLimits {
    /// What a worker is told under a profile, with its part of the device's batch and threads.
    pub fn under(limits: &Limits, generation: u64, max_batch: u16, threads: u16) -> Self {
        Self {
            generation,
            niceness: limits.niceness.0,
            io: IoPriority::under(limits),
            max_batch,
            request_interval: nanos(limits.request_interval),
            threads,
        }
    }
}

/// How text is sampled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// Most tokens generated, ≥ 1.
    pub max_tokens: u32,
    /// Thousandths; 0 = greedy.
    pub temperature_milli: u32,
    /// Thousandths, 1 to 1000.
    pub top_p_milli: u32,
    /// 0 = all.
    pub top_k: u32,
    /// Seed.
    pub seed: u64,
    /// Texts that end a generation.
    pub stop: Vec<String>,
}

/// Agent → worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum ToWorker {
    /// Load the model whose verified, read-only file descriptor travels with this frame (SCM_RIGHTS).
    Load {
        /// Device: `cpu` or a GPU's UUID.
        device: String,
        /// Context of one sequence in tokens.
        context_tokens: u32,
        /// Sequences decoded together at most, before limits.
        parallel_sequences: u16,
        /// Device memory it may take, in bytes.
        memory: u64,
        /// Sampling where a record doesn't say.
        sampling: Sampling,
    },
    /// New limits.
    Limits(WorkerLimits),
    /// The right to use the device until `expires_at`, and to live until `fence_at`.
    Grant {
        /// Kernel timer: SIGSTOP at this CLOCK_BOOTTIME, in nanoseconds.
        fence_at: u64,
        /// Share of the device in permille; 0 = wait.
        share_permille: u16,
        /// End of this share, CLOCK_BOOTTIME nanoseconds.
        expires_at: u64,
    },
    /// One record to answer.
    Record {
        /// Its line number in the whole input, from 1.
        line: u64,
        /// The line.
        text: String,
    },
    /// These results are durable.
    Acknowledge {
        /// Their line numbers.
        lines: Vec<u64>,
    },
    /// Start no other record; finish those begun and answer [`FromWorker::Drained`].
    Drain,
}

/// Worker → agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum FromWorker {
    /// The model is in memory and the worker takes records.
    Loaded {
        /// Bytes of weights and caches it allocated on the device.
        device_bytes: u64,
    },
    /// A set of limits is in force on every thread, as read back.
    Applied(Readback),
    /// A record was begun; sent when its first device step is permitted.
    Started {
        /// Its line.
        line: u64,
        /// CLOCK_BOOTTIME nanoseconds.
        at: u64,
    },
    /// A record was answered or failed; kept until acknowledged.
    Result(RecordResult),
    /// Counters since the start, sent about once a second while anything runs.
    Usage(Usage),
    /// All records that were begun are answered.
    Drained,
    /// The worker can't go on.
    Failed {
        /// One CamelCase word, e.g. `UnsupportedArchitecture`.
        reason: String,
        /// A sentence with the numbers.
        message: String,
    },
}

/// Limits as the kernel tells them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Readback {
    /// Generation of the limits.
    pub generation: u64,
    /// Threads looked at.
    pub threads: u32,
    /// Lowest nice value among them.
    pub niceness: i8,
    /// I/O priority of the least kind among them.
    pub io: IoPriority,
    /// Nice value of the worker's autogroup where autogroups rank it against other sessions; `None` where the kernel has
    /// none or a cgroup ranks the worker instead.
    pub autogroup: Option<i8>,
    /// Batch limit in force.
    pub max_batch: u16,
    /// Request interval in force, nanoseconds.
    pub request_interval: u64,
}

/// The answer to one record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordResult {
    /// Its line.
    pub line: u64,
    /// `custom_id` of the record, if it could be read.
    pub custom_id: Option<String>,
    /// What came out.
    pub outcome: Outcome,
    /// When it began, CLOCK_BOOTTIME nanoseconds; 0 if it never did.
    pub started_at: u64,
    /// When it ended.
    pub finished_at: u64,
    /// Most sequences that were decoded together with it, itself included.
    pub batch: u16,
}

/// What came out of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Outcome {
    /// A text.
    Text {
        /// The answer.
        text: String,
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens generated.
        completion_tokens: u32,
        /// Why it ended.
        finish: Finish,
        /// Whether the record asked for `/v1/completions` rather than `/v1/chat/completions`.
        completion: bool,
    },
    /// It failed; the others go on.
    Error {
        /// One CamelCase word, e.g. `InvalidRecord`, `PromptTooLong`.
        code: String,
        /// A sentence with line number and numbers.
        message: String,
    },
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finish {
    /// End of sequence or a stop text.
    Stop,
    /// The token limit or the context.
    Length,
}

/// Counters since the worker's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// CPU time of the whole process, nanoseconds.
    pub cpu: u64,
    /// Device time billed, nanoseconds (CPU time ÷ cores on the CPU device).
    pub device: u64,
    /// The part of it that was used between permits: reading and writing messages.
    pub outside: u64,
    /// Time spent waiting for a share, nanoseconds.
    pub waited: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Prompt tokens read.
    pub prompt_tokens: u64,
    /// Highest device memory, bytes.
    pub peak_bytes: u64,
}

/// A frame that can't be taken.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME_BYTES`].
    #[error("frame of {0} bytes is longer than {MAX_FRAME_BYTES}")]
    TooLong(usize),
    /// Not a message of this protocol.
    #[error("frame is no message of protocol {PROTOCOL_VERSION}: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// One message as bytes on the wire.
///
/// # Errors
/// [`FrameError::TooLong`] when the body exceeds [`MAX_FRAME_BYTES`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= MAX_FRAME_BYTES);
    let length = length.ok_or(FrameError::TooLong(body.len()))?;
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Length of a frame's body from its 4-byte header, checked before anything is allocated.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn body_length(header: [u8; 4]) -> Result<usize, FrameError> {
    let length = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
    if length > MAX_FRAME_BYTES {
        Err(FrameError::TooLong(length))
    } else {
        Ok(length)
    }
}

/// The message in a frame's body.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode<T: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<T, FrameError> {
    Ok(serde_json::from_slice(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_reads_back_as_the_message_that_was_written() {
        let message = ToWorker::Record {
            line: 7,
            text: "{\"a\":1}\n".into(),
        };
        let frame = encode(&message).unwrap();
        let (header, body) = frame.split_at(4);
        assert_eq!(body_length(header.try_into().unwrap()).unwrap(), body.len());
        assert_eq!(decode::<ToWorker>(body).unwrap(), message);
    }

    #[test]
    fn an_oversized_frame_is_refused_before_it_is_read_and_before_it_is_sent() {
        assert!(matches!(
            body_length(u32::MAX.to_le_bytes()),
            Err(FrameError::TooLong(_))
        ));
        let text = "x".repeat(MAX_FRAME_BYTES);
        assert!(matches!(
            encode(&ToWorker::Record { line: 1, text }),
            Err(FrameError::TooLong(_))
        ));
    }

    #[test]
    fn unknown_fields_and_unknown_messages_are_refused() {
        assert!(decode::<FromWorker>(br#"{"Loaded":{"device_bytes":1,"token":"x"}}"#).is_err());
        assert!(decode::<FromWorker>(br#""Shutdown""#).is_err());
    }
}
