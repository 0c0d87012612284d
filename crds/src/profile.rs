//! `ResourceProfile`: how much of a machine inference may take.
//!
//! Owns: the fields and bounds of a profile, and the three presets. What a node ends up with is
//! [`crate::effective_profile`]'s to say.

use crate::{ByteQuantity, Condition};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Device memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VramLimit {
    /// Share of (total − driver-reserved) memory of each device, in percent.
    #[serde(default = "hundred")]
    #[schemars(range(min = 1, max = 100))]
    pub max_percent: i32,
    /// Most bytes of each device, whatever the percentage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<ByteQuantity>,
    /// Bytes left free below the cap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve: Option<ByteQuantity>,
}

/// Time on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ComputeLimit {
    /// Share of each device's time, in percent.
    #[serde(default = "hundred")]
    #[schemars(range(min = 1, max = 100))]
    pub max_percent: i32,
    /// Shortest time between the starts of two requests on a device, in milliseconds.
    #[serde(default)]
    #[schemars(range(min = 0, max = 3_600_000))]
    pub min_request_interval_millis: i64,
}

/// Courtesy of threads on the CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CpuLimit {
    /// Unix nice value of every worker thread.
    #[serde(default)]
    #[schemars(range(min = -20, max = 19))]
    pub niceness: i32,
    /// cgroup CPU weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub weight: Option<i32>,
}

/// I/O scheduling class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum IoClass {
    /// The kernel's default.
    #[default]
    None,
    /// Best effort at the given level.
    BestEffort,
    /// Only when nobody else wants the disk.
    Idle,
}

/// Courtesy of threads at the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct IoLimit {
    /// Scheduling class.
    #[serde(default)]
    pub class: IoClass,
    /// Level within BestEffort; 7 is the kindest.
    #[serde(default = "default_io_level")]
    #[schemars(range(min = 0, max = 7))]
    pub level: i32,
}

fn default_io_level() -> i32 {
    4
}

impl Default for IoLimit {
    fn default() -> Self {
        Self {
            class: IoClass::default(),
            level: default_io_level(),
        }
    }
}

/// What the adaptive law listens to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AdaptiveMode {
    /// Nothing: the share is fixed. (Not `Off`: unquoted, that is a boolean to YAML 1.1 readers such as kubectl.)
    #[default]
    Disabled,
    /// Other processes' load on the device.
    ForeignLoad,
}

/// Yielding to others by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Adaptive {
    /// What it listens to.
    #[serde(default)]
    pub mode: AdaptiveMode,
    /// Foreign load in percent above which the share falls to the floor.
    #[serde(default = "default_foreign")]
    #[schemars(range(min = 1, max = 100))]
    pub foreign_load_percent: i32,
    /// Share kept while others work, in percent.
    #[serde(default = "default_floor")]
    #[schemars(range(min = 1, max = 100))]
    pub floor_percent: i32,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            mode: AdaptiveMode::default(),
            foreign_load_percent: default_foreign(),
            floor_percent: default_floor(),
        }
    }
}

fn hundred() -> i32 {
    100
}

fn default_foreign() -> i32 {
    20
}

fn default_floor() -> i32 {
    5
}

/// How much of a machine inference may take.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "gogrid.dev",
    version = "v1alpha1",
    kind = "ResourceProfile",
    shortname = "rprof",
    category = "gogrid",
    status = "ResourceProfileStatus",
    derive = "PartialEq",
    doc = "A ceiling on what inference may take of each device and of the CPU of the nodes it matches.",
    printcolumn(name = "VRAM", type_ = "integer", json_path = ".spec.vram.maxPercent"),
    printcolumn(name = "Compute", type_ = "integer", json_path = ".spec.compute.maxPercent"),
    printcolumn(name = "Nice", type_ = "integer", json_path = ".spec.cpu.niceness"),
    printcolumn(name = "Interval", type_ = "integer", json_path = ".spec.compute.minRequestIntervalMillis"),
    printcolumn(name = "Batch", type_ = "integer", json_path = ".spec.maxBatchSize"),
    printcolumn(name = "Applied", type_ = "string", json_path = ".status.conditions[?(@.type==\"Applied\")].reason"),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.nodesApplied"),
    printcolumn(name = "Jobs", type_ = "integer", json_path = ".status.jobs"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.spec.adaptive.floorPercent <= self.spec.compute.maxPercent").message("spec.adaptive.floorPercent must not be above spec.compute.maxPercent"),
)]
#[serde(rename_all = "camelCase")]
pub struct ResourceProfileSpec {
    /// Device memory.
    pub vram: VramLimit,
    /// Time on a device.
    pub compute: ComputeLimit,
    /// Courtesy on the CPU.
    pub cpu: CpuLimit,
    /// Courtesy at the disk.
    #[serde(default)]
    pub io: IoLimit,
    /// Sequences decoded together on a device at most.
    #[schemars(range(min = 1, max = 256))]
    pub max_batch_size: i32,
    /// Yielding to others by itself.
    #[serde(default)]
    pub adaptive: Adaptive,
    /// Nodes this profile may govern, by label; `{}` = every node, absent = none (jobs may still name it).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::label_map")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Of several profiles that match a node, the highest governs; of equals, the first by name.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub precedence: i32,
}

/// Where the profile is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResourceProfileStatus {
    /// `Accepted` and `Applied`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Nodes governed by this profile.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub nodes_matched: i32,
    /// Nodes that report this generation in force.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub nodes_applied: i32,
    /// Unfinished jobs on those nodes or naming this profile.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub jobs: i32,
}

/// Name of the profile of nodes that no profile matches.
pub const CONSERVATIVE: &str = "conservative";

/// The presets: name and spec, each for the nodes labelled `gogrid.dev/profile=<name>`. The operator creates them when absent and never reverts an edit.
pub fn presets() -> [(&'static str, ResourceProfileSpec); 3] {
    let preset = |name, vram, compute, niceness, interval, batch, class| {
        let label = (crate::names::PROFILE_NODE_LABEL.to_owned(), String::from(name));
        (
            name,
            ResourceProfileSpec {
                vram: VramLimit {
                    max_percent: vram,
                    max: None,
                    reserve: None,
                },
                compute: ComputeLimit {
                    max_percent: compute,
                    min_request_interval_millis: interval,
                },
                cpu: CpuLimit {
                    niceness,
                    weight: None,
                },
                io: IoLimit { class, level: 7 },
                max_batch_size: batch,
                adaptive: Adaptive {
                    mode: AdaptiveMode::Disabled,
                    foreign_load_percent: default_foreign(),
                    floor_percent: default_floor(),
                },
                node_selector: Some(BTreeMap::from([label])),
                precedence: 0,
            },
        )
    };
    [
        preset(CONSERVATIVE, 50, 60, 15, 100, 2, IoClass::Idle),
        preset("default", 70, 80, 10, 50, 4, IoClass::BestEffort),
        preset("aggressive", 95, 95, 0, 0, 16, IoClass::None),
    ]
}
