//! The header child: parses one model's header from its standard input and prints facts.
//!
//! Owns: its own confinement, the translation of header facts into the API's, and the wait for it. Runs with no
//! environment and no token. Must not open anything.

use gogrid_api::assignment::ModelFacts;
use gogrid_gguf::{ENGINE_ARCHITECTURES, Facts, GgufError, Header, Limits, parse_from, supported};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, pidfd_open, setpriority_process, setrlimit};
use serde::{Deserialize, Serialize};
use std::io::{self, Write as _};
use std::process::{Child, ExitStatus};
use std::time::Duration;

/// What the child prints.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The model can be run by this version.
    Facts(ModelFacts),
    /// It can't.
    Refused {
        /// One word.
        reason: String,
        /// A sentence.
        message: String,
    },
}

/// The child's whole life. What it can't give up was not there to begin with.
pub fn child(bytes: u64) -> io::Result<()> {
    let _ = setpriority_process(None, 19);
    let _ = rustix::thread::set_no_new_privs(true);
    let limit = |most: u64| Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    for (resource, most) in [
        (Resource::Cpu, 30),
        (Resource::Data, 1 << 30),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
        (Resource::Nproc, 0),
    ] {
        let _ = setrlimit(resource, limit(most));
    }
    let mut input = io::stdin().lock();
    let answer = match parse_from(&mut input, bytes, &Limits::default()) {
        Err(error) => refused(word(&error), &error.to_string()),
        Ok(header) => match Facts::from_header(&header) {
            Err(error) => without_facts(&header, &error.to_string()),
            Ok(facts) => match supported(&facts) {
                Err(error) => refused("UnsupportedModel", &error.to_string()),
                Ok(()) => Answer::Facts(api_facts(&facts)),
            },
        },
    };
    let text = serde_json::to_vec(&answer)?;
    io::stdout().lock().write_all(&text)
}

/// A header without facts: most likely because it is of an architecture whose keys nobody here knows.
fn without_facts(header: &Header, error: &str) -> Answer {
    match header.str_opt("general.architecture") {
        Ok(Some(name)) if !ENGINE_ARCHITECTURES.contains(&name) => {
            let known = ENGINE_ARCHITECTURES.join(", ");
            refused(
                "UnsupportedModel",
                &format!("architecture {name:?} is not supported: must be one of {known}"),
            )
        }
        _ => refused("InvalidModel", error),
    }
}

fn word(error: &GgufError) -> &'static str {
    match error {
        GgufError::NotGguf { .. } => "NotGguf",
        GgufError::Truncated { .. } | GgufError::OutsideFile { .. } => "TruncatedModel",
        _ => "InvalidModel",
    }
}

fn refused(reason: &str, message: &str) -> Answer {
    let message = gogrid_agent_core::results::clip(message, 1024).to_owned();
    Answer::Refused {
        reason: reason.to_owned(),
        message,
    }
}

fn signed(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX).min(9_007_199_254_740_991)
}

fn narrow(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn api_facts(facts: &Facts) -> ModelFacts {
    let heads: u64 = facts.kv_heads.iter().map(|h| u64::from(*h)).sum();
    let width = u64::from(facts.key_length).saturating_add(u64::from(facts.value_length));
    ModelFacts {
        architecture: facts.architecture.clone(),
        name: facts.name.clone().unwrap_or_default(),
        quantization: facts.quantization.to_string(),
        file_bytes: signed(facts.file_bytes),
        weight_bytes: signed(facts.weight_bytes()),
        parameters: signed(facts.parameters),
        layers: narrow(facts.layers),
        embedding: narrow(facts.embedding),
        feed_forward: narrow(facts.feed_forward),
        vocabulary: narrow(facts.vocab),
        context_length: i64::from(facts.context_length),
        kv_bytes_per_token: signed(heads.saturating_mul(width).saturating_mul(4)),
    }
}

/// What the child says, cut to what the API takes: the child has seen hostile bytes.
pub(crate) fn bounded(answer: Answer) -> Answer {
    let most = 9_007_199_254_740_991;
    let text = |text: &str, length| gogrid_agent_core::results::clip(text, length).to_owned();
    match answer {
        Answer::Facts(facts) => Answer::Facts(ModelFacts {
            architecture: text(&facts.architecture, 64),
            name: text(&facts.name, 128),
            quantization: text(&facts.quantization, 16),
            file_bytes: facts.file_bytes.clamp(0, most),
            weight_bytes: facts.weight_bytes.clamp(0, most),
            parameters: facts.parameters.clamp(0, most),
            layers: facts.layers.clamp(0, 65_535),
            embedding: facts.embedding.clamp(0, 1_048_576),
            feed_forward: facts.feed_forward.clamp(0, 16_777_216),
            vocabulary: facts.vocabulary.clamp(0, 16_777_216),
            context_length: facts.context_length.clamp(0, 2_147_483_647),
            kv_bytes_per_token: facts.kv_bytes_per_token.clamp(0, most),
        }),
        Answer::Refused { reason, message } => {
            let reason = gogrid_agent_core::results::reason_word(&reason, "InvalidModel").to_owned();
            Answer::Refused {
                reason,
                message: text(&message, 1024),
            }
        }
    }
}

/// Waits for a child; kills it at the deadline.
pub(crate) fn wait(child: &mut Child, deadline: Duration) -> io::Result<ExitStatus> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let fd = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec {
        tv_sec: i64::try_from(deadline.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let mut waiting = [PollFd::new(&fd, PollFlags::IN)];
    if poll(&mut waiting, Some(&limit))? == 0 {
        child.kill()?;
    }
    child.wait()
}
