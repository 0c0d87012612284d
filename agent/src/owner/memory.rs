//! The watchdog of device memory.
//!
//! Owns: each job's place on the ladder, from what its worker was measured with and from a cap that has fallen, and what
//! each rung changes. Must not measure anything.

use super::Owner;
use super::work::Work;
use gogrid_agent_core::plan::Phase;
use gogrid_agent_core::session::{Nanos, nanos};
use gogrid_agent_core::watchdog::{DRAIN_GRACE, Rung, WATCH_EVERY, above_cap, allowance};
use gogrid_api::Bytes;
use gogrid_api::assignment::Notice;
use gogrid_api::job::Failure;
use std::collections::BTreeMap;

/// What a worker's program may grow by on the CPU beside what it counts: tokenizer, threads, messages.
const PROGRAM: Bytes = Bytes(256 << 20);

impl Owner {
    /// What our processes hold was measured.
    pub(super) fn resident(&mut self, resident: &BTreeMap<i32, Bytes>) {
        for (name, work) in &mut self.work {
            let measured = work.pid.and_then(|pid| resident.get(&pid)).copied();
            work.resident = measured;
            let phase = self.jobs.get(name).map(|job| job.phase);
            if matches!(phase, Some(Phase::Starting | Phase::Connected)) {
                work.before_load = measured;
            }
        }
    }

    /// Memory of a worker's process beyond what it may hold, if so, with both figures.
    fn overrun(work: &Work) -> Option<(Bytes, Bytes)> {
        // The program itself is no device memory; where the process can't be seen, the worker's own word must do.
        let (measured, most) = match (work.resident, work.before_load) {
            (Some(resident), Some(before)) => (
                resident.saturating_sub(before),
                allowance(work.bytes).saturating_add(PROGRAM),
            ),
            _ => (Bytes(work.usage.peak_bytes), allowance(work.bytes)),
        };
        (measured > most).then_some((measured, most))
    }

    /// Looks at every job once a second.
    pub(super) fn watch_memory(&mut self, now: Nanos) {
        if now < self.memory_at.saturating_add(nanos(WATCH_EVERY)) {
            return;
        }
        self.memory_at = now;
        let live = |name: &str| self.jobs.get(name).is_some_and(|job| job.phase != Phase::Over);
        let mut above: BTreeMap<String, String> = BTreeMap::new();
        for device in self.ledger.devices() {
            let (cap, held) = (self.ledger.cap(device), self.ledger.held(device));
            let holdings: Vec<(&str, Bytes, Nanos)> = self
                .work
                .iter()
                .filter(|(name, work)| work.device == device && live(name))
                .map(|(name, work)| (name.as_str(), work.bytes, work.claimed_at))
                .collect();
            for name in above_cap(cap, &holdings) {
                let why = format!(
                    "{held} of device {device} are reserved, the profile allows {cap} for all jobs, and this one came last"
                );
                above.insert(name, why);
            }
        }
        let mut overruns = vec![];
        for (name, work) in self
            .work
            .iter()
            .filter(|(name, work)| work.loaded_at.is_some() && live(name))
        {
            if let Some((measured, most)) = Self::overrun(work) {
                overruns.push((work.device.clone(), name.clone(), measured));
                let why = format!(
                    "the worker holds {measured}: {} are reserved for it, {most} with all allowances",
                    work.bytes
                );
                above.insert(name.clone(), why);
            }
        }
        for (device, name, measured) in overruns {
            self.ledger.overrun(&device, &name, measured);
        }
        let names: Vec<String> = self.work.keys().filter(|name| live(name)).cloned().collect();
        for name in names {
            let why = above.get(&name);
            let climbed = self.work.get_mut(&name).and_then(|work| {
                let rung = work.ladder.observe(now, why.is_some())?;
                work.why_above = why.cloned().or(work.why_above.take());
                Some((rung, work.why_above.clone().unwrap_or_default()))
            });
            if let Some((rung, why)) = climbed {
                self.stand_on(&name, rung, &why, now);
            }
        }
    }

    /// What a rung changes besides what looks at it: feeding and the batch limit do.
    fn stand_on(&mut self, name: &str, rung: Rung, why: &str, now: Nanos) {
        tracing::warn!(
            assignment = name,
            rung = rung.word(),
            why,
            "watchdog of device memory"
        );
        self.tools.metrics.rungs.with_label_values(&[rung.word()]).inc();
        let message: String = format!("{}: {why}", rung.word()).chars().take(256).collect();
        if let Some(work) = self.work.get_mut(name) {
            work.status.vram_exceeded = (rung != Rung::Clear).then(|| Notice {
                reason: rung.word().into(),
                message: message.clone(),
            });
        }
        if rung == Rung::Drain
            && let Some(job) = self.jobs.get_mut(name)
        {
            let failure = Failure {
                reason: "VRAMExceeded".into(),
                message,
                retryable: true,
            };
            job.eviction = Some((failure, now.saturating_add(nanos(DRAIN_GRACE))));
        }
        self.push_limits();
    }
}
