//! What an Assignment says.
//!
//! Owns: turning a placed job into the whole order for its agent, earlier epochs' answers included. Must not: choose.

use crate::results::union;
use gogrid_api::assignment::{AssignmentSpec, JobReference, Kind, LineRange, ModelOrder, StagedInput};
use gogrid_api::names::{self, JOB_UID_LABEL};
use gogrid_api::{Assignment, InferenceJob, InferenceJobStatus};
use kube::ResourceExt as _;
use std::collections::BTreeMap;

/// Ranges that an order can leave out.
const RANGES: usize = 1024;

fn named(name: &str, job: &InferenceJob, spec: AssignmentSpec) -> Assignment {
    let mut assignment = Assignment::new(name, spec);
    assignment.metadata.labels = Some(BTreeMap::from([(
        JOB_UID_LABEL.to_owned(),
        job.uid().unwrap_or_default(),
    )]));
    assignment
}

fn reference(job: &InferenceJob) -> JobReference {
    JobReference {
        namespace: job.namespace().unwrap_or_default(),
        name: job.name_any(),
        uid: job.uid().unwrap_or_default(),
    }
}

fn model(job: &InferenceJob) -> ModelOrder {
    ModelOrder {
        uri: job.spec.model.uri.clone(),
        sha256: job.spec.model.sha256.clone().unwrap_or_default(),
    }
}

/// What a run needs beyond the job and its status.
pub(crate) struct Run<'a> {
    /// Session of the node's agent.
    pub(crate) session: String,
    /// Term of the leader that gives the order: not always of the one that chose the place, which may have died before it
    /// could. An agent refuses one of an earlier leader.
    pub(crate) term: i64,
    /// Sequences decoded together at most.
    pub(crate) parallel_limit: u16,
    /// Staged inputs.
    pub(crate) inputs: Vec<StagedInput>,
    /// The job's runs; what earlier epochs answered is left out.
    pub(crate) runs: &'a [&'a Assignment],
}

/// The order for the placement that `status` holds.
pub(crate) fn run(job: &InferenceJob, status: &InferenceJobStatus, run: Run<'_>) -> Option<Assignment> {
    let Run {
        session,
        term,
        parallel_limit,
        inputs,
        runs,
    } = run;
    let placement = status.placement.as_ref()?;
    let checkpoints = || {
        runs.iter()
            .filter(|a| a.spec.epoch < status.epoch)
            .filter_map(|a| a.status.as_ref()?.checkpoint.as_ref())
    };
    let failed: i64 = checkpoints().map(|c| c.failed).sum();
    let skip: Vec<LineRange> = union(checkpoints().flat_map(|c| c.lines.iter().copied()), RANGES);
    let allowed = job.spec.failure_policy.max_failed_records;
    let left = allowed.map(|most| i32::try_from((i64::from(most) - failed).max(0)).unwrap_or(most));
    let name = names::assignment(&job.uid().unwrap_or_default(), status.epoch);
    Some(named(
        &name,
        job,
        AssignmentSpec {
            kind: Kind::Run,
            job: reference(job),
            epoch: status.epoch,
            term,
            node_name: placement.node_name.clone(),
            session,
            model: model(job),
            profile_name: job.spec.profile_name.clone(),
            stages: placement.stages.clone(),
            generation: Some(job.spec.generation.clone()),
            context_tokens: job.spec.context_tokens,
            parallel_sequences: job.spec.parallel_sequences.min(i32::from(parallel_limit)).max(1),
            inputs,
            skip,
            max_failed_records: left,
            stop: None,
        },
    ))
}

/// The order to look at the job's model.
pub(crate) fn inspection(
    job: &InferenceJob,
    attempt: u32,
    term: i64,
    node: &str,
    session: &str,
) -> Assignment {
    let name = names::inspection(&job.uid().unwrap_or_default(), attempt);
    named(
        &name,
        job,
        AssignmentSpec {
            kind: Kind::Inspect,
            job: reference(job),
            epoch: 0,
            term,
            node_name: node.into(),
            session: session.into(),
            model: model(job),
            profile_name: job.spec.profile_name.clone(),
            stages: vec![],
            generation: None,
            context_tokens: job.spec.context_tokens,
            parallel_sequences: job.spec.parallel_sequences,
            inputs: vec![],
            skip: vec![],
            max_failed_records: None,
            stop: None,
        },
    )
}

/// Number of an inspection's attempt, from its name.
pub(crate) fn attempt(inspection: &Assignment) -> u32 {
    inspection
        .name_any()
        .rsplit('-')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_order_carries_the_term_of_who_gives_it_and_leaves_out_what_earlier_epochs_answered() {
        let job: InferenceJob = serde_json::from_value(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob",
            "metadata": {"name": "j", "namespace": "n", "uid": "u"},
            "spec": {"model": {"uri": "file:///models/m.gguf", "sha256": "0".repeat(64)}, "input": {"inline": ["{}"]},
                     "output": {"configMap": "out"}},
            "status": {"epoch": 2, "term": 3, "placement": {"nodeName": "a", "stages": []}},
        }))
        .unwrap();
        let status = job.status.clone().unwrap();
        let order = |term, runs: &[&Assignment]| {
            let run = Run {
                session: "s".into(),
                term,
                parallel_limit: 1,
                inputs: vec![],
                runs,
            };
            super::run(&job, &status, run).unwrap()
        };
        let answered = |epoch: i64, line: i64| {
            let mut run = order(3, &[]);
            run.spec.epoch = epoch;
            let status =
                json!({"checkpoint": {"chunks": 1, "lines": [{"first": line, "last": line}], "failed": 0}});
            run.status = Some(serde_json::from_value(status).unwrap());
            run
        };
        let (first, second) = (answered(1, 7), answered(2, 8));
        let again = order(4, &[&first, &second]);
        assert_eq!((again.spec.epoch, again.spec.term), (2, 4));
        assert_eq!(again.spec.skip, [LineRange { first: 7, last: 7 }]);
    }
}
