//! The one task that holds the world.
//!
//! Owns: the loop of observations, rounds and answers; who is busy; back-off after failures. Must not: decide what a job
//! needs (`round` does) or talk to the API server itself (`apply` does).

use crate::apply::{Executor, Fact, StepError};
use crate::clock::{Host, within};
use crate::config::Config;
use crate::events::Told;
use crate::gate::Leadership;
use crate::metrics::Metrics;
use crate::observe::{Change, Observation};
use crate::pace::Pace;
use crate::presets;
use crate::profiles;
use crate::round::{Memory, Round, Work};
use crate::store::{Claim, Store};
use crate::telemetry::Telemetry;
use gogrid_api::{Assignment, Millis, ResourceProfile, names};
use gogrid_planner::liveness::Liveness;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};

/// From one round to the next at least: what happens meanwhile is one round, for each is a look at every job that lives.
const REST: Duration = Duration::from_millis(25);
/// Longest pause after failures.
const LONGEST_PAUSE: u64 = 30_000;
/// Shortest time between two writes of a profile.
const PROFILES: u64 = 250;
/// Shortest time between two writes of a profile's counts.
const PROFILE_COUNTS: u64 = 5_000;

/// What a spawned task came back with.
enum Answer {
    Work {
        uid: String,
        key: String,
        step: &'static str,
        facts: Vec<Fact>,
        error: Option<StepError>,
    },
    Profile {
        name: String,
        written: Result<Box<ResourceProfile>, StepError>,
    },
    Swept(i64, Result<Swept, StepError>),
}

/// What a new leader found.
struct Swept {
    staged: BTreeSet<String>,
    orders: Vec<Assignment>,
}

/// The owner.
pub(crate) struct Owner {
    host: Arc<dyn Host>,
    config: Config,
    executor: Executor,
    leadership: Arc<Leadership>,
    metrics: Arc<Metrics>,
    telemetry: Telemetry,
    store: Store,
    memory: BTreeMap<String, Memory>,
    busy: BTreeMap<String, Option<Claim>>,
    profiles_busy: BTreeSet<String>,
    profiles_written: BTreeMap<String, Millis>,
    /// When the profiles' counts were last looked at.
    profiles_seen: Option<Millis>,
    pace: Pace,
    has_inputs: BTreeSet<String>,
    missing_since: BTreeMap<String, Millis>,
    /// Times that the API server was out of reach, as far as nodes were given time after them.
    gaps: u64,
    /// The term for which the orders were read anew, and the one for which they are being read.
    swept: Option<i64>,
    sweeping: Option<i64>,
    permits: Arc<Semaphore>,
    answers: mpsc::UnboundedSender<Answer>,
    answered: mpsc::UnboundedReceiver<Answer>,
}

impl Owner {
    pub(crate) fn new(
        config: Config,
        executor: Executor,
        leadership: Arc<Leadership>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (answers, answered) = mpsc::unbounded_channel();
        let liveness = Liveness::new(config.timing, executor.host.mono());
        let liveness = if config.layers.observed_change {
            liveness
        } else {
            liveness.hasty()
        };
        Self {
            store: Store::new(liveness),
            permits: Arc::new(Semaphore::new(config.concurrency)),
            host: Arc::clone(&executor.host),
            config,
            executor,
            leadership,
            metrics,
            telemetry: Telemetry::default(),
            memory: BTreeMap::new(),
            busy: BTreeMap::new(),
            profiles_busy: BTreeSet::new(),
            profiles_written: BTreeMap::new(),
            profiles_seen: None,
            pace: Pace::default(),
            has_inputs: BTreeSet::new(),
            missing_since: BTreeMap::new(),
            gaps: 0,
            swept: None,
            sweeping: None,
            answers,
            answered,
        }
    }

    /// Runs until `stop` says true, then waits a little for what is on its way.
    pub(crate) async fn run(
        mut self,
        mut seen: mpsc::Receiver<Observation>,
        mut leads: watch::Receiver<Option<i64>>,
        mut stop: watch::Receiver<bool>,
    ) {
        let period = Duration::from_millis((self.config.timing.lease().0 / 40).clamp(100, 1000));
        let mut tick = self.host.sleep(Duration::ZERO);
        let mut rest = self.host.sleep(Duration::ZERO);
        let (mut wanted, mut rests) = (false, false);
        while !*stop.borrow() {
            let mut look = false;
            // In this order: what comes seldom must not wait behind a flood of what comes often.
            tokio::select! {
                biased;
                _ = stop.changed() => {}
                _ = leads.changed() => {
                    self.swept = None;
                    self.sweep();
                }
                () = &mut rest, if rests => rests = false,
                () = &mut tick => {
                    tick = self.host.sleep(period);
                    self.tick();
                    look = true;
                }
                Some(answer) = self.answered.recv() => {
                    self.take(answer);
                    while let Ok(more) = self.answered.try_recv() {
                        self.take(more);
                    }
                    look = true;
                }
                observation = seen.recv() => match observation {
                    Some(observation) => {
                        look |= self.store.apply(self.host.mono(), observation);
                        // A burst is one round.
                        while let Ok(more) = seen.try_recv() {
                            look |= self.store.apply(self.host.mono(), more);
                        }
                    }
                    None => return,
                },
            }
            wanted |= look;
            if wanted && !rests {
                self.round();
                rest = self.host.sleep(REST);
                (wanted, rests) = (false, true);
            }
        }
        self.drain().await;
    }

    async fn drain(&mut self) {
        let host = Arc::clone(&self.host);
        let all = async {
            while !self.busy.is_empty() {
                match self.answered.recv().await {
                    Some(answer) => self.take(answer),
                    None => return,
                }
            }
        };
        if within(&*host, Duration::from_secs(5), all).await.is_none() {
            tracing::warn!("stopping with calls on their way");
        }
    }

    fn tick(&mut self) {
        self.sweep();
        let now = self.host.mono();
        self.store.liveness.tick(now);
        self.metrics.set_ready(self.store.synced());
        self.telemetry
            .tick(&self.store, &self.metrics, now, self.host.wall().as_second());
    }

    /// What a new leader looks for: presets that are absent, inputs staged under an earlier one, and the orders that one
    /// gave. Its watch may lag behind the jobs that it reads: an order it does not know of is not an order that is gone.
    fn sweep(&mut self) {
        let known = |term: &i64| self.swept == Some(*term) || self.sweeping == Some(*term);
        let term = self.leadership.term(self.host.mono());
        let Some(term) = term.filter(|term| !known(term)) else {
            return;
        };
        self.sweeping = Some(term);
        let (executor, answers) = (self.executor.clone(), self.answers.clone());
        self.host.spawn(Box::pin(async move {
            let found = async {
                presets::create_absent(&executor).await?;
                Ok(Swept {
                    staged: executor.staged_uids().await?,
                    orders: executor.orders().await?,
                })
            };
            let found = found.await;
            if found.is_err() {
                executor.host.sleep(Duration::from_secs(1)).await;
            }
            // The owner is gone only when the process ends.
            let _ = answers.send(Answer::Swept(term, found));
        }));
    }

    fn round(&mut self) {
        let now = self.host.mono();
        let gaps = self.leadership.gaps();
        if std::mem::replace(&mut self.gaps, gaps) != gaps {
            self.store.liveness.blind(now);
        }
        let ready = |term: &i64| self.swept == Some(*term) && self.store.synced();
        let Some(term) = self.leadership.term(now).filter(ready) else {
            return;
        };
        let timer = self.metrics.round_seconds.start_timer();
        let missing = Round::missing(&self.store, &self.has_inputs);
        self.missing_since.retain(|uid, _| missing.contains(uid));
        for uid in missing {
            self.missing_since.entry(uid).or_insert(now);
        }
        let (store, missing) = (&self.store, &self.missing_since);
        self.memory
            .retain(|uid, _| store.jobs.contains_key(uid) || missing.contains_key(uid));
        let works = Round {
            store: &self.store,
            memory: &self.memory,
            busy: &self.busy,
            has_inputs: &self.has_inputs,
            missing_since: &self.missing_since,
            config: &self.config,
            now,
            wall: self.host.wall().as_second(),
            term,
        }
        .works();
        let (quiet, rest): (Vec<Work>, Vec<Work>) = works.into_iter().partition(Work::only_shows);
        let written = |work: &Work| self.memory.get(&work.uid).and_then(|m| m.written);
        let quiet = quiet.into_iter().map(|work| (written(&work), work)).collect();
        let quiet = self.pace.admit(now, quiet);
        for work in rest.into_iter().chain(quiet) {
            self.begin(work);
        }
        self.write_profiles(now);
        timer.observe_duration();
    }

    fn begin(&mut self, work: Work) {
        let Work {
            uid,
            job,
            only_if_gone,
            step,
            ops,
            claim,
        } = work;
        self.busy.insert(uid.clone(), claim);
        self.metrics.steps.with_label_values(&[step]).inc();
        let key = job.as_ref().map_or_else(|| uid.clone(), names::job_key);
        tracing::debug!(job = key, step, "begun");
        let (executor, answers, permits, metrics) = (
            self.executor.clone(),
            self.answers.clone(),
            self.permits.clone(),
            self.metrics.clone(),
        );
        self.host.spawn(Box::pin(async move {
            let _permit = permits.acquire_owned().await;
            let timer = metrics.work_seconds.start_timer();
            let mut facts = vec![];
            let all = async {
                if let Some(reference) = &only_if_gone {
                    executor.ensure_gone(reference).await?;
                }
                for op in ops {
                    facts.push(executor.run(job.as_ref(), op).await?);
                }
                Ok::<(), StepError>(())
            };
            let error = match within(&*executor.host, Duration::from_secs(60), all).await {
                Some(outcome) => outcome.err(),
                None => Some(StepError::TimedOut),
            };
            timer.observe_duration();
            let _ = answers.send(Answer::Work {
                uid,
                key,
                step,
                facts,
                error,
            });
        }));
    }

    fn take(&mut self, answer: Answer) {
        match answer {
            Answer::Work {
                uid,
                key,
                step,
                facts,
                error,
            } => {
                self.busy.remove(&uid);
                for fact in facts {
                    self.learn(&uid, step, fact);
                }
                self.judge(&uid, &key, step, error);
            }
            Answer::Profile { name, written } => {
                self.profiles_busy.remove(&name);
                match written {
                    Ok(profile) => {
                        self.store.profiles.insert(name, *profile);
                    }
                    Err(error) => self.failed("Profile", &name, &error),
                }
            }
            Answer::Swept(term, found) => {
                // Old answers are dropped: what is there since would count as gone. After a failure, the next tick asks again.
                let asked = self.sweeping.take_if(|begun| *begun == term).is_some();
                match found {
                    Ok(Swept { staged, orders }) if asked => {
                        self.has_inputs.extend(staged);
                        self.store.reread_assignments(orders);
                        self.swept = Some(term);
                    }
                    Ok(_) => {}
                    Err(error) => self.failed("Sweep", "", &error),
                }
            }
        }
    }

    fn learn(&mut self, uid: &str, step: &'static str, fact: Fact) {
        let now = self.host.mono();
        let memory = self.memory.entry(uid.to_owned()).or_default();
        memory.learn(now, step, &fact);
        match fact {
            Fact::Job(job) => {
                tracing::info!(
                    job = names::job_key(&job),
                    step,
                    epoch = job.status.as_ref().map_or(0, |s| s.epoch),
                    "status written"
                );
                self.telemetry.written(&self.metrics, &job);
                self.store.put_job(*job);
            }
            Fact::Assignment(assignment) => self.store.put_assignment(*assignment),
            Fact::AssignmentGone { name, uid } => self.store.drop_assignment(&name, &uid),
            Fact::JobGone => self.store.drop_job(uid),
            Fact::Staged(inputs) => {
                if inputs.iter().any(|input| input.config_map.is_some()) {
                    self.has_inputs.insert(uid.to_owned());
                }
            }
            Fact::InputRefused(_) | Fact::Published(_) | Fact::Silent => {}
            Fact::InputsGone => {
                self.has_inputs.remove(uid);
            }
        }
    }

    fn judge(&mut self, uid: &str, key: &str, step: &'static str, error: Option<StepError>) {
        let now = self.host.mono();
        let Some(error) = error else {
            if step == "CleanUp" {
                // Nothing will be done for it any more.
                self.memory.remove(uid);
            } else if let Some(memory) = self.memory.get_mut(uid) {
                memory.failures = 0;
                memory.not_before = Millis(0);
            }
            return;
        };
        // Parts of an input may have been staged before that.
        if matches!(step, "Stage" | "Requeue") {
            self.has_inputs.insert(uid.to_owned());
        }
        if let StepError::Present(order) = &error {
            self.store.put_assignment((**order).clone());
        }
        if let StepError::NotSilent(lease) = &error {
            let seen = Observation::Lease(Change::Changed(lease.clone()));
            self.store.apply(now, seen);
        }
        let memory = self.memory.entry(uid.to_owned()).or_default();
        memory.failures = memory.failures.saturating_add(1);
        let pause = match error {
            // The newer version is on its way through the watch.
            StepError::Conflict(_) | StepError::NotSilent(_) | StepError::Present(_) | StepError::MovedOn
                if memory.failures < 5 =>
            {
                100
            }
            _ => (250_u64 << memory.failures.min(7)).min(LONGEST_PAUSE),
        };
        memory.not_before = Millis(now.0 + pause);
        if let Some(objection) = error.objection()
            && memory.objection.as_deref() != Some(objection)
            && let Some(job) = self.store.jobs.get(uid).cloned()
        {
            memory.objection = Some(objection.to_owned());
            let told = Told {
                warning: true,
                reason: "StepRefused".into(),
                note: format!("step {step} is refused and tried again: {objection}"),
            };
            let executor = self.executor.clone();
            self.host
                .spawn(Box::pin(async move { executor.tell(&job, &told).await }));
        }
        self.failed(step, key, &error);
    }

    fn failed(&self, step: &str, key: &str, error: &StepError) {
        self.metrics
            .errors
            .with_label_values(&[step, error.variant()])
            .inc();
        tracing::warn!(
            job = key,
            step,
            cause = error.variant(),
            error = crate::error_text(error),
            "a step failed and comes again"
        );
    }

    fn write_profiles(&mut self, now: Millis) {
        // No sooner than anything could be written: it is a look at every node.
        let soon = |at: Millis| now.0.saturating_sub(at.0) < PROFILES;
        if self.profiles_seen.is_some_and(soon) {
            return;
        }
        self.profiles_seen = Some(now);
        for (name, status) in profiles::statuses(&self.store, self.host.wall().as_second()) {
            let Some(profile) = self
                .store
                .profiles
                .get(&name)
                .filter(|_| !self.profiles_busy.contains(&name))
            else {
                continue;
            };
            let old = profile.status.clone().unwrap_or_default();
            let counts_only = (&old.conditions, old.nodes_matched, old.nodes_applied)
                == (&status.conditions, status.nodes_matched, status.nodes_applied);
            let last = self.profiles_written.get(&name).map_or(0, |at| at.0);
            let early = now.0.saturating_sub(last) < if counts_only { PROFILE_COUNTS } else { PROFILES };
            if old == status || (last > 0 && early) {
                continue;
            }
            self.profiles_busy.insert(name.clone());
            self.profiles_written.insert(name.clone(), now);
            let (executor, answers, profile) = (self.executor.clone(), self.answers.clone(), profile.clone());
            self.host.spawn(Box::pin(async move {
                let write = executor.write_profile(&profile, &status);
                let written = match within(&*executor.host, Duration::from_secs(20), write).await {
                    Some(written) => written.map(Box::new),
                    None => Err(StepError::TimedOut),
                };
                let _ = answers.send(Answer::Profile { name, written });
            }));
        }
        let known = &self.store.profiles;
        self.profiles_written.retain(|name, _| known.contains_key(name));
    }
}

#[cfg(test)]
mod tests;
