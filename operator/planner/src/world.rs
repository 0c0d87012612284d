//! The world as placement sees it.
//!
//! Owns: nodes, devices and profiles in a canonical order, and bookkeeping of what is promised to whom.
//! Must not: decide anything.

use crate::plan::Planned;
use gogrid_api::Bytes;
use gogrid_api::effective::NamedProfile;
use gogrid_api::job::TaintEffect;
use gogrid_api::node::Backend;
use std::collections::{BTreeMap, BTreeSet};

/// A taint of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taint {
    /// Key.
    pub key: String,
    /// Value, empty when none.
    pub value: String,
    /// Effect.
    pub effect: TaintEffect,
}

/// What is known of a node's heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heartbeat {
    /// Its Lease was seen to change within the lease's length.
    Fresh,
    /// Not seen to change yet since the operator started looking, or silent but not yet given up.
    Waiting,
    /// Silent for longer than lease and drift margin.
    Lost,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Driver's UUID, or `cpu`.
    pub uuid: String,
    /// What runs kernels on it.
    pub backend: Backend,
    /// Memory in all.
    pub total: Bytes,
    /// Memory of driver or system.
    pub reserved: Bytes,
    /// Memory others hold.
    pub foreign: Bytes,
    /// Memory promised to our jobs, used or not.
    pub used: Bytes,
    /// Our jobs on it.
    pub jobs: u32,
    /// Whether it may be used.
    pub healthy: bool,
    /// The pod that holds it, where nothing else keeps it from being used: waiting for that pod's end helps.
    pub holder: Option<String>,
}

impl Device {
    /// Most bytes that could still be promised under that ceiling.
    pub fn available(&self, cap: Bytes) -> Bytes {
        let physical = self
            .total
            .saturating_sub(self.reserved)
            .saturating_sub(self.foreign);
        cap.min(physical).saturating_sub(self.used)
    }
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Name of the Node.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// Whether it is cordoned.
    pub unschedulable: bool,
    /// What is known of its heartbeat.
    pub heartbeat: Heartbeat,
    /// Whether its agent calls itself ready.
    pub ready: bool,
    /// Why its agent gets no work, where its version doesn't go with the operator's.
    pub skew: Option<String>,
    /// Session of its agent, as in the Lease.
    pub session: String,
    /// Devices by index.
    pub devices: Vec<Device>,
    /// URIs and digests of models it holds.
    pub models: BTreeSet<String>,
    /// Whether `models` may have been cut: then a file that is not in it may still be there.
    pub models_cut: bool,
}

/// Everything a placement depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    nodes: Vec<Node>,
    profiles: Vec<NamedProfile>,
}

/// The world contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorldError {
    /// Two nodes of one name.
    #[error("node {0:?} occurs twice")]
    DuplicateNode(String),
    /// Two devices of one UUID on a node.
    #[error("device {device:?} of node {node:?} occurs twice")]
    DuplicateDevice {
        /// The node.
        node: String,
        /// The device.
        device: String,
    },
}

impl World {
    /// A world in canonical order: the order of the inputs makes no difference afterwards.
    ///
    /// # Errors
    /// A name occurs twice.
    pub fn new(mut nodes: Vec<Node>, mut profiles: Vec<NamedProfile>) -> Result<Self, WorldError> {
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        profiles.sort_by(|a, b| a.name.cmp(&b.name));
        for pair in nodes.windows(2) {
            if let [a, b] = pair
                && a.name == b.name
            {
                return Err(WorldError::DuplicateNode(a.name.clone()));
            }
        }
        for node in &nodes {
            let mut seen = BTreeSet::new();
            if let Some(twice) = node.devices.iter().find(|d| !seen.insert(&d.uuid)) {
                return Err(WorldError::DuplicateDevice {
                    node: node.name.clone(),
                    device: twice.uuid.clone(),
                });
            }
        }
        Ok(Self { nodes, profiles })
    }

    /// Nodes by name.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Profiles by name.
    pub fn profiles(&self) -> &[NamedProfile] {
        &self.profiles
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes
            .binary_search_by(|n| n.name.as_str().cmp(name))
            .ok()
            .and_then(|i| self.nodes.get(i))
    }

    /// Promises `bytes` of a device to one more job; unknown devices are no error, they only can't be placed on.
    pub fn promise(&mut self, node: &str, device: &str, bytes: Bytes) {
        let at = self.nodes.binary_search_by(|n| n.name.as_str().cmp(node)).ok();
        let node = at.and_then(|at| self.nodes.get_mut(at));
        if let Some(device) = node.and_then(|n| n.devices.iter_mut().find(|d| d.uuid == device)) {
            device.used = device.used.saturating_add(bytes);
            device.jobs = device.jobs.saturating_add(1);
        }
    }

    /// Promises everything a plan asks for.
    pub fn take(&mut self, planned: &Planned) {
        for stage in &planned.stages {
            self.promise(&planned.node, &stage.device, stage.bytes);
        }
    }
}
