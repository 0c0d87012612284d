//! Jobs as last seen.
//!
//! Owns: the newest version of each, and which of them need a look at all: a cluster keeps many more jobs that are over
//! than jobs that are not, and neither a round's length nor this process's memory may grow with those. Must not: decide
//! what a job needs.

use gogrid_api::job::conditions;
use gogrid_api::{InferenceJob, condition};
use std::collections::{BTreeMap, BTreeSet};

/// Jobs by uid.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    all: BTreeMap<String, InferenceJob>,
    /// Uids of those that are not over.
    live: BTreeSet<String>,
    /// When those that are over are to be deleted, in seconds since 1970, and their uids.
    due: BTreeSet<(i64, String)>,
}

/// Whether a job is over.
pub(crate) fn over(job: &InferenceJob) -> bool {
    let status = job.status.as_ref();
    status.is_some_and(|s| condition::is_true(&s.conditions, conditions::FINISHED))
}

/// When a job that is over is to be deleted; `None` where nobody asked for that.
fn due(job: &InferenceJob) -> Option<i64> {
    let ttl = job.spec.ttl_seconds_after_finished?;
    let completed = job.status.as_ref()?.completion_time.as_ref()?;
    Some(completed.0.as_second().saturating_add(ttl))
}

/// Drops what nobody asks a job for that is over: its records, and everything in its status but how and when it ended.
fn lighten(job: &mut InferenceJob) {
    job.spec.input.inline = None;
    let Some(status) = &mut job.status else { return };
    let kept = [conditions::SUCCEEDED, conditions::FINISHED];
    status.conditions.retain(|c| kept.contains(&c.type_.as_str()));
    status.conditions.shrink_to_fit();
    for condition in &mut status.conditions {
        condition.message = String::new();
    }
    status.placement = None;
    status.lease = None;
    status.progress = None;
    status.estimate = None;
    status.measured = None;
    if let Some(result) = &mut status.result {
        result.preview = String::new();
    }
}

impl Jobs {
    /// The job with that uid.
    pub(crate) fn get(&self, uid: &str) -> Option<&InferenceJob> {
        self.all.get(uid)
    }

    /// Whether there is one.
    pub(crate) fn contains_key(&self, uid: &str) -> bool {
        self.all.contains_key(uid)
    }

    /// All, those that are over lightened.
    pub(crate) fn values(&self) -> impl Iterator<Item = &InferenceJob> {
        self.all.values()
    }

    /// Those that are not over, by uid.
    pub(crate) fn live(&self) -> impl Iterator<Item = (&String, &InferenceJob)> {
        self.live.iter().filter_map(|uid| self.all.get_key_value(uid))
    }

    /// Uids of those that need a look for their own sake: they are not over, or their time after the end is up.
    pub(crate) fn awake(&self, wall: i64) -> impl Iterator<Item = &str> {
        let due = self.due.iter().take_while(move |(at, _)| *at <= wall);
        let due = due.map(|(_, uid)| uid.as_str());
        self.live.iter().map(String::as_str).chain(due)
    }

    /// Takes the newest version of a job.
    pub(crate) fn insert(&mut self, uid: String, mut job: InferenceJob) {
        self.forget(&uid);
        if over(&job) {
            self.due.extend(due(&job).map(|at| (at, uid.clone())));
            lighten(&mut job);
        } else {
            self.live.insert(uid.clone());
        }
        self.all.insert(uid, job);
    }

    /// The job is gone.
    pub(crate) fn remove(&mut self, uid: &str) {
        self.forget(uid);
        self.all.remove(uid);
    }

    fn forget(&mut self, uid: &str) {
        self.live.remove(uid);
        if let Some(at) = self.all.get(uid).and_then(due) {
            self.due.remove(&(at, uid.to_owned()));
        }
    }

    /// These are all there are.
    pub(crate) fn replace(&mut self, all: impl Iterator<Item = (String, InferenceJob)>) {
        *self = Self::default();
        for (uid, job) in all {
            self.insert(uid, job);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn job(uid: &str, ttl: Option<i64>, status: &Value) -> InferenceJob {
        serde_json::from_value(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob", "metadata": {"name": uid, "namespace": "n", "uid": uid},
            "spec": {"model": {"uri": "file:/m/a", "sha256": "0"}, "input": {"inline": ["{}"]}, "output": {"configMap": "o"},
                     "ttlSecondsAfterFinished": ttl},
            "status": status,
        }))
        .unwrap()
    }

    fn ended() -> Value {
        let condition = |type_: &str, reason: &str| {
            json!({"type": type_, "status": "True", "reason": reason, "message": "long", "observedGeneration": 1,
                   "lastTransitionTime": "1970-01-01T00:00:10Z"})
        };
        json!({
            "epoch": 1, "completionTime": "1970-01-01T00:00:10Z",
            "conditions": [condition("Succeeded", "Succeeded"), condition("Finished", "Succeeded"), condition("Placed", "Placed")],
        })
    }

    fn awake(jobs: &Jobs, wall: i64) -> Vec<&str> {
        jobs.awake(wall).collect()
    }

    #[test]
    fn jobs_that_are_over_need_no_look_until_their_time_is_up_however_many_there_are() {
        let mut jobs = Jobs::default();
        for n in 0..1_000 {
            let uid = format!("over-{n}");
            jobs.insert(uid.clone(), job(&uid, None, &ended()));
        }
        jobs.insert("kept".into(), job("kept", Some(60), &ended()));
        jobs.insert("live".into(), job("live", Some(60), &json!({"epoch": 1})));
        assert_eq!(awake(&jobs, 69), ["live"]);
        assert_eq!(awake(&jobs, 70), ["live", "kept"]);
        assert_eq!(jobs.live().count(), 1);
        assert_eq!(jobs.values().count(), 1_002);
        jobs.insert("live".into(), job("live", None, &ended()));
        jobs.remove("kept");
        assert_eq!(awake(&jobs, i64::MAX), Vec::<&str>::new());
        assert!(!jobs.contains_key("kept"));
    }

    #[test]
    fn a_job_that_is_over_keeps_how_it_ended_and_drops_its_records() {
        let mut jobs = Jobs::default();
        jobs.insert("a".into(), job("a", None, &json!({"epoch": 1})));
        assert!(jobs.get("a").unwrap().spec.input.inline.is_some());
        jobs.insert("a".into(), job("a", None, &ended()));
        let light = jobs.get("a").unwrap();
        assert_eq!(light.spec.input.inline, None);
        let conditions = &light.status.as_ref().unwrap().conditions;
        assert!(condition::is_true(conditions, "Succeeded") && condition::is_true(conditions, "Finished"));
        assert_eq!(condition::find(conditions, "Placed"), None);
    }

    #[test]
    fn a_new_list_replaces_everything_known() {
        let mut jobs = Jobs::default();
        jobs.insert("old".into(), job("old", Some(1), &ended()));
        jobs.replace([("new".to_owned(), job("new", None, &json!({"epoch": 0})))].into_iter());
        assert_eq!(awake(&jobs, i64::MAX), ["new"]);
        assert!(!jobs.contains_key("old"));
    }
}
