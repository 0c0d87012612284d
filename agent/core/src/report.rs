//! When a node's status is worth a write.
//!
//! Owns: the bucketing of memory figures and the pacing of GpuNode writes, so that an idle node is silent. Must not
//! write anything.

use crate::session::{Nanos, nanos};
use gogrid_api::assignment::{Checkpoint, Notice, State};
use gogrid_api::node::Device;
use gogrid_api::{AssignmentStatus, ByteQuantity, Bytes, GpuNodeStatus, LeaseTiming, Millis};

/// Between two writes caused by memory figures.
pub const MEMORY_EVERY: Millis = Millis(10_000);
/// Between two writes caused by profiles.
pub const PROFILES_EVERY: Millis = Millis(5_000);
/// Between two writes of whatever cause.
pub const WRITE_EVERY: Millis = Millis(1_000);
/// Looks at the status in the time between two heartbeats.
const LOOKS: Nanos = 6;
/// How long getting or loading a model takes before that is worth telling.
const PASSING: Millis = Millis(5_000);

/// Whether an assignment's status whose state has lasted that long is worth a write. A model that is at hand is got and
/// loaded within moments, a small job answers its records within a few more, and every write of an agent's is followed by one
/// of the operator's. The claim is always written: nothing begins before it is accepted. So are answers and what is wrong.
pub fn worth_telling(
    written: Option<&AssignmentStatus>,
    status: &AssignmentStatus,
    lasted: Nanos,
    timing: LeaseTiming,
) -> bool {
    fn news(status: &AssignmentStatus) -> (&Option<Checkpoint>, &Option<Notice>, &Option<Notice>) {
        (&status.checkpoint, &status.throttled, &status.vram_exceeded)
    }
    let Some(state) = status.state else { return false };
    let none = AssignmentStatus::default();
    if news(written.unwrap_or(&none)) != news(status) {
        return true;
    }
    let passing = |state| matches!(state, State::Fetching | State::Loading);
    // What was told and is no longer so is worth telling at once.
    let outdated = written.and_then(|status| status.state).is_some_and(passing);
    match state {
        State::Fetching | State::Loading => lasted >= nanos(PASSING),
        State::Running => outdated || lasted >= nanos(passing_run(timing)),
        State::Claimed | State::Stopping | State::Stopped | State::Succeeded | State::Failed => true,
    }
}

/// How long records are answered before that is worth telling: half a lease.
fn passing_run(timing: LeaseTiming) -> Millis {
    Millis(timing.lease().0 / 2)
}

/// The figure to publish: the old one unless the new differs by max(256 MiB, 5 % of the device).
pub fn bucketed(old: Option<Bytes>, new: Bytes, total: Bytes) -> Bytes {
    let step = (256 << 20).max(total.0 / 20);
    match old {
        Some(old) if old.0.abs_diff(new.0) < step => old,
        _ => Bytes(new.0 - new.0 % (1 << 20)),
    }
}

/// The devices to publish: as measured, with memory figures that moved too little kept as they were written.
pub fn bucketed_devices(written: &[Device], mut measured: Vec<Device>) -> Vec<Device> {
    for device in &mut measured {
        let old = written.iter().find(|d| d.uuid == device.uuid);
        let total = device.memory_total.bytes().unwrap_or_default();
        let kept = |old: Option<&ByteQuantity>, new: &ByteQuantity| {
            bucketed(
                old.and_then(|q| q.bytes().ok()),
                new.bytes().unwrap_or_default(),
                total,
            )
            .into()
        };
        device.memory_foreign = kept(old.map(|d| &d.memory_foreign), &device.memory_foreign);
        device.memory_free = kept(old.map(|d| &d.memory_free), &device.memory_free);
    }
    measured
}

/// What was last written and when.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    written: Option<(GpuNodeStatus, Nanos)>,
    memory_at: Nanos,
    profiles_at: Nanos,
}

impl Pace {
    /// The status last written.
    pub fn last(&self) -> Option<&GpuNodeStatus> {
        self.written.as_ref().map(|(status, _)| status)
    }

    /// Nothing written is known any more: the object is gone or in doubt.
    pub fn forget(&mut self) {
        self.written = None;
    }

    /// The status was written.
    pub fn wrote(&mut self, status: GpuNodeStatus, now: Nanos) {
        if self.last().is_none_or(|w| w.devices != status.devices) {
            self.memory_at = now;
        }
        if self.last().is_none_or(|w| w.profiles != status.profiles) {
            self.profiles_at = now;
        }
        self.written = Some((status, now));
    }

    /// Whether the last write was so recent that nothing is worth another one yet.
    pub fn rests(&self, now: Nanos) -> bool {
        let written = self.written.as_ref();
        written.is_some_and(|(_, at)| now < at.saturating_add(nanos(WRITE_EVERY)))
    }

    /// When to look at the status again although nothing happened: time alone changes little of it, and the heartbeat is
    /// not to wait for the next look.
    pub fn look_at(&self, timing: LeaseTiming, now: Nanos) -> Nanos {
        let batch = nanos(timing.heartbeat_batch());
        let look = now.saturating_add(batch / LOOKS);
        let beat = self.written.as_ref().map(|(_, at)| at.saturating_add(batch));
        beat.filter(|at| *at > now).map_or(look, |at| at.min(look))
    }

    /// Whether to write this status now. What changes with every job, heartbeat and rows of limits, is a reason once per
    /// batch interval; a heartbeat only when it `beats`: it tells of a job of which nothing else was written for so long.
    pub fn due(&self, status: &GpuNodeStatus, beats: bool, timing: LeaseTiming, now: Nanos) -> bool {
        let Some((last, at)) = &self.written else {
            return true;
        };
        if self.rests(now) {
            return false;
        }
        let GpuNodeStatus {
            conditions,
            session,
            agent_version,
            devices,
            enforcement,
            profiles,
            models,
            model_count,
            heartbeat,
        } = status;
        let health =
            |devices: &[Device]| -> Vec<_> { devices.iter().map(|d| (d.uuid.clone(), d.health)).collect() };
        let at_once = *conditions != last.conditions
            || (session, agent_version) != (&last.session, &last.agent_version)
            || (models, model_count) != (&last.models, &last.model_count)
            || (last.heartbeat.is_some() && heartbeat.is_none());
        let after = |since: Nanos, every: Millis| now >= since.saturating_add(nanos(every));
        at_once
            || (*devices != last.devices
                && (health(devices) != health(&last.devices) || after(self.memory_at, MEMORY_EVERY)))
            || (*profiles != last.profiles && after(self.profiles_at, PROFILES_EVERY))
            // Rows of limits also change with every worker that comes or goes.
            || ((*enforcement != last.enforcement || (beats && *heartbeat != last.heartbeat))
                && after(*at, timing.heartbeat_batch()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gogrid_api::node::{Backend, Health};

    fn status(free: u64) -> GpuNodeStatus {
        let device = Device {
            uuid: "cpu".into(),
            name: "CPU".into(),
            backend: Backend::Cpu,
            memory_total: Bytes(8 << 30).into(),
            memory_reserved: Bytes(0).into(),
            memory_foreign: Bytes(0).into(),
            memory_free: Bytes(free).into(),
            compute_capability: None,
            health: Health::Healthy,
            message: None,
            holder: None,
        };
        GpuNodeStatus {
            devices: vec![device],
            ..GpuNodeStatus::default()
        }
    }

    #[test]
    fn small_changes_of_memory_are_not_published() {
        let total = Bytes(8 << 30);
        let old = Bytes(4 << 30);
        assert_eq!(bucketed(Some(old), Bytes(old.0 + (400 << 20)), total), old);
        assert_ne!(bucketed(Some(old), Bytes(old.0 + (420 << 20)), total), old);
        let kept = bucketed_devices(&status(1 << 30).devices, status((1 << 30) + 4096).devices);
        assert_eq!(kept, status(1 << 30).devices);
    }

    #[test]
    fn workers_that_come_and_go_cause_a_write_once_per_batch_interval_and_a_profile_sooner() {
        let (timing, second) = (LeaseTiming::default(), 1_000_000_000);
        let mut pace = Pace::default();
        pace.wrote(status(1), 0);
        let mut busy = status(1);
        busy.enforcement = vec![gogrid_api::node::Enforcement {
            device: "cpu".into(),
            limit: "niceness".into(),
            requested: "15".into(),
            effective: "15".into(),
            mechanism: "thread".into(),
        }];
        assert!(!pace.due(&busy, true, timing, 29 * second) && pace.due(&busy, true, timing, 30 * second));
        let edited =
            serde_json::json!([{"name": "a", "generation": 2, "effectiveAt": "1970-01-01T00:00:00Z"}]);
        busy.profiles = serde_json::from_value(edited).unwrap();
        assert!(!pace.due(&busy, true, timing, 4 * second) && pace.due(&busy, true, timing, 5 * second));
    }

    #[test]
    fn passing_states_are_told_only_where_they_take_a_while_and_everything_else_at_once() {
        let (timing, second) = (LeaseTiming::default(), 1_000_000_000);
        let is = |state| AssignmentStatus {
            state: Some(state),
            ..AssignmentStatus::default()
        };
        let claimed = is(State::Claimed);
        let told = |status: &AssignmentStatus, lasted| worth_telling(Some(&claimed), status, lasted, timing);
        for (state, seconds) in [(State::Fetching, 5), (State::Loading, 5), (State::Running, 20)] {
            assert!(!told(&is(state), seconds * second - 1) && told(&is(state), seconds * second));
        }
        let at_once = [
            State::Claimed,
            State::Stopping,
            State::Stopped,
            State::Succeeded,
            State::Failed,
        ];
        assert!(at_once.iter().all(|state| told(&is(*state), 0)));
        assert!(!told(&AssignmentStatus::default(), u64::MAX));
        assert!(worth_telling(
            Some(&is(State::Loading)),
            &is(State::Running),
            0,
            timing
        ));
    }

    #[test]
    fn answers_and_what_is_wrong_are_told_at_once_whatever_the_state_and_only_once() {
        let timing = LeaseTiming::default();
        let running = AssignmentStatus {
            state: Some(State::Running),
            ..AssignmentStatus::default()
        };
        let answered = AssignmentStatus {
            checkpoint: Some(Checkpoint {
                text: Some("{}\n".into()),
                ..Checkpoint::default()
            }),
            ..running.clone()
        };
        let notice = || Notice {
            reason: "Shed".into(),
            message: "too much".into(),
        };
        let exceeds = AssignmentStatus {
            vram_exceeded: Some(notice()),
            ..running.clone()
        };
        assert!(!worth_telling(None, &running, 0, timing));
        for status in [&answered, &exceeds] {
            assert!(worth_telling(None, status, 0, timing));
            assert!(!worth_telling(Some(status), status, 0, timing));
            assert!(worth_telling(Some(status), &running, 0, timing));
        }
    }

    #[test]
    fn a_heartbeat_is_a_reason_only_where_it_tells_of_a_job_of_which_nothing_else_was_written() {
        let (timing, second) = (LeaseTiming::default(), 1_000_000_000);
        let mut pace = Pace::default();
        let at = |time: &str| {
            let heartbeat = serde_json::json!({"lease": "l", "renewedAt": time});
            GpuNodeStatus {
                heartbeat: serde_json::from_value(heartbeat).unwrap(),
                ..status(1)
            }
        };
        pace.wrote(at("1970-01-01T00:00:00Z"), 0);
        let later = at("1970-01-01T00:00:30Z");
        assert!(pace.due(&later, true, timing, 30 * second));
        assert!(!pace.due(&later, false, timing, 90 * second));
        assert!(
            pace.due(&status(1), false, timing, second),
            "nothing runs any more"
        );
    }

    #[test]
    fn an_unchanged_status_is_never_written_again() {
        let timing = LeaseTiming::default();
        let mut pace = Pace::default();
        assert!(pace.due(&status(1), true, timing, 0));
        pace.wrote(status(1), 0);
        assert!(!pace.due(&status(1), true, timing, u64::MAX));
    }

    #[test]
    fn the_status_is_looked_at_now_and_then_and_when_its_heartbeat_is_due() {
        let timing = LeaseTiming::default();
        let second = 1_000_000_000;
        let mut pace = Pace::default();
        assert_eq!(pace.look_at(timing, 7 * second), 12 * second);
        pace.wrote(status(1), 10 * second);
        assert_eq!(pace.look_at(timing, 34 * second), 39 * second);
        assert_eq!(pace.look_at(timing, 36 * second), 40 * second);
        assert_eq!(pace.look_at(timing, 40 * second), 45 * second);
    }

    #[test]
    fn memory_waits_ten_seconds_and_health_does_not() {
        let timing = LeaseTiming::default();
        let mut pace = Pace::default();
        pace.wrote(status(1), 0);
        assert!(!pace.due(&status(2), true, timing, 9_999_999_999));
        assert!(pace.due(&status(2), true, timing, 10_000_000_000));
        let mut sick = status(1);
        sick.devices[0].health = Health::Unhealthy;
        assert!(pace.due(&sick, true, timing, 1_000_000_000));
    }
}
