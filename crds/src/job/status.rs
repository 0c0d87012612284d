//! What became of a job: where it runs, how far it is, what came out.
//!
//! Owns: the fields and bounds of the status, some of which assignments carry, too. Must not decide anything.

use crate::{ByteQuantity, Condition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// Layers of one model on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Stage {
    /// The device; `cpu` is the node's CPU.
    #[serde(rename = "gpuUUID")]
    #[schemars(length(min = 1, max = 96))]
    pub gpu_uuid: String,
    /// First layer, from 0.
    #[schemars(range(min = 0, max = 65_535))]
    pub first_layer: i32,
    /// Last layer, inclusive.
    #[schemars(range(min = 0, max = 65_535))]
    pub last_layer: i32,
    /// Device memory reserved.
    pub vram: ByteQuantity,
}

/// Where the job runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlacementStatus {
    /// The node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// Its devices, in layer order.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub stages: Vec<Stage>,
}

/// How far the job is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Records answered, failed ones included.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub done: i64,
    /// Records that failed.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub failed: i64,
    /// Records in all.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub total: i64,
    /// Tokens generated.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub tokens: i64,
    /// Tokens per second since loaded, one decimal.
    #[serde(default)]
    #[schemars(length(max = 24))]
    pub tokens_per_second: String,
    /// `done/total`, for people.
    #[serde(default)]
    #[schemars(length(max = 48))]
    pub display: String,
}

/// A download on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Download {
    /// Bytes fetched.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub done_bytes: i64,
    /// Bytes in all, 0 while unknown.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub total_bytes: i64,
}

/// The heartbeat behind the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeaseStatus {
    /// Name of the Lease in GoGrid's namespace.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Session of the agent that holds it.
    #[schemars(length(max = 256))]
    pub holder: String,
    /// When the agent last reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::time")]
    pub last_heartbeat: Option<Time>,
}

/// Memory that the job needs, before it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct EstimateStatus {
    /// Tensors.
    pub weights: ByteQuantity,
    /// Keys and values of all sequences.
    pub kv_cache: ByteQuantity,
    /// Activations.
    pub compute: ByteQuantity,
    /// The backend's own.
    pub overhead: ByteQuantity,
    /// The sum, or the user's override.
    pub total: ByteQuantity,
}

/// Memory that the job took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Measured {
    /// Highest device memory seen.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "peakVRAM")]
    pub peak_vram: Option<ByteQuantity>,
}

/// A node that was considered and why it was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    /// The node.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// Most memory free on one of its devices, after its profile.
    pub free: ByteQuantity,
    /// How much is missing there.
    pub missing: ByteQuantity,
    /// Why not, one word.
    #[schemars(length(min = 1, max = 64))]
    pub reason: String,
}

/// A failed attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// One word.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Z][A-Za-z0-9]*$"))]
    pub reason: String,
    /// A sentence with the numbers.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// Whether another attempt may go better.
    #[serde(default)]
    pub retryable: bool,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResultStatus {
    /// `configmap/<name>` in the job's namespace.
    #[schemars(length(max = 2048))]
    pub location: String,
    /// SHA-256 of the published text.
    #[schemars(length(min = 64, max = 64))]
    pub sha256: String,
    /// Its length in bytes.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub bytes: i64,
    /// Records in it.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub records: i64,
    /// Failed records among them.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub failed_records: i64,
    /// Its beginning.
    #[schemars(length(max = 1024))]
    pub preview: String,
}

/// What became of it; the operator alone writes this.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferenceJobStatus {
    /// Aspects of the job's state.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Counts placements; only ever grows by 1.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub epoch: i64,
    /// Leadership under which the job was last placed.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub term: i64,
    /// Where the job runs or last ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementStatus>,
    /// When the job was first placed, by the operator's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::time")]
    pub start_time: Option<Time>,
    /// When the job was over, by the operator's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::time")]
    pub completion_time: Option<Time>,
    /// Seconds the job spent suspended since it started, for the deadline.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub suspended_seconds: i64,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// A download on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<Download>,
    /// The heartbeat behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseStatus>,
    /// Memory it needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<EstimateStatus>,
    /// Memory it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// Nodes considered while unplaced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["node".into()]))]
    pub candidates: Vec<Candidate>,
    /// Place in the queue while unplaced, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub queue_position: Option<i32>,
    /// Attempts that failed by themselves, for the backoff limit.
    #[serde(default)]
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub attempts: i32,
    /// The last failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Failure>,
    /// What came out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<ResultStatus>,
    /// What the model calls itself, for the column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub model_name: Option<String>,
    /// The profile in force, for the column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub profile_name: Option<String>,
}
