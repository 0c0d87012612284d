//! What each value is when nobody says.

use super::{
    Admission, Agent, Budget, Crds, FlowSchema, Free, Image, Labelled, Monitoring, NetworkPolicy, Operator,
    PodMonitor, PriorityClass, Rbac, Resources, Values, Workers,
};
use serde_json::json;
use std::collections::BTreeMap;

fn free(value: &serde_json::Value) -> Free {
    value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn image(name: &str) -> Image {
    Image {
        repository: format!("gogrid/{name}"),
        ..Image::default()
    }
}

fn resources(cpu: &str, limit: &str) -> Resources {
    Resources {
        limits: free(&json!({"memory": limit})),
        requests: free(&json!({"cpu": cpu, "memory": "64Mi"})),
    }
}

impl Default for Values {
    fn default() -> Self {
        Self {
            admission: Admission::default(),
            agent: Agent::default(),
            crds: Crds::default(),
            enabled: None,
            extra_objects: vec![],
            flow_schema: FlowSchema::default(),
            fullname_override: String::new(),
            global: super::Global::default(),
            model_roots: vec!["/srv/gogrid/models".into()],
            monitoring: Monitoring::default(),
            name_override: String::new(),
            network_policy: NetworkPolicy::default(),
            operator: Operator::default(),
            priority_class: PriorityClass::default(),
            rbac: Rbac::default(),
            workers: Workers::default(),
        }
    }
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            admin_groups: vec!["system:masters".into(), "kubeadm:cluster-admins".into()],
        }
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            affinity: Free::new(),
            extra_args: vec![],
            flavours: BTreeMap::new(),
            gpu_resources: vec!["nvidia.com/*".into(), "gpu.nvidia.com".into()],
            image: image("agent"),
            max_unavailable: json!(1),
            metrics_port: 9401,
            node_selector: BTreeMap::from([("kubernetes.io/os".into(), "linux".into())]),
            pod_annotations: BTreeMap::new(),
            pod_resources_dir: "/var/lib/kubelet/pod-resources".into(),
            resources: resources("20m", "512Mi"),
            runtime_class_name: String::new(),
            state_dir: "/var/lib/gogrid".into(),
            termination_grace_period_seconds: 60,
            tolerations: vec![free(
                &json!({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}),
            )],
        }
    }
}

impl Default for Crds {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl Default for FlowSchema {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl Default for Monitoring {
    fn default() -> Self {
        Self {
            dashboards: Labelled {
                enabled: false,
                labels: BTreeMap::from([("grafana_dashboard".into(), "1".into())]),
            },
            pod_monitor: PodMonitor::default(),
            prometheus_rule: super::PrometheusRule::default(),
        }
    }
}

impl Default for Labelled {
    fn default() -> Self {
        Monitoring::default().dashboards
    }
}

impl Default for PodMonitor {
    fn default() -> Self {
        Self {
            enabled: false,
            interval: "30s".into(),
            labels: BTreeMap::new(),
        }
    }
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self {
            api_server_cidrs: vec![],
            api_server_ports: vec![443, 6443],
            enabled: true,
            metrics_from: vec![],
        }
    }
}

impl Default for Operator {
    fn default() -> Self {
        Self {
            affinity: Free::new(),
            extra_args: vec![],
            image: image("operator"),
            metrics_port: 9400,
            node_selector: BTreeMap::new(),
            pod_annotations: BTreeMap::new(),
            pod_disruption_budget: Budget::default(),
            priority_class_name: String::new(),
            replicas: 2,
            resources: resources("50m", "512Mi"),
            tolerations: vec![],
        }
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl Default for PriorityClass {
    fn default() -> Self {
        Self {
            create: true,
            name: String::new(),
            value: -100,
        }
    }
}

impl Default for Rbac {
    fn default() -> Self {
        Self { aggregate: true }
    }
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            image: image("worker"),
            resources: resources("50m", "8Gi"),
        }
    }
}

impl Default for Image {
    fn default() -> Self {
        Self {
            digest: String::new(),
            pull_policy: "IfNotPresent",
            repository: "gogrid".into(),
            tag: String::new(),
        }
    }
}
