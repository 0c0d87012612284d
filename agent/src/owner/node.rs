//! The GpuNode: what this agent says of its node.
//!
//! Owns: the status as it should read and the moment it is written. Must not measure or enforce anything.

use super::{Owner, workers};
use crate::clock::wall_seconds;
use crate::event::Event;
use gogrid_agent_core::plan::Phase;
use gogrid_agent_core::protocol::Readback;
use gogrid_agent_core::report::bucketed_devices;
use gogrid_agent_core::session::{Nanos, Standing};
use gogrid_api::condition::{self, set_condition};
use gogrid_api::effective::Limits;
use gogrid_api::names::{CPU_DEVICE, node_lease};
use gogrid_api::node::{Enforcement, Heartbeat, RunningProgress};
use gogrid_api::profile::IoClass;
use gogrid_api::{Bytes, Condition, ConditionStatus, GpuNodeStatus};
use std::collections::BTreeMap;

const RETRY_NANOS: Nanos = 1_000_000_000;
const READY: &str = "Ready";
const ENDING: &str = "Ending";

impl Owner {
    pub(super) fn node_changed(&mut self, uid: String, labels: BTreeMap<String, String>) {
        if self.node_uid.as_ref() != Some(&uid) {
            self.node_ensure |= self.node_uid.is_some();
            self.node_uid = Some(uid);
            self.pace.forget();
        }
        if self.labels.as_ref() != Some(&labels) {
            self.labels = Some(labels);
            self.profiles_changed();
        }
    }

    pub(super) fn node_written(&mut self, status: GpuNodeStatus, result: Result<(), String>, now: Nanos) {
        self.node_writing = false;
        let label = if result.is_ok() { "ok" } else { "failed" };
        self.tools
            .metrics
            .writes
            .with_label_values(&["gpunode", label])
            .inc();
        match result {
            Ok(()) => {
                self.node_ensure = false;
                let ready = condition::find(&status.conditions, READY);
                if let Some(shutdown) = &mut self.shutdown {
                    shutdown.said |= ready.is_some_and(|c| c.reason == ENDING);
                }
                self.pace.wrote(status, now);
            }
            Err(error) => {
                tracing::warn!(error, "the GpuNode was not written");
                self.node_ensure = true;
                self.node_retry_at = now.saturating_add(RETRY_NANOS);
            }
        }
    }

    /// Writes the GpuNode if it is worth it. The session is published only under a held lease.
    pub(super) fn flush_node(&mut self, now: Nanos) {
        let known = self.profiles.is_some()
            && self.labels.is_some()
            && !self.cpu.is_empty()
            && self.driver.is_some()
            && self.guest.settled();
        let held = self.renewals.standing(now) == Standing::Held;
        if self.node_writing || !known || !held || self.models.is_none() || now < self.node_retry_at {
            return;
        }
        self.refresh(now);
        let untold = self.shutdown.is_some_and(|s| !s.said);
        if !untold && !self.pace.due(&self.status, self.tools.config.timing, now) {
            return;
        }
        self.node_writing = true;
        let (calls, hub, status) = (
            self.tools.calls.clone(),
            self.tools.hub.clone(),
            self.status.clone(),
        );
        let ensure = self.node_ensure;
        self.tools.host.spawn(Box::pin(async move {
            let result = calls
                .gpu_node_status(&status, ensure)
                .await
                .map_err(|e| e.to_string());
            hub.send(Event::GpuNodeWritten(Box::new(status), result)).await;
        }));
    }

    fn refresh(&mut self, now: Nanos) {
        let written = self.pace.last().map(|s| s.devices.clone()).unwrap_or_default();
        let devices = bucketed_devices(&written, self.devices());
        let models = self.models.clone().unwrap_or_default();
        // While an edit is on its way, the rows stay as they were: they change once, together with the profile.
        let enforcement = match self.pace.last() {
            Some(last) if self.limits_pending() => last.enforcement.clone(),
            Some(_) | None => self.enforcement(),
        };
        let mut conditions = std::mem::take(&mut self.status.conditions);
        set_condition(&mut conditions, self.ready());
        for condition in self.surroundings(now) {
            set_condition(&mut conditions, condition);
        }
        self.status = GpuNodeStatus {
            conditions,
            session: self.tools.session.clone(),
            agent_version: self.tools.config.version.clone(),
            devices,
            enforcement,
            profiles: self.in_force.clone(),
            model_count: models.len().to_string(),
            models,
            heartbeat: self.heartbeat(now),
        };
    }

    fn ready(&self) -> Condition {
        let (status, reason, message) = if self.shutdown.is_some() {
            (
                ConditionStatus::False,
                ENDING,
                "the agent was told to end and hands its jobs back",
            )
        } else if self.pool.is_some() {
            (
                ConditionStatus::True,
                "AgentReady",
                "the agent holds its lease and has its pool of workers",
            )
        } else {
            (
                ConditionStatus::False,
                "NoPool",
                "the pool of workers is not connected",
            )
        };
        Condition {
            type_: READY.into(),
            status,
            reason: reason.into(),
            message: message.into(),
            observed_generation: 1,
            last_transition_time: wall_seconds(&*self.tools.host),
        }
    }

    fn heartbeat(&self, now: Nanos) -> Option<Heartbeat> {
        let live = |name: &String| {
            self.jobs.get(name).is_some_and(|j| {
                matches!(
                    j.phase,
                    Phase::Running | Phase::Renewing | Phase::Renewed | Phase::Draining | Phase::Drained
                )
            })
        };
        let running: Vec<RunningProgress> = self
            .work
            .iter()
            .filter(|(name, _)| live(name))
            .take(256)
            .map(|(name, work)| RunningProgress {
                assignment: name.clone(),
                progress: work.feed.progress(work.running_for(now)),
            })
            .collect();
        let renewed_at = self.renewed_at.clone().filter(|_| !running.is_empty())?;
        Some(Heartbeat {
            lease: node_lease(&self.tools.config.node),
            renewed_at,
            running,
        })
    }

    fn enforcement(&self) -> Vec<Enforcement> {
        let Some(effective) = self.ceiling() else {
            return vec![];
        };
        let live: Vec<(&Readback, bool)> = self
            .work
            .values()
            .filter(|w| w.link.is_some())
            .filter_map(|w| Some((w.applied.as_ref()?, w.idle)))
            .collect();
        let readbacks: Vec<&Readback> = live.iter().map(|(readback, _)| *readback).collect();
        let idle = !live.is_empty() && live.iter().all(|(_, idle)| *idle);
        let ranked = ranked_by(&readbacks, idle);
        let cap = self.ledger.cap(CPU_DEVICE);
        let mut rows = rows(&effective.ceiling, cap, &readbacks, &ranked);
        rows.extend(self.share_rows(CPU_DEVICE, &effective.ceiling, "billed by CPU time"));
        rows
    }
}

/// One row per limit: what the profile asks for, what was read back, by which means.
fn rows(limits: &Limits, cap: Bytes, readbacks: &[&Readback], ranked: &str) -> Vec<Enforcement> {
    let idle = || "nothing runs".to_owned();
    let row = |limit: &str, requested: String, effective: String, mechanism: &str| Enforcement {
        limit: limit.into(),
        requested,
        effective,
        mechanism: mechanism.into(),
    };
    let asked_io = match limits.io_class {
        IoClass::None => "None".to_owned(),
        IoClass::BestEffort => format!("BestEffort/{}", limits.io_level),
        IoClass::Idle => "Idle".to_owned(),
    };
    let nice = readbacks
        .iter()
        .map(|r| r.niceness)
        .min()
        .map_or_else(idle, |n| n.to_string());
    let io = readbacks.first().map_or_else(idle, |r| workers::io_text(r.io));
    let interval = readbacks.iter().map(|r| r.request_interval).min();
    let interval = interval.map_or_else(idle, |n| format!("{} ms", n / 1_000_000));
    let batch: u32 = readbacks.iter().map(|r| u32::from(r.max_batch)).sum();
    let batch = if readbacks.is_empty() {
        idle()
    } else {
        batch.to_string()
    };
    vec![
        row(
            "vram",
            format!("{} %", limits.vram_percent.0),
            format!("{cap} on cpu"),
            "ledger, capped arena, RLIMIT_DATA",
        ),
        row(
            "requestInterval",
            format!("{} ms", limits.request_interval.0),
            interval,
            "request gate per device",
        ),
        row("niceness", limits.niceness.0.to_string(), nice, ranked),
        row("io", asked_io, io, "ioprio_set on every thread"),
        row(
            "batch",
            limits.max_batch.to_string(),
            batch,
            "sequences per decode step",
        ),
    ]
}

/// What ranks the workers behind others: nice values of threads count only inside one autogroup or cgroup.
fn ranked_by(readbacks: &[&Readback], idle: bool) -> String {
    if idle {
        return "cgroup: idle at the top".to_owned();
    }
    match readbacks.iter().map(|r| r.autogroup).min() {
        Some(Some(nice)) => format!("thread, autogroup at {nice}"),
        Some(None) => "thread: ranks inside the workers' cgroup only".to_owned(),
        None => "thread".to_owned(),
    }
}
