//! `InferenceJob`: what a user asks for, and what became of it.
//!
//! Owns: the fields, bounds and store-side rules of a job. Must not decide anything: the operator alone writes its status.

mod status;

pub use status::*;

use crate::ByteQuantity;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Condition types of an InferenceJob.
pub mod conditions {
    /// Summary of a Batch job: Unknown until over.
    pub const SUCCEEDED: &str = "Succeeded";
    /// Summary of a Service.
    pub const READY: &str = "Ready";
    /// True when the job is over, either way: what `kubectl wait` needs.
    pub const FINISHED: &str = "Finished";
    /// Whether the spec can be carried out by this version of GoGrid.
    pub const ACCEPTED: &str = "Accepted";
    /// Whether the job is suspended and holds nothing.
    pub const SUSPENDED: &str = "Suspended";
    /// Whether the model's bytes match the digest.
    pub const MODEL_VERIFIED: &str = "ModelVerified";
    /// Whether devices are chosen.
    pub const PLACED: &str = "Placed";
    /// Whether the model is in memory.
    pub const LOADED: &str = "Loaded";
    /// Whether limits hold the job back noticeably.
    pub const THROTTLED: &str = "Throttled";
    /// Whether the job met its memory limit.
    pub const VRAM_EXCEEDED: &str = "VRAMExceeded";
    /// Whether the node that runs the job renews its lease.
    pub const LEASE_HELD: &str = "LeaseHeld";
}

/// What kind of inference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Task {
    /// Text in, text out.
    #[default]
    TextGeneration,
    /// Text in, vectors out.
    Embedding,
    /// Text and pictures in, text out.
    VisionLanguage,
    /// Text in, pictures out.
    ImageGeneration,
    /// Speech in, text out.
    AudioTranscription,
}

/// Whether the job ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// A finite list of records.
    #[default]
    Batch,
    /// Serves until deleted.
    Service,
}

/// Weights to run, and how to know that they are the right ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.sha256) != has(self.trust)").message("model must carry exactly one of sha256 and trust"))]
pub struct Model {
    /// `file:` beneath a model root of the node, or `http(s):`, `s3:`, `oci:`, `hf:`.
    #[schemars(
        length(min = 1, max = 2048),
        regex(pattern = r"^(file|https?|s3|oci|hf):\S+$")
    )]
    pub uri: String,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 64, max = 64), regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: Option<String>,
    /// Verification through a TUF repository instead of a digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<Trust>,
}

/// A target in a TUF repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Trust {
    /// Name of a configured repository.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub repository: String,
    /// Target path in it.
    #[schemars(length(min = 1, max = 512))]
    pub target: String,
}

/// Where the records come from: JSONL in the OpenAI Batch shape, one record a line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("(has(self.inline) ? 1 : 0) + (has(self.configMapRef) ? 1 : 0) + (has(self.uri) ? 1 : 0) == 1").message("input must carry exactly one of inline, configMapRef and uri"))]
pub struct Input {
    /// The records themselves, one JSON line each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), inner(length(min = 1, max = 4096)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub inline: Option<Vec<String>>,
    /// A ConfigMap in the job's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<ConfigMapKey>,
    /// Any other place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub uri: Option<String>,
}

/// One key of a ConfigMap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapKey {
    /// Name of the ConfigMap.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    )]
    pub name: String,
    /// Key in its `data`.
    #[serde(default = "default_input_key")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

fn default_input_key() -> String {
    crate::names::INPUT_KEY.into()
}

/// Where the results go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.configMap) != has(self.uri)").message("output must carry exactly one of configMap and uri"))]
pub struct Output {
    /// Name of a ConfigMap that GoGrid creates in the job's namespace, key `results.jsonl`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    )]
    pub config_map: Option<String>,
    /// Any other place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub uri: Option<String>,
}

/// How text is sampled; a record's own values win where they are stricter in length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Generation {
    /// Most tokens generated for one record.
    #[serde(default = "default_max_tokens")]
    #[schemars(range(min = 1, max = 131_072))]
    pub max_tokens: i32,
    /// Temperature in thousandths; 0 is greedy.
    #[serde(default)]
    #[schemars(range(min = 0, max = 5000))]
    pub temperature_milli: i32,
    /// Nucleus mass in thousandths; 1000 keeps all.
    #[serde(default = "default_top_p")]
    #[schemars(range(min = 1, max = 1000))]
    pub top_p_milli: i32,
    /// Most candidates kept; 0 keeps all.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub top_k: i32,
    /// Seed of sampling; the same seed gives the same answer to the same record.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub seed: i64,
    /// Texts that end a generation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4), inner(length(min = 1, max = 64)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub stop: Vec<String>,
}

fn default_max_tokens() -> i32 {
    256
}

fn default_top_p() -> i32 {
    1000
}

impl Default for Generation {
    fn default() -> Self {
        Self {
            max_tokens: default_max_tokens(),
            temperature_milli: 0,
            top_p_milli: default_top_p(),
            top_k: 0,
            seed: 0,
            stop: vec![],
        }
    }
}

/// Memory the user asks for instead of the estimate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// Device memory the job may take; overrides the estimate.
    pub vram: ByteQuantity,
}

/// How a model may be spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Split {
    /// Whatever fits best.
    #[default]
    Auto,
    /// One device only.
    #[serde(rename = "SingleGPU")]
    SingleGpu,
    /// Devices of one node only.
    SingleNode,
}

/// Whether the CPU device may serve when no GPU fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CpuFallback {
    /// Never.
    Never,
    /// When no GPU fits; said in an event and a column.
    #[default]
    IfNeeded,
}

/// Limits on where the job may run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// How the model may be spread.
    #[serde(default)]
    pub split: Split,
    /// Whether the CPU may serve.
    #[serde(default)]
    pub cpu_fallback: CpuFallback,
    /// Labels a node must carry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "crate::schema::label_map")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints the job bears.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub tolerations: Vec<Toleration>,
}

/// How a toleration's value is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TolerationOperator {
    /// Key and value equal.
    #[default]
    Equal,
    /// Key present; an empty key bears every taint.
    Exists,
}

/// What a taint does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TaintEffect {
    /// Nothing new is placed.
    NoSchedule,
    /// Placed only when nothing else fits.
    PreferNoSchedule,
    /// Running work leaves, too.
    NoExecute,
}

/// A taint that the job bears; same meaning as a pod's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.operator) && self.operator == 'Exists' ? !has(self.value) : has(self.key)").message("toleration must name a key, and no value with operator Exists"))]
pub struct Toleration {
    /// Taint key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 316))]
    pub key: Option<String>,
    /// How the value is compared.
    #[serde(default)]
    pub operator: TolerationOperator,
    /// Taint value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,
    /// Taint effect; all effects when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
}

/// What to do about one kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FailureAction {
    /// Try again, counted.
    Retry,
    /// End the job.
    Fail,
    /// Try again, not counted.
    Ignore,
}

/// One rule: on this reason, do that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailureRule {
    /// Failure reason, as in `status.lastFailure.reason`.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Z][A-Za-z0-9]*$"))]
    pub on_reason: String,
    /// What to do.
    pub action: FailureAction,
}

/// Which failures are borne.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicy {
    /// How many records may fail before the job does; absent = any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_failed_records: Option<i32>,
    /// Rules by failure reason, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["onReason".into()]))]
    pub rules: Vec<FailureRule>,
}

/// What a user asks for.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "gogrid.dev",
    version = "v1alpha1",
    kind = "InferenceJob",
    namespaced,
    shortname = "ijob",
    category = "gogrid",
    status = "InferenceJobStatus",
    derive = "PartialEq",
    doc = "Runs a GGUF model over records on a node of this cluster, inside that node's ResourceProfile.",
    selectable = ".status.placement.nodeName",
    printcolumn(name = "Model", type_ = "string", json_path = ".status.modelName"),
    printcolumn(name = "Profile", type_ = "string", json_path = ".status.profileName"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress.display"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.placement.nodeName"),
    printcolumn(name = "Tokens/s", type_ = "string", json_path = ".status.progress.tokensPerSecond"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Succeeded\")].message", priority = 1),
    printcolumn(name = "VRAM", type_ = "string", json_path = ".status.estimate.total", priority = 1),
    printcolumn(name = "Stages", type_ = "string", json_path = ".status.placement.stages[*].gpuUUID", priority = 1),
    printcolumn(name = "Heartbeat", type_ = "date", json_path = ".status.lease.lastHeartbeat", priority = 1),
    printcolumn(name = "Output", type_ = "string", json_path = ".status.result.location", priority = 1),
    validation = Rule::new("EPOCH_NEW == EPOCH_OLD || EPOCH_NEW == EPOCH_OLD + 1").message("status.epoch must stay or grow by exactly 1"),
    validation = Rule::new("EPOCH_NEW == EPOCH_OLD + 1 || PLACEMENT_STAYS").message("status.placement must change only together with status.epoch + 1"),
    validation = Rule::new("TERM_NEW >= TERM_OLD").message("status.term must never fall"),
    validation = Rule::new("EPOCH_OLD == 0 || (self.spec.task == oldSelf.spec.task && self.spec.mode == oldSelf.spec.mode && self.spec.model == oldSelf.spec.model && STAYS(spec.profileName) && self.spec.input == oldSelf.spec.input && self.spec.output == oldSelf.spec.output && self.spec.generation == oldSelf.spec.generation && self.spec.contextTokens == oldSelf.spec.contextTokens && self.spec.parallelSequences == oldSelf.spec.parallelSequences && STAYS(spec.memory) && self.spec.backoffLimit == oldSelf.spec.backoffLimit && STAYS(spec.activeDeadlineSeconds) && self.spec.failurePolicy == oldSelf.spec.failurePolicy && STAYS(spec.managedBy) && self.spec.placement.split == oldSelf.spec.placement.split && self.spec.placement.cpuFallback == oldSelf.spec.placement.cpuFallback)").message("spec must not change once the job was placed, except suspend, priorityClassName and ttlSecondsAfterFinished"),
    validation = Rule::new("EPOCH_OLD == 0 || oldSelf.spec.suspend || (STAYS(spec.placement.nodeSelector) && STAYS(spec.placement.tolerations))").message("spec.placement.nodeSelector and tolerations must not change once the job was placed, unless it is suspended"),
)]
#[serde(rename_all = "camelCase")]
pub struct InferenceJobSpec {
    /// What kind of inference.
    #[serde(default)]
    pub task: Task,
    /// Whether the job ends by itself.
    #[serde(default)]
    pub mode: Mode,
    /// Weights to run.
    pub model: Model,
    /// A ResourceProfile that may only make the node's profile stricter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    )]
    pub profile_name: Option<String>,
    /// Where the records come from.
    pub input: Input,
    /// Where the results go.
    pub output: Output,
    /// How text is sampled.
    #[serde(default)]
    pub generation: Generation,
    /// Context of one sequence in tokens; prompt and answer share it.
    #[serde(default = "default_context")]
    #[schemars(range(min = 16, max = 1_048_576))]
    pub context_tokens: i32,
    /// Sequences decoded together at most; the profile may allow fewer.
    #[serde(default = "default_parallel")]
    #[schemars(range(min = 1, max = 256))]
    pub parallel_sequences: i32,
    /// Memory to take instead of the estimate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Limits on where the job may run.
    #[serde(default)]
    pub placement: Placement,
    /// PriorityClass that orders the queue; never a `system-` one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    )]
    #[x_kube(validation = Rule::new("!self.startsWith('system-')").message("priorityClassName must not be a system- class: they are reserved for the cluster itself"))]
    pub priority_class_name: Option<String>,
    /// Stops the job and gives its devices back; finished records stay.
    #[serde(default)]
    pub suspend: bool,
    /// How many attempts may fail for other reasons than a lost node.
    #[serde(default = "default_backoff")]
    #[schemars(range(min = 0, max = 1000))]
    pub backoff_limit: i32,
    /// Longest time from the first start, in seconds; stands still while suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<i64>,
    /// Seconds after the end at which the job is deleted; absent = kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<i64>,
    /// Which failures are borne.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// Controller that decides when the job may run, instead of GoGrid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub managed_by: Option<String>,
}

fn default_context() -> i32 {
    2048
}

fn default_parallel() -> i32 {
    16
}

fn default_backoff() -> i32 {
    3
}
