//! Every bound and every rule of the CRDs, tried on a real API server: each refuses what it must, for its own reason,
//! and lets the rest through.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

mod bounds;
mod cel;
mod samples;
mod server;

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use serde_json::{Value, json};

use bounds::{Bound, Step};
use samples::Sample;
use server::{Area, Server, Verdict};

/// Requests on their way at once; the API server shares few cores with the tests.
const AT_ONCE: usize = 8;

fn schema_of(kind: &str) -> JSONSchemaProps {
    let crds: [CustomResourceDefinition; 4] = gogrid_api::crds();
    let crd = crds.into_iter().find(|crd| crd.spec.names.kind == kind).unwrap();
    crd.spec.versions[0]
        .schema
        .clone()
        .unwrap()
        .open_api_v3_schema
        .unwrap()
}

/// A wanted verdict about one value.
struct Case {
    area: Area,
    what: String,
    body: Value,
    wanted: Wanted,
}

enum Wanted {
    Accepted,
    RefusedAt(String),
}

fn cases(sample: &Sample, area: Area) -> (usize, Vec<Case>) {
    let (key, wholes) = match area {
        Area::Spec => ("spec", &sample.specs),
        Area::Status => ("status", &sample.statuses),
    };
    let wholes: Vec<Value> = wholes.iter().map(|whole| json!({ key: whole })).collect();
    let schema = &schema_of(sample.kind).properties.unwrap()[key];
    let found = bounds::bounds(schema, &vec![Step::Key(key.into())], &wholes);
    let mut cases: Vec<Case> = wholes
        .iter()
        .enumerate()
        .map(|(n, body)| Case {
            area,
            what: format!("sample {n}"),
            body: body.clone(),
            wanted: Wanted::Accepted,
        })
        .collect();
    for bound in &found {
        cases.extend(cases_of(sample.kind, area, bound, &wholes));
    }
    (found.len(), cases)
}

fn cases_of(kind: &str, area: Area, bound: &Bound, wholes: &[Value]) -> Vec<Case> {
    let field = bounds::field(&bound.place);
    // A required field is absent from no sample.
    let base = wholes
        .iter()
        .find(|whole| bounds::at(whole, &bound.place).is_some())
        .unwrap();
    let what = |value: &Option<Value>| {
        let text = value.as_ref().map_or("absent".into(), Value::to_string);
        format!(
            "{kind}.{field}: {}: {}",
            bound.name,
            text.chars().take(60).collect::<String>()
        )
    };
    let inside = bound
        .inside
        .iter()
        .cloned()
        .map(Some)
        .map(|value| (value, Wanted::Accepted));
    let outside = bound
        .outside
        .iter()
        .cloned()
        .map(|value| (value, Wanted::RefusedAt(field.clone())));
    inside
        .chain(outside)
        .map(|(value, wanted)| {
            let body = suited(kind, &field, value.as_ref(), base);
            Case {
                area,
                what: what(&value),
                body: bounds::with(&body, &bound.place, value),
                wanted,
            }
        })
        .collect()
}

/// The sample without what a CEL rule would hold against this value of this field.
fn suited(kind: &str, field: &str, value: Option<&Value>, base: &Value) -> Value {
    let mut body = base.clone();
    match (kind, field) {
        // With the epoch, the placement would have to stay behind.
        ("InferenceJob", "status.epoch") => body["status"] = json!({}),
        ("InferenceJob", "spec.placement.tolerations[0].operator") if value == Some(&json!("Exists")) => {
            body["spec"]["placement"]["tolerations"] = json!([{"key": "gpu"}]);
        }
        _ => {}
    }
    body
}

/// The one value inside its bound that only a sequence of writes could reach.
fn is_out_of_reach(case: &Case, verdict: &Verdict) -> bool {
    case.what.contains("InferenceJob.status.epoch: maximum")
        && verdict.causes.iter().all(|cause| {
            cause
                .message
                .contains("status.epoch must stay or grow by exactly 1")
        })
}

async fn judge(server: &Server, sample: &Sample, case: &Case) -> Option<String> {
    let verdict = match case.area {
        Area::Spec => server.creates(sample, case.body.clone()).await,
        Area::Status => server.reports(sample, case.body.clone()).await,
    };
    match &case.wanted {
        Wanted::Accepted if verdict.accepted || is_out_of_reach(case, &verdict) => None,
        Wanted::RefusedAt(field) if !verdict.accepted && verdict.is_only_about(field) => None,
        Wanted::Accepted => Some(format!("{} was refused: {verdict}", case.what)),
        Wanted::RefusedAt(field) => Some(format!("{} was not refused for {field}: {verdict}", case.what)),
    }
}

#[tokio::test]
async fn every_bound_refuses_what_is_just_outside_and_accepts_what_is_just_inside() {
    let server = Server::get().await;
    let mut surprises = Vec::new();
    let mut counted = BTreeMap::new();
    for sample in samples::all() {
        let mut spec = sample.specs[0].clone();
        if sample.kind == "GpuNode" {
            // Its name says its node, and the sample's own is to be free.
            spec["nodeName"] = json!("stored");
        }
        server.store(&sample, "stored", spec, Value::Null).await;
        for area in [Area::Spec, Area::Status] {
            let (bounds, cases) = cases(&sample, area);
            counted.insert(format!("{} {area:?}", sample.kind), (bounds, cases.len()));
            let judged = futures::stream::iter(&cases)
                .map(|case| judge(&server, &sample, case))
                .buffer_unordered(AT_ONCE);
            surprises.extend(
                judged
                    .filter_map(|surprise| async { surprise })
                    .collect::<Vec<_>>()
                    .await,
            );
        }
    }
    println!("bounds and objects: {counted:?}");
    assert!(surprises.is_empty(), "{}: {surprises:#?}", surprises.len());
}

/// Every rule of a schema: where, its text, its message.
fn rules(schema: &JSONSchemaProps, found: &mut Vec<(String, String)>) {
    for rule in schema.x_kubernetes_validations.iter().flatten() {
        found.push((rule.rule.clone(), rule.message.clone().unwrap_or_default()));
    }
    for property in schema
        .properties
        .iter()
        .flat_map(|properties| properties.values())
    {
        rules(property, found);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        rules(items, found);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
        rules(values, found);
    }
}

fn all_rules() -> BTreeMap<(String, String), String> {
    let mut all = BTreeMap::new();
    for kind in samples::all().map(|sample| sample.kind) {
        let mut found = Vec::new();
        rules(&schema_of(kind), &mut found);
        all.extend(
            found
                .into_iter()
                .map(|(rule, message)| ((kind.to_owned(), rule), message)),
        );
    }
    all
}

#[test]
fn the_table_has_a_row_with_good_and_bad_for_every_rule_and_none_besides() {
    let rows = cel::rows();
    let in_table: BTreeSet<(String, String)> = rows
        .iter()
        .map(|row| (row.kind.into(), row.rule.into()))
        .collect();
    let in_schemas: BTreeSet<(String, String)> = all_rules().into_keys().collect();
    assert_eq!(in_table, in_schemas);
    assert!(rows.iter().all(|row| !row.bad.is_empty() && !row.good.is_empty()));
}

#[tokio::test]
async fn every_rule_refuses_its_bad_and_accepts_its_good() {
    let server = Server::get().await;
    let messages = all_rules();
    let mut surprises = Vec::new();
    let mut tried = 0;
    for row in cel::rows() {
        let message = &messages[&(row.kind.to_owned(), row.rule.to_owned())];
        let sample = samples::of(row.kind);
        let tries = row
            .bad
            .iter()
            .map(|attempt| (attempt, false))
            .chain(row.good.iter().map(|attempt| (attempt, true)));
        for (attempt, wanted) in tries {
            tried += 1;
            let verdict = server.tries(&sample, attempt).await;
            let said = verdict.causes.iter().any(|cause| {
                cause.message.contains(message.as_str()) && (row.field.is_empty() || cause.field == row.field)
            });
            if verdict.accepted != wanted || (!wanted && !said) {
                surprises.push(format!("{message}: {attempt:?}: {verdict}"));
            }
        }
    }
    println!("{} rules, {tried} objects and changes", messages.len());
    assert!(surprises.is_empty(), "{}: {surprises:#?}", surprises.len());
}

#[tokio::test]
async fn a_jobs_epoch_fences_its_placement_through_a_whole_sequence_of_writes() {
    let server = Server::get().await;
    let sample = samples::of("InferenceJob");
    let name = server
        .store(&sample, "sequence", sample.specs[0].clone(), Value::Null)
        .await;
    let on = |node: &str| json!({"nodeName": node, "stages": [{"gpuUUID": "GPU-1", "firstLayer": 0, "lastLayer": 3, "vram": "1Gi"}]});
    let steps = [
        (
            true,
            "first placement",
            json!({"epoch": 1, "term": 4, "placement": on("node-a")}),
        ),
        (
            false,
            "same epoch to another node",
            json!({"epoch": 1, "placement": on("node-b")}),
        ),
        (
            false,
            "same epoch to another device",
            json!({"placement": {"stages": [{"gpuUUID": "GPU-2", "firstLayer": 0, "lastLayer": 3, "vram": "1Gi"}]}}),
        ),
        (
            false,
            "placement dropped, to be added again",
            json!({"placement": null}),
        ),
        (
            false,
            "jump by two",
            json!({"epoch": 3, "placement": on("node-b")}),
        ),
        (false, "epoch disappears", json!({"epoch": null})),
        (
            false,
            "epoch and placement disappear",
            json!({"epoch": null, "placement": null}),
        ),
        (false, "the whole status disappears", Value::Null),
        (
            false,
            "a lower term",
            json!({"epoch": 2, "term": 3, "placement": on("node-b")}),
        ),
        (false, "term disappears", json!({"term": null})),
        (
            true,
            "next epoch on another node",
            json!({"epoch": 2, "term": 5, "placement": on("node-b")}),
        ),
        (
            false,
            "back to the epoch before",
            json!({"epoch": 1, "placement": on("node-a")}),
        ),
        (
            true,
            "next epoch, nowhere",
            json!({"epoch": 3, "placement": null}),
        ),
        (
            false,
            "placed without a new epoch",
            json!({"placement": on("node-c")}),
        ),
        (
            true,
            "placed again",
            json!({"epoch": 4, "placement": on("node-c")}),
        ),
    ];
    for (wanted, what, status) in steps {
        let verdict = server
            .writes_status(&sample, &name, json!({ "status": status }))
            .await;
        assert_eq!(verdict.accepted, wanted, "{what}: {verdict}");
    }
    // The spec's writer can't reach the status at all.
    let verdict = server
        .writes(&sample, &name, json!({"status": {"epoch": 9}}))
        .await;
    assert!(verdict.accepted, "{verdict}");
    assert_eq!(server.read(&sample, &name).await["status"]["epoch"], json!(4));
}

#[tokio::test]
async fn orders_and_jobs_of_one_node_can_be_selected() {
    let server = Server::get().await;
    let orders = samples::of("Assignment");
    let jobs = samples::of("InferenceJob");
    for node in ["node-s1", "node-s2"] {
        let mut spec = orders.specs[0].clone();
        spec["nodeName"] = json!(node);
        server
            .store(&orders, &format!("of-{node}"), spec, Value::Null)
            .await;
        let placement = json!({"nodeName": node, "stages": [{"gpuUUID": "GPU-1", "firstLayer": 0, "lastLayer": 3, "vram": "1Gi"}]});
        server
            .store(
                &jobs,
                &format!("on-{node}"),
                jobs.specs[0].clone(),
                json!({"epoch": 1, "placement": placement}),
            )
            .await;
    }
    assert_eq!(
        server.names(&orders, "spec.nodeName=node-s1").await,
        ["of-node-s1"]
    );
    assert_eq!(
        server.names(&jobs, "status.placement.nodeName=node-s2").await,
        ["on-node-s2"]
    );
}

#[tokio::test]
async fn the_api_server_takes_the_crds_without_a_complaint() {
    let server = Server::get().await;
    for crd in server.stored_crds().await {
        let conditions = crd
            .status
            .and_then(|status| status.conditions)
            .unwrap_or_default();
        let complaints: Vec<_> = conditions
            .iter()
            .filter(|condition| condition.type_ == "NonStructuralSchema" || condition.status != "True")
            .collect();
        assert!(complaints.is_empty() && conditions.len() >= 2, "{complaints:?}");
    }
}

#[tokio::test]
async fn absent_fields_get_the_documented_values() {
    let server = Server::get().await;
    let jobs = samples::of("InferenceJob");
    let least = json!({"model": {"uri": "file:m", "sha256": "0".repeat(64)}, "input": {"inline": ["{}"]}, "output": {"configMap": "out"}});
    let name = server.store(&jobs, "least", least, Value::Null).await;
    let stored = server.read(&jobs, &name).await;
    let job: gogrid_api::InferenceJob = serde_json::from_value(stored).unwrap();
    assert_eq!(job.spec.generation, gogrid_api::job::Generation::default());
    assert_eq!(job.spec.placement, gogrid_api::job::Placement::default());
    assert_eq!(
        (
            job.spec.context_tokens,
            job.spec.parallel_sequences,
            job.spec.backoff_limit,
            job.spec.suspend
        ),
        (2048, 16, 3, false)
    );

    let profiles = samples::of("ResourceProfile");
    let least = json!({"vram": {}, "compute": {}, "cpu": {}, "maxBatchSize": 1});
    let name = server.store(&profiles, "least", least, Value::Null).await;
    let profile: gogrid_api::ResourceProfile =
        serde_json::from_value(server.read(&profiles, &name).await).unwrap();
    assert_eq!(profile.spec.adaptive, gogrid_api::profile::Adaptive::default());
    assert_eq!(profile.spec.io, gogrid_api::profile::IoLimit::default());
}
