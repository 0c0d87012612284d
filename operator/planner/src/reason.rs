//! Why a job is not placed: one word for machines, one sentence with numbers for people.
//!
//! Owns: every reason there is. A job without a place always has one of these.

use gogrid_api::Bytes;

/// Why a job has no place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No agent has reported a node.
    NoNodes,
    /// No node passes selector, taints and cordons.
    NoMatchingNode {
        /// Nodes known.
        nodes: usize,
        /// Of them, nodes without the labels.
        selector: usize,
        /// Nodes with a taint that the job doesn't bear.
        tainted: usize,
        /// Cordoned nodes.
        cordoned: usize,
    },
    /// Nodes match, but none of their agents is alive and ready.
    NodeNotReady {
        /// Nodes that match.
        matching: usize,
    },
    /// The file is beneath no live matching node's roots.
    ModelNotFound {
        /// The model.
        uri: String,
        /// Nodes that were asked.
        nodes: usize,
    },
    /// The nodes have no healthy device of an allowed kind.
    NoDevice {
        /// Nodes considered.
        nodes: usize,
        /// Whether CPU devices were left out because the job says so.
        cpu_refused: bool,
    },
    /// It fits a cap, but not now.
    InsufficientVram {
        /// Bytes needed.
        needed: Bytes,
        /// Most bytes free on one device.
        best_free: Bytes,
        /// Whose.
        node: String,
        /// Further devices that would do and that other pods hold.
        held: usize,
    },
    /// Only devices that other pods hold would do.
    DevicesHeld {
        /// How many.
        devices: usize,
        /// The first of them.
        device: String,
        /// Its node.
        node: String,
        /// The pod that holds it.
        holder: String,
    },
    /// It fits no device's cap at all.
    ExceedsClusterVram {
        /// Bytes needed.
        needed: Bytes,
        /// Largest cap of a device.
        largest_cap: Bytes,
        /// Whose.
        node: String,
    },
    /// The job's profile does not exist.
    ProfileNotFound {
        /// Its name.
        name: String,
    },
    /// A profile can't be enforced.
    ProfileInvalid {
        /// What is wrong with it.
        message: String,
    },
    /// An agent's version doesn't go with the operator's.
    VersionSkew {
        /// Its node.
        node: String,
        /// Both versions.
        message: String,
    },
    /// The engine can't run the model.
    UnsupportedModel {
        /// What stands in the way.
        message: String,
    },
    /// The model's header is being read.
    InspectingModel {
        /// Where, once that is known.
        node: Option<String>,
    },
    /// The model can't be read or is not what it should be.
    ModelRefused {
        /// The agent's word.
        word: String,
        /// The agent's sentence.
        message: String,
    },
    /// The input is being copied to where agents may read it.
    StagingInput,
    /// The job is suspended.
    Suspended,
    /// The priority class is missing.
    PriorityClassNotFound {
        /// Its name.
        name: String,
    },
    /// The node was lost; the job is about to be placed again.
    NodeLost {
        /// The node.
        node: String,
    },
    /// An earlier run has been told to stop and may still compute.
    FormerRunEnding {
        /// Where.
        node: String,
    },
    /// A failed attempt is repeated after a pause.
    BackingOff {
        /// Attempts that failed.
        attempts: i32,
        /// Seconds until the next.
        seconds: i64,
    },
}

impl Reason {
    /// One CamelCase word.
    pub fn word(&self) -> &str {
        match self {
            Reason::NoNodes => "NoNodes",
            Reason::NoMatchingNode { .. } => "NoMatchingNode",
            Reason::NodeNotReady { .. } => "NodeNotReady",
            Reason::ModelNotFound { .. } => "ModelNotFound",
            Reason::NoDevice { .. } => "NoDevice",
            Reason::InsufficientVram { .. } => "InsufficientVRAM",
            Reason::DevicesHeld { .. } => "DevicesHeld",
            Reason::ExceedsClusterVram { .. } => "ExceedsClusterVRAM",
            Reason::ProfileNotFound { .. } => "ProfileNotFound",
            Reason::ProfileInvalid { .. } => "ProfileInvalid",
            Reason::VersionSkew { .. } => "VersionSkew",
            Reason::UnsupportedModel { .. } => "UnsupportedModel",
            Reason::InspectingModel { .. } => "InspectingModel",
            Reason::ModelRefused { word, .. } => word,
            Reason::StagingInput => "StagingInput",
            Reason::Suspended => "Suspended",
            Reason::PriorityClassNotFound { .. } => "PriorityClassNotFound",
            Reason::NodeLost { .. } => "NodeLost",
            Reason::FormerRunEnding { .. } => "FormerRunEnding",
            Reason::BackingOff { .. } => "BackingOff",
        }
    }

    /// A sentence with the numbers, and what would help.
    pub fn message(&self) -> String {
        match self {
            Reason::NoNodes => {
                "no node runs GoGrid's agent yet: install the agent or wait for its first report".into()
            }
            Reason::NoMatchingNode {
                nodes,
                selector,
                tainted,
                cordoned,
            } => format!(
                "none of {nodes} nodes matches: {selector} lack a label of spec.placement.nodeSelector, {tainted} have a taint that is not tolerated, {cordoned} are cordoned"
            ),
            Reason::NodeNotReady { matching } => {
                format!(
                    "{matching} nodes match, but no agent there is alive and ready: waiting for a heartbeat"
                )
            }
            Reason::ModelNotFound { uri, nodes } => {
                format!(
                    "{uri} is beneath the model roots of none of {nodes} live matching nodes: put the file there"
                )
            }
            Reason::NoDevice {
                nodes,
                cpu_refused: true,
            } => {
                format!(
                    "{nodes} nodes considered have no healthy GPU, and spec.placement.cpuFallback is Never"
                )
            }
            Reason::NoDevice {
                nodes,
                cpu_refused: false,
            } => format!("{nodes} nodes considered have no healthy device"),
            Reason::InsufficientVram {
                needed,
                best_free,
                node,
                held,
            } => {
                let others = match held {
                    0 => String::new(),
                    held => format!(", or for other pods, which hold {held} GPUs that would do"),
                };
                format!(
                    "needs {needed} on one device; most is free on node {node}: {best_free}, {} short; waiting for jobs to end{others}",
                    needed.saturating_sub(*best_free)
                )
            }
            Reason::DevicesHeld {
                devices: 1,
                device,
                node,
                holder,
            } => format!(
                "the one GPU that would do, {device} of node {node}, is held by pod {holder}: waiting for that to end"
            ),
            Reason::DevicesHeld {
                devices,
                device,
                node,
                holder,
            } => format!(
                "all {devices} GPUs that would do are held by other pods, {device} of node {node} by {holder}: waiting for one of them to end"
            ),
            Reason::ExceedsClusterVram {
                needed,
                largest_cap,
                node,
            } => format!(
                "needs {needed} on one device, but the largest cap is {largest_cap} (node {node}): waiting won't help; lower contextTokens or parallelSequences, or raise that node's profile"
            ),
            Reason::ProfileNotFound { name } => {
                format!("ResourceProfile {name:?} does not exist: create it or name one of those that do")
            }
            Reason::ProfileInvalid { message }
            | Reason::UnsupportedModel { message }
            | Reason::ModelRefused { message, .. } => message.clone(),
            Reason::VersionSkew { node, message } => {
                format!("node {node} gets no work: {message}; upgrade the older one")
            }
            Reason::InspectingModel { node: Some(node) } => format!("node {node} reads the model's header"),
            Reason::InspectingModel { node: None } => "the model's header is about to be read".into(),
            Reason::StagingInput => "the input is being staged".into(),
            Reason::Suspended => "spec.suspend is true".into(),
            Reason::PriorityClassNotFound { name } => {
                format!("PriorityClass {name:?} does not exist: create it or name one of those that do")
            }
            Reason::NodeLost { node } => format!("node {node} was lost; looking for another place"),
            Reason::FormerRunEnding { node } => {
                format!("the earlier run on node {node} was told to stop and has not ended yet")
            }
            Reason::BackingOff { attempts, seconds } => {
                format!("attempt {attempts} failed; the next one starts in {seconds} s")
            }
        }
    }
}

/// Why one node was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeReason {
    /// It fits the cap, but not now.
    InsufficientVram,
    /// Other pods hold the devices that would do.
    DevicesHeld,
    /// It is above the cap.
    ExceedsCap,
    /// No healthy device of an allowed kind.
    NoDevice,
    /// Its profile can't be enforced.
    ProfileInvalid,
    /// Its agent's version doesn't go with the operator's.
    VersionSkew,
    /// The file is not there.
    ModelNotFound,
    /// Its agent is silent or not ready.
    NodeNotReady,
    /// Cordoned.
    Unschedulable,
    /// A taint is not tolerated.
    TaintNotTolerated,
    /// A label is missing.
    SelectorMismatch,
}

impl NodeReason {
    /// One CamelCase word.
    pub fn word(self) -> &'static str {
        match self {
            NodeReason::InsufficientVram => "InsufficientVRAM",
            NodeReason::DevicesHeld => "DevicesHeld",
            NodeReason::ExceedsCap => "ExceedsCap",
            NodeReason::NoDevice => "NoDevice",
            NodeReason::ProfileInvalid => "ProfileInvalid",
            NodeReason::VersionSkew => "VersionSkew",
            NodeReason::ModelNotFound => "ModelNotFound",
            NodeReason::NodeNotReady => "NodeNotReady",
            NodeReason::Unschedulable => "Unschedulable",
            NodeReason::TaintNotTolerated => "TaintNotTolerated",
            NodeReason::SelectorMismatch => "SelectorMismatch",
        }
    }
}

/// A node that was considered, and why it was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The node.
    pub node: String,
    /// Most bytes free on one of its devices.
    pub free: Bytes,
    /// How much is missing there.
    pub missing: Bytes,
    /// Why.
    pub reason: NodeReason,
}
