//! The cluster as last seen.
//!
//! Owns: the newest version of every watched object, and the planner's world built from them. One task owns it.
//! Must not: call the API server or decide anything.

use crate::jobs::{self, Jobs};
use crate::observe::{Change, KINDS, LeaseInfo, NodeInfo, Observation, PriorityInfo};
use crate::validate::canonical;
use gogrid_api::assignment::{Kind, State};
use gogrid_api::effective::NamedProfile;
use gogrid_api::job::{Stage, conditions};
use gogrid_api::node::Health;
use gogrid_api::version::work_together;
use gogrid_api::{
    Assignment, ByteQuantity, Bytes, ConditionStatus, GpuNode, GpuNodeStatus, InferenceJob, Millis,
    ResourceProfile, condition, names,
};
use gogrid_planner::liveness::Liveness;
use gogrid_planner::{Device, Heartbeat, Node, World, WorldError};
use kube::{Resource, ResourceExt as _};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Models that a GpuNode can list.
const MODELS_LISTED: usize = 64;
/// Deleted objects remembered, so that a late answer can't bring one back.
const REMEMBERED: usize = 4096;

/// Device memory promised to one (job uid, epoch).
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) node: String,
    pub(crate) stages: Vec<Stage>,
}

/// The newest version of everything.
pub(crate) struct Store {
    pub(crate) jobs: Jobs,
    pub(crate) assignments: BTreeMap<String, Assignment>,
    pub(crate) gpu_nodes: BTreeMap<String, GpuNode>,
    pub(crate) profiles: BTreeMap<String, ResourceProfile>,
    pub(crate) nodes: BTreeMap<String, NodeInfo>,
    pub(crate) leases: BTreeMap<String, LeaseInfo>,
    pub(crate) priorities: BTreeMap<String, i32>,
    pub(crate) liveness: Liveness,
    /// The last epoch of each job whose order an agent was seen to have taken up.
    claimed: BTreeMap<String, i64>,
    listed: BTreeSet<&'static str>,
    gone: BTreeSet<String>,
    gone_order: VecDeque<String>,
}

fn uid<K: Resource>(object: &K) -> String {
    object.meta().uid.clone().unwrap_or_default()
}

/// Whether `new` is not older than `old`.
fn not_older<K: Resource>(old: &K, new: &K) -> bool {
    let version = |k: &K| {
        k.meta()
            .resource_version
            .as_ref()
            .and_then(|v| v.parse::<u64>().ok())
    };
    match (version(old), version(new)) {
        (Some(old_version), Some(new_version)) => new_version >= old_version || uid(old) != uid(new),
        _ => true,
    }
}

/// Drops what is read anew when it is wanted: answers, which may be many in all.
fn lighten(mut assignment: Assignment) -> Assignment {
    assignment.metadata.managed_fields = None;
    let checkpoint = assignment.status.as_mut().and_then(|s| s.checkpoint.as_mut());
    if let Some(checkpoint) = checkpoint {
        checkpoint.text = None;
    }
    assignment
}

impl Store {
    pub(crate) fn new(liveness: Liveness) -> Self {
        Self {
            jobs: Jobs::default(),
            assignments: BTreeMap::new(),
            gpu_nodes: BTreeMap::new(),
            profiles: BTreeMap::new(),
            nodes: BTreeMap::new(),
            leases: BTreeMap::new(),
            priorities: BTreeMap::new(),
            liveness,
            claimed: BTreeMap::new(),
            listed: BTreeSet::new(),
            gone: BTreeSet::new(),
            gone_order: VecDeque::new(),
        }
    }

    /// Whether every watch has brought its first list.
    pub(crate) fn synced(&self) -> bool {
        self.listed.len() == KINDS
    }

    /// Takes a change; returns whether jobs should be looked at because of it.
    pub(crate) fn apply(&mut self, now: Millis, observation: Observation) -> bool {
        match observation {
            Observation::Job(change) => self.take_jobs(change),
            Observation::Assignment(change) => self.take_assignments(change),
            Observation::GpuNode(change) => {
                take(
                    &mut self.gpu_nodes,
                    &mut self.listed,
                    "GpuNode",
                    change,
                    kube::ResourceExt::name_any,
                );
            }
            Observation::Profile(change) => {
                take(
                    &mut self.profiles,
                    &mut self.listed,
                    "ResourceProfile",
                    change,
                    kube::ResourceExt::name_any,
                );
            }
            Observation::Node(change) => take(
                &mut self.nodes,
                &mut self.listed,
                "Node",
                change,
                |n: &NodeInfo| n.name.clone(),
            ),
            Observation::Priority(change) => {
                let key = |p: &PriorityInfo| p.name.clone();
                let mut map: BTreeMap<String, PriorityInfo> = std::mem::take(&mut self.priorities)
                    .into_iter()
                    .map(|(name, value)| (name.clone(), PriorityInfo { name, value }))
                    .collect();
                take(&mut map, &mut self.listed, "PriorityClass", change, key);
                self.priorities = map.into_iter().map(|(name, p)| (name, p.value)).collect();
            }
            Observation::Lease(change) => {
                self.take_lease(now, change);
                return false;
            }
        }
        true
    }

    fn take_lease(&mut self, now: Millis, change: Change<LeaseInfo>) {
        match &change {
            Change::Listed(all) => {
                self.liveness.blind(now);
                for lease in all {
                    self.liveness.listed(now, &lease.name, &lease.mark);
                }
                let kept: BTreeSet<_> = all.iter().map(|l| &l.name).collect();
                for name in self.leases.keys().filter(|name| !kept.contains(name)) {
                    self.liveness.removed(name);
                }
            }
            Change::Changed(lease) => self.liveness.changed(now, &lease.name, &lease.mark),
            Change::Gone(lease) => self.liveness.removed(&lease.name),
            Change::Blind => self.liveness.blind(now),
        }
        take(
            &mut self.leases,
            &mut self.listed,
            "Lease",
            change,
            |l: &LeaseInfo| l.name.clone(),
        );
    }

    fn take_jobs(&mut self, change: Change<InferenceJob>) {
        match change {
            Change::Changed(job) => self.put_job(*job),
            Change::Gone(job) => self.drop_job(&uid(&*job)),
            Change::Listed(all) => {
                self.jobs.replace(all.into_iter().map(|job| (uid(&job), job)));
                self.listed.insert("InferenceJob");
            }
            Change::Blind => {}
        }
    }

    fn take_assignments(&mut self, change: Change<Assignment>) {
        match change {
            Change::Changed(assignment) => self.put_assignment(*assignment),
            Change::Gone(assignment) => self.drop_assignment(&assignment.name_any(), &uid(&*assignment)),
            Change::Listed(all) => {
                for assignment in &all {
                    self.note_claim(assignment);
                }
                let light = all.into_iter().map(lighten);
                self.assignments = light.map(|a| (a.name_any(), a)).collect();
                self.listed.insert("Assignment");
            }
            Change::Blind => {}
        }
    }

    /// Takes a job as a watch or a write brought it, unless a newer version is known.
    pub(crate) fn put_job(&mut self, mut job: InferenceJob) {
        job.metadata.managed_fields = None;
        let key = uid(&job);
        if !self.gone.contains(&key) && self.jobs.get(&key).is_none_or(|old| not_older(old, &job)) {
            if jobs::over(&job) {
                self.claimed.remove(&key);
            }
            self.jobs.insert(key, job);
        }
    }

    fn note_claim(&mut self, assignment: &Assignment) {
        let taken_up = assignment.status.as_ref().is_some_and(|s| s.state.is_some());
        let job = &assignment.spec.job.uid;
        if taken_up && assignment.spec.kind == Kind::Run && self.jobs.get(job).is_some_and(|j| !jobs::over(j))
        {
            let epoch = self.claimed.entry(job.clone()).or_default();
            *epoch = assignment.spec.epoch.max(*epoch);
        }
    }

    /// Whether an agent was seen to have taken up the order of that epoch.
    pub(crate) fn claimed(&self, job_uid: &str, epoch: i64) -> bool {
        self.claimed.get(job_uid) == Some(&epoch)
    }

    /// Takes an assignment as a watch or a write brought it, unless a newer version is known.
    pub(crate) fn put_assignment(&mut self, assignment: Assignment) {
        let assignment = lighten(assignment);
        self.note_claim(&assignment);
        let key = assignment.name_any();
        if !self.gone.contains(&uid(&assignment))
            && self
                .assignments
                .get(&key)
                .is_none_or(|old| not_older(old, &assignment))
        {
            self.assignments.insert(key, assignment);
        }
    }

    /// Takes all assignments as they were just read: what was not found is gone.
    pub(crate) fn reread_assignments(&mut self, all: Vec<Assignment>) {
        let there: BTreeSet<String> = all.iter().map(kube::ResourceExt::name_any).collect();
        self.assignments.retain(|name, _| there.contains(name));
        for assignment in all {
            self.put_assignment(assignment);
        }
    }

    pub(crate) fn drop_job(&mut self, job_uid: &str) {
        self.jobs.remove(job_uid);
        self.claimed.remove(job_uid);
        self.remember_gone(job_uid);
    }

    pub(crate) fn drop_assignment(&mut self, name: &str, assignment_uid: &str) {
        if self
            .assignments
            .get(name)
            .is_some_and(|a| uid(a) == assignment_uid)
        {
            self.assignments.remove(name);
        }
        self.remember_gone(assignment_uid);
    }

    fn remember_gone(&mut self, key: &str) {
        if self.gone.insert(key.to_owned()) {
            self.gone_order.push_back(key.to_owned());
        }
        if self.gone_order.len() > REMEMBERED
            && let Some(oldest) = self.gone_order.pop_front()
        {
            self.gone.remove(&oldest);
        }
    }

    /// Assignments by job uid.
    pub(crate) fn by_job(&self) -> BTreeMap<&str, Vec<&Assignment>> {
        let mut by_job: BTreeMap<&str, Vec<&Assignment>> = BTreeMap::new();
        for assignment in self.assignments.values() {
            by_job
                .entry(&assignment.spec.job.uid)
                .or_default()
                .push(assignment);
        }
        by_job
    }

    /// What is known of a node's heartbeat, and the session that holds its Lease.
    pub(crate) fn heartbeat(&self, now: Millis, node: &str) -> (Heartbeat, Option<String>) {
        let lease = names::node_lease(node);
        let session = self
            .leases
            .get(&lease)
            .and_then(|l| l.holder.clone())
            .filter(|h| !h.is_empty());
        (self.liveness.judge(now, &lease), session)
    }

    /// Profiles as deciders take them.
    pub(crate) fn named_profiles(&self) -> Vec<NamedProfile> {
        let named = |(name, p): (&String, &ResourceProfile)| NamedProfile {
            name: name.clone(),
            generation: p.metadata.generation.unwrap_or(0),
            spec: p.spec.clone(),
        };
        self.profiles.iter().map(named).collect()
    }

    /// Everything promised: assignments that are not over, placements whose assignment is yet to be made, and
    /// `pending` ones whose write is on its way.
    fn claims(&self, pending: &BTreeMap<String, Claim>) -> Vec<Claim> {
        let mut claims: BTreeMap<(String, i64), Claim> = BTreeMap::new();
        for (job_uid, job) in self.jobs.live() {
            let Some(status) = &job.status else { continue };
            let held = condition::is_true(&status.conditions, conditions::PLACED);
            if let Some(p) = status.placement.as_ref().filter(|_| held) {
                claims.insert(
                    (job_uid.clone(), status.epoch),
                    Claim {
                        node: p.node_name.clone(),
                        stages: p.stages.clone(),
                    },
                );
            }
        }
        for a in self.assignments.values().filter(|a| a.spec.kind == Kind::Run) {
            let key = (a.spec.job.uid.clone(), a.spec.epoch);
            let over = a
                .status
                .as_ref()
                .and_then(|s| s.state)
                .is_some_and(State::is_over);
            // A node's new session begins only when nothing of the old one is left.
            let holder = self.leases.get(&names::node_lease(&a.spec.node_name));
            let holder = holder.and_then(|l| l.holder.as_ref()).filter(|h| !h.is_empty());
            if over || holder.is_some_and(|h| *h != a.spec.session) {
                claims.remove(&key);
            } else {
                claims.insert(
                    key,
                    Claim {
                        node: a.spec.node_name.clone(),
                        stages: a.spec.stages.clone(),
                    },
                );
            }
        }
        for (job_uid, claim) in pending {
            claims.insert((job_uid.clone(), i64::MAX), claim.clone());
        }
        claims.into_values().collect()
    }

    /// The planner's world, for an operator of that version.
    pub(crate) fn world(
        &self,
        now: Millis,
        version: &str,
        pending: &BTreeMap<String, Claim>,
    ) -> Result<World, WorldError> {
        let nodes = self.gpu_nodes.values();
        let nodes = nodes.map(|g| self.node(now, version, g)).collect();
        let mut world = World::new(nodes, self.named_profiles())?;
        for claim in self.claims(pending) {
            for stage in &claim.stages {
                world.promise(&claim.node, &stage.gpu_uuid, bytes(&stage.vram));
            }
        }
        Ok(world)
    }

    fn node(&self, now: Millis, version: &str, gpu_node: &GpuNode) -> Node {
        let name = gpu_node.spec.node_name.clone();
        let (heartbeat, session) = self.heartbeat(now, &name);
        let session = session.unwrap_or_default();
        let none = GpuNodeStatus::default();
        let status = gpu_node.status.as_ref().unwrap_or(&none);
        let unready =
            condition::find(&status.conditions, "Ready").is_some_and(|c| c.status != ConditionStatus::True);
        let kube_node = self.nodes.get(&name);
        let device = |d: &gogrid_api::node::Device| Device {
            uuid: d.uuid.clone(),
            backend: d.backend,
            total: bytes(&d.memory_total),
            reserved: bytes(&d.memory_reserved),
            foreign: bytes(&d.memory_foreign),
            used: Bytes(0),
            jobs: 0,
            healthy: d.health == Health::Healthy,
            holder: d.holder.clone(),
        };
        Node {
            labels: kube_node.map(|n| n.labels.clone()).unwrap_or_default(),
            taints: kube_node.map(|n| n.taints.clone()).unwrap_or_default(),
            unschedulable: kube_node.is_some_and(|n| n.unschedulable),
            heartbeat,
            ready: !unready && kube_node.is_some() && status.session == session,
            skew: work_together(version, &status.agent_version)
                .err()
                .map(|skew| skew.to_string()),
            session,
            devices: status.devices.iter().map(device).collect(),
            models: status.models.iter().map(|m| canonical(&m.uri)).collect(),
            models_cut: status.models.len() >= MODELS_LISTED,
            name,
        }
    }
}

/// Bytes of a stored quantity; one that can't be read counts as more than any device has.
pub(crate) fn bytes(quantity: &ByteQuantity) -> Bytes {
    quantity.bytes().unwrap_or(Bytes(u64::MAX))
}

fn take<T>(
    map: &mut BTreeMap<String, T>,
    listed: &mut BTreeSet<&'static str>,
    kind: &'static str,
    change: Change<T>,
    key: fn(&T) -> String,
) {
    match change {
        Change::Listed(all) => {
            *map = all.into_iter().map(|o| (key(&o), o)).collect();
            listed.insert(kind);
        }
        Change::Changed(object) => {
            map.insert(key(&object), *object);
        }
        Change::Gone(object) => {
            map.remove(&key(&object));
        }
        Change::Blind => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gogrid_api::LeaseTiming;
    use serde_json::{Value, json};

    fn assignment(version: u32, status: &Value) -> Assignment {
        serde_json::from_value(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "Assignment",
            "metadata": {"name": "u-1", "uid": "a", "resourceVersion": version.to_string()},
            "spec": {
                "kind": "Run", "job": {"namespace": "n", "name": "j", "uid": "u"}, "epoch": 1, "term": 1, "nodeName": "a",
                "session": "s", "model": {"uri": "file:/m/a", "sha256": "0"}, "contextTokens": 16, "parallelSequences": 1,
            },
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn no_answers_are_kept_but_which_lines_have_one_is() {
        let mut store = Store::new(Liveness::new(LeaseTiming::default(), Millis(0)));
        let status = json!({"state": "Succeeded",
            "checkpoint": {"chunks": 2, "text": "{}\n", "lines": [{"first": 1, "last": 3}], "failed": 1, "bytes": 9}});
        let kept = |store: &Store| {
            let status = store.assignments["u-1"].status.clone().unwrap();
            let checkpoint = status.checkpoint.unwrap();
            assert_eq!(
                (checkpoint.chunks, checkpoint.failed, checkpoint.lines.len()),
                (2, 1, 1)
            );
            checkpoint.text
        };
        store.put_assignment(assignment(1, &status));
        assert_eq!(kept(&store), None);
        let listed = Change::Listed(vec![assignment(2, &status)]);
        store.apply(Millis(0), Observation::Assignment(listed));
        assert_eq!(kept(&store), None);
    }

    #[test]
    fn an_order_that_was_taken_up_is_remembered_although_it_is_gone_until_its_job_is() {
        let mut store = Store::new(Liveness::new(LeaseTiming::default(), Millis(0)));
        let job = json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob", "metadata": {"name": "j", "namespace": "n", "uid": "u"},
            "spec": {"model": {"uri": "file:/m/a", "sha256": "0"}, "input": {"inline": ["{}"]}, "output": {"configMap": "o"}},
        });
        store.put_job(serde_json::from_value(job).unwrap());
        store.put_assignment(assignment(1, &Value::Null));
        assert!(!store.claimed("u", 1));
        store.put_assignment(assignment(2, &json!({"state": "Claimed"})));
        store.drop_assignment("u-1", "a");
        assert!(store.claimed("u", 1) && !store.claimed("u", 2));
        store.drop_job("u");
        assert!(!store.claimed("u", 1));
    }
}
