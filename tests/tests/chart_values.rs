//! What each value makes of the chart: a case for every branch of the templates, and four whole renderings.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use gogrid_reference::compare;
use gogrid_tests::branches::Branches;
use gogrid_tests::{chart, schemas};
use serde_json::{Value, json};

/// One thing that a set of values must bring about.
struct Case {
    values: Value,
    kind: &'static str,
    name: &'static str,
    pointer: &'static str,
    /// `None`: nothing is there, be it the object or the field.
    wanted: Option<Value>,
}

fn case(values: Value, kind: &'static str, name: &'static str, pointer: &'static str, wanted: Value) -> Case {
    Case {
        values,
        kind,
        name,
        pointer,
        wanted: Some(wanted),
    }
}

fn absent(values: Value, kind: &'static str, name: &'static str, pointer: &'static str) -> Case {
    Case {
        values,
        kind,
        name,
        pointer,
        wanted: None,
    }
}

async fn outcome(case: &Case) -> Result<(), String> {
    let Case {
        values,
        kind,
        name,
        pointer,
        wanted,
    } = case;
    let rendered = chart::rendered(values).await.map_err(|error| error.to_string())?;
    let found = rendered
        .iter()
        .find(|document| document["kind"] == *kind && document["metadata"]["name"] == *name)
        .and_then(|document| document.pointer(pointer));
    if found == wanted.as_ref() {
        return Ok(());
    }
    Err(format!(
        "{values}: {kind} {name} {pointer}: {found:?}, not {wanted:?}"
    ))
}

async fn all_hold(cases: Vec<Case>) {
    let mut wrong = Vec::new();
    for case in &cases {
        wrong.extend(outcome(case).await.err());
    }
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), cases.len());
}

const POD: &str = "/spec/template/spec";

/// Blocks over what is never empty: constants, files of the chart, and lists of which the schema wants one entry.
const NEVER_LEFT: [&str; 13] = [
    "NOTES.txt: range .Values.modelRoots",
    "_helpers.tpl: range .",
    "_helpers.tpl: range .Values.modelRoots",
    "admission-writers.yaml: range $i, $g := .Values.admission.adminGroups",
    "agent.yaml: range $i, $root := .Values.modelRoots",
    "agent.yaml: range .Values.agent.gpuResources",
    "agent.yaml: with .root",
    "crds.yaml: range $path, $_ := .Files.Glob \"files/crds/*.yaml\"",
    "dashboards.yaml: range $path, $_ := .Files.Glob \"files/dashboards/*.json\"",
    "networkpolicy.yaml: range .",
    "networkpolicy.yaml: range .Values.networkPolicy.apiServerPorts",
    "podmonitors.yaml: range $component := list \"operator\" \"agent\"",
    "serviceaccounts.yaml: range $name := list (include \"gogrid.operator\" .) (include \"gogrid.agent\" .)",
];

fn cases_of_both_kinds_of_pods() -> Vec<Case> {
    let pods = |part: Value| json!({"operator": part, "agent": part});
    let mut cases = vec![];
    for (kind, name) in [("Deployment", "gogrid-operator"), ("DaemonSet", "gogrid-agent")] {
        cases.extend([
            case(
                pods(json!({"affinity": {"podAffinity": {}}})),
                kind,
                name,
                "/spec/template/spec/affinity",
                json!({"podAffinity": {}}),
            ),
            absent(json!({}), kind, name, "/spec/template/spec/affinity"),
            case(
                pods(json!({"podAnnotations": {"a": "b"}})),
                kind,
                name,
                "/spec/template/metadata/annotations/a",
                json!("b"),
            ),
            case(
                pods(json!({"nodeSelector": {"kubernetes.io/os": "other"}})),
                kind,
                name,
                "/spec/template/spec/nodeSelector",
                json!({"kubernetes.io/os": "other"}),
            ),
            case(
                pods(json!({"tolerations": [{"operator": "Exists"}]})),
                kind,
                name,
                "/spec/template/spec/tolerations",
                json!([{"operator": "Exists"}]),
            ),
            absent(
                pods(json!({"tolerations": []})),
                kind,
                name,
                "/spec/template/spec/tolerations",
            ),
            case(
                pods(json!({"metricsPort": 9999})),
                kind,
                name,
                "/spec/template/spec/containers/0/ports/0/containerPort",
                json!(9999),
            ),
            case(
                pods(json!({"resources": {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}}})),
                kind,
                name,
                "/spec/template/spec/containers/0/resources",
                json!({"requests": {"cpu": "1", "memory": "64Mi"}, "limits": {"memory": "1Gi"}}),
            ),
            case(
                json!({"global": {"imagePullSecrets": ["s"]}}),
                kind,
                name,
                "/spec/template/spec/imagePullSecrets",
                json!([{"name": "s"}]),
            ),
            absent(json!({}), kind, name, "/spec/template/spec/imagePullSecrets"),
            case(
                pods(json!({"image": {"repository": "r", "tag": "t", "pullPolicy": "Never"}})),
                kind,
                name,
                "/spec/template/spec/containers/0/image",
                json!("r:t"),
            ),
            case(
                json!({"global": {"imageRegistry": "reg:5000/x"}, "operator": {"image": {"repository": "r"}}, "agent": {"image": {"repository": "r"}}}),
                kind,
                name,
                "/spec/template/spec/containers/0/image",
                json!("reg:5000/x/r:0.1.0"),
            ),
            case(
                pods(
                    json!({"image": {"repository": "r", "tag": "t", "digest": format!("sha256:{}", "0".repeat(64))}}),
                ),
                kind,
                name,
                "/spec/template/spec/containers/0/image",
                json!(format!("r@sha256:{}", "0".repeat(64))),
            ),
        ]);
    }
    cases
}

#[tokio::test]
async fn each_value_of_both_kinds_of_pods_ends_in_its_field() {
    all_hold(cases_of_both_kinds_of_pods()).await;
}

fn with_arguments(part: &str) -> Value {
    json!({"modelRoots": ["/m", "/n"], part: {"extraArgs": ["--last=1"]}})
}

#[tokio::test]
async fn arguments_come_from_values_and_further_ones_come_last() {
    for (kind, part) in [("Deployment", "operator"), ("DaemonSet", "agent")] {
        let values = with_arguments(part);
        let rendered = chart::rendered(&values).await.unwrap();
        let object = rendered.iter().find(|o| o["kind"] == kind).unwrap();
        let args: Vec<&str> = object
            .pointer(&format!("{POD}/containers/0/args"))
            .unwrap()
            .as_array()
            .unwrap()
            .iter()
            .map(|arg| arg.as_str().unwrap())
            .collect();
        for wanted in [
            "--namespace=$(POD_NAMESPACE)",
            "--model-root=/m",
            "--model-root=/n",
        ] {
            assert!(args.contains(&wanted), "{kind}: {args:?}");
        }
        assert_eq!(args.last(), Some(&"--last=1"), "{kind}");
    }
}

fn cases_of_agents() -> Vec<Case> {
    vec![
        absent(
            json!({}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/runtimeClassName",
        ),
        case(
            json!({"agent": {"runtimeClassName": "nvidia"}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/runtimeClassName",
            json!("nvidia"),
        ),
        case(
            json!({"agent": {"maxUnavailable": "10%"}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/updateStrategy/rollingUpdate/maxUnavailable",
            json!("10%"),
        ),
        case(
            json!({"agent": {"terminationGracePeriodSeconds": 90}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/terminationGracePeriodSeconds",
            json!(90),
        ),
        case(
            json!({"workers": {"resources": {"limits": {"memory": "2Gi"}}}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/containers/1/resources/limits/memory",
            json!("2Gi"),
        ),
        case(
            json!({"agent": {"podResourcesDir": "/k0s/pod-resources"}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/containers/0/volumeMounts/4",
            json!({"name": "pod-resources", "mountPath": "/k0s/pod-resources", "readOnly": true}),
        ),
        case(
            json!({"agent": {"podResourcesDir": "/k0s/pod-resources"}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/volumes/4/hostPath/path",
            json!("/k0s/pod-resources"),
        ),
        case(
            json!({"agent": {"podResourcesDir": ""}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/volumes/4/name",
            json!("models-0"),
        ),
        absent(
            json!({"agent": {"nodeSelector": {"kubernetes.io/os": null}}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/nodeSelector",
        ),
    ]
}

#[tokio::test]
async fn each_value_of_the_agents_alone_ends_in_its_field() {
    all_hold(cases_of_agents()).await;
}

#[tokio::test]
async fn the_kubelet_is_asked_for_the_resources_that_are_named_and_not_at_all_where_its_directory_is_empty() {
    let args = |values: Value| async move {
        let rendered = chart::rendered(&values).await.unwrap();
        let agent = rendered.iter().find(|o| o["kind"] == "DaemonSet").unwrap();
        let args = agent.pointer(&format!("{POD}/containers/0/args")).unwrap();
        let args = args
            .as_array()
            .unwrap()
            .iter()
            .map(|arg| arg.as_str().unwrap().to_owned());
        args.filter(|arg| arg.starts_with("--pod-resources") || arg.starts_with("--gpu"))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        args(json!({"agent": {"podResourcesDir": "/k", "gpuResources": ["a.dev/gpu"]}})).await,
        [
            "--pod-resources-socket=/k/kubelet.sock",
            "--gpu-resource=a.dev/gpu"
        ]
    );
    assert_eq!(
        args(json!({"agent": {"podResourcesDir": "", "gpuResources": ["a", "b*"]}})).await,
        ["--gpu-resource=a", "--gpu-resource=b*"]
    );
}

fn cases_of_flavours() -> Vec<Case> {
    let digest = format!("sha256:{}", "1".repeat(64));
    let flavour = |of: Value| json!({"workers": {"image": {"digest": digest.clone()}}, "agent": {"flavours": {"cuda": of}}});
    let full = flavour(json!({
        "runtimeClassName": "nvidia", "tolerations": [{"operator": "Exists"}],
        "workers": {"image": {"repository": "w/cuda"}, "resources": {"limits": {"memory": "9Gi"}}},
    }));
    let of = |pointer: &'static str, wanted: Value| {
        case(full.clone(), "DaemonSet", "gogrid-agent-cuda", pointer, wanted)
    };
    vec![
        of("/spec/template/spec/runtimeClassName", json!("nvidia")),
        of("/spec/template/spec/tolerations", json!([{"operator": "Exists"}])),
        of(
            "/spec/template/spec/nodeSelector",
            json!({"kubernetes.io/os": "linux", "gogrid.dev/flavour": "cuda"}),
        ),
        of("/spec/selector/matchLabels/gogrid.dev~1flavour", json!("cuda")),
        // Another repository has another digest: the plain one's would name no image there.
        of("/spec/template/spec/containers/1/image", json!("w/cuda:0.1.0")),
        of(
            "/spec/template/spec/containers/1/resources",
            json!({"limits": {"memory": "9Gi"}}),
        ),
        of("/spec/template/spec/serviceAccountName", json!("gogrid-agent")),
        case(
            full.clone(),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0/matchExpressions/0",
            json!({"key": "gogrid.dev/flavour", "operator": "NotIn", "values": ["cuda"]}),
        ),
        case(
            flavour(json!({})),
            "DaemonSet",
            "gogrid-agent-cuda",
            "/spec/template/spec/containers/1/image",
            json!(format!("gogrid/worker@{digest}")),
        ),
        case(
            flavour(json!({"workers": {"image": {"tag": "t"}}})),
            "DaemonSet",
            "gogrid-agent-cuda",
            "/spec/template/spec/containers/1/image",
            json!("gogrid/worker:t"),
        ),
        case(
            flavour(json!({"workers": {"image": {"digest": format!("sha256:{}", "2".repeat(64))}}})),
            "DaemonSet",
            "gogrid-agent-cuda",
            "/spec/template/spec/containers/1/image",
            json!(format!("gogrid/worker@sha256:{}", "2".repeat(64))),
        ),
        case(
            flavour(json!({})),
            "DaemonSet",
            "gogrid-agent-cuda",
            "/spec/template/spec/containers/1/resources/limits/memory",
            json!("8Gi"),
        ),
        absent(json!({}), "DaemonSet", "gogrid-agent-cuda", ""),
    ]
}

fn refused_flavours() -> [(Value, &'static str); 2] {
    [
        (
            json!({"agent": {"flavours": {"default": {}}}}),
            "no flavour may be called default",
        ),
        (
            json!({"agent": {"flavours": {"cuda": {}}, "affinity": {"nodeAffinity": {"x": 1}}}}),
            "can't be used together with agent.flavours",
        ),
    ]
}

#[tokio::test]
async fn a_flavour_has_nodes_runtime_and_workers_of_its_own_and_the_plain_agent_keeps_off_them() {
    all_hold(cases_of_flavours()).await;
    for (values, said) in refused_flavours() {
        let refused = chart::render(&values).await.unwrap_err().to_string();
        assert!(refused.contains(said), "{refused}");
    }
}

fn cases_of_switches() -> Vec<Case> {
    let monitoring = |key: &str, value: Value| json!({"monitoring": {key: value}});
    let on = || json!({"enabled": true, "labels": {"found": "by"}});
    vec![
        absent(
            json!({"crds": {"enabled": false}}),
            "CustomResourceDefinition",
            "inferencejobs.gogrid.dev",
            "",
        ),
        case(
            json!({}),
            "CustomResourceDefinition",
            "inferencejobs.gogrid.dev",
            "/metadata/annotations/helm.sh~1resource-policy",
            json!("keep"),
        ),
        absent(
            json!({"rbac": {"aggregate": false}}),
            "ClusterRole",
            "gogrid-view",
            "",
        ),
        case(
            json!({}),
            "ClusterRole",
            "gogrid-view",
            "/metadata/labels/rbac.authorization.k8s.io~1aggregate-to-view",
            json!("true"),
        ),
        case(
            json!({}),
            "ClusterRole",
            "gogrid-edit",
            "/metadata/labels/rbac.authorization.k8s.io~1aggregate-to-admin",
            json!("true"),
        ),
        case(
            json!({}),
            "PodDisruptionBudget",
            "gogrid-operator",
            "/spec/maxUnavailable",
            json!(1),
        ),
        absent(
            json!({"operator": {"replicas": 1}}),
            "PodDisruptionBudget",
            "gogrid-operator",
            "",
        ),
        absent(
            json!({"operator": {"podDisruptionBudget": {"enabled": false}}}),
            "PodDisruptionBudget",
            "gogrid-operator",
            "",
        ),
        case(
            json!({}),
            "PriorityClass",
            "gogrid-guest",
            "/preemptionPolicy",
            json!("Never"),
        ),
        case(
            json!({"priorityClass": {"name": "mine", "value": -7}}),
            "PriorityClass",
            "mine",
            "/value",
            json!(-7),
        ),
        absent(
            json!({"priorityClass": {"create": false, "name": "theirs"}}),
            "PriorityClass",
            "theirs",
            "",
        ),
        case(
            json!({"priorityClass": {"create": false, "name": "theirs"}}),
            "DaemonSet",
            "gogrid-agent",
            "/spec/template/spec/priorityClassName",
            json!("theirs"),
        ),
        absent(
            json!({}),
            "Deployment",
            "gogrid-operator",
            "/spec/template/spec/priorityClassName",
        ),
        case(
            json!({"operator": {"priorityClassName": "high"}}),
            "Deployment",
            "gogrid-operator",
            "/spec/template/spec/priorityClassName",
            json!("high"),
        ),
        case(
            json!({}),
            "FlowSchema",
            "gogrid-node-leases",
            "/spec/priorityLevelConfiguration/name",
            json!("node-high"),
        ),
        case(
            json!({}),
            "FlowSchema",
            "gogrid-leader-lease",
            "/spec/priorityLevelConfiguration/name",
            json!("leader-election"),
        ),
        absent(
            json!({"flowSchema": {"enabled": false}}),
            "FlowSchema",
            "gogrid-node-leases",
            "",
        ),
        absent(
            json!({"networkPolicy": {"enabled": false}}),
            "NetworkPolicy",
            "gogrid-operator",
            "",
        ),
        case(
            json!({}),
            "NetworkPolicy",
            "gogrid-operator",
            "/spec/egress",
            json!([{"ports": [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]}]),
        ),
        case(
            json!({"networkPolicy": {"apiServerCidrs": ["10.0.0.1/32"], "apiServerPorts": [8443]}}),
            "NetworkPolicy",
            "gogrid-operator",
            "/spec/egress",
            json!([{"ports": [{"protocol": "TCP", "port": 8443}], "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]}]),
        ),
        case(
            json!({}),
            "NetworkPolicy",
            "gogrid-agent",
            "/spec/policyTypes",
            json!(["Ingress"]),
        ),
        case(
            json!({}),
            "NetworkPolicy",
            "gogrid-agent",
            "/spec/ingress",
            json!([{"ports": [{"protocol": "TCP", "port": 9401}]}]),
        ),
        case(
            json!({"networkPolicy": {"metricsFrom": [{"podSelector": {}}]}}),
            "NetworkPolicy",
            "gogrid-agent",
            "/spec/ingress/0/from",
            json!([{"podSelector": {}}]),
        ),
        absent(json!({}), "PodMonitor", "gogrid-agent", ""),
        case(
            monitoring("podMonitor", json!({"enabled": true, "interval": "15s"})),
            "PodMonitor",
            "gogrid-agent",
            "/spec/podMetricsEndpoints/0/interval",
            json!("15s"),
        ),
        case(
            monitoring("podMonitor", on()),
            "PodMonitor",
            "gogrid-operator",
            "/metadata/labels/found",
            json!("by"),
        ),
        absent(json!({}), "PrometheusRule", "gogrid", ""),
        case(
            monitoring("prometheusRule", on()),
            "PrometheusRule",
            "gogrid",
            "/metadata/labels/found",
            json!("by"),
        ),
        case(
            monitoring("prometheusRule", json!({"enabled": true})),
            "PrometheusRule",
            "gogrid",
            "/spec/groups/0/rules/0/annotations/runbook_url",
            json!("docs/runbooks/GoGridNoLeader.md"),
        ),
        case(
            monitoring(
                "prometheusRule",
                json!({"enabled": true, "runbookBaseUrl": "https://runbooks.example/"}),
            ),
            "PrometheusRule",
            "gogrid",
            "/spec/groups/0/rules/0/annotations/runbook_url",
            json!("https://runbooks.example/GoGridNoLeader.md"),
        ),
        absent(json!({}), "ConfigMap", "gogrid-dashboard-gogrid", ""),
        case(
            monitoring("dashboards", json!({"enabled": true})),
            "ConfigMap",
            "gogrid-dashboard-gogrid",
            "/metadata/labels/grafana_dashboard",
            json!("1"),
        ),
        absent(
            monitoring(
                "dashboards",
                json!({"enabled": true, "labels": {"grafana_dashboard": null}}),
            ),
            "ConfigMap",
            "gogrid-dashboard-gogrid",
            "/metadata/labels/grafana_dashboard",
        ),
        case(
            monitoring("dashboards", on()),
            "ConfigMap",
            "gogrid-dashboard-gogrid",
            "/metadata/labels/found",
            json!("by"),
        ),
        case(
            json!({"extraObjects": [{"kind": "ConfigMap", "metadata": {"name": "as-it-is"}, "data": {"a": "{{ b }}"}}]}),
            "ConfigMap",
            "as-it-is",
            "/data/a",
            json!("{{ b }}"),
        ),
        case(
            json!({"extraObjects": ["kind: ConfigMap\nmetadata: {name: made}\ndata: {a: \"{{ .Release.Name }}\"}"]}),
            "ConfigMap",
            "made",
            "/data/a",
            json!("gogrid"),
        ),
        case(
            json!({"admission": {"adminGroups": ["a", "b"]}}),
            "ValidatingAdmissionPolicy",
            "gogrid-one-writer",
            "/spec/matchConditions/0/expression",
            json!("!request.userInfo.?groups.orValue([]).exists(g, g in ['a', 'b'])"),
        ),
    ]
}

#[tokio::test]
async fn each_object_that_can_be_switched_is_there_exactly_when_it_should_be() {
    all_hold(cases_of_switches()).await;
}

#[tokio::test]
async fn the_dashboard_in_the_cluster_is_the_file_to_the_letter_and_the_rules_are_all_there() {
    let values =
        json!({"monitoring": {"dashboards": {"enabled": true}, "prometheusRule": {"enabled": true}}});
    let rendered = chart::rendered(&values).await.unwrap();
    let dashboard = rendered
        .iter()
        .find(|o| o["metadata"]["name"] == "gogrid-dashboard-gogrid")
        .unwrap();
    let file = std::fs::read_to_string(chart::dir().join("files/dashboards/gogrid.json")).unwrap();
    assert_eq!(
        dashboard["data"]["gogrid.json"].as_str().unwrap().trim(),
        file.trim()
    );
    let rule = rendered.iter().find(|o| o["kind"] == "PrometheusRule").unwrap();
    let alerts = std::fs::read_to_string(chart::dir().join("files/alerts.yaml")).unwrap();
    let alerts: Value = serde_yaml::from_str(&alerts).unwrap();
    assert_eq!(rule["spec"], alerts);
}

fn names() -> [(&'static str, Value, &'static str); 5] {
    [
        ("gogrid", json!({}), "gogrid-operator"),
        ("my-gogrid", json!({}), "my-gogrid-operator"),
        ("two", json!({}), "two-gogrid-operator"),
        ("two", json!({"nameOverride": "x"}), "two-x-operator"),
        ("two", json!({"fullnameOverride": "y"}), "y-operator"),
    ]
}

#[tokio::test]
async fn names_follow_the_release_and_both_overrides() {
    for (release, values, wanted) in names() {
        let rendered = chart::render_as(release, "n", &values).await.unwrap();
        let documents = chart::documents(&rendered).unwrap();
        let deployment = documents.iter().find(|o| o["kind"] == "Deployment").unwrap();
        assert_eq!(deployment["metadata"]["name"], wanted, "{release} {values}");
    }
}

#[tokio::test]
async fn every_object_of_every_case_is_valid_for_every_kubernetes_from_1_32_to_1_36() {
    let cases = [
        cases_of_switches(),
        cases_of_flavours(),
        cases_of_agents(),
        cases_of_both_kinds_of_pods(),
    ];
    let mut objects = BTreeMap::new();
    for case in cases.iter().flatten() {
        let rendered = chart::rendered(&case.values).await.unwrap();
        objects.extend(rendered.iter().map(|object| (object.to_string(), object.clone())));
    }
    let mut objects: Vec<Value> = objects.into_values().collect();
    // Others' groups, whose types no Kubernetes has, and what users add as they like.
    objects.retain(|object| {
        let version = object["apiVersion"].as_str();
        version.is_some_and(|version| !version.starts_with("monitoring.coreos.com/"))
    });
    let said = schemas::check(&objects).unwrap();
    let minors: Vec<&str> = said.keys().map(String::as_str).collect();
    assert_eq!(minors, ["1.32", "1.33", "1.34", "1.35", "1.36"]);
    assert!(
        said.values()
            .all(|said| *said == format!("{} objects", objects.len())),
        "{said:?}"
    );

    let misspelt =
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}, "secretz": []});
    let refused = schemas::check(&[misspelt]).unwrap_err().to_string();
    assert!(refused.contains("unknown field \"secretz\""), "{refused}");
}

/// Every group, version and kind below is served, and not deprecated, in each of them.
#[tokio::test]
async fn the_chart_is_the_same_for_every_kubernetes_from_1_32_to_1_36_and_refused_below() {
    const GA_BEFORE_1_32: [(&str, &str); 16] = [
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy"),
        (
            "admissionregistration.k8s.io/v1",
            "ValidatingAdmissionPolicyBinding",
        ),
        ("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
        ("apps/v1", "DaemonSet"),
        ("apps/v1", "Deployment"),
        ("flowcontrol.apiserver.k8s.io/v1", "FlowSchema"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
        ("policy/v1", "PodDisruptionBudget"),
        ("rbac.authorization.k8s.io/v1", "ClusterRole"),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
        ("rbac.authorization.k8s.io/v1", "Role"),
        ("rbac.authorization.k8s.io/v1", "RoleBinding"),
        ("scheduling.k8s.io/v1", "PriorityClass"),
        ("v1", "ConfigMap"),
        ("v1", "ServiceAccount"),
        ("v1", "Pod"),
    ];
    let oldest = chart::render_for("1.32.0").await.unwrap();
    for document in chart::documents(&oldest).unwrap() {
        let (version, kind) = (
            document["apiVersion"].as_str().unwrap(),
            document["kind"].as_str().unwrap(),
        );
        assert!(GA_BEFORE_1_32.contains(&(version, kind)), "{version} {kind}");
    }
    for minor in 33..=36 {
        assert_eq!(
            chart::render_for(&format!("1.{minor}.0")).await.unwrap(),
            oldest,
            "1.{minor}"
        );
    }
    // As clouds write their versions.
    assert_eq!(chart::render_for("1.33.1-gke.100").await.unwrap(), oldest);
    let refused = chart::render_for("1.31.9").await.unwrap_err().to_string();
    assert!(refused.contains(">=1.32.0"), "{refused}");
}

#[tokio::test]
async fn a_parent_chart_can_switch_it_share_its_globals_and_still_may_not_misspell() {
    let parent = tempfile::tempdir().unwrap();
    chart::copy(&parent.path().join("charts/gogrid")).unwrap();
    std::fs::write(
        parent.path().join("Chart.yaml"),
        "apiVersion: v2\nname: parent\nversion: 1.0.0\ndependencies:\n- name: gogrid\n  version: 0.1.0\n  condition: gogrid.enabled\n",
    )
    .unwrap();
    let render = async |values: Value| {
        let file = parent.path().join("v.json");
        std::fs::write(&file, values.to_string()).unwrap();
        chart::helm(&[
            "template".as_ref(),
            "p".as_ref(),
            parent.path().as_os_str(),
            chart::KUBE_VERSION.as_ref(),
            "--values".as_ref(),
            file.as_os_str(),
        ])
        .await
    };
    let shared = json!({"global": {"theirs": {"a": 1}, "imageRegistry": "reg"}, "gogrid": {"enabled": true}});
    let rendered = render(shared).await.unwrap();
    assert!(rendered.contains("image: \"reg/gogrid/operator:0.1.0\""));
    let off = render(json!({"gogrid": {"enabled": false}})).await.unwrap();
    assert_eq!(chart::documents(&off).unwrap(), Vec::<Value>::new());
    let refused = render(json!({"gogrid": {"operators": {}}}))
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("operators"), "{refused}");
}

/// Whole renderings, so that a change of a template shows in review. CRDs are left out: they are files already.
#[tokio::test]
async fn four_whole_renderings_are_as_committed() {
    let no_crds = json!({"enabled": false});
    for (name, values) in [
        ("default", json!({"crds": no_crds})),
        (
            "minimal",
            json!({
                "crds": no_crds, "operator": {"replicas": 1}, "rbac": {"aggregate": false}, "networkPolicy": {"enabled": false},
                "flowSchema": {"enabled": false}, "priorityClass": {"create": false, "name": "low"}, "agent": {"tolerations": []},
            }),
        ),
        (
            "gpu",
            json!({
                "crds": no_crds, "agent": {"flavours": {"cuda": {
                    "runtimeClassName": "nvidia", "workers": {"image": {"repository": "gogrid/worker-cuda"}}}}},
            }),
        ),
        (
            "monitored",
            json!({
                "crds": no_crds, "global": {"imageRegistry": "registry.example", "imagePullSecrets": ["pull"]},
                "networkPolicy": {"apiServerCidrs": ["10.0.0.1/32"], "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]},
                "monitoring": {"podMonitor": {"enabled": true}, "prometheusRule": {"enabled": true, "runbookBaseUrl": "https://runbooks.example/"}},
            }),
        ),
    ] {
        let rendered = chart::render_as("gogrid", "gogrid-system", &values)
            .await
            .unwrap();
        compare(&format!("tests/golden/chart/{name}.yaml"), &rendered);
    }
}

/// What the cases above leave out would be a branch that nobody looks at.
#[tokio::test]
async fn each_branch_of_the_templates_is_taken_by_one_case_above_and_left_by_another() {
    let mut branches = Branches::new().unwrap();
    for (release, values, _) in names() {
        branches.take(release, &values).await.unwrap();
    }
    for (values, _) in refused_flavours() {
        branches.take("gogrid", &values).await.unwrap();
    }
    for part in ["operator", "agent"] {
        branches.take("gogrid", &with_arguments(part)).await.unwrap();
    }
    let cases = [
        cases_of_switches(),
        cases_of_flavours(),
        cases_of_agents(),
        cases_of_both_kinds_of_pods(),
    ];
    let all: BTreeSet<String> = cases
        .iter()
        .flatten()
        .map(|case| case.values.to_string())
        .collect();
    for values in all {
        let values = serde_json::from_str(&values).unwrap();
        branches.take("gogrid", &values).await.unwrap();
    }
    // Without the line, which every edit moves.
    let unseen: BTreeSet<String> = branches
        .unseen()
        .into_iter()
        .map(|branch| {
            let (place, words) = branch.split_once(": ").unwrap();
            let file = place.split(':').next().unwrap().replace("templates/", "");
            format!("{file}: {words}")
        })
        .collect();
    let never = NEVER_LEFT.map(|block| format!("not {block}"));
    assert_eq!(unseen, BTreeSet::from(never), "of {}", branches.count());
}

/// What the four renderings and the cases above leave out would be a template that nobody looks at.
#[tokio::test]
async fn no_template_is_empty_with_everything_switched_on() {
    let values = json!({
        "monitoring": {"podMonitor": {"enabled": true}, "prometheusRule": {"enabled": true}, "dashboards": {"enabled": true}},
        "extraObjects": [{"kind": "ConfigMap"}],
    });
    let rendered = chart::render(&values).await.unwrap();
    let sources: BTreeSet<&str> = rendered
        .lines()
        .filter_map(|line| line.strip_prefix("# Source: gogrid/templates/"))
        .collect();
    let templates: Vec<String> = std::fs::read_dir(chart::dir().join("templates"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| Path::new(name).extension().is_some_and(|end| end == "yaml"))
        .collect();
    let missing: Vec<&String> = templates
        .iter()
        .filter(|name| !sources.contains(name.as_str()))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
