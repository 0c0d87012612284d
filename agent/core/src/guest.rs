//! GoGrid is a guest: which GPUs other pods hold, as the node's kubelet says it.
//!
//! Owns: reading the kubelet's device ids as devices of the driver, what its silence means, which devices and jobs that
//! concerns, and the node's condition about it. Must not ask the kubelet.

use crate::driver::View;
use crate::results::clip;
use crate::session::{Nanos, nanos};
use gogrid_api::job::Failure;
use gogrid_api::node::{Backend, Device, Health};
use gogrid_api::{ConditionStatus, Millis};
use std::collections::BTreeMap;

/// Reason of a job that left its device because the kubelet gave that to a pod.
pub const DEVICE_CLAIMED: &str = "DeviceClaimed";
/// Resources whose devices are GPUs, where nobody says.
pub const GPU_RESOURCES: [&str; 2] = ["nvidia.com/*", "gpu.nvidia.com"];
/// Longest list of all pods' devices that is taken, in bytes.
pub const MAX_LIST_BYTES: usize = 4 << 20;
/// How long the kubelet may take to answer.
pub const ANSWER: Millis = Millis(2_000);
/// A kubelet that was heard may be silent for so long before the node says so: it may be restarting.
const SILENT_AFTER: Millis = Millis(10_000);
/// Longest `namespace/name` of a pod.
const HOLDER: usize = 320;

/// How long to wait before the kubelet is asked again, after that many failures in a row.
pub fn pause(failures: u32) -> Millis {
    Millis(match failures {
        0 | 1 => 1_000,
        2 => 2_000,
        _ => 4_000,
    })
}

/// A device that the kubelet has given to a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Allocated {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Extended resource, or the driver of a resource claim.
    pub resource: String,
    /// The device as plugin or driver call it.
    pub id: String,
}

/// Which resources are GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuResources(Vec<String>);

/// A name of resources that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no resource: give a name such as nvidia.com/gpu, or a beginning and one * at its end")]
pub struct ResourceNameError(String);

impl GpuResources {
    /// From names, each whole or with a `*` at the end.
    ///
    /// # Errors
    /// A name is empty, or has its `*` elsewhere.
    pub fn new(names: Vec<String>) -> Result<Self, ResourceNameError> {
        for name in &names {
            let beginning = name.strip_suffix('*').unwrap_or(name);
            if beginning.is_empty() || beginning.contains('*') {
                return Err(ResourceNameError(name.clone()));
            }
        }
        Ok(Self(names))
    }

    fn has(&self, resource: &str) -> bool {
        self.0.iter().any(|name| match name.strip_suffix('*') {
            Some(beginning) => resource.starts_with(beginning),
            None => name == resource,
        })
    }
}

/// What a device id names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Named<'a> {
    /// One device by its UUID.
    Uuid(&'a str),
    /// A GPU by its index, with all its parts or with one of them.
    Index(u32, Option<u32>),
    /// It can't be read: it may be any.
    Any,
}

/// Reads an id: NVIDIA's plugin says `GPU-…` or `MIG-…`, with `::n` for a time slice; others say `0`, `0:1`, `nvidia0`,
/// `nvidia0/gi1` or, for a resource claim, `gpu-0` and `gpu-0-mig-…`.
fn named(id: &str) -> Named<'_> {
    let id = id.split_once("::").map_or(id, |(id, _slice)| id);
    if id.starts_with("GPU-") || id.starts_with("MIG-") {
        return Named::Uuid(id);
    }
    let number = id
        .strip_prefix("nvidia")
        .or_else(|| id.strip_prefix("gpu-"))
        .unwrap_or(id);
    if let Some((gpu, part)) = number.split_once(':') {
        return match (gpu.parse(), part.parse()) {
            (Ok(gpu), Ok(part)) => Named::Index(gpu, Some(part)),
            _ => Named::Any,
        };
    }
    let gpu = number.split(['/', '-']).next().unwrap_or_default();
    gpu.parse().map_or(Named::Any, |gpu| Named::Index(gpu, None))
}

/// The pod that holds a device, and as what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// `namespace/name`.
    pub pod: String,
    /// The resource it asked for.
    pub resource: String,
}

/// What is known of the GPUs that other pods hold.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Whether there is a kubelet to ask.
    asked: bool,
    own: Option<(String, String)>,
    resources: GpuResources,
    /// What the kubelet said last.
    held: Option<Vec<Allocated>>,
    /// Since when it is silent, and why.
    silent: Option<(Nanos, String)>,
}

impl Guest {
    /// Nothing heard yet. `own` is this agent's own pod, namespace and name.
    pub fn new(asked: bool, own: Option<(String, String)>, resources: GpuResources) -> Self {
        Self {
            asked,
            own,
            resources,
            held: None,
            silent: None,
        }
    }

    /// The kubelet's answer. Returns whether anything is different now.
    pub fn heard(&mut self, answer: Result<Vec<Allocated>, String>, now: Nanos) -> bool {
        match answer {
            Ok(mut all) => {
                let own = |a: &Allocated| {
                    self.own
                        .as_ref()
                        .is_some_and(|(namespace, pod)| (&a.namespace, &a.pod) == (namespace, pod))
                };
                all.retain(|a| self.resources.has(&a.resource) && !own(a));
                all.sort();
                let spoke = self.silent.take().is_some();
                let changed = self.held.as_ref() != Some(&all);
                self.held = Some(all);
                spoke || changed
            }
            Err(why) => {
                let first = self.silent.is_none();
                let since = self.silent.as_ref().map_or(now, |(since, _)| *since);
                self.silent = Some((since, clip(&why, 400).to_owned()));
                first
            }
        }
    }

    /// Whether it is settled by now what is known: true as soon as the first question was answered or not.
    pub fn settled(&self) -> bool {
        !self.asked || self.held.is_some() || self.silent.is_some()
    }

    /// The driver's devices that other pods hold, by UUID.
    pub fn holders(&self, view: &View) -> BTreeMap<String, Holder> {
        let mut holders = BTreeMap::new();
        for allocated in self.held.iter().flatten() {
            let concerns = |uuid: &str| {
                let place = view.places.get(uuid);
                match named(&allocated.id) {
                    Named::Uuid(id) => id == uuid,
                    Named::Index(gpu, None) => place.is_some_and(|(index, _)| *index == gpu),
                    Named::Index(gpu, part) => place == Some(&(gpu, part)),
                    Named::Any => true,
                }
            };
            for device in view.devices.iter().filter(|d| concerns(&d.uuid)) {
                // Where several share it, the first by name stands for all: the text must not change without cause.
                holders.entry(device.uuid.clone()).or_insert_with(|| Holder {
                    pod: clip(&format!("{}/{}", allocated.namespace, allocated.pod), HOLDER).to_owned(),
                    resource: allocated.resource.clone(),
                });
            }
        }
        holders
    }

    /// The driver's devices as they may be used: those of others not at all, and none before it is known which those are.
    pub fn lent(&self, view: &View) -> Vec<Device> {
        let holders = self.holders(view);
        let unknown = self.asked && self.held.is_none();
        let mut devices = view.devices.clone();
        for device in devices
            .iter_mut()
            .filter(|d| d.backend != Backend::Cpu && d.health == Health::Healthy)
        {
            if unknown {
                device.health = Health::Unhealthy;
                device.message =
                    Some("which pods hold GPUs is not known: see the condition PodGPUsKnown".to_owned());
            } else if let Some(holder) = holders.get(&device.uuid) {
                device.health = Health::Unhealthy;
                device.message = Some(clip(&format!("pod {} holds it", holder.pod), 256).to_owned());
                device.holder = Some(holder.pod.clone());
            }
        }
        devices
    }

    /// The condition `PodGPUsKnown` of the node: status, reason and message.
    pub fn condition(&self, now: Nanos) -> (ConditionStatus, &'static str, String) {
        if !self.asked {
            let message = "the kubelet is not asked which pods hold GPUs, so no GPU counts as held: set \
                           agent.podResourcesDir, by default /var/lib/kubelet/pod-resources (flag --pod-resources-socket)";
            return (ConditionStatus::Unknown, "KubeletNotAsked", message.to_owned());
        }
        match (&self.held, &self.silent) {
            (None, None) => (
                ConditionStatus::Unknown,
                "KubeletNotAskedYet",
                "the kubelet is asked for the first time".to_owned(),
            ),
            (None, Some((_, why))) => (
                ConditionStatus::False,
                "KubeletUnreadable",
                format!(
                    "the kubelet does not say which pods hold GPUs ({why}), so none of this node's is used: set \
                     agent.podResourcesDir to the directory pod-resources beneath the kubelet's --root-dir, or to \"\" \
                     on nodes where no pod is ever given a GPU"
                ),
            ),
            (Some(_), Some((since, why))) if now >= since.saturating_add(nanos(SILENT_AFTER)) => (
                ConditionStatus::Unknown,
                "KubeletSilent",
                format!(
                    "the kubelet does not answer any more which pods hold GPUs ({why}): what it said last goes on to \
                     hold, as a kubelet that is down gives nothing away; if the node is Ready, look whether \
                     agent.podResourcesDir still is the kubelet's"
                ),
            ),
            (Some(_), _) => (
                ConditionStatus::True,
                "KubeletAnswers",
                "the kubelet says which pods hold GPUs".to_owned(),
            ),
        }
    }
}

/// The failure of whatever is on that device although a pod holds it.
pub fn claim(device: &str, holder: &Holder) -> Failure {
    Failure {
        reason: DEVICE_CLAIMED.to_owned(),
        message: format!(
            "the kubelet gave device {device} to pod {} as {}: GoGrid is a guest there and leaves",
            holder.pod, holder.resource
        ),
        retryable: true,
    }
}

/// The jobs that must leave their devices, and why: `jobs` are names and devices of all that have one.
pub fn claimed<'a>(
    holders: &BTreeMap<String, Holder>,
    jobs: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> BTreeMap<String, Failure> {
    jobs.into_iter()
        .filter_map(|(name, device)| Some((name.to_owned(), claim(device, holders.get(device)?))))
        .collect()
}

/// Devices that pods hold and that the node's written status still offers: a job that is handed back now would be placed
/// there once more.
pub fn unsaid(holders: &BTreeMap<String, Holder>, written: &[Device]) -> Vec<String> {
    written
        .iter()
        .filter(|device| device.health == Health::Healthy && holders.contains_key(&device.uuid))
        .map(|device| device.uuid.clone())
        .collect()
}

#[cfg(test)]
mod tests;
