//! The rows of the matrix: what an agent writes for its node, and what it might try beyond.

use anyhow::{Context as _, Result};
use gogrid_api::names;
use kube::Client;
use serde_json::{Value, json};

use super::attempt::{Attempt, Verb};
use crate::cluster::NAMESPACE;

/// GoGrid's API group.
pub const GOGRID: &str = "/apis/gogrid.dev/v1alpha1";
/// The API group of Leases.
pub const COORDINATION: &str = "/apis/coordination.k8s.io/v1";
/// All GpuNodes.
pub const GPU_NODES: &str = "/apis/gogrid.dev/v1alpha1/gpunodes";
/// The jobs of namespace `default`.
pub const JOBS: &str = "/apis/gogrid.dev/v1alpha1/namespaces/default/inferencejobs";

/// All orders.
pub fn assignments() -> String {
    format!("{GOGRID}/namespaces/{NAMESPACE}/assignments")
}

/// Leases of GoGrid's namespace.
pub fn leases() -> String {
    format!("{COORDINATION}/namespaces/{NAMESPACE}/leases")
}

/// ConfigMaps of GoGrid's namespace.
pub fn config_maps() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/configmaps")
}

fn assignment_name(node: &str) -> String {
    format!("job-of-{node}-1")
}

/// The order that the node has in this matrix.
pub fn assignment_path(node: &str) -> String {
    format!("{}/{}", assignments(), assignment_name(node))
}

/// The node's GpuNode.
pub fn gpu_node_path(node: &str) -> String {
    format!("{GPU_NODES}/{node}")
}

/// The node's Lease.
pub fn lease_path(node: &str) -> String {
    format!("{}/{}", leases(), names::node_lease(node))
}

/// The first chunk of results of the node's order.
pub fn chunk_path(node: &str) -> String {
    format!(
        "{}/{}",
        config_maps(),
        names::result_chunk(&assignment_name(node), node, 0)
    )
}

/// A GpuNode as its agent makes it.
pub fn gpu_node(node: &str) -> Value {
    typed(
        "gogrid.dev/v1alpha1",
        "GpuNode",
        json!({"metadata": {"name": node}, "spec": {"nodeName": node}}),
    )
}

/// A Lease as the node's agent makes it.
pub fn lease(node: &str) -> Value {
    let spec = json!({"holderIdentity": "boot/instance", "leaseDurationSeconds": 40});
    typed(
        "coordination.k8s.io/v1",
        "Lease",
        json!({"metadata": {"name": names::node_lease(node)}, "spec": spec}),
    )
}

/// An order as the operator makes it, for a session that no agent has.
pub fn assignment(node: &str) -> Value {
    let spec = json!({
        "kind": "Run", "job": {"namespace": "default", "name": "a-job", "uid": format!("job-of-{node}")}, "epoch": 1, "term": 1,
        "nodeName": node, "session": "boot/instance", "model": {"uri": "file:/srv/m.gguf", "sha256": "0".repeat(64)},
        "contextTokens": 512, "parallelSequences": 1,
    });
    typed(
        "gogrid.dev/v1alpha1",
        "Assignment",
        json!({"metadata": {"name": assignment_name(node)}, "spec": spec}),
    )
}

/// A job.
pub fn job() -> Value {
    let spec = json!({
        "model": {"uri": "file:/srv/m.gguf", "sha256": "0".repeat(64)},
        "input": {"inline": ["{}"]}, "output": {"configMap": "out"},
    });
    typed(
        "gogrid.dev/v1alpha1",
        "InferenceJob",
        json!({"metadata": {"name": "a-job"}, "spec": spec}),
    )
}

/// The n-th chunk of the node's assignment, in every way as it must be.
pub async fn chunk(admin: &Client, node: &str, n: u32) -> Result<Value> {
    let assignment = assignment_name(node);
    let uid = stored(admin, &assignment_path(node)).await?["metadata"]["uid"].clone();
    Ok(typed(
        "v1",
        "ConfigMap",
        json!({
            "metadata": {
                "name": names::result_chunk(&assignment, node, n),
                "labels": {names::NODE_LABEL: node, names::ASSIGNMENT_LABEL: assignment, names::ROLE_LABEL: "result"},
                "ownerReferences": [{"apiVersion": "gogrid.dev/v1alpha1", "kind": "Assignment", "name": assignment, "uid": uid}],
            },
            "data": {names::RESULTS_KEY: "{}"},
        }),
    ))
}

fn without(mut object: Value, pointer: &str, field: &str) -> Value {
    if let Some(parent) = object.pointer_mut(pointer).and_then(Value::as_object_mut) {
        parent.remove(field);
    }
    object
}

/// Sets every field of `change` in `object`; null takes one away.
fn merge(object: &mut Value, change: &Value) {
    let (Some(fields), Some(changes)) = (object.as_object_mut(), change.as_object()) else {
        *object = change.clone();
        return;
    };
    for (key, value) in changes {
        if value.is_null() {
            fields.remove(key);
        } else {
            merge(fields.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// Everything that the agent of `node` may write for it.
pub async fn writes(admin: &Client, node: &str) -> Result<Vec<Attempt>> {
    let (assignment, gpu, beat, results) = (
        assignment_path(node),
        gpu_node_path(node),
        lease_path(node),
        chunk_path(node),
    );
    let claimed = json!({"status": {"state": "Claimed"}});
    let seen = json!({"status": {"session": "boot/instance", "agentVersion": "0.1.0"}});
    let type_of = |kind: &str, body: &Value| typed("gogrid.dev/v1alpha1", kind, body.clone());
    let mut renewed = stored(admin, &beat).await?;
    renewed["spec"]["holderIdentity"] = json!("boot/next");
    let mut answered = without(stored(admin, &results).await?, "/metadata", "managedFields");
    answered["data"][names::RESULTS_KEY] = json!("{}\n{}");
    Ok(vec![
        Attempt::with(Verb::Merge, format!("{assignment}/status"), claimed.clone()),
        Attempt::with(
            Verb::Apply,
            format!("{assignment}/status"),
            type_of("Assignment", &claimed),
        ),
        Attempt::with(Verb::Create, GPU_NODES, gpu_node(node)),
        Attempt::with(
            Verb::Merge,
            &gpu,
            json!({"metadata": {"labels": {"seen": "yes"}}}),
        ),
        Attempt::with(Verb::Apply, &gpu, gpu_node(node)),
        Attempt::with(Verb::Merge, format!("{gpu}/status"), seen.clone()),
        Attempt::with(Verb::Apply, format!("{gpu}/status"), type_of("GpuNode", &seen)),
        Attempt::with(Verb::Create, leases(), lease(node)),
        Attempt::with(Verb::Update, &beat, renewed),
        Attempt::with(Verb::Create, config_maps(), chunk(admin, node, 7).await?),
        Attempt::with(Verb::Update, &results, answered),
    ])
}

/// What the agent of `own` might try in order to write what is not its own, or to hide what it wrote.
pub async fn disguises(admin: &Client, own: &str, other: &str) -> Result<Vec<Attempt>> {
    let good = chunk(admin, own, 7).await?;
    let create = |body: Value, note| Attempt::with(Verb::Create, config_maps(), body).noted(note);
    let change = async |path: String, body: Value, note| {
        let mut object = without(stored(admin, &path).await?, "/metadata", "managedFields");
        merge(&mut object, &body);
        anyhow::Ok(Attempt::with(Verb::Update, path, object).noted(note))
    };
    let renamed = |name: String| {
        let mut body = good.clone();
        body["metadata"]["name"] = json!(name);
        body
    };
    let mut of_a_map = good.clone();
    of_a_map["metadata"]["ownerReferences"][0]["kind"] = json!("ConfigMap");
    of_a_map["metadata"]["ownerReferences"][0]["apiVersion"] = json!("v1");
    let mut of_two = good.clone();
    let second = json!({"apiVersion": "v1", "kind": "Node", "name": own, "uid": "0"});
    if let Some(owners) = of_two["metadata"]["ownerReferences"].as_array_mut() {
        owners.push(second);
    }
    let mut other_lease = lease(own);
    other_lease["metadata"]["name"] = json!("node-third");
    let label = |node: Value| json!({"metadata": {"labels": {names::NODE_LABEL: node}}});
    let (staged, presets) = (
        format!("{}/input-of-a-job", config_maps()),
        format!("{}/gogrid-presets", config_maps()),
    );
    Ok(vec![
        create(without(good.clone(), "/metadata", "labels"), "no label"),
        create(without(good.clone(), "/metadata", "ownerReferences"), "no owner"),
        create(of_a_map, "owner of another kind"),
        create(of_two, "two owners"),
        create(
            renamed(names::result_chunk(&assignment_name(other), own, 7)),
            "named after another's assignment",
        ),
        create(
            renamed(names::result_chunk(&assignment_name(own), other, 7)),
            "named as another node's chunk",
        ),
        create(
            renamed(names::result_chunk(&assignment_name(own), own, 7) + "-0"),
            "named as the chunk of a node whose name begins like this one's",
        ),
        create(
            renamed("input-of-another-job-0".into()),
            "named as a staged input",
        ),
        create(renamed("result-0".into()), "no assignment in the name"),
        change(
            chunk_path(own),
            label(json!(other)),
            "own chunk labelled as another's",
        )
        .await?,
        change(chunk_path(own), label(Value::Null), "label taken off").await?,
        change(
            chunk_path(own),
            json!({"metadata": {"ownerReferences": null}}),
            "owner taken off",
        )
        .await?,
        change(
            chunk_path(other),
            label(json!(own)),
            "another's chunk labelled as own",
        )
        .await?,
        change(
            staged.clone(),
            json!({"data": {names::INPUT_KEY: "{}"}}),
            "a staged input",
        )
        .await?,
        change(staged, label(json!(own)), "a staged input labelled as own").await?,
        change(presets, json!({"data": {"presets.yaml": ""}}), "the presets").await?,
        change(
            format!("{}/result-of-nobody", config_maps()),
            label(json!(own)),
            "a stray",
        )
        .await?,
        Attempt::with(Verb::Create, GPU_NODES, gpu_node("third")).noted("a node that is not there"),
        Attempt::with(Verb::Create, leases(), other_lease).noted("a lease of no node"),
    ])
}

/// What is stored at `path`, as an admin sees it.
pub async fn stored(admin: &Client, path: &str) -> Result<Value> {
    let seen = Attempt::new(Verb::Get, path).answer(admin).await;
    seen.with_context(|| path.to_owned())
}

/// `body` with its type.
pub fn typed(api_version: &str, kind: &str, mut body: Value) -> Value {
    body["apiVersion"] = json!(api_version);
    body["kind"] = json!(kind);
    body
}
