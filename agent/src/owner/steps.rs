//! Steps of the plan, carried out.
//!
//! Owns: the translation of each step into a message, a call or a change of state. Must not choose among steps.

use super::work::Work;
use super::{Owner, workers};
use crate::event::{Event, WriteFailure};
use gogrid_agent_core::feed::Save;
use gogrid_agent_core::plan::{Ending, Job, Phase, Step, Stopping};
use gogrid_agent_core::protocol::{ToPool, ToWorker, Usage};
use gogrid_agent_core::report::worth_telling;
use gogrid_agent_core::results::clip;
use gogrid_agent_core::session::Nanos;
use gogrid_api::AssignmentStatus;
use gogrid_api::assignment::State;
use gogrid_api::job::Failure;
use gogrid_api::names::CPU_DEVICE;
use std::sync::Arc;
use std::time::Duration;

/// Between two attempts to write what the API server did not take.
const RETRY_NANOS: Nanos = 1_000_000_000;

impl Owner {
    /// Returns whether anything changed that the plan looks at.
    pub(super) fn carry_out(&mut self, step: Step, now: Nanos) -> bool {
        match step {
            Step::ReadTerm(name) => self.read_term(name),
            Step::Inspect(name) => self.inspect(&name, now),
            Step::Claim(name) => self.claim(&name, now),
            Step::Refuse(name, ending) => {
                self.begin(&name, now, Phase::Over);
                self.report_end(&name, ending);
                true
            }
            Step::Fetch(name) => self.fetch(&name, now),
            Step::Spawn(name) => self.spawn(&name, now),
            Step::Load(name) => self.load(&name, now),
            Step::Renew(name) => self.renew(&name, now),
            Step::Stop(name, deadline) => self.stop(&name, deadline, now),
            Step::Fail(name, failure) => {
                let Failure {
                    reason,
                    message,
                    retryable,
                } = failure;
                self.fail(&name, &reason, &message, retryable);
                true
            }
            Step::Kill(name) => self.kill(&name),
            Step::Save(name) => self.save(&name, now),
            Step::Confirm(name) => self.confirm(name),
            Step::Continue(name) => self.wake_worker(&name, now),
            Step::Finish(name, ending) => {
                self.close(&name, now);
                self.enter(&name, Phase::Over, now);
                self.report_end(&name, ending);
                true
            }
            Step::Forget(name) => {
                self.close(&name, now);
                self.jobs.remove(&name);
                self.work.remove(&name);
                true
            }
        }
    }

    /// Gives a job's belongings back: link, model, bytes.
    fn close(&mut self, name: &str, now: Nanos) {
        if let Some(work) = self.work.get_mut(name) {
            work.link = None;
            work.model = None;
            work.share = 0;
            work.wanted = 0;
        }
        self.ledger.release(now, name);
        self.push_limits();
    }

    fn begin(&mut self, name: &str, now: Nanos, phase: Phase) {
        if let Some(order) = self.orders.get(name) {
            self.work
                .insert(name.to_owned(), Work::new(&order.assignment, now));
            self.jobs.insert(
                name.to_owned(),
                Job {
                    phase,
                    ..Job::new(now)
                },
            );
        }
    }

    pub(super) fn enter(&mut self, name: &str, phase: Phase, now: Nanos) {
        if let Some(job) = self.jobs.get_mut(name) {
            job.phase = phase;
            job.since = now;
        }
    }

    fn set_state(&mut self, name: &str, state: State) {
        if let Some(work) = self.work.get_mut(name) {
            work.status.state = Some(state);
            work.status.session = Some(self.tools.session.clone());
            work.turned_at = self.tools.host.boottime();
        }
    }

    pub(super) fn fail(&mut self, name: &str, reason: &str, message: &str, retryable: bool) {
        if let Some(job) = self.jobs.get_mut(name)
            && job.failure.is_none()
            && job.phase != Phase::Over
        {
            tracing::warn!(assignment = name, reason, message, "assignment fails");
            let message = clip(message, 1024).to_owned();
            job.failure = Some(Failure {
                reason: reason.to_owned(),
                message,
                retryable,
            });
        }
    }

    fn read_term(&mut self, name: String) -> bool {
        if self.asked.insert(name.clone()) {
            let (calls, hub) = (self.tools.calls.clone(), self.tools.hub.clone());
            let host = Arc::clone(&self.tools.host);
            self.tools.host.spawn(Box::pin(async move {
                let term = calls.leader_term().await;
                if let Err(error) = &term {
                    tracing::warn!(%error, "could not read the leader lease");
                    host.sleep(Duration::from_secs(1)).await;
                }
                hub.send(Event::Term(name, term.ok())).await;
            }));
        }
        false
    }

    fn inspect(&mut self, name: &str, now: Nanos) -> bool {
        self.begin(name, now, Phase::Inspecting);
        self.set_state(name, State::Fetching);
        if let Some(work) = self.work.get(name) {
            let (models, hub) = (Arc::clone(&self.tools.models), self.tools.hub.clone());
            let (order, name) = (work.spec.model.clone(), name.to_owned());
            self.tools.host.spawn(Box::pin(async move {
                let facts = models.inspect(order).await;
                hub.send(Event::Inspected(name, facts)).await;
            }));
        }
        true
    }

    fn claim(&mut self, name: &str, now: Nanos) -> bool {
        self.begin(name, now, Phase::Claimed);
        self.set_state(name, State::Claimed);
        self.set_limits(name);
        tracing::info!(assignment = name, "claimed");
        true
    }

    fn fetch(&mut self, name: &str, now: Nanos) -> bool {
        self.enter(name, Phase::Fetching, now);
        self.set_state(name, State::Fetching);
        if let Some(work) = self.work.get(name) {
            let (models, hub) = (Arc::clone(&self.tools.models), self.tools.hub.clone());
            let (order, name) = (work.spec.model.clone(), name.to_owned());
            self.tools.host.spawn(Box::pin(async move {
                let model = models.obtain(order).await;
                hub.send(Event::Obtained(name, model)).await;
            }));
        }
        true
    }

    fn spawn(&mut self, name: &str, now: Nanos) -> bool {
        let (Some(work), Some(pool)) = (self.work.get_mut(name), self.pool.as_ref()) else {
            return false;
        };
        let (Some(limits), Some(fence_at)) = (work.limits.clone(), self.renewals.fence_at()) else {
            return false;
        };
        let nonce = match workers::nonce() {
            Ok(nonce) => nonce,
            Err(error) => {
                self.fail(
                    name,
                    "NoRandomness",
                    &format!("reading random bytes: {error}"),
                    true,
                );
                return true;
            }
        };
        let worker = self.next_worker;
        self.next_worker += 1;
        let memory_limit = workers::memory_limit(work.bytes);
        work.told = limits.generation;
        work.applied = None;
        work.kindest = None;
        work.usage = Usage::default();
        let order = ToPool::Spawn {
            worker,
            nonce: nonce.clone(),
            limits,
            fence_at,
            memory_limit,
        };
        if let Err(error) = pool.link.pool(&order) {
            tracing::warn!(%error, "the pool takes no orders");
            return false;
        }
        work.nonce = Some(nonce);
        work.oom_kills = workers::oom_kills();
        self.workers.insert(worker, name.to_owned());
        if let Some(job) = self.jobs.get_mut(name) {
            job.worker = Some(worker);
        }
        self.enter(name, Phase::Starting, now);
        self.set_state(name, State::Loading);
        true
    }

    fn load(&mut self, name: &str, now: Nanos) -> bool {
        self.enter(name, Phase::Loading, now);
        let Some(work) = self.work.get(name) else {
            return true;
        };
        let (Some(link), Some(model)) = (work.link.clone(), work.model.clone()) else {
            return true;
        };
        let device = if self.tools.config.cuda_on_cpu {
            CPU_DEVICE
        } else {
            &work.device
        };
        let sent = link.load(&workers::load_message(work, device), model);
        if let Err(error) = sent {
            self.fail(
                name,
                "WorkerExited",
                &format!("could not send the model: {error}"),
                true,
            );
        }
        self.grant_now(now);
        true
    }

    fn renew(&mut self, name: &str, now: Nanos) -> bool {
        self.enter(name, Phase::Renewing, now);
        tracing::info!(
            assignment = name,
            "a new worker is to take over: this one can't lower its nice value"
        );
        self.drain(name);
        true
    }

    fn drain(&self, name: &str) {
        let link = self.work.get(name).and_then(|w| w.link.clone());
        if let Some(Err(error)) = link.map(|l| l.worker(&ToWorker::Drain)) {
            tracing::debug!(%error, assignment = name, "worker takes no drain");
        }
    }

    fn stop(&mut self, name: &str, deadline: Nanos, now: Nanos) -> bool {
        let Some(job) = self.jobs.get_mut(name) else {
            return false;
        };
        job.stopping = Some(Stopping { deadline });
        if matches!(job.phase, Phase::Running | Phase::Renewing) {
            self.enter(name, Phase::Draining, now);
            self.set_state(name, State::Stopping);
            self.drain(name);
        }
        true
    }

    fn kill(&mut self, name: &str) -> bool {
        let Some(job) = self.jobs.get_mut(name) else {
            return false;
        };
        let (Some(worker), Some(pool)) = (job.worker, self.pool.as_ref()) else {
            return false;
        };
        match pool.link.pool(&ToPool::Kill { worker }) {
            Ok(()) => {
                job.killed = true;
                true
            }
            Err(error) => {
                tracing::warn!(%error, "the pool takes no orders");
                false
            }
        }
    }

    /// Makes the next answers durable: in a chunk, or with the status, which is written as it changes.
    fn save(&mut self, name: &str, now: Nanos) -> bool {
        let (Some(job), Some(work)) = (self.jobs.get_mut(name), self.work.get_mut(name)) else {
            return false;
        };
        let (number, chunk) = match work.feed.save() {
            Some(Save::Chunk(number, chunk)) => (number, chunk),
            Some(Save::Status) => {
                workers::fill_status(work, now);
                return true;
            }
            None => return false,
        };
        job.saving = true;
        let host = Arc::clone(&self.tools.host);
        let (calls, hub, target) = (
            self.tools.calls.clone(),
            self.tools.hub.clone(),
            work.target.clone(),
        );
        self.tools.host.spawn(Box::pin(async move {
            let written = calls.chunk(&target, number, chunk).await;
            if written.is_err() {
                host.sleep(Duration::from_nanos(RETRY_NANOS)).await;
            }
            hub.send(Event::Saved(target.name, written)).await;
        }));
        true
    }

    fn confirm(&mut self, name: String) -> bool {
        if self.asked.insert(format!("confirm/{name}")) {
            let (calls, hub) = (self.tools.calls.clone(), self.tools.hub.clone());
            let host = Arc::clone(&self.tools.host);
            self.tools.host.spawn(Box::pin(async move {
                loop {
                    match calls.assignment(&name).await {
                        Ok(found) => return hub.send(Event::Confirmed(name, found.map(Box::new))).await,
                        Err(error) => tracing::warn!(%error, assignment = name, "could not look it up"),
                    }
                    host.sleep(Duration::from_nanos(RETRY_NANOS)).await;
                }
            }));
        }
        false
    }

    fn wake_worker(&mut self, name: &str, now: Nanos) -> bool {
        self.grant_now(now);
        if let Some(work) = self.work.get_mut(name) {
            // It could not speak while it stood still.
            work.heard_at = now;
        }
        let Some(job) = self.jobs.get_mut(name) else {
            return false;
        };
        let (Some(worker), Some(pool)) = (job.worker, self.pool.as_ref()) else {
            return false;
        };
        job.fenced = false;
        job.confirmed = false;
        if let Err(error) = pool.link.pool(&ToPool::Continue { worker }) {
            tracing::warn!(%error, "the pool takes no orders");
        }
        tracing::info!(assignment = name, "continued after the fence");
        true
    }

    fn report_end(&mut self, name: &str, ending: Ending) {
        self.set_state(name, ending.state());
        let now = self.tools.host.boottime();
        let Some(work) = self.work.get_mut(name) else {
            return;
        };
        let reason = match &ending {
            Ending::Succeeded => "Succeeded",
            Ending::Stopped => "Stopped",
            Ending::Evicted(failure) | Ending::Failed(failure) => failure.reason.as_str(),
        };
        tracing::info!(assignment = name, reason, "over");
        let result = match &ending {
            Ending::Succeeded => "Succeeded",
            Ending::Stopped | Ending::Evicted(_) => "Stopped",
            Ending::Failed(_) => "Failed",
        };
        self.tools.metrics.ends.with_label_values(&[result]).inc();
        // One write says the end and carries what is in no chunk.
        work.feed.carry();
        workers::fill_status(work, now);
        if let Ending::Evicted(failure) | Ending::Failed(failure) = ending {
            work.status.failure = Some(failure);
        }
    }

    /// Writes every status that changed, one write a job at a time.
    pub(super) fn flush(&mut self, now: Nanos) {
        let names: Vec<String> = self.jobs.keys().cloned().collect();
        let every = gogrid_agent_core::session::nanos(self.tools.config.timing.checkpoint());
        for name in names {
            let running = self
                .jobs
                .get(&name)
                .is_some_and(|j| j.phase != Phase::Over && !j.saving);
            if running && self.work.get(&name).is_some_and(|w| w.feed.save_due(now, every)) {
                self.save(&name, now);
            }
            self.flush_one(&name, now);
        }
    }

    fn flush_one(&mut self, name: &str, now: Nanos) {
        let Some(work) = self.work.get_mut(name) else {
            return;
        };
        if work.gone
            || work.writing.is_some()
            || now < work.retry_at
            || work.written.as_ref() == Some(&work.status)
        {
            return;
        }
        let lasted = now.saturating_sub(work.turned_at);
        if !worth_telling(
            work.written.as_ref(),
            &work.status,
            lasted,
            self.tools.config.timing,
        ) {
            return;
        }
        let status = AssignmentStatus {
            renewed_at: self.renewed_at.clone(),
            ..work.status.clone()
        };
        work.writing = Some(work.status.clone());
        let (calls, hub, target) = (
            self.tools.calls.clone(),
            self.tools.hub.clone(),
            work.target.clone(),
        );
        self.tools.host.spawn(Box::pin(async move {
            let written = calls.status(&target, &status).await;
            hub.send(Event::StatusWritten(target.name, written)).await;
        }));
    }

    pub(super) fn status_written(&mut self, name: &str, written: Result<String, WriteFailure>, now: Nanos) {
        let result = if written.is_ok() { "ok" } else { "failed" };
        self.tools
            .metrics
            .writes
            .with_label_values(&["assignment", result])
            .inc();
        let Some(work) = self.work.get_mut(name) else {
            return;
        };
        let status: Option<AssignmentStatus> = work.writing.take();
        match written {
            Ok(version) => {
                work.target.resource_version = version;
                if let Some(checkpoint) = status.as_ref().and_then(|s| s.checkpoint.as_ref()) {
                    let lines = work.feed.reported(checkpoint);
                    workers::acknowledge(work, lines);
                }
                work.written = status;
                work.told_at = now;
                if let Some(job) = self.jobs.get_mut(name) {
                    job.accepted = true;
                }
            }
            Err(WriteFailure { gone, error }) => {
                tracing::warn!(assignment = name, error, "status was not written");
                work.gone |= gone;
                work.retry_at = now.saturating_add(RETRY_NANOS);
            }
        }
    }
}
