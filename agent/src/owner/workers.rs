//! Small truths about workers.
//!
//! Owns: nonces, memory limits, the message that loads a model, and what a job's status says of its worker.

use super::work::Work;
use gogrid_agent_core::protocol::{IoPriority, Sampling, ToWorker};
use gogrid_agent_core::session::Nanos;
use gogrid_api::assignment::{AppliedLimits, Checkpoint};
use gogrid_api::job::{Generation, Measured};
use gogrid_api::{Bytes, Percent};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _};

/// 32 random bytes in hexadecimal digits.
pub(super) fn nonce() -> io::Result<String> {
    let mut bytes = [0_u8; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let mut text = String::with_capacity(64);
    for byte in bytes {
        write!(text, "{byte:02x}").map_err(io::Error::other)?;
    }
    Ok(text)
}

/// Backstop behind the worker's own arena: its reservation, an eighth more, and room for the program and its stacks.
pub(super) fn memory_limit(Bytes(reserved): Bytes) -> u64 {
    reserved.saturating_add(reserved / 8).saturating_add(512 << 20)
}

/// Processes that the kernel has killed for want of memory since boot.
pub(super) fn oom_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("oom_kill "));
    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// The order to load, on that device.
pub(super) fn load_message(work: &Work, device: &str) -> ToWorker {
    let spec = &work.spec;
    let Generation {
        max_tokens,
        temperature_milli,
        top_p_milli,
        top_k,
        seed,
        stop,
    } = spec.generation.clone().unwrap_or_default();
    let positive = |number: i32| u32::try_from(number).unwrap_or(0);
    ToWorker::Load {
        device: device.to_owned(),
        context_tokens: positive(spec.context_tokens),
        parallel_sequences: u16::try_from(spec.parallel_sequences).unwrap_or(1).max(1),
        memory: work.bytes.0,
        sampling: Sampling {
            max_tokens: positive(max_tokens).max(1),
            temperature_milli: positive(temperature_milli),
            top_p_milli: positive(top_p_milli).clamp(1, 1000),
            top_k: positive(top_k),
            seed: u64::try_from(seed).unwrap_or(0),
            stop,
        },
    }
}

/// `Idle`, `BestEffort/7` or `None`.
pub(super) fn io_text(io: IoPriority) -> String {
    match io {
        IoPriority::None => "None".into(),
        IoPriority::BestEffort(level) => format!("BestEffort/{level}"),
        IoPriority::Idle => "Idle".into(),
    }
}

/// Tells a job's worker that these lines' answers are durable.
pub(super) fn acknowledge(work: &Work, lines: Vec<u64>) {
    if let Some(link) = work.link.as_ref().filter(|_| !lines.is_empty()) {
        // A worker that takes no message is killed by its own end; nothing is lost here.
        let _ = link.worker(&ToWorker::Acknowledge { lines });
    }
}

/// Progress, memory, limits and checkpoint as they stand at a transition.
pub(super) fn fill_status(work: &mut Work, now: Nanos) {
    work.status.progress = work.loaded_at.map(|_| work.feed.progress(work.running_for(now)));
    if work.usage.peak_bytes > 0 {
        // Its own word: bounded by what the API takes.
        work.status.measured = Some(Measured {
            peak_vram: Some(Bytes(work.usage.peak_bytes.min(1 << 50)).into()),
        });
    }
    let checkpoint = work.feed.checkpoint();
    if checkpoint != Checkpoint::default() {
        work.status.checkpoint = Some(checkpoint);
    }
    if let Some(limits) = applied(work) {
        work.status.limits = Some(limits);
    }
}

/// Limits as read back, once any were.
fn applied(work: &Work) -> Option<AppliedLimits> {
    let (readback, effective) = (work.applied.as_ref()?, work.effective.as_ref()?);
    let Percent(percent) = effective.limits.compute_percent;
    Some(AppliedLimits {
        profiles: effective
            .sources
            .iter()
            .take(4)
            .map(|(name, generation)| format!("{name}@{generation}"))
            .collect(),
        vram: work.bytes.into(),
        compute_percent: i32::from(percent.min(100)),
        min_request_interval_millis: i64::try_from(readback.request_interval / 1_000_000)
            .unwrap_or(0)
            .min(3_600_000),
        niceness: i32::from(readback.niceness.clamp(-20, 19)),
        io: io_text(readback.io),
        max_batch_size: i32::from(readback.max_batch.clamp(1, 256)),
    })
}
