//! The first steps of a worker process, in the order that makes its limits true.
//!
//! Owns the order: fence, courtesy, then threads, then the agent. Must not touch a model before all of that holds.

use crate::failure::SessionError;
use crate::pool::Start;
use crate::session::{Pause, Session};
use crate::stamps::Stamps;
use crate::wire;
use crate::{compute_environment, inbox, limits, num, sys};
use anyhow::{Context, Result};
use gogrid_agent_core::protocol::{Role, WorkerId};
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;

/// The agent is gone.
const EXIT_NO_AGENT: u8 = 75;
/// The engine panicked.
const EXIT_PANIC: u8 = 70;
/// The longest start message.
const MAX_START: u64 = 64 << 10;

/// Runs one worker until the agent is gone or it can't go on.
pub(crate) fn run(socket: &Path, worker: WorkerId, stamps: Option<&Path>) -> Result<ExitCode> {
    let mut text = String::new();
    std::io::stdin()
        .take(MAX_START)
        .read_to_string(&mut text)
        .context("reading the start message")?;
    let start: Start =
        serde_json::from_str(&text).context("start message; workers are started by the pool")?;
    drop(text);
    let fence = sys::Fence::arm(start.fence_at).context("arming the fence")?;
    limits::settle(&start.limits, start.memory_limit).context("setting the first limits")?;
    sys::set_environment_before_threads(&compute_environment(threads(start.limits.threads)))
        .context("setting the number of threads")?;

    let role = Role::Worker {
        worker,
        nonce: start.nonce,
    };
    let (sender, receiver) = wire::connect(socket, role).context("greeting the agent")?;
    let (messages, mut received) = mpsc::channel();
    std::thread::Builder::new().name("agent".into()).spawn(move || {
        let error = inbox::read(receiver, &fence, &messages);
        tracing::warn!(worker, %error, "the agent is gone");
        // Nothing may be computed for nobody: not even the step under way.
        std::process::exit(i32::from(EXIT_NO_AGENT));
    })?;
    let stamps = stamps
        .map(Stamps::open)
        .transpose()
        .context("opening the stamps")?;
    let mut session = Session::new(sender, start.limits, stamps);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        loop {
            // The session runs inside the pool that computes, as one of its threads: no more threads than allowed are
            // ever runnable, and handing out work costs no wake-up of a third one.
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(session.threads())
                .build()
                .map_err(|error| SessionError::Threads(error.to_string()))?;
            match pool.install(|| session.run(&mut received))? {
                Pause::Threads => {}
                Pause::Over => return Ok::<_, SessionError>(()),
            }
        }
    }));
    match result {
        Ok(Ok(())) => Ok(ExitCode::from(EXIT_NO_AGENT)),
        Ok(Err(error)) => {
            session.fail(error.reason(), error.to_string());
            Err(error.into())
        }
        Err(_) => {
            session.fail(
                "EnginePanic",
                "the engine panicked; its message is in the worker's log".into(),
            );
            Ok(ExitCode::from(EXIT_PANIC))
        }
    }
}

/// Threads that compute: never more than cores.
pub(crate) fn threads(asked: u16) -> usize {
    at_most(asked, cores())
}

/// As many threads as asked, but no more than cores.
pub(crate) fn at_most(asked: u16, cores: usize) -> usize {
    num::index(u32::from(asked.max(1))).min(cores)
}

/// Cores of the CPU device.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
