//! The table itself.

use super::{Grant, Place};

const GOGRID: &str = "gogrid.dev";
const LEASES: &str = "coordination.k8s.io";
/// The recorded run of operator and agents.
pub const OBSERVED: (&str, &str) = (
    "tests/tests/observed/main.rs",
    "induced_faults_fire_and_clear_their_alerts_and_the_run_uses_every_right",
);
/// The chart's own test on real nodes.
pub const HELM_TEST: (&str, &str) = (
    "tests/tests/nodes/install.rs",
    "helm_test_runs_a_real_job_and_prints_every_nodes_devices",
);

macro_rules! grant {
    ($account:literal, $place:ident, $group:expr, $resource:literal, [$($verb:literal),+], $code:expr, $test:expr, $why:literal) => {
        Grant { account: $account, place: Place::$place, group: $group, resource: $resource, verbs: &[$($verb),+],
            code: $code, test: $test, why: $why }
    };
}

const OBSERVE: (&str, &str) = ("operator/src/observe.rs", "start");

/// All of them.
pub const GRANTS: &[Grant] = &[
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "inferencejobs",
        ["list", "watch"],
        OBSERVE,
        OBSERVED,
        "sees jobs"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "inferencejobs",
        ["get"],
        ("operator/src/apply.rs", "ensure_gone"),
        OBSERVED,
        "makes sure that a job is gone before its things are deleted"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "inferencejobs",
        ["delete"],
        ("operator/src/apply.rs", "run"),
        OBSERVED,
        "deletes a finished job when its time to live is over"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "inferencejobs/status",
        ["patch"],
        ("operator/src/apply.rs", "write_status"),
        OBSERVED,
        "writes what became of a job; tries the fence rules in a dry run"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "resourceprofiles",
        ["list", "watch"],
        OBSERVE,
        OBSERVED,
        "sees profiles"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "resourceprofiles",
        ["get", "create"],
        ("operator/src/apply.rs", "create_absent_profiles"),
        OBSERVED,
        "creates presets that are absent"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "resourceprofiles/status",
        ["patch"],
        ("operator/src/apply.rs", "write_profile"),
        OBSERVED,
        "says where a profile is in force"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "gpunodes",
        ["list", "watch"],
        OBSERVE,
        OBSERVED,
        "sees devices and models"
    ),
    grant!(
        "operator",
        Everywhere,
        "",
        "nodes",
        ["list", "watch"],
        OBSERVE,
        OBSERVED,
        "sees labels, taints and cordons"
    ),
    grant!(
        "operator",
        Everywhere,
        "scheduling.k8s.io",
        "priorityclasses",
        ["list", "watch"],
        OBSERVE,
        OBSERVED,
        "sees priorities"
    ),
    grant!(
        "operator",
        Everywhere,
        "",
        "configmaps",
        ["get"],
        ("operator/src/apply.rs", "stage"),
        OBSERVED,
        "reads an input by the name in the job"
    ),
    grant!(
        "operator",
        Everywhere,
        "",
        "configmaps",
        ["create"],
        ("operator/src/publish.rs", "publish"),
        OBSERVED,
        "stages inputs; publishes a result"
    ),
    grant!(
        "operator",
        Everywhere,
        "",
        "configmaps",
        ["patch"],
        ("operator/src/publish.rs", "overwrite"),
        OBSERVED,
        "replaces a staged input or a result whose text has changed"
    ),
    grant!(
        "operator",
        Everywhere,
        "events.k8s.io",
        "events",
        ["create"],
        ("operator/src/apply.rs", "write_status"),
        OBSERVED,
        "tells people"
    ),
    grant!(
        "operator",
        Everywhere,
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        ["get"],
        ("operator/src/probe.rs", "crds"),
        OBSERVED,
        "refuses to lead on CRDs that are older than it"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["list", "watch"],
        OBSERVE,
        OBSERVED,
        "sees how orders go"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["create"],
        ("operator/src/apply.rs", "create"),
        OBSERVED,
        "orders a run or a look at a model"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["get"],
        ("operator/src/apply.rs", "run"),
        OBSERVED,
        "looks for an order that seems lost, or at one that is there already: the answer to its creation was lost"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["patch"],
        ("operator/src/apply.rs", "stop"),
        OBSERVED,
        "stops a run"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["delete"],
        ("operator/src/apply.rs", "run"),
        OBSERVED,
        "cleans up after a job"
    ),
    grant!(
        "operator",
        Own,
        "",
        "configmaps",
        ["list", "delete"],
        ("operator/src/apply.rs", "delete_inputs"),
        OBSERVED,
        "deletes staged inputs"
    ),
    grant!(
        "operator",
        Own,
        LEASES,
        "leases",
        ["list", "watch"],
        OBSERVE,
        OBSERVED,
        "sees heartbeats"
    ),
    grant!(
        "operator",
        Own,
        LEASES,
        "leases",
        ["get"],
        ("operator/src/apply.rs", "ensure_silent"),
        OBSERVED,
        "looks once more whether a node is silent before its job is placed elsewhere"
    ),
    grant!(
        "operator",
        Leader,
        LEASES,
        "leases",
        ["get", "update"],
        ("operator/src/leader.rs", "turn"),
        OBSERVED,
        "holds the leader Lease"
    ),
    grant!(
        "operator",
        Leader,
        LEASES,
        "leases",
        ["create"],
        ("operator/src/leader.rs", "turn"),
        OBSERVED,
        "makes the leader Lease"
    ),
    grant!(
        "agent",
        Everywhere,
        GOGRID,
        "gpunodes",
        ["list", "watch"],
        ("agent/src/watch.rs", "gpu_node"),
        OBSERVED,
        "notices when its GpuNode is gone"
    ),
    grant!(
        "agent",
        Everywhere,
        GOGRID,
        "gpunodes",
        ["create", "patch"],
        ("agent/src/api.rs", "ensure_gpu_node"),
        OBSERVED,
        "makes its GpuNode"
    ),
    grant!(
        "agent",
        Everywhere,
        GOGRID,
        "gpunodes/status",
        ["patch"],
        ("agent/src/api.rs", "gpu_node_status"),
        OBSERVED,
        "says what its node has"
    ),
    grant!(
        "agent",
        Everywhere,
        GOGRID,
        "resourceprofiles",
        ["list", "watch"],
        ("agent/src/watch.rs", "profiles"),
        OBSERVED,
        "enforces profiles"
    ),
    grant!(
        "agent",
        Everywhere,
        "",
        "nodes",
        ["get"],
        ("agent/src/api.rs", "node_owner"),
        OBSERVED,
        "ties its GpuNode and its Lease to the Node"
    ),
    grant!(
        "agent",
        Everywhere,
        "",
        "nodes",
        ["list", "watch"],
        ("agent/src/watch.rs", "node"),
        OBSERVED,
        "sees its Node's labels"
    ),
    grant!(
        "agent",
        Own,
        LEASES,
        "leases",
        ["get", "create", "update"],
        ("agent/src/lease.rs", "renew"),
        OBSERVED,
        "holds its node's Lease"
    ),
    grant!(
        "agent",
        Own,
        GOGRID,
        "assignments",
        ["list", "watch"],
        ("agent/src/watch.rs", "assignments"),
        OBSERVED,
        "sees its orders"
    ),
    grant!(
        "agent",
        Own,
        GOGRID,
        "assignments",
        ["get"],
        ("agent/src/api.rs", "status"),
        OBSERVED,
        "looks at an order whose version has moved on, or that it has not seen during an outage"
    ),
    grant!(
        "agent",
        Own,
        GOGRID,
        "assignments/status",
        ["patch"],
        ("agent/src/api.rs", "apply_status"),
        OBSERVED,
        "says how an order goes"
    ),
    grant!(
        "agent",
        Own,
        "",
        "configmaps",
        ["get"],
        ("agent/src/api.rs", "input"),
        OBSERVED,
        "reads staged inputs"
    ),
    grant!(
        "agent",
        Own,
        "",
        "configmaps",
        ["create"],
        ("agent/src/api.rs", "chunk"),
        OBSERVED,
        "writes result chunks"
    ),
    grant!(
        "agent",
        Own,
        "",
        "configmaps",
        ["update"],
        ("agent/src/api.rs", "chunk"),
        OBSERVED,
        "replaces a chunk of the same name: the answer to its creation was lost"
    ),
    grant!(
        "agent",
        Leader,
        LEASES,
        "leases",
        ["get"],
        ("agent/src/api.rs", "leader_term"),
        OBSERVED,
        "compares an order's term with the leader's"
    ),
    grant!(
        "trial",
        Everywhere,
        "",
        "nodes",
        ["list"],
        ("operator/src/trial.rs", "look"),
        HELM_TEST,
        "says which nodes there are"
    ),
    grant!(
        "trial",
        Everywhere,
        GOGRID,
        "gpunodes",
        ["list"],
        ("operator/src/trial.rs", "look"),
        HELM_TEST,
        "says what each node has, or what is wrong with it"
    ),
    grant!(
        "trial",
        Own,
        "",
        "pods",
        ["list"],
        ("operator/src/trial.rs", "look"),
        HELM_TEST,
        "says why a node's agent is not ready"
    ),
    grant!(
        "trial",
        Own,
        "",
        "events",
        ["list"],
        ("operator/src/trial.rs", "look"),
        HELM_TEST,
        "says why a node has no agent"
    ),
    grant!(
        "trial",
        Own,
        GOGRID,
        "inferencejobs",
        ["create", "get", "delete"],
        ("operator/src/trial.rs", "run"),
        HELM_TEST,
        "runs one job, follows and removes it"
    ),
    grant!(
        "trial",
        Own,
        "",
        "configmaps",
        ["get", "delete"],
        ("operator/src/trial.rs", "run"),
        HELM_TEST,
        "reads and removes that job's answer"
    ),
];
