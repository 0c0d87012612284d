//! Records to workers, answers to where they are durable.
//!
//! Owns: which worker gets the next record, and what the plan is told of a job's records. Must not plan.

use super::{Owner, workers};
use crate::event::{Event, Written};
use crate::link::SendError;
use crate::models::Obtained;
use gogrid_agent_core::plan::Phase;
use gogrid_agent_core::protocol::ToWorker;
use gogrid_agent_core::session::{Nanos, Standing, nanos};
use gogrid_agent_core::shares::window;
use gogrid_agent_core::watchdog::Rung;
use gogrid_api::assignment::{ModelFacts, StagedInput, State};
use gogrid_api::job::Failure;
use std::sync::Arc;
use std::time::Duration;

/// A record that was sent this long ago and has not begun no longer holds the other workers of its device back.
const STUCK_NANOS: Nanos = 10_000_000_000;

impl Owner {
    /// Tells the plan where the records are.
    pub(super) fn observe(&mut self, _now: Nanos) {
        let mut failed = vec![];
        for (name, job) in &mut self.jobs {
            let Some(work) = self.work.get(name) else { continue };
            job.heard = work.heard_at;
            job.outdated = work.outdated();
            job.exhausted = work.feed.exhausted();
            job.unsaved = work.feed.unsaved();
            let most = work.spec.max_failed_records.map(i64::from);
            if let Some(most) = most.filter(|most| work.feed.failed() > *most) {
                failed.push((name.clone(), work.feed.failed(), most));
            }
        }
        for (name, count, most) in failed {
            self.fail(
                &name,
                "TooManyFailedRecords",
                &format!("{count} records failed, {most} may"),
                false,
            );
        }
    }

    pub(super) fn obtained(&mut self, name: &str, result: Result<Obtained, Failure>, now: Nanos) {
        let Some(job) = self.jobs.get(name) else { return };
        if job.phase != Phase::Fetching {
            return;
        }
        match result {
            Ok(Obtained { file, facts }) => {
                if let Some(work) = self.work.get_mut(name) {
                    work.model = Some(file);
                    work.status.facts = facts;
                }
                self.enter(name, Phase::Verified, now);
                self.read_input(name, now);
            }
            Err(Failure {
                reason,
                message,
                retryable,
            }) => self.fail(name, &reason, &message, retryable),
        }
    }

    /// Gets the next parts of the input that are wanted: those that the order carries at once, another one by a call.
    fn read_input(&mut self, name: &str, now: Nanos) {
        while let Some((part, input)) = self.work.get_mut(name).and_then(|work| work.feed.want()) {
            let StagedInput {
                config_map,
                text,
                first_line: _,
                records: _,
            } = input;
            match (text, config_map) {
                (Some(text), _) => self.input_read(name, part, Ok(text), now),
                (None, Some(config_map)) => return self.fetch_input(name, part, config_map),
                (None, None) => {
                    return self.fail(
                        name,
                        "InputMismatch",
                        "the order says of no place where its input is",
                        false,
                    );
                }
            }
        }
    }

    fn fetch_input(&self, name: &str, part: usize, config_map: String) {
        let (calls, hub, name) = (self.tools.calls.clone(), self.tools.hub.clone(), name.to_owned());
        let host = Arc::clone(&self.tools.host);
        self.tools.host.spawn(Box::pin(async move {
            let read = loop {
                match calls.input(&config_map).await {
                    Ok(Some(text)) => break Ok(text),
                    Ok(None) => {
                        let message = format!("staged input {config_map} is missing");
                        break Err(Failure {
                            reason: "InputMissing".into(),
                            message,
                            retryable: true,
                        });
                    }
                    Err(error) => tracing::warn!(%error, config_map, "could not read a staged input"),
                }
                host.sleep(Duration::from_secs(1)).await;
            };
            hub.send(Event::InputRead(name, part, read)).await;
        }));
    }

    pub(super) fn input_read(
        &mut self,
        name: &str,
        part: usize,
        result: Result<String, Failure>,
        now: Nanos,
    ) {
        let Some(work) = self.work.get_mut(name) else {
            return;
        };
        match result {
            Ok(text) => {
                if let Err(error) = work.feed.read(part, &text, now) {
                    self.fail(name, "InputMismatch", &error.to_string(), false);
                }
            }
            Err(Failure {
                reason,
                message,
                retryable,
            }) => self.fail(name, &reason, &message, retryable),
        }
    }

    pub(super) fn inspected(&mut self, name: &str, result: Result<ModelFacts, Failure>, now: Nanos) {
        let Some(job) = self.jobs.get_mut(name) else {
            return;
        };
        if job.phase != Phase::Inspecting {
            return;
        }
        let Some(work) = self.work.get_mut(name) else {
            return;
        };
        match result {
            Ok(facts) => {
                work.status.facts = Some(facts);
                work.status.state = Some(State::Succeeded);
            }
            Err(failure) => {
                work.status.failure = Some(failure);
                work.status.state = Some(State::Failed);
            }
        }
        self.enter(name, Phase::Over, now);
    }

    pub(super) fn saved(&mut self, name: &str, written: Written, now: Nanos) {
        let result = if written.is_ok() { "ok" } else { "failed" };
        self.tools
            .metrics
            .writes
            .with_label_values(&["chunk", result])
            .inc();
        if let Some(job) = self.jobs.get_mut(name) {
            job.saving = false;
        }
        let Some(work) = self.work.get_mut(name) else {
            return;
        };
        match written {
            Ok(_) => {
                let lines = work.feed.saved(now);
                workers::fill_status(work, now);
                workers::acknowledge(work, lines);
            }
            Err(failure) => {
                work.feed.not_saved();
                work.gone |= failure.gone;
                tracing::warn!(
                    assignment = name,
                    error = failure.error,
                    "answers were not written"
                );
            }
        }
    }

    /// Gives records to workers that may take some.
    pub(super) fn feed(&mut self, now: Nanos) {
        if self.renewals.standing(now) != Standing::Held {
            return;
        }
        let ready = |owner: &Self, name: &String| {
            owner.jobs.get(name).is_some_and(|j| {
                j.phase == Phase::Running
                    && j.stopping.is_none()
                    && j.failure.is_none()
                    && !j.fenced
                    && !j.killed
            }) && owner
                .work
                .get(name)
                .is_some_and(|work| work.ladder.rung() == Rung::Clear)
        };
        let names: Vec<String> = self.work.keys().filter(|n| ready(self, n)).cloned().collect();
        for name in &names {
            self.read_input(name, now);
        }
        let devices: std::collections::BTreeSet<String> = names
            .iter()
            .filter_map(|n| self.work.get(n))
            .map(|w| w.device.clone())
            .collect();
        for device in devices {
            let on: Vec<&String> = names
                .iter()
                .filter(|n| self.work.get(*n).is_some_and(|w| w.device == device))
                .collect();
            let interval = self.interval(&device);
            if let [one] = on.as_slice() {
                // Alone on its device: the worker's own gate keeps the interval.
                while self.send_next(one, 2, now) {}
            } else if interval == 0 {
                for name in on {
                    while self.send_next(name, 2, now) {}
                }
            } else {
                self.feed_paced(&device, &on, interval, now);
            }
        }
    }

    /// Several workers share a device with an interval: one record at a time is on its way to its start.
    fn feed_paced(&mut self, device: &str, on: &[&String], interval: Nanos, now: Nanos) {
        let since = now.saturating_sub(STUCK_NANOS.saturating_add(interval.saturating_mul(4)));
        if on
            .iter()
            .filter_map(|n| self.work.get(*n))
            .any(|w| w.feed.unstarted(since) > 0)
        {
            return;
        }
        let next = self
            .last_start
            .get(device)
            .map_or(0, |last| last.saturating_add(interval));
        if now < next {
            self.wake = Some(self.wake.map_or(next, |wake| wake.min(next)));
            return;
        }
        let mut order: Vec<(usize, &String)> = on
            .iter()
            .filter_map(|n| Some((self.work.get(*n)?.feed.outstanding(), *n)))
            .collect();
        order.sort();
        for (_, name) in order {
            if self.send_next(name, 1, now) {
                return;
            }
        }
    }

    /// The interval of the node's ceiling.
    fn interval(&self, device: &str) -> Nanos {
        let on_device = self.work.values().filter(|w| w.device == device);
        let ceilings = on_device
            .filter_map(|w| w.effective.as_ref())
            .map(|e| nanos(e.ceiling.request_interval));
        ceilings.max().unwrap_or(0)
    }

    /// Sends one record if the worker may hold another; `batches` of its batch limit.
    fn send_next(&mut self, name: &str, batches: usize, now: Nanos) -> bool {
        let Some(work) = self.work.get_mut(name) else {
            return false;
        };
        let (Some(link), Some(limits)) = (work.link.clone(), work.limits.as_ref()) else {
            return false;
        };
        let most = window(limits.max_batch) * batches / 2;
        let Some((line, text)) = work.feed.next(most, now) else {
            return false;
        };
        match link.worker(&ToWorker::Record { line, text }) {
            Ok(()) => true,
            Err(SendError::Frame(error)) => {
                work.feed
                    .refuse(line, "RecordTooLong", format!("line {line}: {error}"), now);
                true
            }
            Err(SendError::Gone) => {
                self.fail(name, "WorkerExited", "the worker does not take records", true);
                false
            }
        }
    }
}
