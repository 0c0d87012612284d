//! Where one job goes, or why nowhere.
//!
//! Owns: hard filters and the integer score. Must not: order jobs among each other or promise anything.

use crate::estimate::Estimated;
use crate::reason::{NodeReason, Reason, Rejection};
use crate::request::{JobRequest, tolerates};
use crate::world::{Device, Heartbeat, Node, World};
use gogrid_api::Bytes;
use gogrid_api::effective::{EffectiveProfileError, Limits, effective_profile};
use gogrid_api::job::{CpuFallback, TaintEffect};
use gogrid_api::node::Backend;

/// Most rejected nodes that are named.
const CANDIDATES: usize = 8;

/// Layers on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedStage {
    /// The device.
    pub device: String,
    /// What runs kernels on it.
    pub backend: Backend,
    /// First layer.
    pub first_layer: i32,
    /// Last layer, inclusive.
    pub last_layer: i32,
    /// Bytes promised.
    pub bytes: Bytes,
}

/// A place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The node.
    pub node: String,
    /// Its agent's session.
    pub session: String,
    /// Devices in layer order.
    pub stages: Vec<PlannedStage>,
    /// Bytes by cause.
    pub estimate: Estimated,
    /// Sequences decoded together there.
    pub parallel_limit: u16,
    /// Profiles that took part, the governing one first.
    pub profiles: Vec<String>,
    /// Whether the CPU serves.
    pub on_cpu: bool,
}

/// No place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unplaced {
    /// Why.
    pub reason: Reason,
    /// Nodes that came closest, at most 8.
    pub candidates: Vec<Rejection>,
}

/// The outcome for one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It goes there.
    Place(Planned),
    /// It stays.
    Unplaced(Unplaced),
}

/// Lower is better, compared from first to last.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one place of an ordered score"
)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    cpu: bool,
    elsewhere: bool,
    /// Jobs that share a CPU device: they share its time as well.
    sharing: u32,
    uncached: bool,
    remaining: Bytes,
    unused_node: bool,
    node: usize,
    device: usize,
}

struct Fit {
    score: Score,
    estimate: Estimated,
    parallel_limit: u16,
    profiles: Vec<String>,
}

/// What a device came to.
struct Tried {
    needed: Bytes,
    free: Bytes,
    cap: Bytes,
}

/// Devices that would do if other pods did not hold them.
#[derive(Default)]
struct Held {
    devices: usize,
    /// The first one: index of its node, its UUID, and its holder.
    first: Option<(usize, String, String)>,
}

/// Decides on one job.
pub fn plan(world: &World, request: &JobRequest) -> Decision {
    if let Some(name) = &request.profile_name
        && !world.profiles().iter().any(|p| p.name == *name)
    {
        return unplaced(Reason::ProfileNotFound { name: name.clone() }, vec![]);
    }
    let mut best: Option<Fit> = None;
    let mut rejected = vec![];
    let mut closest: Option<(Tried, usize)> = None;
    let mut largest: Option<(Tried, usize)> = None;
    let mut trouble: Option<Reason> = None;
    let mut held = Held::default();
    for (index, node) in world.nodes().iter().enumerate() {
        let held_before = held.devices;
        match try_node(world, index, node, request, &mut held) {
            NodeOutcome::Fits(fit) => {
                if best.as_ref().is_none_or(|b| fit.score < b.score) {
                    best = Some(fit);
                }
            }
            NodeOutcome::Rejected(reason) => rejected.push((reason, Bytes(0), Bytes(0), index)),
            NodeOutcome::Trouble(node_reason, reason) => {
                trouble.get_or_insert(reason);
                rejected.push((node_reason, Bytes(0), Bytes(0), index));
            }
            NodeOutcome::TooSmall {
                most_free,
                largest_cap,
            } => {
                let reason = if most_free.needed > largest_cap.cap {
                    if held.devices > held_before {
                        NodeReason::DevicesHeld
                    } else {
                        NodeReason::ExceedsCap
                    }
                } else {
                    NodeReason::InsufficientVram
                };
                rejected.push((
                    reason,
                    most_free.free,
                    most_free.needed.saturating_sub(most_free.free),
                    index,
                ));
                if closest
                    .as_ref()
                    .is_none_or(|(c, _)| most_free.missing() < c.missing())
                {
                    closest = Some((most_free, index));
                }
                if largest
                    .as_ref()
                    .is_none_or(|(l, _)| largest_cap.over_cap() < l.over_cap())
                {
                    largest = Some((largest_cap, index));
                }
            }
        }
    }
    if let Some(fit) = best {
        return place(world, request, &fit);
    }
    let name = |index: usize| {
        world
            .nodes()
            .get(index)
            .map(|n| n.name.clone())
            .unwrap_or_default()
    };
    let reason = match (closest, held.first, largest) {
        (Some((free, at)), _, Some((cap, _))) if cap.needed <= cap.cap => Reason::InsufficientVram {
            needed: free.needed,
            best_free: free.free,
            node: name(at),
            held: held.devices,
        },
        // Whatever else does not fit: these would.
        (_, Some((at, device, holder)), _) => Reason::DevicesHeld {
            devices: held.devices,
            device,
            node: name(at),
            holder,
        },
        (_, None, Some((cap, at))) => Reason::ExceedsClusterVram {
            needed: cap.needed,
            largest_cap: cap.cap,
            node: name(at),
        },
        _ => trouble.unwrap_or_else(|| without_memory(request, &rejected)),
    };
    rejected.sort_by_key(|(reason, _, missing, index)| (*reason, *missing, *index));
    let candidates = rejected
        .into_iter()
        .take(CANDIDATES)
        .map(|(reason, free, missing, index)| Rejection {
            node: name(index),
            free,
            missing,
            reason,
        })
        .collect();
    unplaced(reason, candidates)
}

fn unplaced(reason: Reason, candidates: Vec<Rejection>) -> Decision {
    Decision::Unplaced(Unplaced { reason, candidates })
}

fn place(world: &World, request: &JobRequest, fit: &Fit) -> Decision {
    let Some((node, device)) = world
        .nodes()
        .get(fit.score.node)
        .and_then(|n| Some((n, n.devices.get(fit.score.device)?)))
    else {
        return unplaced(Reason::NoNodes, vec![]);
    };
    Decision::Place(Planned {
        node: node.name.clone(),
        session: node.session.clone(),
        stages: vec![PlannedStage {
            device: device.uuid.clone(),
            backend: device.backend,
            first_layer: 0,
            last_layer: request.layers.saturating_sub(1).max(0),
            bytes: fit.estimate.total,
        }],
        estimate: fit.estimate,
        parallel_limit: fit.parallel_limit,
        profiles: fit.profiles.clone(),
        on_cpu: device.backend == Backend::Cpu,
    })
}

impl Tried {
    fn missing(&self) -> Bytes {
        self.needed.saturating_sub(self.free)
    }

    fn over_cap(&self) -> (Bytes, std::cmp::Reverse<Bytes>) {
        (self.needed.saturating_sub(self.cap), std::cmp::Reverse(self.cap))
    }
}

enum NodeOutcome {
    Fits(Fit),
    Rejected(NodeReason),
    Trouble(NodeReason, Reason),
    TooSmall { most_free: Tried, largest_cap: Tried },
}

fn try_node(world: &World, index: usize, node: &Node, request: &JobRequest, held: &mut Held) -> NodeOutcome {
    if let Some(reason) = filtered(node, request) {
        return NodeOutcome::Rejected(reason);
    }
    if let Some(message) = &node.skew {
        return NodeOutcome::Trouble(
            NodeReason::VersionSkew,
            Reason::VersionSkew {
                node: node.name.clone(),
                message: message.clone(),
            },
        );
    }
    let effective = match effective_profile(world.profiles(), &node.labels, request.profile_name.as_deref()) {
        Ok(effective) => effective,
        Err(error @ (EffectiveProfileError::NotFound(_) | EffectiveProfileError::Invalid { .. })) => {
            return NodeOutcome::Trouble(
                NodeReason::ProfileInvalid,
                Reason::ProfileInvalid {
                    message: error.to_string(),
                },
            );
        }
    };
    let cached = request
        .model_sha256
        .as_ref()
        .is_some_and(|sha| node.models.contains(&format!("sha256:{sha}")))
        || node.models.contains(&request.model_uri);
    let used_node = node.devices.iter().any(|d| d.jobs > 0);
    let mut best: Option<Fit> = None;
    let mut most_free: Option<Tried> = None;
    let mut largest_cap: Option<Tried> = None;
    let mut held_here = false;
    for (device_index, device) in node
        .devices
        .iter()
        .enumerate()
        .filter(|(_, d)| (d.healthy || d.holder.is_some()) && allowed(d, request))
    {
        let estimate = match request.demand.on(device.backend, effective.limits.max_batch) {
            Ok(estimate) => estimate,
            Err(error) => {
                return NodeOutcome::Trouble(
                    NodeReason::NoDevice,
                    Reason::UnsupportedModel {
                        message: error.to_string(),
                    },
                );
            }
        };
        let needed = estimate.total;
        let (cap, free) = room(device, &effective.ceiling, &effective.limits);
        let free = if device.holder.is_some() { Bytes(0) } else { free };
        if let Some(holder) = device.holder.as_ref().filter(|_| needed <= cap) {
            held_here = true;
            held.devices += 1;
            held.first
                .get_or_insert_with(|| (index, device.uuid.clone(), holder.clone()));
            continue;
        }
        if needed <= free {
            let score = Score {
                cpu: device.backend == Backend::Cpu,
                elsewhere: request.preferred_node.as_ref().is_some_and(|p| *p != node.name),
                sharing: if device.backend == Backend::Cpu {
                    device.jobs
                } else {
                    0
                },
                uncached: !cached,
                remaining: free.saturating_sub(needed),
                unused_node: !used_node,
                node: index,
                device: device_index,
            };
            if best.as_ref().is_none_or(|b| score < b.score) {
                let profiles = effective
                    .sources
                    .iter()
                    .map(|(name, generation)| format!("{name}@{generation}"))
                    .collect();
                best = Some(Fit {
                    score,
                    estimate,
                    parallel_limit: effective.limits.max_batch,
                    profiles,
                });
            }
        }
        let tried = || Tried { needed, free, cap };
        if most_free.as_ref().is_none_or(|m| tried().missing() < m.missing()) {
            most_free = Some(tried());
        }
        if largest_cap
            .as_ref()
            .is_none_or(|l| tried().over_cap() < l.over_cap())
        {
            largest_cap = Some(tried());
        }
    }
    match (best, most_free, largest_cap) {
        (Some(fit), _, _) => NodeOutcome::Fits(fit),
        (None, Some(most_free), Some(largest_cap)) => NodeOutcome::TooSmall {
            most_free,
            largest_cap,
        },
        _ if held_here => NodeOutcome::Rejected(NodeReason::DevicesHeld),
        _ => NodeOutcome::Rejected(NodeReason::NoDevice),
    }
}

/// Cap of a device for this job, and what is free beneath it: all jobs together stay below the node's ceiling, this one
/// also below its own profile's.
fn room(device: &Device, ceiling: &Limits, own: &Limits) -> (Bytes, Bytes) {
    let all = ceiling.vram_cap(device.total, device.reserved);
    let one = own.vram_cap(device.total, device.reserved);
    (all.min(one), device.available(all).min(one))
}

fn allowed(device: &Device, request: &JobRequest) -> bool {
    !(device.backend == Backend::Cpu && request.cpu_fallback == CpuFallback::Never)
}

fn filtered(node: &Node, request: &JobRequest) -> Option<NodeReason> {
    if !request
        .node_selector
        .iter()
        .all(|(k, v)| node.labels.get(k) == Some(v))
    {
        return Some(NodeReason::SelectorMismatch);
    }
    let blocks = |effect| matches!(effect, TaintEffect::NoSchedule | TaintEffect::NoExecute);
    if node
        .taints
        .iter()
        .any(|t| blocks(t.effect) && !tolerates(&request.tolerations, t))
    {
        return Some(NodeReason::TaintNotTolerated);
    }
    if node.unschedulable {
        return Some(NodeReason::Unschedulable);
    }
    if node.heartbeat != Heartbeat::Fresh || !node.ready || node.session.is_empty() {
        return Some(NodeReason::NodeNotReady);
    }
    let local = request.model_uri.starts_with("file:");
    (local && !node.models.contains(&request.model_uri) && !node.models_cut)
        .then_some(NodeReason::ModelNotFound)
}

/// The reason when no device was ever measured: the one of the nodes that came farthest.
fn without_memory(request: &JobRequest, rejected: &[(NodeReason, Bytes, Bytes, usize)]) -> Reason {
    let count = |reason| rejected.iter().filter(|(r, ..)| *r == reason).count();
    let nodes = rejected.len();
    let [selector, tainted, cordoned, silent, missing] = [
        NodeReason::SelectorMismatch,
        NodeReason::TaintNotTolerated,
        NodeReason::Unschedulable,
        NodeReason::NodeNotReady,
        NodeReason::ModelNotFound,
    ]
    .map(count);
    let matching = nodes - selector - tainted - cordoned;
    if nodes == 0 {
        Reason::NoNodes
    } else if matching == 0 {
        Reason::NoMatchingNode {
            nodes,
            selector,
            tainted,
            cordoned,
        }
    } else if matching == silent {
        Reason::NodeNotReady { matching }
    } else if matching == silent + missing {
        Reason::ModelNotFound {
            uri: request.model_uri.clone(),
            nodes: missing,
        }
    } else {
        let cpu_refused = request.cpu_fallback == CpuFallback::Never;
        Reason::NoDevice {
            nodes: matching - silent - missing,
            cpu_refused,
        }
    }
}
