//! `Assignment`: the whole order from operator to agent for one (job, epoch, node), and the agent's answer.
//!
//! Owns: fields, bounds and store-side rules. The operator writes the spec, one agent the status.

use crate::ByteQuantity;
use crate::job::{Download, Failure, Generation, Measured, Progress, Stage};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the agent is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Kind {
    /// Run the job.
    #[default]
    Run,
    /// Read the model's header and return its facts.
    Inspect,
}

/// The job an assignment is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobReference {
    /// Its namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its uid.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,
}

/// The weights to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelOrder {
    /// Where they lie.
    #[schemars(length(min = 1, max = 2048))]
    pub uri: String,
    /// What they must hash to, 64 lower-case hexadecimal digits.
    #[schemars(length(min = 64, max = 64), regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: String,
}

/// Most bytes of an input that travels in its order, and of answers that travel in an order's status. More than that lies
/// in ConfigMaps, each of which is written and removed by itself.
pub const INLINE_BYTES: usize = 16 << 10;

/// A staged part of the input: whole lines, here or in a ConfigMap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.configMap) != has(self.text)").message("a staged input must carry exactly one of configMap and text"))]
pub struct StagedInput {
    /// Name of a ConfigMap in GoGrid's namespace that holds its lines, key `input.jsonl`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub config_map: Option<String>,
    /// Its lines themselves, where the whole input is short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = INLINE_BYTES))]
    pub text: Option<String>,
    /// Line number of its first record, from 1, in the whole input.
    #[schemars(range(min = 1, max = 9_007_199_254_740_991_i64))]
    pub first_line: i64,
    /// Its records.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub records: i32,
}

/// Records by line number, both ends included, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LineRange {
    /// First line.
    #[schemars(range(min = 1, max = 9_007_199_254_740_991_i64))]
    pub first: i64,
    /// Last line.
    #[schemars(range(min = 1, max = 9_007_199_254_740_991_i64))]
    pub last: i64,
}

/// Why the agent is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StopReason {
    /// The user suspended the job.
    Suspended,
    /// The job is gone.
    JobDeleted,
    /// The job's deadline passed.
    DeadlineExceeded,
    /// The job is placed anew.
    Superseded,
    /// A more important job needs the place.
    Preempted,
    /// The node is being drained, or tainted so that the job may not stay.
    NodeDrained,
}

/// The order to stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Stop {
    /// Why.
    pub reason: StopReason,
    /// How long the worker may take to hand back what it has.
    #[schemars(range(min = 0, max = 3600))]
    pub grace_seconds: i32,
}

/// The whole order.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "gogrid.dev",
    version = "v1alpha1",
    kind = "Assignment",
    namespaced,
    category = "gogrid",
    status = "AssignmentStatus",
    derive = "PartialEq",
    doc = "Internal: one (job, epoch, node), the whole order from operator to agent and the agent's answer.",
    selectable = ".spec.nodeName",
    printcolumn(name = "Kind", type_ = "string", json_path = ".spec.kind"),
    printcolumn(name = "Job", type_ = "string", json_path = ".spec.job.name"),
    printcolumn(name = "Epoch", type_ = "integer", json_path = ".spec.epoch"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress.display"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.spec.kind == oldSelf.spec.kind && self.spec.job == oldSelf.spec.job && self.spec.epoch == oldSelf.spec.epoch && self.spec.term == oldSelf.spec.term && self.spec.nodeName == oldSelf.spec.nodeName && self.spec.session == oldSelf.spec.session && self.spec.model == oldSelf.spec.model && STAYS(spec.profileName) && STAYS(spec.stages) && STAYS(spec.generation) && self.spec.contextTokens == oldSelf.spec.contextTokens && self.spec.parallelSequences == oldSelf.spec.parallelSequences && STAYS(spec.inputs) && STAYS(spec.skip) && STAYS(spec.maxFailedRecords)").message("spec must not change, except that stop may be set once"),
    validation = Rule::new("!has(oldSelf.spec.stop) || (has(self.spec.stop) && self.spec.stop == oldSelf.spec.stop)").message("spec.stop must not change once set"),
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.state) || !(oldSelf.status.state in ['Stopped', 'Succeeded', 'Failed']) || (has(self.status) && has(self.status.state) && self.status.state == oldSelf.status.state)").message("status.state must not leave Stopped, Succeeded or Failed"),
)]
#[serde(rename_all = "camelCase")]
pub struct AssignmentSpec {
    /// What to do.
    pub kind: Kind,
    /// For which job.
    pub job: JobReference,
    /// The job's epoch; 0 for Inspect.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub epoch: i64,
    /// Leadership under which this was ordered; agents refuse one lower than the leader Lease's.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub term: i64,
    /// The node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// The agent session this is for, as in the node's Lease; any other session refuses it.
    #[schemars(length(min = 1, max = 128))]
    pub session: String,
    /// The weights.
    pub model: ModelOrder,
    /// The job's own profile, which only tightens the node's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub profile_name: Option<String>,
    /// Devices and layers; empty for Inspect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub stages: Vec<Stage>,
    /// How text is sampled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// Context of one sequence in tokens.
    #[schemars(range(min = 16, max = 1_048_576))]
    pub context_tokens: i32,
    /// Sequences decoded together at most.
    #[schemars(range(min = 1, max = 256))]
    pub parallel_sequences: i32,
    /// Staged inputs, in line order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub inputs: Vec<StagedInput>,
    /// Lines that earlier epochs have answered: not to be run again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub skip: Vec<LineRange>,
    /// How many more records may fail; absent = any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_failed_records: Option<i32>,
    /// The order to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
}

/// Where the agent is with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum State {
    /// Seen, bytes reserved.
    Claimed,
    /// Getting and verifying the model.
    Fetching,
    /// Bringing it into memory.
    Loading,
    /// Answering records.
    Running,
    /// Handing back.
    Stopping,
    /// Ended because it was told to, or because its session ended; what it answered is in its checkpoint.
    Stopped,
    /// All records answered.
    Succeeded,
    /// Ended by a failure.
    Failed,
}

impl State {
    /// Whether nothing of it runs any more and nothing will.
    pub fn is_over(self) -> bool {
        matches!(self, State::Stopped | State::Succeeded | State::Failed)
    }
}

/// Results that are durable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    /// Result ConfigMaps written, numbered from 0.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100_000))]
    pub chunks: i32,
    /// Output lines that are in none of them, each with its line feed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = INLINE_BYTES))]
    pub text: Option<String>,
    /// Lines answered in all of that, sorted, merged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub lines: Vec<LineRange>,
    /// Failed records among them.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub failed: i64,
    /// Bytes of all these results.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub bytes: i64,
}

/// Limits in force on the worker, as read back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppliedLimits {
    /// Profiles that took part, the governing one first, as `name@generation`.
    #[schemars(length(max = 4), inner(length(max = 280)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub profiles: Vec<String>,
    /// Device memory reserved.
    pub vram: ByteQuantity,
    /// Share of the device's time, in percent.
    #[schemars(range(min = 0, max = 100))]
    pub compute_percent: i32,
    /// Between two request starts, in milliseconds.
    #[schemars(range(min = 0, max = 3_600_000))]
    pub min_request_interval_millis: i64,
    /// Nice value that every worker thread was read back with.
    #[schemars(range(min = -20, max = 19))]
    pub niceness: i32,
    /// I/O class read back, e.g. `Idle` or `BestEffort/7`.
    #[schemars(length(max = 32))]
    pub io: String,
    /// Sequences decoded together.
    #[schemars(range(min = 1, max = 256))]
    pub max_batch_size: i32,
}

/// What a model's header says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelFacts {
    /// `general.architecture`.
    #[schemars(length(max = 64))]
    pub architecture: String,
    /// `general.name`.
    #[serde(default)]
    #[schemars(length(max = 128))]
    pub name: String,
    /// Tensor type that holds most bytes, e.g. `Q4_K`.
    #[schemars(length(max = 16))]
    pub quantization: String,
    /// Length of the file in bytes.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub file_bytes: i64,
    /// Bytes of all tensors.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub weight_bytes: i64,
    /// Weights in all.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub parameters: i64,
    /// Transformer blocks.
    #[schemars(range(min = 0, max = 65_535))]
    pub layers: i32,
    /// Width of the residual stream.
    #[schemars(range(min = 0, max = 1_048_576))]
    pub embedding: i32,
    /// Width of the feed-forward network.
    #[schemars(range(min = 0, max = 16_777_216))]
    pub feed_forward: i32,
    /// Tokens in the vocabulary.
    #[schemars(range(min = 0, max = 16_777_216))]
    pub vocabulary: i32,
    /// Longest context it was made for.
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub context_length: i64,
    /// Bytes of keys and values of one token in f32, all layers.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub kv_bytes_per_token: i64,
}

/// Something about a running assignment that its job should say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Notice {
    /// One CamelCase word.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Z][A-Za-z0-9]*$"))]
    pub reason: String,
    /// A sentence with the numbers.
    #[schemars(length(max = 256))]
    pub message: String,
}

/// The agent's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AssignmentStatus {
    /// Where the agent is with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// Session that claimed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub session: Option<String>,
    /// Progress as of this write; between writes that are far apart it is in the GpuNode's heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// When the node's Lease was last renewed as of this write, by the node's clock. No write's cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::time")]
    pub renewed_at: Option<Time>,
    /// A download on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<Download>,
    /// Memory taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// Limits in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<AppliedLimits>,
    /// Results that are durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// It gets less of its device's time than its profile allows, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled: Option<Notice>,
    /// It holds more device memory than it may, and what is done about it.
    #[serde(default, rename = "vramExceeded", skip_serializing_if = "Option::is_none")]
    pub vram_exceeded: Option<Notice>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// The model's facts, once its bytes are verified (Run) or its header was read (Inspect).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<ModelFacts>,
}
