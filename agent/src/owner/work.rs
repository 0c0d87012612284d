//! What the executor keeps of one job beside what the plan looks at.
//!
//! Owns: records, model, link, limits and the status that is to be written. Must not decide what comes next.

use super::yielding::Yield;
use crate::api::Target;
use crate::link::Link;
use gogrid_agent_core::feed::Feed;
use gogrid_agent_core::protocol::{Readback, Usage, WorkerLimits};
use gogrid_agent_core::session::Nanos;
use gogrid_agent_core::watchdog::Ladder;
use gogrid_api::effective::EffectiveProfile;
use gogrid_api::{Assignment, AssignmentStatus, Bytes};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One job's belongings.
pub(crate) struct Work {
    /// Which assignment.
    pub(crate) target: Target,
    /// The order's spec.
    pub(crate) spec: gogrid_api::AssignmentSpec,
    /// Its records.
    pub(crate) feed: Feed,
    /// Its one device.
    pub(crate) device: String,
    /// Bytes reserved there.
    pub(crate) bytes: Bytes,
    /// The verified model.
    pub(crate) model: Option<Arc<OwnedFd>>,
    /// What its worker must say; used once.
    pub(crate) nonce: Option<String>,
    /// The way to its worker.
    pub(crate) link: Option<Link>,
    /// What it may take.
    pub(crate) effective: Option<EffectiveProfile>,
    /// Limits last sent.
    pub(crate) limits: Option<WorkerLimits>,
    /// Generation of the limits that its worker was told last, at its start or since.
    pub(crate) told: u64,
    /// Limits last read back.
    pub(crate) applied: Option<Readback>,
    /// Nice value that its worker had from its start, where that is kinder than was asked: no new one would be less so.
    pub(crate) kindest: Option<i8>,
    /// Whether its worker was moved to the idle cgroup.
    pub(crate) idle: bool,
    /// Share last granted, in permille.
    pub(crate) share: u16,
    /// Share that it was to get; others' grants that are still out may have left less.
    pub(crate) wanted: u16,
    /// How its own profile yields to others' work, where it does.
    pub(crate) yielding: Option<Yield>,
    /// When its status last changed what it says of that.
    pub(crate) noticed_at: Option<Nanos>,
    /// Its worker's process, where that can be seen from here.
    pub(crate) pid: Option<i32>,
    /// Memory of that process as last measured.
    pub(crate) resident: Option<Bytes>,
    /// What it was before the model was loaded.
    pub(crate) before_load: Option<Bytes>,
    /// Its place on the watchdog's ladder.
    pub(crate) ladder: Ladder,
    /// Why it is there.
    pub(crate) why_above: Option<String>,
    /// When it was taken up.
    pub(crate) claimed_at: Nanos,
    /// Counters of the worker.
    pub(crate) usage: Usage,
    /// When its worker last said anything.
    pub(crate) heard_at: Nanos,
    /// When the model was loaded.
    pub(crate) loaded_at: Option<Nanos>,
    /// Kills for want of memory on this machine when the worker was started.
    pub(crate) oom_kills: u64,
    /// The status to be written.
    pub(crate) status: AssignmentStatus,
    /// When its state was set.
    pub(crate) turned_at: Nanos,
    /// The status last written.
    pub(crate) written: Option<AssignmentStatus>,
    /// When that was.
    pub(crate) told_at: Nanos,
    /// The one on its way.
    pub(crate) writing: Option<AssignmentStatus>,
    /// No sooner than this.
    pub(crate) retry_at: Nanos,
    /// The assignment is gone: nothing can be reported any more.
    pub(crate) gone: bool,
}

impl Work {
    /// For an assignment that has just been taken up.
    pub(crate) fn new(assignment: &Assignment, now: Nanos) -> Self {
        let metadata = &assignment.metadata;
        let spec = assignment.spec.clone();
        let stage = spec.stages.first();
        Self {
            target: Target {
                name: metadata.name.clone().unwrap_or_default(),
                uid: metadata.uid.clone().unwrap_or_default(),
                job_uid: spec.job.uid.clone(),
                resource_version: metadata.resource_version.clone().unwrap_or_default(),
            },
            feed: Feed::new(&spec.job.uid, &spec.inputs, &spec.skip),
            device: stage.map(|s| s.gpu_uuid.clone()).unwrap_or_default(),
            bytes: stage.and_then(|s| s.vram.bytes().ok()).unwrap_or_default(),
            spec,
            model: None,
            nonce: None,
            link: None,
            effective: None,
            limits: None,
            told: 0,
            applied: None,
            kindest: None,
            idle: false,
            share: 0,
            wanted: 0,
            yielding: None,
            noticed_at: None,
            pid: None,
            resident: None,
            before_load: None,
            ladder: Ladder::default(),
            why_above: None,
            claimed_at: now,
            usage: Usage::default(),
            heard_at: 0,
            loaded_at: None,
            oom_kills: 0,
            status: AssignmentStatus::default(),
            turned_at: now,
            written: None,
            told_at: now,
            writing: None,
            retry_at: 0,
            gone: false,
        }
    }

    /// Whether nothing waits to be written.
    pub(crate) fn reported(&self) -> bool {
        self.gone || (self.writing.is_none() && self.written.as_ref() == Some(&self.status))
    }

    /// Takes in what is in force in its worker.
    pub(crate) fn read_back(&mut self, readback: Readback) {
        let asked = self
            .limits
            .as_ref()
            .filter(|l| l.generation == readback.generation);
        if self.applied.is_none() && asked.is_some_and(|asked| readback.niceness > asked.niceness) {
            self.kindest = Some(readback.niceness);
        }
        self.applied = Some(readback);
    }

    /// Whether its worker is kinder than its limits ask although a new one would not be: it may not lower its nice value.
    pub(crate) fn outdated(&self) -> bool {
        let (Some(limits), Some(applied)) = (&self.limits, &self.applied) else {
            return false;
        };
        let least = self
            .kindest
            .map_or(limits.niceness, |kindest| kindest.max(limits.niceness));
        self.link.is_some() && applied.generation == limits.generation && applied.niceness > least
    }

    /// Time since the model was loaded.
    pub(crate) fn running_for(&self, now: Nanos) -> Nanos {
        self.loaded_at.map_or(0, |at| now.saturating_sub(at))
    }
}
