//! Jobs as a user sees them, by a watch of this program's own.
//!
//! Owns: when a job was made, placed and over, and which changes of a status were progress alone. Must not: ask GoGrid.

#![allow(clippy::disallowed_methods, reason = "measures")]

use crate::sim::time::lock;
use anyhow::Result;
use futures::StreamExt as _;
use gogrid_api::condition::{find, is_true};
use gogrid_api::job::conditions;
use gogrid_api::{InferenceJob, InferenceJobStatus};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, ResourceExt as _};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::pin::pin;
use std::sync::Mutex;
use std::time::{Duration, Instant};

#[derive(Default)]
struct Seen {
    version: String,
    words: u64,
    made: Option<Instant>,
    placed: Option<Instant>,
    running: bool,
    over: Option<bool>,
    placements: i64,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<String, Seen>,
    progress: Vec<Instant>,
    /// Changes of words, by the summary's reason after it.
    turns: BTreeMap<String, u64>,
}

/// How many jobs there are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Seen.
    pub(super) all: usize,
    /// Placed at least once.
    pub(super) placed: usize,
    /// Their workers answer records.
    pub(super) running: usize,
    /// Over, well or not.
    pub(super) over: usize,
    /// Over and not well.
    pub(super) failed: usize,
    /// Placements beyond the first.
    pub(super) again: i64,
}

/// What is known of all jobs.
#[derive(Default)]
pub(super) struct Board(Mutex<State>);

/// Everything in a status but what only shows how far a job is.
fn words(status: &InferenceJobStatus) -> u64 {
    let mut hasher = DefaultHasher::new();
    for condition in &status.conditions {
        format!("{} {:?} {}", condition.type_, condition.status, condition.reason).hash(&mut hasher);
    }
    (status.epoch, status.attempts).hash(&mut hasher);
    (status.result.is_some(), status.completion_time.is_some()).hash(&mut hasher);
    hasher.finish()
}

impl Board {
    /// Watches for as long as the stream lasts.
    pub(super) async fn watch(&self, jobs: Api<InferenceJob>) -> Result<()> {
        let mut events = pin!(watcher(jobs, watcher::Config::default()));
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::InitApply(job) | Event::Apply(job)) => self.saw(&job, Instant::now()),
                Ok(Event::Init | Event::InitDone | Event::Delete(_)) => {}
                Err(error) => tracing::warn!(%error, "the watch of jobs broke: changes may have been missed"),
            }
        }
        Ok(())
    }

    fn saw(&self, job: &InferenceJob, at: Instant) {
        let mut state = lock(&self.0);
        let State {
            jobs,
            progress,
            turns,
        } = &mut *state;
        let seen = jobs.entry(job.name_any()).or_default();
        let version = job.resource_version().unwrap_or_default();
        let Some(status) = job.status.as_ref().filter(|_| seen.version != version) else {
            return;
        };
        seen.version = version;
        let new = words(status);
        let all = &status.conditions;
        let reason = find(all, conditions::SUCCEEDED).map_or("", |c| c.reason.as_str());
        if std::mem::replace(&mut seen.words, new) == new {
            progress.push(at);
        } else {
            *turns.entry(reason.to_owned()).or_default() += 1;
        }
        if is_true(all, conditions::PLACED) {
            seen.placed.get_or_insert(at);
        }
        seen.placements = status.epoch;
        seen.running = reason == "Running";
        if is_true(all, conditions::FINISHED) {
            seen.over = Some(is_true(all, conditions::SUCCEEDED));
        }
    }

    /// The API server has said that it made that job.
    pub(super) fn made(&self, name: &str) {
        let now = Instant::now();
        lock(&self.0).jobs.entry(name.to_owned()).or_default().made = Some(now);
    }

    /// Counts of the jobs whose names begin so.
    pub(super) fn counts(&self, prefix: &str) -> Counts {
        let state = lock(&self.0);
        let mut counts = Counts::default();
        for (_, seen) in state.jobs.iter().filter(|(name, _)| name.starts_with(prefix)) {
            counts.all += 1;
            counts.placed += usize::from(seen.placed.is_some());
            counts.running += usize::from(seen.running);
            counts.over += usize::from(seen.over.is_some());
            counts.failed += usize::from(seen.over == Some(false));
            counts.again += (seen.placements - 1).max(0);
        }
        counts
    }

    /// From the API server's answer to the creation to Placed as this program's watch saw it, shortest first.
    pub(super) fn placements(&self, prefix: &str) -> Vec<Duration> {
        let state = lock(&self.0);
        let mut all: Vec<Duration> = state
            .jobs
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .filter_map(|(_, seen)| Some(seen.placed?.saturating_duration_since(seen.made?)))
            .collect();
        all.sort();
        all
    }

    /// Moments at which a status changed in progress alone.
    pub(super) fn progress(&self, from: Instant, until: Instant) -> Vec<Instant> {
        let state = lock(&self.0);
        let within = |at: &&Instant| **at >= from && **at < until;
        state.progress.iter().filter(within).copied().collect()
    }

    /// Changes of words so far, by the summary's reason after them.
    pub(super) fn turns(&self) -> BTreeMap<String, u64> {
        lock(&self.0).turns.clone()
    }
}
