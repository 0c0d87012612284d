//! Events, taken in.
//!
//! Owns: what each event changes in the state. What a worker says is checked against what it was asked. Must not plan.

use super::{End, Owner, Pool, workers};
use crate::event::{Event, Greeting};
use crate::lease::LeaseEvent;
use crate::link::Link;
use gogrid_agent_core::driver::View;
use gogrid_agent_core::plan::{Order, Phase, Shutdown};
use gogrid_agent_core::protocol::{FromPool, FromWorker, ToPool, WorkerId};
use gogrid_agent_core::results::{clip, reason_word};
use gogrid_agent_core::session::{Nanos, nanos};
use gogrid_api::assignment::State;
use gogrid_api::node::Backend;
use gogrid_api::{Assignment, Bytes};
use std::collections::BTreeSet;

/// Between two fresh starts of all watches.
const WATCH_AGAIN_NANOS: Nanos = 30_000_000_000;

impl Owner {
    /// Takes one event in.
    pub(super) fn take(&mut self, event: Event, now: Nanos) {
        self.stir_node(&event);
        match event {
            Event::Lease(event) => self.lease(event, now),
            Event::AssignmentsInit => self.listing = Some(BTreeSet::new()),
            Event::Assignment(assignment) => self.assignment(*assignment),
            Event::AssignmentsComplete => {
                if let Some(seen) = self.listing.take() {
                    self.orders.retain(|name, _| seen.contains(name));
                }
                self.complete = true;
            }
            Event::AssignmentGone(name) => {
                self.orders.remove(&name);
            }
            Event::Confirmed(name, found) => self.confirmed(&name, found),
            Event::Term(name, term) => {
                self.asked.remove(&name);
                if let Some(order) = self.orders.get_mut(&name) {
                    order.leader_term = term;
                }
            }
            Event::Profiles(profiles) => {
                if self.profiles.as_ref() != Some(&profiles) {
                    self.profiles = Some(profiles);
                    self.profiles_changed();
                }
            }
            Event::Node(uid, labels) => self.node_changed(uid, labels),
            Event::GpuNodeGone => {
                self.pace.forget();
                self.node_ensure = true;
            }
            Event::GpuNodeWritten(status, result) => self.node_written(*status, result, now),
            Event::PoolHello { alive, user, link } => self.pool_hello(&alive, user, link, now),
            Event::PoolLost => self.pool_lost(now),
            Event::PoolEnded => self.pool_ended(now),
            Event::FromPool(message) => self.pool_says(message, now),
            Event::WorkerHello {
                greeting,
                link,
                reply,
            } => {
                let let_in = self.worker_hello(greeting, link, now);
                let _ = reply.send(let_in);
            }
            Event::FromWorker { worker, message } => self.worker_says(worker, message, now),
            Event::WorkerLost { worker, why } => self.worker_lost(worker, why),
            Event::Obtained(name, result) => self.obtained(&name, result, now),
            Event::InputRead(name, part, result) => self.input_read(&name, part, result, now),
            Event::Saved(name, written) => self.saved(&name, written, now),
            Event::StatusWritten(name, written) => self.status_written(&name, written, now),
            Event::Inspected(name, result) => self.inspected(&name, result, now),
            Event::Models(models) => self.models_listed(models),
            Event::Devices(Backend::Cpu, devices) => {
                self.cpu = devices;
                self.measured(now);
            }
            Event::Devices(Backend::Cuda | Backend::Metal, devices) => {
                self.driver_seen(View::of(devices), now);
            }
            Event::Driver(view) => self.driver_seen(*view, now),
            Event::PodGpus(answer) => self.pods_seen(answer, now),
            Event::Sensed(device, sample) => self.sensed(&device, sample),
            Event::Resident(resident) => self.resident(&resident),
            Event::Shutdown => {
                tracing::info!("told to end: draining workers");
                self.shutdown.get_or_insert(Shutdown {
                    said: false,
                    say_by: now.saturating_add(super::SAY_NANOS),
                    drain_by: now.saturating_add(super::SHUTDOWN_NANOS),
                });
            }
        }
    }

    fn lease(&mut self, event: LeaseEvent, now: Nanos) {
        match event {
            LeaseEvent::Renewed { sent } => {
                self.tools.metrics.renewed(true);
                // A renewal that took until after the fence does not undo it: the workers stand still already.
                self.notice_fence(now);
                self.look_again(now);
                self.renewals.succeeded(sent);
                self.renewed_at = Some(crate::clock::wall_seconds(&*self.tools.host));
                if let Some(ahead) = self.tools.server_clock.ahead() {
                    self.skew.observe(ahead);
                }
                self.grant_now(now);
                self.rouse_silent(now);
            }
            LeaseEvent::Failed { error } => {
                self.tools.metrics.renewed(false);
                self.renewals.failed();
                tracing::warn!(
                    error,
                    failures = self.renewals.failures(),
                    "the lease was not renewed"
                );
            }
            LeaseEvent::Superseded { holder } => self.end = Some(End::Superseded(holder)),
        }
    }

    /// A worker that got too little CPU to read its grants was stopped by its own timer although the lease was never
    /// lost. It has a new grant before it is woken, and takes no step without one. Waking one that runs does nothing.
    fn rouse_silent(&mut self, now: Nanos) {
        let quiet = nanos(self.tools.config.timing.renew());
        let Some(pool) = &self.pool else { return };
        for (name, job) in &self.jobs {
            let Some(work) = self.work.get(name).filter(|w| w.link.is_some()) else {
                continue;
            };
            if let Some(worker) = job.worker.filter(|_| !job.fenced && !job.killed)
                && now > work.heard_at.saturating_add(quiet)
            {
                let _ = pool.link.pool(&ToPool::Continue { worker });
            }
        }
    }

    /// After an outage the watches may hang on dead connections for minutes: they are begun anew, not too often.
    fn look_again(&mut self, now: Nanos) {
        if self.renewals.failures() >= 3 && now >= self.watched_at.saturating_add(WATCH_AGAIN_NANOS) {
            self.watched_at = now;
            self.tools.watch_again.notify_one();
        }
    }

    fn assignment(&mut self, assignment: Assignment) {
        let name = assignment.metadata.name.clone().unwrap_or_default();
        if let Some(listing) = &mut self.listing {
            listing.insert(name.clone());
        }
        let known =
            self.orders.get(&name).map(|o| &o.assignment.metadata.uid) == Some(&assignment.metadata.uid);
        let leader_term = self
            .orders
            .get(&name)
            .filter(|_| known)
            .and_then(|o| o.leader_term);
        if let Some(work) = self.work.get_mut(&name)
            && Some(&work.target.uid) == assignment.metadata.uid.as_ref()
            && work.writing.is_none()
            && let Some(version) = &assignment.metadata.resource_version
        {
            work.target.resource_version.clone_from(version);
        }
        let obstacle = self.obstacle_of(&assignment.spec);
        self.orders.insert(
            name,
            Order {
                assignment,
                leader_term,
                obstacle,
            },
        );
    }

    fn confirmed(&mut self, name: &str, found: Option<Box<Assignment>>) {
        self.asked.remove(&format!("confirm/{name}"));
        match found {
            Some(assignment) => {
                let status = assignment.status.as_ref();
                let ours = status.is_none_or(|s| s.session.as_ref().is_none_or(|s| *s == self.tools.session));
                let over = status.and_then(|s| s.state).is_some_and(State::is_over);
                let good = ours && !over && assignment.spec.session == self.tools.session;
                self.assignment(*assignment);
                match self.jobs.get_mut(name) {
                    Some(job) if good => job.confirmed = true,
                    Some(_) => self.fail(
                        name,
                        "Superseded",
                        "the assignment was closed while the API was away",
                        true,
                    ),
                    None => {}
                }
            }
            None => {
                self.orders.remove(name);
            }
        }
    }

    fn pool_hello(&mut self, alive: &[WorkerId], user: u32, link: Link, now: Nanos) {
        // A pool that has lost its agent kills its workers; whatever it still has, it must kill before it is used.
        for worker in alive {
            let _ = link.pool(&ToPool::Kill { worker: *worker });
        }
        let lost: Vec<WorkerId> = self
            .workers
            .keys()
            .copied()
            .filter(|w| !alive.contains(w))
            .collect();
        for worker in lost {
            self.worker_gone(worker, "the pool does not have it any more", now);
        }
        self.strangers = alive
            .iter()
            .copied()
            .filter(|w| !self.workers.contains_key(w))
            .collect();
        tracing::info!(
            alive = alive.len(),
            strangers = self.strangers.len(),
            "pool connected"
        );
        self.pool = Some(Pool { link, user });
        self.ranked = None;
        self.rank_pool();
        self.clear();
    }

    /// Once the pool holds nothing of an old session, this one may be published.
    fn clear(&mut self) {
        if self.pool.is_some()
            && self.strangers.is_empty()
            && let Some(clear) = self.tools.clear.take()
        {
            let _ = clear.send(());
        }
    }

    fn pool_lost(&mut self, _now: Nanos) {
        tracing::warn!("pool lost");
        self.pool = None;
        let names: Vec<String> = self.workers.values().cloned().collect();
        for name in names {
            self.fail(&name, "WorkerExited", "the pool of workers ended", true);
        }
    }

    fn pool_ended(&mut self, now: Nanos) {
        self.pool = None;
        let lost: Vec<WorkerId> = self.workers.keys().copied().collect();
        for worker in lost {
            self.worker_gone(worker, "the pool of workers ended", now);
        }
    }

    fn pool_says(&mut self, message: FromPool, now: Nanos) {
        match message {
            FromPool::Spawned { worker, pid } => {
                let assignment = self.workers.get(&worker);
                tracing::info!(worker, pid, assignment, "worker started");
                self.pids.insert(worker, pid);
                // A pool of our own lives in our PID namespace; another one's numbers mean nothing here.
                if self.tools.processes.is_some()
                    && let Some(work) = self.workers.get(&worker).and_then(|n| self.work.get_mut(n))
                {
                    work.pid = i32::try_from(pid).ok();
                }
                if let Some(processes) = self.tools.processes.clone() {
                    // A file write: short, but not for the owner's loop.
                    tokio::task::spawn_blocking(move || {
                        let mut list = processes
                            .lock()
                            .unwrap_or_else(std::sync::PoisonError::into_inner);
                        if let Err(error) = list.add(pid) {
                            tracing::error!(%error, pid, "could not record a worker");
                        }
                    });
                }
            }
            FromPool::SpawnFailed { worker, message } => {
                if let Some(name) = self.workers.get(&worker).cloned() {
                    self.fail(&name, "SpawnFailed", &message, true);
                }
                self.worker_gone(worker, &message, now);
            }
            FromPool::Exited { worker, code, signal } => {
                let how = match (code, signal) {
                    (Some(code), _) => format!("the worker exited with code {code}"),
                    (None, Some(signal)) => format!("the worker was killed by signal {signal}"),
                    (None, None) => "the worker ended".to_owned(),
                };
                let name = self.workers.get(&worker).cloned();
                let unasked = name
                    .as_ref()
                    .and_then(|n| self.jobs.get(n))
                    .is_some_and(|j| !j.killed);
                let before = name
                    .as_ref()
                    .and_then(|n| self.work.get(n))
                    .map_or(u64::MAX, |w| w.oom_kills);
                if let Some(name) =
                    name.filter(|_| unasked && signal == Some(9) && workers::oom_kills() > before)
                {
                    self.fail(
                        &name,
                        "OutOfMemory",
                        "the kernel killed the worker for want of memory",
                        true,
                    );
                }
                self.worker_gone(worker, &how, now);
                self.strangers.remove(&worker);
                self.clear();
            }
        }
    }

    /// The worker is reaped: nothing of it runs any more.
    fn worker_gone(&mut self, worker: WorkerId, how: &str, now: Nanos) {
        self.pids.remove(&worker);
        let Some(name) = self.workers.remove(&worker) else {
            return;
        };
        for grants in self.out.values_mut() {
            grants.ended(worker);
        }
        let Some(job) = self.jobs.get_mut(&name) else {
            return;
        };
        job.worker = None;
        job.fenced = false;
        let renewed = job.phase == Phase::Renewed && job.killed && !job.exhausted && job.stopping.is_none();
        if let Some(work) = self.work.get_mut(&name) {
            work.link = None;
            work.nonce = None;
            work.pid = None;
            work.resident = None;
            work.before_load = None;
            if renewed {
                work.feed.give_back();
            }
        }
        if renewed {
            job.killed = false;
            self.enter(&name, Phase::Verified, now);
            return self.push_limits();
        }
        let done = job.killed && (job.exhausted || job.stopping.is_some());
        if !done && !job.exhausted {
            let late = job.killed && job.phase == Phase::Starting;
            let why = if late {
                "the worker did not say hello in time"
            } else {
                how
            };
            self.fail(&name, "WorkerExited", why, true);
        }
        self.push_limits();
    }

    fn worker_hello(&mut self, greeting: Greeting, link: Link, now: Nanos) -> bool {
        let Greeting {
            worker,
            nonce,
            user,
            idle,
        } = greeting;
        let Some(name) = self.workers.get(&worker).cloned() else {
            return false;
        };
        let starting = self
            .jobs
            .get(&name)
            .is_some_and(|j| j.phase == Phase::Starting && !j.killed);
        let Some(work) = self.work.get_mut(&name) else {
            return false;
        };
        let known = starting && work.nonce.as_deref() == Some(nonce.as_str());
        if !known || self.pool.as_ref().is_none_or(|p| p.user != user) {
            self.tools.metrics.breaches.inc();
            return false;
        }
        work.nonce = None;
        work.heard_at = now;
        work.link = Some(link);
        work.idle = idle;
        self.enter(&name, Phase::Connected, now);
        self.push_limits();
        true
    }

    fn worker_lost(&mut self, worker: WorkerId, why: Option<String>) {
        let Some(name) = self.workers.get(&worker).cloned() else {
            return;
        };
        if let Some(work) = self.work.get_mut(&name) {
            work.link = None;
        }
        match why.filter(|why| !why.starts_with("connection:")) {
            Some(why) => {
                self.tools.metrics.breaches.inc();
                self.fail(
                    &name,
                    "ProtocolBreach",
                    &format!("the worker was cut off: {why}"),
                    true,
                );
            }
            // Its exit says more, if it comes; a worker without a connection is of no use either way.
            None => {
                if let (Some(job), Some(pool)) = (self.jobs.get(&name), &self.pool)
                    && let (false, Some(worker)) = (job.killed, job.worker)
                {
                    let _ = pool.link.pool(&ToPool::Kill { worker });
                }
            }
        }
    }

    fn breach(&mut self, name: &str, why: &str) {
        self.tools.metrics.breaches.inc();
        self.fail(name, "ProtocolBreach", why, true);
    }

    fn worker_says(&mut self, worker: WorkerId, message: FromWorker, now: Nanos) {
        let Some(name) = self.workers.get(&worker).cloned() else {
            return;
        };
        let (Some(job), Some(work)) = (self.jobs.get_mut(&name), self.work.get_mut(&name)) else {
            return;
        };
        work.heard_at = now;
        match message {
            FromWorker::Loaded { device_bytes } => {
                if job.phase != Phase::Loading {
                    return self.breach(&name, "the worker said Loaded without having been told to load");
                }
                let (device, reserved) = (work.device.clone(), work.bytes);
                let actual = Bytes(device_bytes).max(reserved);
                work.loaded_at.get_or_insert(now);
                if let Err(shortage) = self.ledger.commit(&device, &name, actual) {
                    return self.fail(&name, "VRAMExceeded", &shortage.to_string(), true);
                }
                work.bytes = actual;
                work.status.state = Some(State::Running);
                work.turned_at = now;
                workers::fill_status(work, now);
                self.enter(&name, Phase::Running, now);
            }
            FromWorker::Applied(readback) => {
                let current = work.limits.as_ref().map(|l| l.generation);
                if current.is_some_and(|generation| readback.generation <= generation) {
                    work.read_back(readback);
                    self.limits_applied();
                } else {
                    self.breach(&name, "the worker applied limits that it was not sent");
                }
            }
            FromWorker::Started { line, at } => match work.feed.started(line) {
                Ok(sent_at) => {
                    self.tools.metrics.began(at.min(now).saturating_sub(sent_at));
                    let device = work.device.clone();
                    // Its own word, but never from the future.
                    self.last_start.insert(device, at.min(now));
                }
                Err(error) => self.breach(&name, &error.to_string()),
            },
            FromWorker::Result(result) => match work.feed.answer(&result, now) {
                Ok(()) => self.tools.metrics.answered(&result),
                Err(error) => self.breach(&name, &error.to_string()),
            },
            FromWorker::Usage(usage) => {
                self.tools.metrics.used(&work.device, &work.usage, &usage);
                work.usage = usage;
            }
            FromWorker::Drained => match job.phase {
                Phase::Draining => self.enter(&name, Phase::Drained, now),
                Phase::Renewing => self.enter(&name, Phase::Renewed, now),
                _ => {}
            },
            FromWorker::Failed { reason, message } => {
                let reason = reason_word(&reason, "WorkerFailed").to_owned();
                let hopeless = ["Unsupported", "Invalid", "ContextTooLong"]
                    .iter()
                    .any(|p| reason.starts_with(p));
                self.fail(&name, &reason, clip(&message, 1024), !hopeless);
            }
        }
    }
}
