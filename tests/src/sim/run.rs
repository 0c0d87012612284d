//! One seed, from beginning to end.
//!
//! Owns: the loop that moves true time, strikes, ends faults and asks at the end whether everybody got what was theirs.

use super::Without;
use super::cluster::{Cluster, ClusterError, TEAM};
use super::kind::Kind;
use super::rng::Rng;
use super::schedule::{Fault, Planned, Schedule, Step, Wish};
use super::storm::{self, Undo, Victims};
use super::time::{MILLI, Nanos, SECOND, lock};
use super::watcher::{self, Findings, Seen, Shared};
use gogrid_api::names::RESULTS_KEY;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How long a schedule lasts at least.
pub const SHORTEST: Nanos = 15 * 60 * SECOND;
/// How long after the last fault every job must be over.
pub const BOUND: Nanos = 15 * 60 * SECOND;
/// How long a fault waits for its step.
const PATIENCE: Nanos = 60 * SECOND;

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Nodes.
    pub nodes: usize,
    /// Operators.
    pub operators: usize,
    /// Jobs.
    pub jobs: usize,
    /// A layer of the fence that is taken away.
    pub without: Option<Without>,
    /// Whether to tell everything.
    pub trace: bool,
}

/// What came of a seed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// True time that passed.
    pub simulated: Nanos,
    /// Moments at which anything happened.
    pub events: u64,
    /// Requests that arrived at the server.
    pub requests: u64,
    /// Faults by kind.
    pub faults: BTreeMap<Fault, u64>,
    /// Steps of the protocol that were taken.
    pub steps: BTreeMap<Step, u64>,
    /// Faults by kind and the step at which they struck.
    pub table: BTreeMap<(Fault, Step), u64>,
    /// Milliseconds in which two workers computed for one job, clocks being within the contract.
    pub overlap_millis: u64,
    /// The same outside the contract.
    pub overlap_outside_millis: u64,
    /// Jobs whose result is missing or not whole.
    pub lost_jobs: u64,
    /// Records that are in a result twice, or whose published answer changed.
    pub duplicated_records: u64,
    /// Times that more device memory was taken than the profile leaves.
    pub over_commits: u64,
    /// Accepted writes of a leader that had been followed by another.
    pub stale_writes: u64,
    /// Jobs that were not over in time.
    pub unfinished_jobs: u64,
    /// How long after the last fault the last job was over.
    pub settled: Nanos,
    /// What was wrong, in words.
    pub violations: Vec<String>,
    /// Lines for people.
    pub trace: Vec<String>,
}

struct Director {
    cluster: Cluster,
    findings: Shared,
    rng: Rng,
    schedule: Schedule,
    setup: Setup,
    undos: BTreeMap<(Nanos, u64), Undo>,
    strikes: BTreeMap<(Nanos, u64), (Planned, Victims)>,
    armed: Vec<Planned>,
    numbers: u64,
    deleted: BTreeSet<usize>,
    submitted: usize,
    outcome: Outcome,
}

/// Runs a seed.
///
/// # Errors
/// The programs could not be put together.
pub fn run(seed: u64, setup: Setup) -> Result<Outcome, ClusterError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .event_interval(u32::MAX)
        .build()
        .map_err(|error| ClusterError(error.to_string()))?;
    runtime.block_on(async {
        let mut rng = Rng::new(seed);
        let favoured = setup.without.map_or(&[][..], Without::favours);
        let schedule = Schedule::new(&mut rng, setup.jobs, favoured);
        let cluster = Cluster::new(&mut rng, setup.nodes, setup.operators, setup.without)?;
        let findings = Arc::new(std::sync::Mutex::new(Findings::new(setup.trace)));
        cluster.server.set_ear(watcher::ear(Arc::clone(&findings)));
        let mut director = Director {
            cluster,
            findings,
            rng,
            schedule,
            setup,
            undos: BTreeMap::new(),
            strikes: BTreeMap::new(),
            armed: vec![],
            numbers: 0,
            deleted: BTreeSet::new(),
            submitted: 0,
            outcome: Outcome {
                seed,
                ..Outcome::default()
            },
        };
        director.direct().await?;
        Ok(director.judge())
    })
}

/// Lets everybody do what there is to do at this moment.
async fn settle() {
    // The runtime comes back to a task that gives way only when no other is ready. Twice, for tasks that gave way too.
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
}

impl Director {
    async fn direct(&mut self) -> Result<(), ClusterError> {
        for node in 0..self.setup.nodes {
            self.cluster.start_agent(node)?;
        }
        for operator in 0..self.setup.operators {
            self.cluster.start_operator(operator)?;
        }
        let (mut calm, mut done, mut looked) = (false, false, 0);
        let mut wishes = std::mem::take(&mut self.schedule.wishes).into_iter().peekable();
        let mut faults = std::mem::take(&mut self.schedule.faults).into_iter().peekable();
        loop {
            settle().await;
            let now = self.cluster.time.now();
            self.match_steps();
            self.wake_the_overtaken();
            while let Some((_, job, wish)) = wishes.next_if(|(at, ..)| *at <= now) {
                self.grant(job, wish)?;
            }
            while let Some(planned) = faults.next_if(|planned| planned.from <= now) {
                self.armed.push(planned);
            }
            self.lose_patience(now);
            self.strike(now)?;
            self.end_faults(now)?;
            self.restart();
            if !calm && now >= self.schedule.calm {
                calm = true;
                self.armed.clear();
                self.strikes.clear();
                self.say("calm");
                storm::calm(&mut self.cluster)?;
            }
            if calm && now >= looked + SECOND {
                looked = now;
                done = wishes.peek().is_none() && self.all_over();
            }
            if done && self.outcome.settled == 0 {
                self.outcome.settled = now.saturating_sub(self.schedule.calm).max(1);
            }
            if (done && now >= SHORTEST) || now >= self.schedule.calm + BOUND {
                self.outcome.simulated = now;
                return Ok(());
            }
            let next = [
                wishes.peek().map(|(at, ..)| *at),
                faults.peek().map(|planned| planned.from),
                self.armed.first().map(|planned| planned.from + PATIENCE),
                self.undos.first_key_value().map(|((at, _), _)| *at),
                self.strikes.first_key_value().map(|((at, _), _)| *at),
                Some(if calm { now + SECOND } else { self.schedule.calm }),
            ];
            let next = next.into_iter().flatten().min().unwrap_or(now + SECOND);
            if self.cluster.time.advance(next) {
                self.outcome.events += 1;
            }
        }
    }

    fn say(&self, text: &str) {
        lock(&self.findings).say(self.cluster.time.now(), text);
    }

    fn grant(&mut self, job: usize, wish: Wish) -> Result<(), ClusterError> {
        self.say(&format!("user: {wish:?} j{job}"));
        match wish {
            Wish::Submit(records) => {
                self.submitted += 1;
                self.cluster.submit(job, records)?;
            }
            Wish::Suspend => self.cluster.patch(job, json!({"spec": {"suspend": true}})),
            Wish::Resume => self.cluster.patch(job, json!({"spec": {"suspend": false}})),
            Wish::Delete => {
                self.deleted.insert(job);
                self.cluster.delete(job);
            }
        }
        Ok(())
    }

    /// Faults that wait for a step that was just taken are let loose.
    fn match_steps(&mut self) {
        let steps = std::mem::take(&mut lock(&self.findings).steps);
        for Seen { step, node } in steps {
            *self.outcome.steps.entry(step).or_default() += 1;
            if let Some(at) = self.armed.iter().position(|planned| planned.step == step) {
                let planned = self.armed.remove(at);
                *self.outcome.table.entry((planned.fault, step)).or_default() += 1;
                let node = node.and_then(|name| name.strip_prefix("node-")?.parse().ok());
                self.let_loose(planned, node);
            }
        }
    }

    fn lose_patience(&mut self, now: Nanos) {
        while let Some(at) = self
            .armed
            .iter()
            .position(|planned| planned.from + PATIENCE <= now)
        {
            let planned = self.armed.remove(at);
            self.let_loose(planned, None);
        }
    }

    fn let_loose(&mut self, planned: Planned, node: Option<usize>) {
        let chance = self.rng.index(self.setup.nodes);
        let operator = if self.rng.permille(800) {
            self.cluster.leader().min(self.setup.operators.saturating_sub(1))
        } else {
            self.rng.index(self.setup.operators)
        };
        let victims = Victims {
            node: node.unwrap_or(chance),
            operator,
        };
        self.numbers += 1;
        let at = self.cluster.time.now() + planned.after;
        self.strikes.insert((at, self.numbers), (planned, victims));
    }

    fn strike(&mut self, now: Nanos) -> Result<(), ClusterError> {
        while let Some(entry) = self.strikes.first_entry().filter(|entry| entry.key().0 <= now) {
            let (planned, victims) = entry.remove();
            self.say(&format!("fault: {planned:?} on {victims:?}"));
            *self.outcome.faults.entry(planned.fault).or_default() += 1;
            let undos = storm::strike(&mut self.cluster, &mut self.rng, &planned, victims)?;
            self.undo_at(undos);
        }
        Ok(())
    }

    fn undo_at(&mut self, undos: impl IntoIterator<Item = (Nanos, Undo)>) {
        for (at, undo) in undos {
            self.numbers += 1;
            self.undos.insert((at, self.numbers), undo);
        }
    }

    fn wake_the_overtaken(&mut self) {
        if std::mem::take(&mut lock(&self.findings).followed) {
            let undos = storm::followed(&self.cluster, &mut self.rng);
            self.undo_at(undos);
        }
    }

    fn end_faults(&mut self, now: Nanos) -> Result<(), ClusterError> {
        while let Some(entry) = self.undos.first_entry().filter(|entry| entry.key().0 <= now) {
            let undo = entry.remove();
            self.say(&format!("over: {undo:?}"));
            storm::undo(&mut self.cluster, undo)?;
        }
        Ok(())
    }

    /// Programs that ended by themselves are started again, as a kubelet would.
    fn restart(&mut self) {
        let now = self.cluster.time.now();
        let agents = self.cluster.take_ended().into_iter().map(Undo::StartAgent);
        let operators = self.cluster.bury_operators().into_iter().map(Undo::StartOperator);
        let undos: Vec<Undo> = agents.chain(operators).collect();
        self.undo_at(undos.into_iter().map(|undo| (now + 2 * SECOND, undo)));
    }

    fn jobs(&self) -> Vec<Value> {
        self.cluster.server.look(|store| {
            let jobs = store.list(Kind::Job, &super::kind::Selector::default());
            jobs.into_iter().map(|job| job.value.clone()).collect()
        })
    }

    fn all_over(&self) -> bool {
        self.cluster.server.look(|store| {
            let jobs = store.list(Kind::Job, &super::kind::Selector::default());
            jobs.iter().all(|job| watcher::over(&job.value).is_some())
        })
    }

    /// Whether everybody got what was theirs.
    fn judge(mut self) -> Outcome {
        let mut outcome = std::mem::take(&mut self.outcome);
        let jobs = self.jobs();
        let missing = self
            .submitted
            .saturating_sub(self.deleted.len())
            .saturating_sub(jobs.len());
        outcome.lost_jobs += u64::try_from(missing).unwrap_or(0);
        for job in &jobs {
            let name = job
                .pointer("/metadata/name")
                .and_then(Value::as_str)
                .unwrap_or("");
            match watcher::finished(job) {
                None => {
                    outcome.unfinished_jobs += 1;
                    let word = serde_json::to_string(&job["status"]["conditions"]).unwrap_or_default();
                    outcome.violations.push(format!("{name} is not over: {word}"));
                }
                Some((false, word)) => {
                    outcome.lost_jobs += 1;
                    outcome.violations.push(format!("{name} failed: {word}"));
                }
                Some((true, _)) => self.result(name, job, &mut outcome),
            }
        }
        for (job, long) in self.cluster.truth.overlaps() {
            let millis = long.div_ceil(MILLI);
            if self.schedule.contract {
                outcome.overlap_millis += millis;
                outcome
                    .violations
                    .push(format!("{job} was computed twice at a time for {millis} ms"));
            } else {
                outcome.overlap_outside_millis += millis;
            }
        }
        outcome.over_commits = self.cluster.truth.over_commits();
        if outcome.over_commits > 0 {
            outcome.violations.push(format!(
                "{} times too much memory was taken",
                outcome.over_commits
            ));
        }
        let mut findings = lock(&self.findings);
        outcome.stale_writes = findings.stale;
        outcome.duplicated_records += findings.changed;
        outcome.violations.append(&mut findings.wrong);
        outcome.trace = findings.trace.take().unwrap_or_default();
        outcome.requests = self.cluster.server.requests();
        outcome
    }

    fn result(&self, name: &str, job: &Value, outcome: &mut Outcome) {
        let asked = job
            .pointer("/spec/input/inline")
            .and_then(Value::as_array)
            .map_or(0, Vec::len);
        let text = self.cluster.server.look(|store| {
            let map = store.get(Kind::ConfigMap, TEAM, &format!("out-{name}"));
            map.map(|map| map.text_at(&format!("/data/{RESULTS_KEY}")).to_owned())
                .unwrap_or_default()
        });
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            *counts
                .entry(line["custom_id"].as_str().unwrap_or("").to_owned())
                .or_default() += 1;
        }
        let twice: u64 = counts.values().map(|count| count - 1).sum();
        let whole = (1..=asked).all(|n| counts.contains_key(&format!("{name}/{n}")));
        if twice > 0 {
            outcome.duplicated_records += twice;
            outcome
                .violations
                .push(format!("{name}: {twice} records are in the result twice"));
        }
        if !whole || counts.len() != asked {
            outcome.lost_jobs += 1;
            outcome.violations.push(format!(
                "{name}: {} of {asked} records have a result",
                counts.len()
            ));
        }
    }
}
