//! Names that more than one program must agree on.

use crate::{GROUP, job::InferenceJob};
use kube::ResourceExt as _;

/// Field manager of the operator's writes.
pub const OPERATOR_MANAGER: &str = "gogrid-operator";
/// Field manager shared by all agents: per-node managers would conflict for ever after a move.
pub const AGENT_MANAGER: &str = "gogrid-agent";
/// What `spec.managedBy` says where GoGrid itself decides; a job with any other value is never touched.
pub const MANAGER: &str = "gogrid.dev/operator";
/// The leader Lease, at a fixed place so that a second install sees the first.
pub const LEADER_LEASE: &str = "gogrid-leader";
/// Namespace of the leader Lease, whatever the namespace of the release.
pub const LEADER_NAMESPACE: &str = "kube-system";
/// Annotation on the leader Lease: the install that the cluster belongs to. No other one leads or reports nodes.
pub const RELEASE_ANNOTATION: &str = "gogrid.dev/release";
/// Label on everything made for one job: the job's uid.
pub const JOB_UID_LABEL: &str = "gogrid.dev/job-uid";
/// Label on everything made for one assignment: its name.
pub const ASSIGNMENT_LABEL: &str = "gogrid.dev/assignment";
/// Label on result chunks: the node whose agent wrote it; admission compares it with the writer's token.
pub const NODE_LABEL: &str = "gogrid.dev/node";
/// Label on ConfigMaps of GoGrid's namespace: `input`, `result`, or `presets`.
pub const ROLE_LABEL: &str = "gogrid.dev/role";
/// Label on Nodes that picks one of the preset profiles.
pub const PROFILE_NODE_LABEL: &str = "gogrid.dev/profile";
/// Annotation on a Node, of any value: its jobs are handed back and no new ones come, as `kubectl drain` does with pods. It
/// never evicts a DaemonSet's.
pub const DRAIN_NODE_ANNOTATION: &str = "gogrid.dev/drain";
/// Label on Nodes that asks the agent to let go of the GPU driver, for as long as it has the value below.
pub const DRIVER_NODE_LABEL: &str = "gogrid.dev/driver";
/// See [`DRIVER_NODE_LABEL`].
pub const DRIVER_RELEASED: &str = "released";
/// Labels by which a Node is known to have an NVIDIA GPU: that of NVIDIA's feature discovery, and that of the flavour which
/// the chart's documentation calls so.
pub const GPU_NODE_LABELS: [(&str, &str); 2] =
    [("nvidia.com/gpu.present", "true"), ("gogrid.dev/flavour", "cuda")];
/// Annotation on a published result: the uid of the job it belongs to.
pub const RESULT_JOB_UID_ANNOTATION: &str = "gogrid.dev/job-uid";
/// Key under which results lie in a ConfigMap.
pub const RESULTS_KEY: &str = "results.jsonl";
/// Key under which staged inputs lie in a ConfigMap.
pub const INPUT_KEY: &str = "input.jsonl";
/// UUID of the one CPU device that every node has.
pub const CPU_DEVICE: &str = "cpu";

/// Name of a node's heartbeat Lease.
pub fn node_lease(node: &str) -> String {
    format!("node-{node}")
}

/// Name of the assignment of one (job, epoch).
pub fn assignment(job_uid: &str, epoch: i64) -> String {
    format!("{job_uid}-{epoch}")
}

/// Name of the assignment that looks at a job's model.
pub fn inspection(job_uid: &str, attempt: u32) -> String {
    format!("{job_uid}-inspect-{attempt}")
}

/// Name of the n-th staged part of a job's input.
pub fn input_chunk(job_uid: &str, n: usize) -> String {
    format!("input-{job_uid}-{n}")
}

/// Name of the n-th result chunk of an assignment, with the node that writes it, so that no other node's agent can take
/// the name (admission compares it with the writer's token).
pub fn result_chunk(assignment: &str, node: &str, n: u32) -> String {
    format!("result-{assignment}.{node}-{n}")
}

/// `namespace/name` of a job, for logs and events.
pub fn job_key(job: &InferenceJob) -> String {
    format!("{}/{}", job.namespace().unwrap_or_default(), job.name_any())
}

/// `gogrid.dev/<name>`.
pub fn qualified(name: &str) -> String {
    format!("{GROUP}/{name}")
}
