//! What an InferenceJob's status says.
//!
//! Owns: the wording of conditions and the rule when a difference is worth a write. Must not: decide what comes next.

use crate::clock;
use ConditionStatus::{False, True, Unknown};
use gogrid_api::assignment::State;
use gogrid_api::condition::{find, set_condition};
use gogrid_api::job::{
    Candidate, EstimateStatus, Failure, LeaseStatus, PlacementStatus, Progress, Stage, conditions,
};
use gogrid_api::{
    Assignment, ByteQuantity, Condition, ConditionStatus, GpuNode, InferenceJob, InferenceJobStatus, names,
};
use gogrid_planner::estimate::Estimated;
use gogrid_planner::lifecycle::{Outcome, Refusal};
use gogrid_planner::{Planned, Reason, Unplaced};
use kube::ResourceExt as _;

/// A status in the making.
pub(crate) struct Draft {
    status: InferenceJobStatus,
    generation: i64,
    now: i64,
}

impl Draft {
    /// Starts from the stored status; a first visit sets the conditions that every job has.
    pub(crate) fn new(job: &InferenceJob, now: i64) -> Self {
        let status = job.status.clone().unwrap_or_default();
        let mut draft = Self {
            status,
            generation: job.metadata.generation.unwrap_or(0),
            now,
        };
        if find(&draft.status.conditions, conditions::SUCCEEDED).is_none() {
            draft.set(conditions::SUCCEEDED, Unknown, "Waiting", "the job was seen");
            draft.set(conditions::FINISHED, False, "Waiting", "the job is not over");
            draft.set(
                conditions::SUSPENDED,
                False,
                "NotSuspended",
                "spec.suspend is false",
            );
        }
        draft
    }

    fn set(&mut self, type_: &str, status: ConditionStatus, reason: &str, message: &str) {
        let condition = Condition {
            type_: type_.into(),
            status,
            reason: reason.into(),
            message: message.into(),
            observed_generation: self.generation,
            last_transition_time: clock::time(self.now),
        };
        set_condition(&mut self.status.conditions, condition);
    }

    /// Sets a condition only where it was set before.
    fn unset(&mut self, type_: &str, reason: &str, message: &str) {
        if find(&self.status.conditions, type_).is_some() {
            self.set(type_, False, reason, message);
        }
    }

    fn accept(&mut self) {
        self.set(
            conditions::ACCEPTED,
            True,
            "Accepted",
            "the spec can be carried out",
        );
    }

    /// The finished status.
    pub(crate) fn done(self) -> InferenceJobStatus {
        self.status
    }

    /// The spec is refused.
    pub(crate) fn refuse(mut self, refusal: &Refusal) -> Self {
        let Refusal { word, message } = refusal;
        self.set(conditions::ACCEPTED, False, word, message);
        self.set(conditions::SUCCEEDED, Unknown, word, message);
        self.set(conditions::PLACED, False, word, message);
        self.status.candidates.clear();
        self.status.queue_position = None;
        self
    }

    /// It waits for that reason.
    pub(crate) fn wait(mut self, reason: &Reason) -> Self {
        self.accept();
        self.waits(reason);
        self.status.candidates.clear();
        self.status.queue_position = None;
        self
    }

    fn waits(&mut self, reason: &Reason) {
        let message = reason.message();
        self.set(conditions::PLACED, False, reason.word(), &message);
        self.set(conditions::SUCCEEDED, Unknown, reason.word(), &message);
    }

    /// No place was found.
    pub(crate) fn unplaced(mut self, unplaced: &Unplaced, position: usize) -> Self {
        self.accept();
        self.waits(&unplaced.reason);
        self.status.queue_position = i32::try_from(position).ok();
        self.status.candidates = unplaced
            .candidates
            .iter()
            .map(|c| Candidate {
                node: c.node.clone(),
                free: c.free.into(),
                missing: c.missing.into(),
                reason: c.reason.word().into(),
            })
            .collect();
        self
    }

    fn estimate(&mut self, e: &Estimated) {
        let [weights, kv_cache, compute, overhead, total] =
            [e.weights, e.kv_cache, e.compute, e.overhead, e.total].map(ByteQuantity::from);
        self.status.estimate = Some(EstimateStatus {
            weights,
            kv_cache,
            compute,
            overhead,
            total,
        });
    }

    /// A place was found: the one write that raises the epoch.
    pub(crate) fn place(mut self, planned: &Planned, term: i64, model_name: &str) -> Self {
        self.accept();
        let stages: Vec<Stage> = planned
            .stages
            .iter()
            .map(|s| Stage {
                gpu_uuid: s.device.clone(),
                first_layer: s.first_layer,
                last_layer: s.last_layer,
                vram: s.bytes.into(),
            })
            .collect();
        let devices = stages
            .iter()
            .map(|s| s.gpu_uuid.as_str())
            .collect::<Vec<_>>()
            .join(", ");
        let message = format!(
            "node {}, device {devices}, {} reserved",
            planned.node, planned.estimate.total
        );
        self.set(conditions::PLACED, True, "Placed", &message);
        self.set(conditions::SUCCEEDED, Unknown, "Placed", &message);
        self.unset(conditions::LOADED, "NotLoaded", "the job was placed anew");
        self.unset(conditions::LEASE_HELD, "NotClaimed", "the job was placed anew");
        self.estimate(&planned.estimate);
        let status = &mut self.status;
        status.epoch += 1;
        status.term = status.term.max(term);
        status.placement = Some(PlacementStatus {
            node_name: planned.node.clone(),
            stages,
        });
        status.start_time = status.start_time.take().or_else(|| Some(clock::time(self.now)));
        status.candidates.clear();
        status.queue_position = None;
        status.lease = None;
        status.download = None;
        status.model_name = Some(model_name.chars().take(128).collect());
        status.profile_name = Some(without_generations(&planned.profiles));
        self
    }

    /// How the running assignment goes.
    pub(crate) fn mirror(mut self, run: &Assignment, node: Option<&GpuNode>) -> Self {
        let status = run.status.clone().unwrap_or_default();
        let heartbeat = node
            .and_then(|n| n.status.as_ref())
            .and_then(|s| s.heartbeat.as_ref());
        let name = run.name_any();
        let beat = heartbeat.and_then(|h| {
            h.running
                .iter()
                .find(|r| r.assignment == name)
                .map(|r| (h, &r.progress))
        });
        let where_ = format!("on node {}", run.spec.node_name);
        if run.spec.stop.is_some() {
            self.set(
                conditions::SUCCEEDED,
                Unknown,
                "Stopping",
                &format!("stopping {where_}"),
            );
        } else if let Some((word, message)) = running_word(status.state) {
            self.set(
                conditions::SUCCEEDED,
                Unknown,
                word,
                &format!("{message} {where_}"),
            );
        }
        if matches!(
            status.state,
            Some(State::Fetching | State::Loading | State::Running | State::Stopping)
        ) {
            self.set(
                conditions::LEASE_HELD,
                True,
                "Renewed",
                &format!("the agent {where_} renews its lease"),
            );
            self.status.lease = Some(LeaseStatus {
                name: names::node_lease(&run.spec.node_name),
                holder: run.spec.session.clone(),
                last_heartbeat: [
                    beat.map(|(h, _)| h.renewed_at.clone()),
                    status.renewed_at,
                    self.status.lease.take().and_then(|l| l.last_heartbeat),
                ]
                .into_iter()
                .flatten()
                .max(),
            });
        }
        if matches!(status.state, Some(State::Loading | State::Running)) {
            self.set(
                conditions::MODEL_VERIFIED,
                True,
                "DigestMatches",
                "the model's bytes match spec.model.sha256",
            );
        }
        if status.state == Some(State::Running) {
            self.set(
                conditions::LOADED,
                True,
                "Loaded",
                &format!("the model is in memory {where_}"),
            );
        }
        let newest = [status.progress, beat.map(|(_, p)| p.clone())]
            .into_iter()
            .flatten()
            .max_by_key(|p: &Progress| p.done);
        if let Some(progress) = newest {
            self.status.progress = Some(progress);
        }
        let notices = [
            (
                conditions::THROTTLED,
                status.throttled,
                "NotThrottled",
                "it gets what its profile allows",
            ),
            (
                conditions::VRAM_EXCEEDED,
                status.vram_exceeded,
                "WithinLimit",
                "it keeps to its device memory",
            ),
        ];
        for (type_, notice, word, message) in notices {
            match notice {
                Some(notice) => self.set(type_, True, &notice.reason, &notice.message),
                None => self.unset(type_, word, message),
            }
        }
        self.status.download = status.download;
        if status.measured.is_some() {
            self.status.measured = status.measured;
        }
        if let Some(limits) = &status.limits {
            self.status.profile_name = Some(without_generations(&limits.profiles));
        }
        self
    }

    /// What its last run had done when it ended: that is kept, and so it is shown.
    pub(crate) fn keeping(mut self, run: Option<&Assignment>) -> Self {
        let last = run.and_then(|r| r.status.as_ref()?.progress.clone());
        let shown = self.status.progress.as_ref().map_or(0, |p| p.done);
        if let Some(last) = last.filter(|last| last.done >= shown) {
            self.status.progress = Some(last);
        }
        self
    }

    /// It holds nothing.
    pub(crate) fn suspend(mut self) -> Self {
        let message = "spec.suspend is true; finished records are kept";
        self.accept();
        self.set(conditions::SUSPENDED, True, "Suspended", message);
        self.set(conditions::PLACED, False, "Suspended", message);
        self.set(conditions::SUCCEEDED, Unknown, "Suspended", message);
        self.release("Suspended");
        self
    }

    fn release(&mut self, word: &str) {
        self.unset(conditions::LOADED, word, "nothing is loaded");
        self.unset(conditions::LEASE_HELD, word, "nothing runs");
        self.unset(conditions::THROTTLED, word, "nothing runs");
        self.unset(conditions::VRAM_EXCEEDED, word, "nothing runs");
        self.status.lease = None;
        self.status.download = None;
        self.status.candidates.clear();
        self.status.queue_position = None;
    }

    /// It waits again after a suspension.
    pub(crate) fn resume(mut self) -> Self {
        if self.status.start_time.is_some()
            && let Some(since) = find(&self.status.conditions, conditions::SUSPENDED)
        {
            let seconds = self.now - since.last_transition_time.0.as_second();
            self.status.suspended_seconds += seconds.max(0);
        }
        self.set(conditions::SUSPENDED, False, "Resumed", "spec.suspend is false");
        self.set(
            conditions::SUCCEEDED,
            Unknown,
            "Resumed",
            "the job waits for a place",
        );
        self.set(conditions::PLACED, False, "Resumed", "the job waits for a place");
        self
    }

    /// It lost its place.
    pub(crate) fn requeue(mut self, failure: &Failure, counted: bool) -> Self {
        let Failure {
            reason,
            message,
            retryable: _,
        } = failure;
        self.set(conditions::PLACED, False, reason, message);
        self.set(conditions::SUCCEEDED, Unknown, reason, message);
        self.release(reason);
        if counted {
            self.status.attempts += 1;
        }
        self.status.last_failure = Some(failure.clone());
        self
    }

    /// It is over.
    pub(crate) fn finish(mut self, outcome: &Outcome, run: Option<&Assignment>) -> Self {
        self.status.completion_time = Some(clock::time(self.now));
        if let Some(status) = run.and_then(|r| r.status.as_ref()) {
            if let Some(progress) = &status.progress {
                self.status.progress = Some(progress.clone());
            }
            if status.measured.is_some() {
                self.status.measured.clone_from(&status.measured);
            }
            if status.state == Some(State::Succeeded) {
                self.set(
                    conditions::MODEL_VERIFIED,
                    True,
                    "DigestMatches",
                    "the model's bytes match spec.model.sha256",
                );
            }
        }
        match outcome {
            Outcome::Succeeded(result) => {
                let message = format!(
                    "{} records, {} of them failed, in {}",
                    result.records, result.failed_records, result.location
                );
                self.set(conditions::SUCCEEDED, True, "Succeeded", &message);
                self.set(conditions::FINISHED, True, "Succeeded", &message);
                self.status.result = Some(result.clone());
            }
            Outcome::Failed(failure) => {
                self.set(conditions::SUCCEEDED, False, &failure.reason, &failure.message);
                self.set(conditions::FINISHED, True, &failure.reason, &failure.message);
                if failure.reason == "DigestMismatch" {
                    self.set(
                        conditions::MODEL_VERIFIED,
                        False,
                        &failure.reason,
                        &failure.message,
                    );
                }
                self.status.last_failure = Some(failure.clone());
            }
        }
        self.release("Finished");
        self
    }
}

fn running_word(state: Option<State>) -> Option<(&'static str, &'static str)> {
    Some(match state? {
        State::Fetching => ("Fetching", "getting and verifying the model"),
        State::Loading => ("Loading", "bringing the model into memory"),
        State::Running => ("Running", "answering records"),
        State::Stopping => ("Stopping", "handing back"),
        // Too short-lived to be worth a write.
        State::Claimed | State::Stopped | State::Succeeded | State::Failed => return None,
    })
}

fn without_generations(profiles: &[String]) -> String {
    profiles
        .iter()
        .map(|p| p.split('@').next().unwrap_or(p))
        .collect::<Vec<_>>()
        .join(",")
}

/// Whether the difference is worth a write at once. Everything else (numbers in messages, progress, places in the queue)
/// waits until the last write is old enough.
pub(crate) fn urgent(old: Option<&InferenceJobStatus>, new: &InferenceJobStatus) -> bool {
    let Some(old) = old else { return true };
    let words = |s: &InferenceJobStatus| {
        let mut words: Vec<_> = s
            .conditions
            .iter()
            .map(|c| {
                (
                    c.type_.clone(),
                    c.status == True,
                    c.status == False,
                    c.reason.clone(),
                    c.observed_generation,
                )
            })
            .collect();
        words.sort();
        words
    };
    words(old) != words(new)
        || (old.epoch, old.attempts, old.suspended_seconds)
            != (new.epoch, new.attempts, new.suspended_seconds)
        || old.placement != new.placement
        || old.last_failure != new.last_failure
        || old.result != new.result
        || old.completion_time != new.completion_time
}
