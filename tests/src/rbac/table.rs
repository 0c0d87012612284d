//! The table itself.

use super::{Grant, Place};

const GOGRID: &str = "gogrid.dev";
const LEASES: &str = "coordination.k8s.io";
/// The recorded run.
pub(super) const USED: (&str, &str) = (
    "tests/tests/observed/main.rs",
    "induced_faults_fire_and_clear_their_alerts_and_the_run_uses_every_right",
);
const OPERATOR_WORK: (&str, &str) = (
    "tests/tests/confinement/main.rs",
    "the_operator_has_the_rights_for_its_work_and_none_beyond",
);
const AGENT_WRITES: (&str, &str) = (
    "tests/tests/confinement/main.rs",
    "an_agent_writes_for_its_own_node_and_for_no_other",
);
const HELM_TEST: (&str, &str) = (
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
        USED,
        "sees jobs"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "inferencejobs",
        ["get"],
        ("operator/src/apply.rs", "ensure_gone"),
        USED,
        "makes sure that a job is gone before its things are deleted"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "inferencejobs",
        ["delete"],
        ("operator/src/apply.rs", "run"),
        USED,
        "deletes a finished job when its time to live is over"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "inferencejobs/status",
        ["patch"],
        ("operator/src/apply.rs", "write_status"),
        USED,
        "writes what became of a job; tries the fence rules in a dry run"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "resourceprofiles",
        ["list", "watch"],
        OBSERVE,
        USED,
        "sees profiles"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "resourceprofiles",
        ["get", "create"],
        ("operator/src/apply.rs", "create_absent_profiles"),
        USED,
        "creates presets that are absent"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "resourceprofiles/status",
        ["patch"],
        ("operator/src/apply.rs", "write_profile"),
        USED,
        "says where a profile is in force"
    ),
    grant!(
        "operator",
        Everywhere,
        GOGRID,
        "gpunodes",
        ["list", "watch"],
        OBSERVE,
        USED,
        "sees devices and models"
    ),
    grant!(
        "operator",
        Everywhere,
        "",
        "nodes",
        ["list", "watch"],
        OBSERVE,
        USED,
        "sees labels, taints and cordons"
    ),
    grant!(
        "operator",
        Everywhere,
        "scheduling.k8s.io",
        "priorityclasses",
        ["list", "watch"],
        OBSERVE,
        USED,
        "sees priorities"
    ),
    grant!(
        "operator",
        Everywhere,
        "",
        "configmaps",
        ["get"],
        ("operator/src/apply.rs", "stage"),
        USED,
        "reads an input by the name in the job"
    ),
    grant!(
        "operator",
        Everywhere,
        "",
        "configmaps",
        ["create"],
        ("operator/src/publish.rs", "publish"),
        USED,
        "publishes a result"
    ),
    grant!(
        "operator",
        Everywhere,
        "",
        "configmaps",
        ["patch"],
        ("operator/src/apply.rs", "stage"),
        USED,
        "stages inputs; publishes a result again after a crash"
    ),
    grant!(
        "operator",
        Everywhere,
        "events.k8s.io",
        "events",
        ["create"],
        ("operator/src/apply.rs", "write_status"),
        USED,
        "tells people"
    ),
    grant!(
        "operator",
        Everywhere,
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        ["get"],
        ("operator/src/probe.rs", "crds"),
        USED,
        "refuses to lead on CRDs that are older than it"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["list", "watch"],
        OBSERVE,
        USED,
        "sees how orders go"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["create"],
        ("operator/src/apply.rs", "create"),
        USED,
        "orders a run or a look at a model"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["get"],
        ("operator/src/apply.rs", "run"),
        OPERATOR_WORK,
        "looks for an order that seems lost, or at one that is there already: the answer to its creation was lost"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["patch"],
        ("operator/src/apply.rs", "stop"),
        USED,
        "stops a run"
    ),
    grant!(
        "operator",
        Own,
        GOGRID,
        "assignments",
        ["delete"],
        ("operator/src/apply.rs", "run"),
        USED,
        "cleans up after a job"
    ),
    grant!(
        "operator",
        Own,
        "",
        "configmaps",
        ["list", "delete"],
        ("operator/src/apply.rs", "delete_inputs"),
        USED,
        "deletes staged inputs"
    ),
    grant!(
        "operator",
        Own,
        LEASES,
        "leases",
        ["list", "watch"],
        OBSERVE,
        USED,
        "sees heartbeats"
    ),
    grant!(
        "operator",
        Own,
        LEASES,
        "leases",
        ["get"],
        ("operator/src/apply.rs", "ensure_silent"),
        USED,
        "looks once more whether a node is silent before its job is placed elsewhere"
    ),
    grant!(
        "operator",
        Leader,
        LEASES,
        "leases",
        ["get", "update"],
        ("operator/src/leader.rs", "turn"),
        USED,
        "holds the leader Lease"
    ),
    grant!(
        "operator",
        Leader,
        LEASES,
        "leases",
        ["create"],
        ("operator/src/leader.rs", "turn"),
        USED,
        "makes the leader Lease"
    ),
    grant!(
        "agent",
        Everywhere,
        GOGRID,
        "gpunodes",
        ["list", "watch"],
        ("agent/src/watch.rs", "gpu_node"),
        USED,
        "notices when its GpuNode is gone"
    ),
    grant!(
        "agent",
        Everywhere,
        GOGRID,
        "gpunodes",
        ["create", "patch"],
        ("agent/src/api.rs", "ensure_gpu_node"),
        USED,
        "makes its GpuNode"
    ),
    grant!(
        "agent",
        Everywhere,
        GOGRID,
        "gpunodes/status",
        ["patch"],
        ("agent/src/api.rs", "gpu_node_status"),
        USED,
        "says what its node has"
    ),
    grant!(
        "agent",
        Everywhere,
        GOGRID,
        "resourceprofiles",
        ["list", "watch"],
        ("agent/src/watch.rs", "profiles"),
        USED,
        "enforces profiles"
    ),
    grant!(
        "agent",
        Everywhere,
        "",
        "nodes",
        ["get"],
        ("agent/src/api.rs", "node_owner"),
        USED,
        "ties its GpuNode and its Lease to the Node"
    ),
    grant!(
        "agent",
        Everywhere,
        "",
        "nodes",
        ["list", "watch"],
        ("agent/src/watch.rs", "node"),
        USED,
        "sees its Node's labels"
    ),
    grant!(
        "agent",
        Own,
        LEASES,
        "leases",
        ["get", "create", "update"],
        ("agent/src/lease.rs", "renew"),
        USED,
        "holds its node's Lease"
    ),
    grant!(
        "agent",
        Own,
        GOGRID,
        "assignments",
        ["list", "watch"],
        ("agent/src/watch.rs", "assignments"),
        USED,
        "sees its orders"
    ),
    grant!(
        "agent",
        Own,
        GOGRID,
        "assignments",
        ["get"],
        ("agent/src/api.rs", "status"),
        (
            "tests/tests/confinement/main.rs",
            "an_agent_has_no_right_beyond_its_work"
        ),
        "looks at an order whose version has moved on, or that it has not seen during an outage"
    ),
    grant!(
        "agent",
        Own,
        GOGRID,
        "assignments/status",
        ["patch"],
        ("agent/src/api.rs", "apply_status"),
        USED,
        "says how an order goes"
    ),
    grant!(
        "agent",
        Own,
        "",
        "configmaps",
        ["get"],
        ("agent/src/api.rs", "input"),
        USED,
        "reads staged inputs"
    ),
    grant!(
        "agent",
        Own,
        "",
        "configmaps",
        ["create"],
        ("agent/src/api.rs", "chunk"),
        USED,
        "writes result chunks"
    ),
    grant!(
        "agent",
        Own,
        "",
        "configmaps",
        ["update"],
        ("agent/src/api.rs", "chunk"),
        AGENT_WRITES,
        "replaces a chunk of the same name: the answer to its creation was lost"
    ),
    grant!(
        "agent",
        Leader,
        LEASES,
        "leases",
        ["get"],
        ("agent/src/api.rs", "leader_term"),
        USED,
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
