//! What the owner's state reads like in numbers.
//!
//! Owns: which number follows from which state: gauges at every tick, counters at every status written. Must not:
//! decide anything, or keep more than what it needs to see a change.

use crate::metrics::Metrics;
use crate::store::Store;
use gogrid_api::condition::{find, is_true};
use gogrid_api::job::conditions;
use gogrid_api::{ConditionStatus, InferenceJob, Millis, ResourceProfile, ResourceProfileStatus};
use gogrid_planner::Heartbeat;
use prometheus::IntGaugeVec;
use std::collections::{BTreeMap, BTreeSet};

/// Reasons that a job without a place shows; a word that an agent made up is none of them, so that no agent can make
/// new series.
const REASONS: [&str; 18] = [
    "AgentRestarted",
    "BackingOff",
    "ExceedsClusterVRAM",
    "InsufficientVRAM",
    "InvalidInput",
    "InvalidMemory",
    "ModelNotFound",
    "NoDevice",
    "NoMatchingNode",
    "NoNodes",
    "NodeLost",
    "NodeNotReady",
    "OutsideModelRoots",
    "PriorityClassNotFound",
    "ProfileInvalid",
    "ProfileNotFound",
    "Unsupported",
    "UnsupportedModel",
];
/// Steps on the way: a job is not turned away by them.
const ON_THE_WAY: [&str; 10] = [
    "Fetching",
    "InspectingModel",
    "Loading",
    "Placed",
    "Resumed",
    "Running",
    "StagingInput",
    "Stopping",
    "Suspended",
    "Waiting",
];
const OTHER: &str = "Other";
/// Ticks between two times that all gauges are set, which means looking at every object there is.
const TICKS_UNTIL_SET: u32 = 5;

/// What was told last.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    ticks: u32,
    alive: BTreeSet<String>,
    /// By the job's uid.
    counted: BTreeMap<String, (bool, &'static str)>,
    told: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Telemetry {
    /// Sets every gauge at every few ticks; `now` is monotonic, `wall` in seconds since 1970.
    pub(crate) fn tick(&mut self, store: &Store, metrics: &Metrics, now: Millis, wall: i64) {
        if self.ticks.is_multiple_of(TICKS_UNTIL_SET) {
            self.set(store, metrics, now, wall);
        }
        self.ticks = self.ticks.wrapping_add(1);
    }

    fn set(&mut self, store: &Store, metrics: &Metrics, now: Millis, wall: i64) {
        self.fill("jobs", &metrics.jobs, states(store));
        metrics.oldest_pending.set(oldest_pending(store, wall));
        let mut nodes = BTreeMap::from([("Fresh", 0), ("Waiting", 0), ("Lost", 0)]);
        for node in store.gpu_nodes.keys() {
            let state = match store.heartbeat(now, node).0 {
                Heartbeat::Fresh => {
                    self.alive.insert(node.clone());
                    "Fresh"
                }
                Heartbeat::Waiting => "Waiting",
                Heartbeat::Lost => {
                    // Only what this process saw alive has expired; the rest was lost before.
                    if self.alive.remove(node) {
                        metrics.lease_expirations.inc();
                    }
                    "Lost"
                }
            };
            *nodes.entry(state).or_insert(0) += 1;
        }
        self.alive.retain(|node| store.gpu_nodes.contains_key(node));
        self.counted.retain(|uid, _| store.jobs.contains_key(uid));
        for (state, count) in nodes {
            metrics.nodes.with_label_values(&[state]).set(count);
        }
        let counts = |of: fn(&ResourceProfileStatus) -> i32| {
            let written = |(name, profile): (&String, &ResourceProfile)| {
                let count = profile.status.as_ref().map_or(0, of);
                (name.clone(), i64::from(count))
            };
            store.profiles.iter().map(written).collect()
        };
        self.fill("matched", &metrics.profile_matched, counts(|s| s.nodes_matched));
        self.fill("applied", &metrics.profile_applied, counts(|s| s.nodes_applied));
    }

    /// Counts what a status that was just written says for the first time. The watch may have brought the same status into
    /// the store before, so what was counted is remembered here.
    pub(crate) fn written(&mut self, metrics: &Metrics, job: &InferenceJob) {
        let uid = job.metadata.uid.clone().unwrap_or_default();
        let Some(verdict) = verdict(job) else {
            self.counted.remove(&uid);
            return;
        };
        if self.counted.insert(uid, verdict) == Some(verdict) {
            return;
        }
        let (over, word) = verdict;
        let counter = if over {
            &metrics.finished
        } else {
            &metrics.rejections
        };
        counter.with_label_values(&[word]).inc();
    }

    /// Sets one child for each count and drops those that have none any more.
    fn fill(&mut self, family: &'static str, gauge: &IntGaugeVec, counts: BTreeMap<String, i64>) {
        let told = self.told.entry(family).or_default();
        for gone in told.iter().filter(|label| !counts.contains_key(*label)) {
            // An error means that it is gone already.
            let _ = gauge.remove_label_values(&[gone]);
        }
        told.clear();
        for (label, count) in counts {
            gauge.with_label_values(&[&label]).set(count);
            told.insert(label);
        }
    }
}

/// What a job's status says that is counted once: that it is over, or why it has no place.
fn verdict(job: &InferenceJob) -> Option<(bool, &'static str)> {
    let all = job.status.as_ref()?.conditions.as_slice();
    let over = find(all, conditions::FINISHED).filter(|c| c.status == ConditionStatus::True);
    if let Some(over) = over {
        let well = over.reason == "Succeeded";
        return Some((true, if well { "Succeeded" } else { "Failed" }));
    }
    let unplaced = find(all, conditions::PLACED).filter(|c| c.status == ConditionStatus::False)?;
    let on_the_way = ON_THE_WAY.contains(&unplaced.reason.as_str());
    (!on_the_way).then(|| (false, known(&unplaced.reason, &REASONS)))
}

fn known(word: &str, words: &[&'static str]) -> &'static str {
    words.iter().find(|known| **known == word).unwrap_or(&OTHER)
}

/// Jobs by how they stand: over, the reason why not placed, or a step on the way.
fn states(store: &Store) -> BTreeMap<String, i64> {
    let words = [REASONS.as_slice(), &ON_THE_WAY].concat();
    let mut counts = BTreeMap::new();
    for job in store.jobs.values() {
        let all = job.status.as_ref().map_or(&[][..], |s| s.conditions.as_slice());
        let state = match find(all, conditions::SUCCEEDED) {
            None => "New",
            Some(summary) => match summary.status {
                ConditionStatus::True => "Succeeded",
                ConditionStatus::False => "Failed",
                ConditionStatus::Unknown => known(&summary.reason, &words),
            },
        };
        *counts.entry(state.to_owned()).or_insert(0) += 1;
    }
    counts
}

/// How long the job that has waited longest for a place has done so, in seconds; 0 where none waits.
fn oldest_pending(store: &Store, wall: i64) -> i64 {
    store
        .jobs
        .values()
        .filter_map(waiting_since)
        .map(|since| wall.saturating_sub(since).max(0))
        .max()
        .unwrap_or(0)
}

/// Since when a job waits for a place; `None` for one that has one, is over, rests or was refused.
fn waiting_since(job: &InferenceJob) -> Option<i64> {
    if job.spec.suspend {
        return None;
    }
    let created = job
        .metadata
        .creation_timestamp
        .as_ref()
        .map(|at| at.0.as_second());
    let Some(status) = &job.status else { return created };
    let accepted = find(&status.conditions, conditions::ACCEPTED);
    let refused = accepted.is_some_and(|c| c.status == ConditionStatus::False);
    if refused || is_true(&status.conditions, conditions::FINISHED) {
        return None;
    }
    match find(&status.conditions, conditions::PLACED) {
        None => created,
        Some(placed) if placed.status == ConditionStatus::True => None,
        Some(placed) => Some(placed.last_transition_time.0.as_second()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::{Change, LeaseInfo, Observation};
    use crate::status::Draft;
    use gogrid_api::{GpuNode, GpuNodeSpec, LeaseTiming};
    use gogrid_planner::Reason;
    use gogrid_planner::liveness::Liveness;
    use serde_json::json;

    fn job(name: &str) -> InferenceJob {
        serde_json::from_value(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob",
            "metadata": {"name": name, "namespace": "n", "uid": name, "creationTimestamp": "1970-01-01T00:01:40Z"},
            "spec": {"model": {"uri": "file:/m/a", "sha256": "0"}, "input": {"inline": ["{}"]}, "output": {"configMap": "o"}},
        }))
        .unwrap()
    }

    #[test]
    fn the_longest_wait_counts_from_when_the_job_had_no_place_and_leaves_out_what_rests() {
        let mut store = Store::new(Liveness::new(LeaseTiming::default(), Millis(0)));
        assert_eq!(oldest_pending(&store, 1000), 0);
        store.put_job(job("new"));
        assert_eq!(oldest_pending(&store, 1000), 900);
        let mut waits = job("new");
        waits.status = Some(Draft::new(&waits, 400).wait(&Reason::NoNodes).done());
        store.put_job(waits.clone());
        assert_eq!(oldest_pending(&store, 1000), 600);
        waits.spec.suspend = true;
        store.put_job(waits);
        assert_eq!(oldest_pending(&store, 1000), 0);
    }

    #[test]
    fn a_reason_that_an_agent_made_up_makes_no_new_series() {
        let mut store = Store::new(Liveness::new(LeaseTiming::default(), Millis(0)));
        let mut odd = job("odd");
        let reason = Reason::ModelRefused {
            word: "MadeUp".into(),
            message: "no".into(),
        };
        odd.status = Some(Draft::new(&odd, 1).wait(&reason).done());
        store.put_job(odd.clone());
        store.put_job(job("new"));
        assert_eq!(
            states(&store),
            BTreeMap::from([("New".to_owned(), 1), ("Other".to_owned(), 1)])
        );
        let metrics = Metrics::new().unwrap();
        Telemetry::default().written(&metrics, &odd);
        assert_eq!(metrics.rejections.with_label_values(&["Other"]).get(), 1);
    }

    #[test]
    fn a_rejection_counts_once_until_its_reason_changes() {
        let metrics = Metrics::new().unwrap();
        let mut telemetry = Telemetry::default();
        let mut waits = job("a");
        waits.status = Some(Draft::new(&waits, 1).wait(&Reason::NoNodes).done());
        telemetry.written(&metrics, &waits);
        telemetry.written(&metrics, &waits);
        assert_eq!(metrics.rejections.with_label_values(&["NoNodes"]).get(), 1);
    }

    /// The watch brings a status into the store while the answer to its write is still on its way.
    #[test]
    fn a_job_that_ended_counts_once_although_the_store_has_its_end_already() {
        let metrics = Metrics::new().unwrap();
        let mut telemetry = Telemetry::default();
        let mut store = Store::new(Liveness::new(LeaseTiming::default(), Millis(0)));
        let mut over = job("a");
        let failure = gogrid_api::job::Failure {
            reason: "DigestMismatch".into(),
            message: "no".into(),
            retryable: false,
        };
        let outcome = gogrid_planner::lifecycle::Outcome::Failed(failure);
        over.status = Some(Draft::new(&over, 1).finish(&outcome, None).done());
        store.put_job(over.clone());
        telemetry.set(&store, &metrics, Millis(0), 1);
        telemetry.written(&metrics, &over);
        telemetry.written(&metrics, &over);
        assert_eq!(metrics.finished.with_label_values(&["Failed"]).get(), 1);
    }

    #[test]
    fn a_lease_expires_once_and_only_where_this_process_saw_it_alive() {
        let mut store = Store::new(Liveness::new(LeaseTiming::default(), Millis(0)));
        let metrics = Metrics::new().unwrap();
        let mut telemetry = Telemetry::default();
        let nodes = ["seen", "never"].map(|name| {
            GpuNode::new(
                name,
                GpuNodeSpec {
                    node_name: name.into(),
                },
            )
        });
        store.apply(Millis(0), Observation::GpuNode(Change::Listed(nodes.into())));
        let lease = |mark: &str| LeaseInfo {
            name: "node-seen".into(),
            holder: Some("s".into()),
            mark: mark.into(),
        };
        store.apply(Millis(0), Observation::Lease(Change::Listed(vec![lease("1")])));
        store.apply(
            Millis(1000),
            Observation::Lease(Change::Changed(Box::new(lease("2")))),
        );
        let state = |name: &str| metrics.nodes.with_label_values(&[name]).get();
        for second in 1..=200 {
            store.liveness.tick(Millis(second * 1000));
            telemetry.set(&store, &metrics, Millis(second * 1000), 0);
            if second == 20 {
                assert_eq!((state("Fresh"), state("Waiting"), state("Lost")), (1, 1, 0));
            }
        }
        assert_eq!((state("Fresh"), state("Lost")), (0, 2));
        assert_eq!(metrics.lease_expirations.get(), 1);
    }
}
