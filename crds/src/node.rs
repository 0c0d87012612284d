//! `GpuNode`: what an agent has seen of its node and what it enforces there.
//!
//! Owns: fields and bounds. Only the node's agent writes it.

use crate::assignment::ModelFacts;
use crate::job::Progress;
use crate::{ByteQuantity, Condition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What runs kernels on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Backend {
    /// The node's CPU and its memory.
    #[serde(rename = "CPU")]
    Cpu,
    /// NVIDIA.
    #[serde(rename = "CUDA")]
    Cuda,
    /// Apple.
    Metal,
}

/// Whether a device may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Health {
    /// Yes.
    Healthy,
    /// No: see the message.
    Unhealthy,
}

/// One device of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Driver's UUID; `cpu` for the CPU.
    #[schemars(length(min = 1, max = 96))]
    pub uuid: String,
    /// Product name.
    #[schemars(length(max = 128))]
    pub name: String,
    /// What runs kernels on it.
    pub backend: Backend,
    /// Memory in all.
    pub memory_total: ByteQuantity,
    /// Memory the driver or the system keeps.
    pub memory_reserved: ByteQuantity,
    /// Memory others hold, bucketed.
    pub memory_foreign: ByteQuantity,
    /// Memory nobody holds, bucketed.
    pub memory_free: ByteQuantity,
    /// CUDA compute capability, e.g. `8.6`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8))]
    pub compute_capability: Option<String>,
    /// Whether it may be used.
    pub health: Health,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub message: Option<String>,
    /// The pod that holds it, `namespace/name`, where nothing else keeps it from being used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 320))]
    pub holder: Option<String>,
}

fn cpu() -> String {
    crate::names::CPU_DEVICE.into()
}

/// How one limit is held on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Enforcement {
    /// On which device: `cpu` or a UUID of `devices`; what concerns the workers' processes stands at `cpu`.
    #[serde(default = "cpu")]
    #[schemars(length(min = 1, max = 96))]
    pub device: String,
    /// Which limit: `vram`, `compute`, `adaptive`, `requestInterval`, `niceness`, `io`, `batch`.
    #[schemars(length(min = 1, max = 32))]
    pub limit: String,
    /// What the profile asks for.
    #[schemars(length(max = 64))]
    pub requested: String,
    /// What is in force.
    #[schemars(length(max = 64))]
    pub effective: String,
    /// By which means.
    #[schemars(length(max = 128))]
    pub mechanism: String,
}

/// A profile in force on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileInForce {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its generation.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub generation: i64,
    /// Since when every worker was read back with it.
    #[schemars(schema_with = "crate::schema::time")]
    pub effective_at: Time,
}

/// A model file that this node holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeldModel {
    /// `file:` URI beneath a root, or `sha256:<hex>` of the store.
    #[schemars(length(min = 1, max = 2048))]
    pub uri: String,
    /// Length in bytes.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub bytes: i64,
    /// What its header says; a hint until the digest is checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<ModelFacts>,
    /// Why it can't be used, one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Z][A-Za-z0-9]*$"))]
    pub reason: Option<String>,
    /// Why it can't be used, a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub error: Option<String>,
}

/// Progress of one running assignment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunningProgress {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub assignment: String,
    /// How far it is.
    pub progress: Progress,
}

/// A batch of progress, written only while anything runs that its own Assignment's status did not tell of lately.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Heartbeat {
    /// The node's Lease.
    #[schemars(length(max = 253))]
    pub lease: String,
    /// When the Lease was last renewed, by the node's clock.
    #[schemars(schema_with = "crate::schema::time")]
    pub renewed_at: Time,
    /// What has run for a heartbeat batch or longer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["assignment".into()]))]
    pub running: Vec<RunningProgress>,
}

/// Which node.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "gogrid.dev",
    version = "v1alpha1",
    kind = "GpuNode",
    shortname = "gpunode",
    category = "gogrid",
    status = "GpuNodeStatus",
    derive = "PartialEq",
    doc = "What GoGrid's agent has seen of a node, and what it enforces there.",
    printcolumn(name = "Devices", type_ = "string", json_path = ".status.devices[*].backend"),
    printcolumn(name = "Free", type_ = "string", json_path = ".status.devices[*].memoryFree"),
    printcolumn(name = "Profile", type_ = "string", json_path = ".status.profiles[0].name"),
    printcolumn(name = "Models", type_ = "string", json_path = ".status.modelCount"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.agentVersion"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name == self.spec.nodeName").message("metadata.name must be spec.nodeName"),
    validation = Rule::new("self.spec.nodeName == oldSelf.spec.nodeName").message("spec.nodeName must not change"),
)]
#[serde(rename_all = "camelCase")]
pub struct GpuNodeSpec {
    /// Name of the Node, and of this object.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
}

/// What its agent has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct GpuNodeStatus {
    /// `Ready`, and what hinders the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The agent's session: `<boot id>/<instance>`; the holder of the node's Lease.
    #[serde(default)]
    #[schemars(length(max = 128))]
    pub session: String,
    /// The agent's version.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub agent_version: String,
    /// Devices, by index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["uuid".into()]))]
    pub devices: Vec<Device>,
    /// How each limit is held.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["device".into(), "limit".into()]))]
    pub enforcement: Vec<Enforcement>,
    /// Profiles in force, the governing one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub profiles: Vec<ProfileInForce>,
    /// Models held.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["uri".into()]))]
    pub models: Vec<HeldModel>,
    /// How many, for the column.
    #[serde(default)]
    #[schemars(length(max = 8))]
    pub model_count: String,
    /// The last batch of progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<Heartbeat>,
}
