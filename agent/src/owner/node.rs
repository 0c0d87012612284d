//! The GpuNode: what this agent says of its node.
//!
//! Owns: the status as it should read and the moment it is written. Must not measure or enforce anything.

use super::Owner;
use super::work::Work;
use crate::clock::wall_seconds;
use crate::event::Event;
use gogrid_agent_core::plan::Phase;
use gogrid_agent_core::protocol::FromWorker;
use gogrid_agent_core::report::bucketed_devices;
use gogrid_agent_core::session::{Nanos, Standing, nanos};
use gogrid_api::condition::{self, set_condition};
use gogrid_api::names::node_lease;
use gogrid_api::node::{Heartbeat, HeldModel, RunningProgress};
use gogrid_api::{Condition, ConditionStatus, GpuNodeStatus};
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

    /// Most events may show in the status at once; what workers answer shows with the next batch.
    pub(super) fn stir_node(&mut self, event: &Event) {
        let answers = matches!(
            event,
            Event::FromWorker {
                message: FromWorker::Started { .. } | FromWorker::Result(_) | FromWorker::Usage(_),
                ..
            }
        );
        if !answers {
            self.node_look_at = 0;
        }
    }

    pub(super) fn models_listed(&mut self, models: Vec<HeldModel>) {
        self.status.model_count = models.len().to_string();
        self.status.models = models;
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
            && self.guest.settled()
            // Written once the models were listed, be they none.
            && !self.status.model_count.is_empty();
        let held = self.renewals.standing(now) == Standing::Held;
        if self.node_writing || !known || !held || now < self.node_retry_at {
            return;
        }
        let untold = self.shutdown.is_some_and(|s| !s.said);
        if !untold && (now < self.node_look_at || self.pace.rests(now)) {
            return;
        }
        self.node_look_at = self.pace.look_at(self.tools.config.timing, now);
        self.refresh(now);
        let beats = self.beats(now);
        if !untold && !self.pace.due(&self.status, beats, self.tools.config.timing, now) {
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
        let written = self.pace.last().map_or(&[][..], |last| &last.devices);
        let devices = bucketed_devices(written, self.devices());
        // While an edit is on its way, the rows stay as they were: they change once, together with the profile.
        let enforcement = match self.pace.last() {
            Some(last) if self.limits_pending() => last.enforcement.clone(),
            Some(_) | None => self.enforcement(),
        };
        let GpuNodeStatus {
            mut conditions,
            models,
            model_count,
            ..
        } = std::mem::take(&mut self.status);
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
            models,
            model_count,
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

    /// How far jobs are that have run for a batch interval; of younger ones the Assignment's own turns say enough.
    fn heartbeat(&self, now: Nanos) -> Option<Heartbeat> {
        let running: Vec<RunningProgress> = self
            .lasting(now)
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

    /// Whether the heartbeat tells of a job whose own status was not written for a batch interval.
    fn beats(&self, now: Nanos) -> bool {
        let batch = nanos(self.tools.config.timing.heartbeat_batch());
        self.lasting(now)
            .any(|(_, work)| now >= work.told_at.saturating_add(batch))
    }

    /// Jobs that have run for a batch interval.
    fn lasting(&self, now: Nanos) -> impl Iterator<Item = (&String, &Work)> {
        let young = nanos(self.tools.config.timing.heartbeat_batch());
        self.work.iter().filter(move |(name, work)| {
            let live = self.jobs.get(*name).is_some_and(|j| {
                matches!(
                    j.phase,
                    Phase::Running | Phase::Renewing | Phase::Renewed | Phase::Draining | Phase::Drained
                )
            });
            live && work.running_for(now) >= young
        })
    }
}
