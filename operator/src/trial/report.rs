//! What a cluster's nodes have for GoGrid, and what is wrong with them, in words.
//!
//! Owns: which of what pods, events and GpuNodes say is told. Pure. Must not: ask the API server.

use gogrid_api::version::work_together;
use gogrid_api::{ConditionStatus, GpuNode};
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Node, Pod};
use kube::ResourceExt as _;
use std::fmt::Write as _;

/// Reasons of waiting that say nothing.
const ON_THE_WAY: [&str; 2] = ["ContainerCreating", "PodInitializing"];

/// What was found in the cluster.
#[derive(Default)]
pub(super) struct Found {
    pub(super) nodes: Vec<Node>,
    pub(super) gpu_nodes: Vec<GpuNode>,
    /// Pods of the operator and the agents.
    pub(super) pods: Vec<Pod>,
    /// Warnings in GoGrid's namespace.
    pub(super) warnings: Vec<Event>,
}

fn component<'a>(pods: &'a [Pod], name: &'a str) -> impl Iterator<Item = &'a Pod> {
    let of_it = move |pod: &&Pod| {
        pod.labels()
            .get("app.kubernetes.io/component")
            .map(String::as_str)
            == Some(name)
    };
    pods.iter().filter(of_it)
}

impl Found {
    /// One line a node: its devices, and what is wrong; then the operator's pods, those with trouble.
    pub(super) fn report(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            let name = node.name_any();
            // Writing to a String never fails.
            let _ = writeln!(text, "node {name}: {}", self.of_node(&name));
        }
        if self.nodes.is_empty() {
            text += "no nodes\n";
        }
        for trouble in component(&self.pods, "operator").filter_map(|pod| self.of_pod(pod)) {
            text += &trouble;
            text.push('\n');
        }
        text
    }

    fn of_node(&self, name: &str) -> String {
        let here = |pod: &&Pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(name);
        let agents: Vec<&Pod> = component(&self.pods, "agent").filter(here).collect();
        if agents.is_empty() {
            let no_pod = "no agent: see agent.nodeSelector, agent.tolerations and agent.flavours".to_owned();
            let refused = self
                .warnings
                .iter()
                .filter(|w| w.involved_object.kind.as_deref() == Some("DaemonSet"));
            return std::iter::once(no_pod)
                .chain(refused.map(told))
                .collect::<Vec<_>>()
                .join("; ");
        }
        let trouble = agents.into_iter().filter_map(|pod| self.of_pod(pod));
        let gpu_node = self.gpu_nodes.iter().find(|g| g.name_any() == name);
        let gpu_node =
            gpu_node.map_or_else(|| vec!["its agent has not reported yet".to_owned()], of_gpu_node);
        trouble.chain(gpu_node).collect::<Vec<_>>().join(", ")
    }

    /// What keeps a pod from being ready, if it isn't.
    fn of_pod(&self, pod: &Pod) -> Option<String> {
        let status = pod.status.clone().unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        if conditions
            .iter()
            .any(|c| c.type_ == "Ready" && c.status == "True")
        {
            return None;
        }
        let containers = status.container_statuses.unwrap_or_default();
        let unscheduled = conditions
            .iter()
            .filter(|c| c.type_ == "PodScheduled" && c.status == "False");
        let unscheduled = unscheduled.filter_map(|c| c.message.clone());
        let warnings = self.warnings.iter();
        let warnings =
            warnings.filter(|w| w.involved_object.uid.is_some() && w.involved_object.uid == pod.uid());
        let mut why: Vec<String> = containers
            .iter()
            .filter_map(of_container)
            .chain(unscheduled)
            .collect();
        if why.is_empty() {
            why = warnings.map(of_event).collect();
        }
        if why.is_empty() {
            why.push("not ready yet".to_owned());
        }
        Some(format!("pod {}: {}", pod.name_any(), why.join("; ")))
    }
}

fn of_container(container: &ContainerStatus) -> Option<String> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.clone().unwrap_or_default();
    if ON_THE_WAY.contains(&reason.as_str()) {
        return None;
    }
    let ended = container.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    let ended = ended.map(|e| {
        format!(
            "{} with exit code {}",
            e.reason.clone().unwrap_or_default(),
            e.exit_code
        )
    });
    let words = [Some(reason), waiting.message.clone(), ended];
    let words: Vec<String> = words.into_iter().flatten().collect();
    Some(format!("{}: {}", container.name, words.join(": ")))
}

fn of_event(event: &Event) -> String {
    let reason = event.reason.clone().unwrap_or_default();
    format!("{reason}: {}", event.message.clone().unwrap_or_default())
}

/// An event with what it is about and since when it may be over.
fn told(event: &Event) -> String {
    let about = &event.involved_object;
    let [kind, name] = [&about.kind, &about.name].map(|word| word.clone().unwrap_or_default());
    let last = event
        .last_timestamp
        .as_ref()
        .map(|t| format!(" (last at {})", t.0))
        .unwrap_or_default();
    format!("{kind} {name}: {}{last}", of_event(event))
}

/// Conditions that hinder no job on the CPU and name a value to set.
const TOLD: [&str; 2] = ["PodGPUsKnown", "ClockAgrees"];

fn of_gpu_node(gpu_node: &GpuNode) -> Vec<String> {
    let status = gpu_node.status.clone().unwrap_or_default();
    if status.session.is_empty() {
        return vec!["its agent has not reported yet".to_owned()];
    }
    let skew = work_together(env!("CARGO_PKG_VERSION"), &status.agent_version).err();
    let skew = skew.map(|skew| format!("VersionSkew: {skew}; upgrade the older one"));
    let wrong = status
        .conditions
        .iter()
        .filter(|c| {
            let hinders = c.type_ == "Ready" && c.status != ConditionStatus::True;
            hinders || (TOLD.contains(&c.type_.as_str()) && c.status == ConditionStatus::False)
        })
        .map(|c| format!("{}: {}", c.reason, c.message));
    let devices = status.devices.iter().map(|d| {
        let trouble = d.message.as_ref().map(|m| format!(" ({m})")).unwrap_or_default();
        format!("{} {:?}{trouble}", d.name, d.health)
    });
    skew.into_iter().chain(wrong).chain(devices).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn gpu_node(name: &str, mut status: Value) -> GpuNode {
        status["session"] = json!("s");
        if status["agentVersion"].is_null() {
            status["agentVersion"] = json!(env!("CARGO_PKG_VERSION"));
        }
        read(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "GpuNode", "metadata": {"name": name},
            "spec": {"nodeName": name}, "status": status,
        }))
    }

    fn pod(component: &str, node: &str, status: &Value) -> Pod {
        let name = format!("{component}-{node}");
        read(json!({
            "metadata": {"name": name, "uid": name, "labels": {"app.kubernetes.io/component": component}},
            "spec": {"nodeName": node, "containers": []}, "status": status,
        }))
    }

    fn ready() -> Value {
        json!({"conditions": [{"type": "Ready", "status": "True"}]})
    }

    fn warning(kind: &str, name: &str, reason: &str, message: &str) -> Event {
        read(json!({
            "metadata": {}, "involvedObject": {"kind": kind, "name": name, "uid": name}, "reason": reason, "message": message,
        }))
    }

    #[test]
    fn each_node_has_a_line_that_says_what_is_wrong_with_it() {
        let device = json!({
            "uuid": "cpu", "name": "EPYC", "backend": "CPU", "memoryTotal": "1Gi", "memoryReserved": "0", "memoryForeign": "0",
            "memoryFree": "1Gi", "health": "Healthy",
        });
        let condition = |type_: &str, status: &str, reason: &str, message: &str| {
            json!({
                "type": type_, "status": status, "reason": reason, "message": message, "observedGeneration": 1,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            })
        };
        let sick = json!({"conditions": [
            condition("Ready", "False", "NoPool", "the pool is away"),
            condition("DriverReady", "False", "NoDriver", "jobs run on the CPU"),
            condition("PodGPUsKnown", "False", "KubeletUnreadable", "set agent.podResourcesDir"),
            condition("ClockAgrees", "True", "ClockAgrees", "within 30 s"),
        ]});
        let unpulled = json!({"containerStatuses": [{
            "name": "workers", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}},
        }]});
        let crashing = json!({"containerStatuses": [{
            "name": "agent", "image": "", "imageID": "", "ready": false, "restartCount": 3,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"reason": "Error", "exitCode": 2}},
        }]});
        let creating = json!({"containerStatuses": [{
            "name": "agent", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "ContainerCreating"}},
        }]});
        let names = ["bare", "good", "sick", "old", "unpulled", "crashing", "creating"];
        let found = Found {
            nodes: names.map(|name| read(json!({"metadata": {"name": name}}))).into(),
            gpu_nodes: vec![
                gpu_node("good", json!({"devices": [device]})),
                gpu_node("sick", sick),
                gpu_node("old", json!({"agentVersion": "77.0.0"})),
                gpu_node("bare", json!({})),
            ],
            pods: vec![
                pod("agent", "good", &ready()),
                pod("agent", "sick", &ready()),
                pod("agent", "old", &ready()),
                pod("agent", "unpulled", &unpulled),
                pod("agent", "crashing", &crashing),
                pod("agent", "creating", &creating),
                pod("operator", "good", &ready()),
                pod("operator", "refusing", &json!({})),
            ],
            warnings: vec![
                warning(
                    "DaemonSet",
                    "agents",
                    "FailedCreate",
                    "RuntimeClass \"x\" not found",
                ),
                warning(
                    "Pod",
                    "agent-creating",
                    "FailedCreatePodSandBox",
                    "no runtime for \"y\"",
                ),
                warning("Pod", "operator-refusing", "LeadershipRefused", "older CRDs"),
            ],
        };
        let said = found.report();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(
            lines[0],
            "node bare: no agent: see agent.nodeSelector, agent.tolerations and agent.flavours; \
             DaemonSet agents: FailedCreate: RuntimeClass \"x\" not found"
        );
        assert_eq!(lines[1], "node good: EPYC Healthy");
        assert_eq!(
            lines[2],
            "node sick: NoPool: the pool is away, KubeletUnreadable: set agent.podResourcesDir"
        );
        assert!(
            lines[3].starts_with("node old: VersionSkew: its agent has version 77.0.0"),
            "{said}"
        );
        assert!(
            lines[4].starts_with("node unpulled: pod agent-unpulled: workers: ErrImagePull: not found,"),
            "{said}"
        );
        assert!(
            lines[5].contains("agent: CrashLoopBackOff: Error with exit code 2"),
            "{said}"
        );
        assert!(
            lines[6].contains("FailedCreatePodSandBox: no runtime for \"y\""),
            "{said}"
        );
        assert_eq!(
            lines[7..],
            ["pod operator-refusing: LeadershipRefused: older CRDs"]
        );
    }
}
