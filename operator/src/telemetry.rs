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

/// What was told last.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    alive: BTreeSet<String>,
    told: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Telemetry {
    /// Sets every gauge; `now` is monotonic, `wall` in seconds since 1970.
    pub(crate) fn tick(&mut self, store: &Store, metrics: &Metrics, now: Millis, wall: i64) {
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

/// Counts what a status that was just written says for the first time.
pub(crate) fn written(metrics: &Metrics, old: Option<&InferenceJob>, new: &InferenceJob) {
    let read = |job: Option<&InferenceJob>, type_: &str| {
        let status = job.and_then(|j| j.status.as_ref())?;
        find(&status.conditions, type_).map(|c| (c.status, c.reason.clone()))
    };
    let (was, is) = (
        read(old, conditions::FINISHED),
        read(Some(new), conditions::FINISHED),
    );
    if let Some((ConditionStatus::True, reason)) = is
        && was.is_none_or(|(status, _)| status != ConditionStatus::True)
    {
        let result = if reason == "Succeeded" {
            "Succeeded"
        } else {
            "Failed"
        };
        metrics.finished.with_label_values(&[result]).inc();
        return;
    }
    let (was, is) = (read(old, conditions::PLACED), read(Some(new), conditions::PLACED));
    if let Some((ConditionStatus::False, reason)) = &is
        && was != is
        && !ON_THE_WAY.contains(&reason.as_str())
    {
        metrics
            .rejections
            .with_label_values(&[known(reason, &REASONS)])
            .inc();
    }
}

fn known<'a>(word: &str, words: &[&'a str]) -> &'a str {
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
        written(&metrics, None, &odd);
        assert_eq!(metrics.rejections.with_label_values(&["Other"]).get(), 1);
    }

    #[test]
    fn a_rejection_counts_once_until_its_reason_changes() {
        let metrics = Metrics::new().unwrap();
        let before = job("a");
        let mut after = before.clone();
        after.status = Some(Draft::new(&before, 1).wait(&Reason::NoNodes).done());
        written(&metrics, Some(&before), &after);
        written(&metrics, Some(&after), &after);
        assert_eq!(metrics.rejections.with_label_values(&["NoNodes"]).get(), 1);
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
            telemetry.tick(&store, &metrics, Millis(second * 1000), 0);
            if second == 20 {
                assert_eq!((state("Fresh"), state("Waiting"), state("Lost")), (1, 1, 0));
            }
        }
        assert_eq!((state("Fresh"), state("Lost")), (0, 2));
        assert_eq!(metrics.lease_expirations.get(), 1);
    }
}
