//! What roles alone give each account, and what they keep from it.

use gogrid_tests::confinement::matrix::{
    COORDINATION, GOGRID, GPU_NODES, JOBS, assignment, assignment_path, assignments, chunk_path, config_maps,
    gpu_node, gpu_node_path, job, lease_path, leases, typed,
};
use gogrid_tests::confinement::{Attempt, Verb};
use serde_json::json;

use crate::world::{NAMESPACE, World};

const JOB: &str = "/apis/gogrid.dev/v1alpha1/namespaces/default/inferencejobs/a-job";
const PROFILES: &str = "/apis/gogrid.dev/v1alpha1/resourceprofiles";
const PROFILE: &str = "/apis/gogrid.dev/v1alpha1/resourceprofiles/conservative";
const LEADER: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/gogrid-leader";

/// What no agent may ask for, whatever the node: roles alone see to it.
pub(crate) fn beyond_an_agent(node: &str) -> Vec<Attempt> {
    let empty = || json!({"metadata": {"name": "x"}});
    let mut rows = secrets();
    for path in [
        &config_maps(),
        "/api/v1/configmaps",
        "/api/v1/namespaces/default/configmaps",
        "/api/v1/namespaces/default/configmaps/an-input",
        "/api/v1/namespaces/kube-system/configmaps",
        JOBS,
        JOB,
        &format!("{GOGRID}/inferencejobs"),
        "/api/v1/pods",
        "/api/v1/namespaces",
        &leases(),
        &format!("{COORDINATION}/namespaces/kube-system/leases"),
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    ] {
        rows.push(Attempt::new(Verb::Get, path));
    }
    for path in [
        "/api/v1/namespaces/default/configmaps",
        JOBS,
        PROFILES,
        "/api/v1/namespaces/default/events",
        &format!("/api/v1/namespaces/{NAMESPACE}/events"),
        &format!("/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events"),
        &assignments(),
        &format!("/api/v1/namespaces/{NAMESPACE}/pods"),
        &format!("{COORDINATION}/namespaces/kube-system/leases"),
        &format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/gogrid-agent/token"),
        &format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/gogrid-operator/token"),
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    ] {
        rows.push(Attempt::with(Verb::Create, path, empty()));
    }
    for path in [
        JOB,
        &format!("{JOB}/status"),
        PROFILE,
        &format!("{PROFILE}/status"),
        &assignment_path(node),
        LEADER,
        &format!("/api/v1/nodes/{node}"),
        &format!("/api/v1/nodes/{node}/status"),
        "/api/v1/namespaces/default/configmaps/an-input",
        // Replaced as a whole, never patched.
        &lease_path(node),
        &chunk_path(node),
    ] {
        rows.push(Attempt::with(Verb::Merge, path, json!({})));
    }
    for path in [
        &assignment_path(node),
        &gpu_node_path(node),
        &lease_path(node),
        &chunk_path(node),
        JOB,
        PROFILE,
        &format!("/api/v1/nodes/{node}"),
        &config_maps(),
        &leases(),
        "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/gogrid-node-confinement",
    ] {
        rows.push(Attempt::new(Verb::Delete, path));
    }
    rows
}

/// What an agent reads.
pub(crate) fn an_agents_reads(node: &str) -> Vec<Attempt> {
    let own_orders = format!("{}?fieldSelector=spec.nodeName={node}", assignments());
    let staged = format!("{}/input-of-a-job", config_maps());
    [
        "/api/v1/nodes",
        PROFILES,
        GPU_NODES,
        &own_orders,
        &staged,
        &assignment_path(node),
        &lease_path(node),
        LEADER,
    ]
    .map(|path| Attempt::new(Verb::Get, path))
    .into()
}

/// What the operator does.
pub(crate) async fn an_operators_work(world: &World, node: &str) -> Vec<Attempt> {
    let named = |name: &str| json!({"metadata": {"name": name}});
    let new_event = json!({
        "metadata": {"name": "e"}, "regarding": {"kind": "InferenceJob", "namespace": "default", "name": "a-job"}, "reason": "Placed",
        "action": "Place", "type": "Normal", "eventTime": "2026-01-01T00:00:00.000000Z", "reportingController": "gogrid.dev/operator",
        "reportingInstance": "x",
    });
    let preset = typed(
        "gogrid.dev/v1alpha1",
        "ResourceProfile",
        json!({
        "metadata": {"name": "another"}, "spec": gogrid_api::profile::presets()[1].1}),
    );
    let mut another = assignment(node);
    another["metadata"]["name"] = json!("another-1");
    let mut held = world.stored(LEADER).await;
    held["spec"]["holderIdentity"] = json!("me");
    let in_default = "/api/v1/namespaces/default/configmaps";
    let mut rows: Vec<Attempt> = [
        &format!("{GOGRID}/inferencejobs"),
        JOB,
        PROFILES,
        GPU_NODES,
        "/api/v1/nodes",
        "/apis/scheduling.k8s.io/v1/priorityclasses",
        &format!("{in_default}/an-input"),
        &config_maps(),
        &chunk_path(node),
        &leases(),
        &lease_path(node),
        &assignments(),
        &assignment_path(node),
        LEADER,
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferencejobs.gogrid.dev",
    ]
    .map(|path| Attempt::new(Verb::Get, path))
    .into();
    rows.extend([
        Attempt::with(
            Verb::Merge,
            format!("{JOB}/status"),
            json!({"status": {"queuePosition": 1}}),
        ),
        Attempt::with(
            Verb::Apply,
            format!("{JOB}/status"),
            typed(
                "gogrid.dev/v1alpha1",
                "InferenceJob",
                json!({"status": {"queuePosition": 1}}),
            ),
        ),
        Attempt::new(Verb::Delete, JOB),
        Attempt::with(Verb::Create, PROFILES, preset),
        Attempt::with(
            Verb::Merge,
            format!("{PROFILE}/status"),
            json!({"status": {"jobs": 1}}),
        ),
        Attempt::with(Verb::Create, in_default, named("out")),
        Attempt::with(
            Verb::Merge,
            format!("{in_default}/an-input"),
            json!({"data": {"a": "b"}}),
        ),
        Attempt::with(
            Verb::Create,
            "/apis/events.k8s.io/v1/namespaces/default/events",
            new_event,
        ),
        Attempt::with(Verb::Create, assignments(), another),
        Attempt::with(
            Verb::Merge,
            assignment_path(node),
            json!({"spec": {"stop": {"reason": "Suspended", "graceSeconds": 30}}}),
        ),
        Attempt::new(Verb::Delete, assignment_path(node)),
        Attempt::with(Verb::Create, config_maps(), named("input-of-another-job-0")),
        Attempt::with(
            Verb::Merge,
            format!("{}/input-of-a-job", config_maps()),
            json!({"data": {"a": "b"}}),
        ),
        Attempt::new(Verb::Delete, format!("{}/input-of-a-job", config_maps())),
        Attempt::with(Verb::Update, LEADER, held),
        Attempt::with(
            Verb::Create,
            format!("{COORDINATION}/namespaces/kube-system/leases"),
            named("gogrid-leader"),
        ),
    ]);
    rows
}

/// What the operator may not do.
pub(crate) fn beyond_the_operator(node: &str) -> Vec<Attempt> {
    let other_lease = format!("{COORDINATION}/namespaces/kube-system/leases/kube-scheduler");
    let mut rows = secrets();
    for path in [
        "/api/v1/configmaps",
        "/api/v1/namespaces/default/configmaps",
        "/api/v1/pods",
        &other_lease,
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    ] {
        rows.push(Attempt::new(Verb::Get, path));
    }
    for path in [
        JOBS,
        GPU_NODES,
        &leases(),
        "/api/v1/namespaces/default/pods",
        &format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/gogrid-agent/token"),
    ] {
        rows.push(Attempt::with(
            Verb::Create,
            path,
            json!({"metadata": {"name": "x"}}),
        ));
    }
    for path in [
        JOB,
        PROFILE,
        &gpu_node_path(node),
        &format!("{}/status", gpu_node_path(node)),
        &format!("{}/status", assignment_path(node)),
        &lease_path(node),
        &format!("/api/v1/nodes/{node}"),
        &other_lease,
    ] {
        rows.push(Attempt::with(Verb::Merge, path, json!({})));
    }
    for path in [
        "/api/v1/namespaces/default/configmaps/an-input",
        PROFILE,
        &gpu_node_path(node),
        &lease_path(node),
        LEADER,
    ] {
        rows.push(Attempt::new(Verb::Delete, path));
    }
    rows
}

/// Writes that are one account's alone, as anybody else would try them.
pub(crate) fn writes_with_one_writer(node: &str) -> Vec<Attempt> {
    let mut another = assignment(node);
    another["metadata"]["name"] = json!("another-1");
    vec![
        Attempt::with(
            Verb::Merge,
            format!("{JOB}/status"),
            json!({"status": {"queuePosition": 1}}),
        ),
        Attempt::with(
            Verb::Merge,
            format!("{PROFILE}/status"),
            json!({"status": {"jobs": 1}}),
        ),
        Attempt::with(Verb::Create, assignments(), another),
        Attempt::with(
            Verb::Merge,
            assignment_path(node),
            json!({"spec": {"stop": {"reason": "Suspended", "graceSeconds": 30}}}),
        ),
        Attempt::new(Verb::Delete, assignment_path(node)),
        Attempt::with(
            Verb::Merge,
            format!("{}/status", assignment_path(node)),
            json!({"status": {"state": "Claimed"}}),
        ),
        Attempt::with(Verb::Create, GPU_NODES, gpu_node("third")),
        Attempt::with(
            Verb::Merge,
            gpu_node_path(node),
            json!({"metadata": {"labels": {"a": "b"}}}),
        ),
        Attempt::with(
            Verb::Merge,
            format!("{}/status", gpu_node_path(node)),
            json!({"status": {"agentVersion": "9"}}),
        ),
        Attempt::new(Verb::Delete, gpu_node_path(node)),
    ]
}

/// What users and admins of profiles do.
pub(crate) fn a_users_work() -> Vec<Attempt> {
    let mut another = job();
    another["metadata"]["name"] = json!("another-job");
    vec![
        Attempt::with(Verb::Create, JOBS, another),
        Attempt::with(Verb::Merge, JOB, json!({"spec": {"suspend": true}})),
        Attempt::new(Verb::Delete, JOB),
        Attempt::with(Verb::Merge, PROFILE, json!({"spec": {"precedence": 1}})),
        Attempt::new(Verb::Delete, PROFILE),
    ]
}

fn secrets() -> Vec<Attempt> {
    let places = [
        "/api/v1/secrets".to_owned(),
        "/api/v1/namespaces/default/secrets".into(),
        "/api/v1/namespaces/default/secrets/a-secret".into(),
        "/api/v1/namespaces/kube-system/secrets".into(),
        format!("/api/v1/namespaces/{NAMESPACE}/secrets"),
        format!("/api/v1/namespaces/{NAMESPACE}/secrets/any"),
        "/api/v1/secrets?watch=1".into(),
    ];
    places.map(|path| Attempt::new(Verb::Get, path)).into()
}
