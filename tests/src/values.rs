//! The chart's values: the one source of `values.yaml`, `values.schema.json` and the page about them.
//!
//! Owns: every key, its default, its bounds and what it means. Must not: say what the templates make of it. The
//! comments below are what admins read.

mod defaults;
mod text;

pub use text::{page, schema, yaml};

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Any object that Kubernetes itself checks.
type Free = BTreeMap<String, Value>;

/// Values of the GoGrid chart.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Values {
    /// Who may repair what otherwise has one writer.
    admission: Admission,
    /// The DaemonSet: one agent a node that lends its devices.
    agent: Agent,
    /// The four CustomResourceDefinitions.
    crds: Crds,
    /// Read by a parent chart's condition; this chart doesn't look at it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "text::boolean")]
    enabled: Option<bool>,
    /// Objects rendered with the release, each as YAML or as a template in a string.
    #[schemars(schema_with = "text::objects_or_templates")]
    extra_objects: Vec<Value>,
    /// Priority and fairness of the lease traffic at the API server.
    flow_schema: FlowSchema,
    /// Replaces the release-derived prefix of object names.
    #[schemars(length(max = 63), regex(pattern = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"))]
    fullname_override: String,
    /// Shared with parent and sibling charts: other keys are theirs.
    global: Global,
    /// Directories on nodes from which `file:` models may be read. Mounted read-only into agents at the same path; a job
    /// that names a file elsewhere is refused.
    #[schemars(
        length(min = 1, max = 16),
        inner(length(max = 1024), regex(pattern = r"^/[^\s:]+$"))
    )]
    model_roots: Vec<String>,
    /// What Prometheus and Grafana find in the cluster. The first two need the Prometheus operator's CRDs.
    monitoring: Monitoring,
    /// Replaces the chart's name in object names.
    #[schemars(length(max = 63), regex(pattern = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"))]
    name_override: String,
    /// Who may talk to whom. It holds only on networks that enforce NetworkPolicies.
    network_policy: NetworkPolicy,
    /// The Deployment that decides where jobs run.
    operator: Operator,
    /// Priority of the agents' pods.
    priority_class: PriorityClass,
    /// Rights of the cluster's users.
    rbac: Rbac,
    /// The container beside each agent in which models run: no token, no root, its own memory limit.
    workers: Workers,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Admission {
    /// Groups that may write Assignments, GpuNodes and the status of jobs and profiles besides GoGrid itself.
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 253)))]
    admin_groups: Vec<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Agent {
    /// Affinity of the pods. Not together with node affinity here and `flavours`.
    affinity: Free,
    /// Further arguments, after the chart's own.
    #[schemars(length(max = 32))]
    extra_args: Vec<String>,
    /// Further kinds of nodes by name, each with a DaemonSet of its own: `cuda: {runtimeClassName: nvidia, workers: {image:
    /// {repository: gogrid/worker-cuda}}}`. A node labelled `gogrid.dev/flavour=<name>` gets that one, every other node
    /// the plain agent. What a flavour doesn't set is as in `agent` and `workers`.
    #[schemars(length(max = 8), extend("propertyNames" = {"pattern": "^[a-z0-9]([-a-z0-9]{0,14}[a-z0-9])?$"}))]
    flavours: BTreeMap<String, Flavour>,
    /// Extended resources, and drivers of resource claims, whose devices are GPUs: one that another pod holds gets no job.
    /// A `*` at the end stands for any ending.
    #[schemars(
        length(min = 1, max = 16),
        inner(length(max = 253), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9./_-]*\*?$"))
    )]
    gpu_resources: Vec<String>,
    image: Image,
    /// How many nodes an upgrade takes at once: a number or a percentage.
    #[schemars(schema_with = "text::count_or_percent")]
    max_unavailable: Value,
    /// Port of /metrics and the probes.
    #[schemars(range(min = 1024, max = 65535))]
    metrics_port: u16,
    /// Which nodes lend their devices. GoGrid is a guest: choose them.
    node_selector: BTreeMap<String, String>,
    pod_annotations: BTreeMap<String, String>,
    /// The kubelet's directory with the socket that says which pods hold GPUs: `pod-resources` beneath its `--root-dir`.
    /// Empty = the kubelet is not asked, and no GPU counts as held.
    #[schemars(length(max = 1024), regex(pattern = r"^(/[^\s:]+)?$"))]
    pod_resources_dir: String,
    resources: Resources,
    /// `nvidia` where the GPU runtime is not the container runtime's default.
    #[schemars(length(max = 63), regex(pattern = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"))]
    runtime_class_name: String,
    /// Directory on the node for downloaded models and what must outlive a restart.
    #[schemars(length(max = 1024), regex(pattern = r"^/[^\s:]+$"))]
    state_dir: String,
    /// How long running work may hand itself back when a pod ends.
    #[schemars(range(min = 10, max = 3600))]
    termination_grace_period_seconds: u32,
    /// GPU nodes are commonly tainted so that only pods which ask for a GPU land there.
    tolerations: Vec<Free>,
}

/// A kind of node that differs from `agent` and `workers`.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Flavour {
    /// Its RuntimeClass.
    #[schemars(length(max = 63), regex(pattern = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"))]
    runtime_class_name: String,
    /// Its tolerations, instead of the agent's.
    tolerations: Vec<Free>,
    /// Its workers.
    workers: FlavourWorkers,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct FlavourWorkers {
    /// Fields set here replace those of `workers.image`.
    image: PartOfImage,
    /// Replaces `workers.resources`.
    resources: Resources,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Crds {
    /// Install and upgrade them with the release. They are kept on uninstall, and every InferenceJob with them.
    enabled: bool,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct FlowSchema {
    /// Keep heartbeats apart from other service accounts' calls, so that a busy API server doesn't stop running jobs.
    enabled: bool,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
struct Global {
    /// Names of pull secrets in the release's namespace.
    image_pull_secrets: Vec<String>,
    /// Registry put before every image repository, without a trailing slash; empty = as the container runtime resolves it.
    #[schemars(regex(pattern = r"^(.*[^/])?$"))]
    image_registry: String,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Monitoring {
    /// ConfigMaps with Grafana dashboards, as Grafana's sidecar finds them.
    dashboards: Labelled,
    /// PodMonitors for the operator and the agents.
    pod_monitor: PodMonitor,
    /// A PrometheusRule with the alerts.
    prometheus_rule: PrometheusRule,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Labelled {
    enabled: bool,
    /// Labels by which they are found.
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PodMonitor {
    enabled: bool,
    /// Between two scrapes. The alerts expect at most 60s.
    #[schemars(regex(pattern = r"^[1-9][0-9]{0,3}(s|m)$"))]
    interval: String,
    /// Labels by which Prometheus finds them.
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PrometheusRule {
    enabled: bool,
    /// Labels by which Prometheus finds it.
    labels: BTreeMap<String, String>,
    /// Put before `<alert>.md` in every alert's runbook_url, with a trailing slash; empty = the path in the repository.
    #[schemars(length(max = 1024), regex(pattern = r"^(https?://\S+/)?$"))]
    runbook_base_url: String,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct NetworkPolicy {
    /// The API server's addresses, for the operator's egress: CIDRs. Empty = any address on `apiServerPorts`.
    #[schemars(length(max = 32), inner(length(min = 4, max = 64)))]
    api_server_cidrs: Vec<String>,
    /// The API server's ports, for the operator's egress: behind the service and on the host.
    #[schemars(length(min = 1, max = 8), inner(range(min = 1, max = 65535)))]
    api_server_ports: Vec<u16>,
    /// Restrict the operator to the API server, and both to being scraped.
    enabled: bool,
    /// Who may scrape metrics: NetworkPolicy peers. Empty = every pod of the cluster.
    #[schemars(length(max = 16))]
    metrics_from: Vec<Free>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Operator {
    affinity: Free,
    /// Further arguments, after the chart's own.
    #[schemars(length(max = 32))]
    extra_args: Vec<String>,
    image: Image,
    /// Port of /metrics and the probes.
    #[schemars(range(min = 1024, max = 65535))]
    metrics_port: u16,
    node_selector: BTreeMap<String, String>,
    pod_annotations: BTreeMap<String, String>,
    pod_disruption_budget: Budget,
    /// Empty = the cluster's default.
    #[schemars(length(max = 63), regex(pattern = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"))]
    priority_class_name: String,
    /// One leads, the others wait for its lease.
    #[schemars(range(min = 1, max = 5))]
    replicas: u8,
    resources: Resources,
    tolerations: Vec<Free>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Budget {
    /// Let a drain take one replica at a time. There is none for a single replica: it would block every drain.
    enabled: bool,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PriorityClass {
    /// Create a class below every ordinary pod that preempts nobody: GoGrid takes what is left over.
    create: bool,
    /// Empty = `<fullname>-guest`; with `create: false`, the class to use.
    #[schemars(
        length(max = 63),
        regex(pattern = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"),
        extend("not" = {"pattern": "^system-"})
    )]
    name: String,
    #[schemars(range(min = -1_000_000_000, max = 0))]
    value: i32,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Rbac {
    /// Add InferenceJob rights to the cluster's own view, edit and admin roles.
    aggregate: bool,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Workers {
    image: Image,
    /// The memory limit bounds the CPU device of every node. CPU time is what a profile says, not a limit here.
    resources: Resources,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Image {
    /// `sha256:…`; wins over the tag.
    #[schemars(regex(pattern = r"^(sha256:[0-9a-f]{64})?$"))]
    digest: String,
    #[schemars(schema_with = "text::pull_policy")]
    pull_policy: &'static str,
    #[schemars(length(min = 1))]
    repository: String,
    /// Empty = the chart's appVersion.
    #[schemars(regex(pattern = r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$"))]
    tag: String,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PartOfImage {
    #[schemars(regex(pattern = r"^(sha256:[0-9a-f]{64})?$"))]
    digest: String,
    repository: String,
    #[schemars(regex(pattern = r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$"))]
    tag: String,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Resources {
    #[serde(skip_serializing_if = "Free::is_empty")]
    limits: Free,
    #[serde(skip_serializing_if = "Free::is_empty")]
    requests: Free,
}
