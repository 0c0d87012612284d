//! The chart: what helm makes of it, and what the API server makes of that.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Duration;

use anyhow::anyhow;
use gogrid_tests::chart;
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::wait::eventually;
use serde_json::{Value, json};

/// As little as the schema lets through.
fn minimal() -> Value {
    json!({
        "modelRoots": ["/m"], "crds": {"enabled": false}, "rbac": {"aggregate": false}, "operator": {"replicas": 1},
        "priorityClass": {"create": false, "name": "low"}, "agent": {"nodeSelector": null, "tolerations": []},
    })
}

/// Everything set to something else than its default.
fn maximal() -> Value {
    let image = |name: &str| json!({"repository": name, "tag": "t", "digest": format!("sha256:{}", "0".repeat(64)), "pullPolicy": "Always"});
    let pod = |name: &str| {
        json!({
            "image": image(name), "metricsPort": 19000, "extraArgs": ["--extra=1"], "nodeSelector": {"a": "b"},
            "tolerations": [{"operator": "Exists"}], "podAnnotations": {"c": "d"},
            "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        })
    };
    let mut operator = pod("o");
    operator["replicas"] = json!(3);
    operator["priorityClassName"] = json!("high");
    let mut agent = pod("a");
    agent["stateDir"] = json!("/data/gogrid");
    agent["podResourcesDir"] = json!("/data/kubelet/pod-resources");
    agent["gpuResources"] = json!(["nvidia.com/gpu"]);
    agent["runtimeClassName"] = json!("nvidia");
    agent["maxUnavailable"] = json!("10%");
    json!({
        "global": {"imageRegistry": "registry.example", "imagePullSecrets": ["pull"], "another-charts": {"key": 1}}, "enabled": true,
        "modelRoots": ["/m", "/n"], "operator": operator, "agent": agent, "workers": {"image": image("w")},
        "priorityClass": {"value": -5}, "admission": {"adminGroups": ["admins"]},
        "networkPolicy": {"apiServerCidrs": ["10.0.0.0/8"], "apiServerPorts": [8443], "metricsFrom": [{"podSelector": {}}]},
        "monitoring": {"dashboards": {"enabled": true}},
        "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "extra", "namespace": "elsewhere"}}],
    })
}

/// Two kinds of nodes.
fn flavoured() -> Value {
    json!({"agent": {"flavours": {"cuda": {"runtimeClassName": "nvidia", "tolerations": [{"operator": "Exists"}]}}}})
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents
        .iter()
        .filter(|document| document["kind"] == kind)
        .collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

#[tokio::test]
async fn helm_has_nothing_to_say_against_the_chart() {
    let dir = chart::dir();
    chart::helm(&[
        "lint".as_ref(),
        "--strict".as_ref(),
        chart::KUBE_VERSION.as_ref(),
        dir.as_os_str(),
    ])
    .await
    .unwrap();
}

#[tokio::test]
async fn a_key_or_a_value_that_the_schema_does_not_know_is_refused() {
    let wrong = [
        json!({"modelRoot": ["/m"]}),
        json!({"operator": {"replica": 1}}),
        json!({"operator": {"replicas": 0}}),
        json!({"agent": {"image": {"name": "x"}}}),
        json!({"agent": {"stateDir": "relative"}}),
        json!({"modelRoots": []}),
        json!({"workers": {"image": {"digest": "md5:0"}}}),
        json!({"priorityClass": {"name": "system-node-critical"}}),
        json!({"admission": {"adminGroups": []}}),
        json!({"monitoring": {"podMonitor": {"interval": "soon"}}}),
        json!({"monitoring": {"prometheusRule": {"runbookBaseUrl": "https://no.slash"}}}),
        json!({"networkPolicy": {"apiServerPorts": []}}),
        json!({"agent": {"flavours": {"Not_A_Label": {}}}}),
        json!({"agent": {"flavours": {"cuda": {"image": {}}}}}),
        json!({"agent": {"maxUnavailable": "0%"}}),
        json!({"extraObjects": [1]}),
        json!({"enabled": "yes"}),
    ];
    for values in wrong {
        let refused = chart::render(&values).await.unwrap_err().to_string();
        assert!(
            refused.contains("values don't meet the specifications of the schema"),
            "{values}: {refused}"
        );
    }
}

#[tokio::test]
async fn every_object_has_its_namespace_and_none_is_a_namespace() {
    let documents =
        chart::documents(&chart::render_as("gogrid", "elsewhere", &json!({})).await.unwrap()).unwrap();
    let cluster_wide: BTreeSet<&str> = [
        "CustomResourceDefinition",
        "ClusterRole",
        "ClusterRoleBinding",
        "FlowSchema",
        "PriorityClass",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ]
    .into();
    for document in &documents {
        let kind = text(&document["kind"]);
        assert_ne!(kind, "Namespace");
        let namespace = document["metadata"]["namespace"].as_str();
        assert_eq!(
            namespace.is_none(),
            cluster_wide.contains(kind),
            "{kind} {}",
            document["metadata"]["name"]
        );
        let leader = text(&document["metadata"]["name"]).ends_with("-leader");
        assert!(
            namespace.is_none_or(|found| found == if leader { "kube-system" } else { "elsewhere" }),
            "{document}"
        );
    }
    assert_eq!(of_kind(&documents, "CustomResourceDefinition").len(), 4);
    for crd in of_kind(&documents, "CustomResourceDefinition") {
        assert_eq!(crd["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    }
}

/// A policy that names another account than the pods have matches nobody, and nobody notices.
#[tokio::test]
async fn policies_name_the_accounts_that_the_pods_run_as_whatever_the_release_is_called() {
    for (release, namespace, values) in [
        ("gogrid", "gogrid-system", json!({})),
        ("two", "elsewhere", json!({})),
        ("r", "n", json!({"nameOverride": "other"})),
        (
            "r",
            "n",
            json!({"fullnameOverride": "a-name-that-is-so-long-that-it-has-to-be-cut-somewhere"}),
        ),
    ] {
        let documents =
            chart::documents(&chart::render_as(release, namespace, &values).await.unwrap()).unwrap();
        let account_of = |kind: &str| {
            text(&of_kind(&documents, kind)[0]["spec"]["template"]["spec"]["serviceAccountName"]).to_owned()
        };
        let (operator, agent) = (account_of("Deployment"), account_of("DaemonSet"));
        let accounts: BTreeSet<&str> = of_kind(&documents, "ServiceAccount")
            .iter()
            .map(|account| text(&account["metadata"]["name"]))
            .collect();
        assert_eq!(accounts, BTreeSet::from([operator.as_str(), agent.as_str()]));
        let policies = of_kind(&documents, "ValidatingAdmissionPolicy");
        assert_eq!(
            policies.len(),
            of_kind(&documents, "ValidatingAdmissionPolicyBinding").len()
        );
        for policy in &policies {
            let spec = policy["spec"].to_string();
            assert_eq!(policy["spec"]["failurePolicy"], "Fail");
            assert!(
                spec.contains(&format!("'system:serviceaccount:{namespace}:{agent}'")),
                "{spec}"
            );
        }
        assert!(policies.iter().any(|policy| {
            policy
                .to_string()
                .contains(&format!("'system:serviceaccount:{namespace}:{operator}'"))
        }));
        for binding in of_kind(&documents, "RoleBinding")
            .into_iter()
            .chain(of_kind(&documents, "ClusterRoleBinding"))
        {
            let subject = &binding["subjects"][0];
            assert!(
                accounts.contains(text(&subject["name"])) && subject["namespace"] == namespace,
                "{binding}"
            );
        }
        for document in &documents {
            assert!(
                text(&document["metadata"]["name"]).len() <= 63
                    || document["kind"] == "CustomResourceDefinition"
            );
        }
    }
}

#[tokio::test]
async fn only_the_agent_container_has_a_token_and_no_container_has_more_than_it_needs() {
    for values in [json!({}), maximal()] {
        let documents = chart::documents(&chart::render(&values).await.unwrap()).unwrap();
        let daemon_set = &of_kind(&documents, "DaemonSet")[0]["spec"]["template"]["spec"];
        let deployment = &of_kind(&documents, "Deployment")[0]["spec"]["template"]["spec"];
        assert_eq!(daemon_set["automountServiceAccountToken"], false);
        for flag in ["hostPID", "hostNetwork", "hostIPC", "shareProcessNamespace"] {
            assert!(daemon_set.get(flag).is_none() && deployment.get(flag).is_none());
        }
        let containers = daemon_set["containers"].as_array().unwrap();
        let mounts = |name: &str| -> Vec<String> {
            let container = containers
                .iter()
                .find(|container| container["name"] == name)
                .unwrap();
            container["volumeMounts"]
                .as_array()
                .unwrap()
                .iter()
                .map(|mount| text(&mount["name"]).to_owned())
                .collect()
        };
        assert_eq!(mounts("workers"), ["socket"]);
        assert!(mounts("agent").contains(&"token".to_owned()));
        for container in containers
            .iter()
            .chain(deployment["containers"].as_array().unwrap())
        {
            let security = &container["securityContext"];
            assert_eq!(security["readOnlyRootFilesystem"], true, "{container}");
            assert_eq!(security["allowPrivilegeEscalation"], false);
            assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
            assert!(
                container["resources"]["limits"]["memory"].is_string()
                    && container["resources"]["limits"].get("cpu").is_none()
            );
            assert_eq!(security["runAsUser"] == 0, container["name"] == "agent");
        }
        for volume in daemon_set["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|volume| text(&volume["name"]).starts_with("models-"))
        {
            let agent = containers
                .iter()
                .find(|container| container["name"] == "agent")
                .unwrap();
            let mount = agent["volumeMounts"]
                .as_array()
                .unwrap()
                .iter()
                .find(|mount| mount["name"] == volume["name"])
                .unwrap();
            assert_eq!(mount["readOnly"], true);
            assert_eq!(mount["mountPath"], volume["hostPath"]["path"]);
        }
    }
}

#[tokio::test]
async fn no_role_reaches_secrets_or_uses_a_wildcard() {
    let documents = chart::documents(&chart::render(&json!({})).await.unwrap()).unwrap();
    for role in of_kind(&documents, "Role")
        .into_iter()
        .chain(of_kind(&documents, "ClusterRole"))
    {
        for rule in role["rules"].as_array().unwrap() {
            let words: Vec<&str> = ["apiGroups", "resources", "verbs"]
                .iter()
                .flat_map(|key| rule[*key].as_array().unwrap())
                .map(text)
                .collect();
            assert!(
                !words.contains(&"*") && !words.contains(&"secrets") && !words.contains(&"escalate"),
                "{role}"
            );
        }
    }
}

#[tokio::test]
async fn helm_test_asks_for_the_model_that_the_agents_image_holds() {
    let rendered = chart::render_test("two", "elsewhere", &maximal()).await;
    let documents = chart::documents(&rendered.unwrap()).unwrap();
    let pod = &of_kind(&documents, "Pod")[0]["spec"];
    let model = gogrid_testmodels::demo::Quant::Q4K;
    let digest = gogrid_tests::jobs::sha256(&gogrid_testmodels::demo::demo_model_path(model)).unwrap();
    let args = pod["containers"][0]["args"].to_string();
    let uri = format!("file://{}/{}", gogrid_tests::images::MODELS, model.file_name());
    assert!(args.contains(&digest) && args.contains(&uri), "{args}");
    assert_eq!(pod["nodeSelector"], json!({"a": "b"}));
    assert_eq!(pod["tolerations"], json!([{"operator": "Exists"}]));
    assert_eq!(pod["serviceAccountName"], "two-gogrid-trial");
    // What a test may do goes with it; its pod stays, for its log.
    for document in &documents {
        let policy = text(&document["metadata"]["annotations"]["helm.sh/hook-delete-policy"]);
        assert_eq!(
            policy.contains("hook-succeeded"),
            document["kind"] != "Pod",
            "{document}"
        );
    }
}

#[tokio::test]
async fn the_api_server_takes_every_object_that_the_chart_can_render() {
    let plane = ControlPlane::shared().await.unwrap();
    plane.ensure_namespace("elsewhere").await.unwrap();
    for (release, values) in [
        ("gogrid", json!({})),
        ("two", minimal()),
        ("three", maximal()),
        ("four", flavoured()),
    ] {
        let rendered = chart::render_as(release, "elsewhere", &values).await.unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(rendered.as_bytes()).unwrap();
        let said = plane
            .kubectl(&[
                "apply",
                "--server-side",
                "--dry-run=server",
                "--validate=strict",
                "--force-conflicts",
                "-f",
                &file.path().display().to_string(),
            ])
            .await
            .unwrap();
        assert_eq!(
            said.lines().count(),
            chart::documents(&rendered).unwrap().len(),
            "{said}"
        );
    }
}

/// Asked of the API server itself: what it says against the pods under the strictest standard.
#[tokio::test]
async fn the_operator_passes_restricted_pod_security_and_the_agent_fails_it_by_host_paths_and_root_alone() {
    let plane = ControlPlane::shared().await.unwrap();
    let documents =
        chart::documents(&chart::render_as("gogrid", "strict", &json!({})).await.unwrap()).unwrap();
    plane.ensure_namespace("strict").await.unwrap();
    let label = "pod-security.kubernetes.io/enforce=restricted";
    plane
        .kubectl(&["label", "--overwrite", "namespace", "strict", label])
        .await
        .unwrap();
    for account in [chart::OPERATOR, chart::AGENT] {
        plane.ensure_service_account("strict", account).await.unwrap();
    }
    let ask = async |kind: &str| {
        let mut pod = of_kind(&documents, kind)[0]["spec"]["template"].clone();
        pod["apiVersion"] = json!("v1");
        pod["kind"] = json!("Pod");
        pod["metadata"]["name"] = json!("asked");
        // Its class is made by the chart, which is not installed here.
        pod["spec"].as_object_mut().unwrap().remove("priorityClassName");
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(pod.to_string().as_bytes()).unwrap();
        let path = file.path().display().to_string();
        plane
            .kubectl(&["create", "--dry-run=server", "--namespace", "strict", "-f", &path])
            .await
    };
    ask("Deployment").await.unwrap();
    let said = ask("DaemonSet").await.unwrap_err().to_string();
    let (_, violations) = said
        .split_once("violates PodSecurity \"restricted:latest\": ")
        .unwrap();
    // In these words the standard names its controls.
    for wanted in ["hostPath", "runAsUser=0"] {
        assert!(violations.contains(wanted), "{violations}");
    }
    for other in [
        "privileged",
        "allowPrivilegeEscalation",
        "capabilities",
        "seccompProfile",
        "host namespaces",
        "hostPort",
    ] {
        assert!(!violations.contains(other), "{violations}");
    }
}

/// The whole life of a release, with the real helm.
#[tokio::test]
async fn uninstalling_keeps_the_jobs_and_installing_again_finds_them() {
    let plane = ControlPlane::shared().await.unwrap();
    let dir = chart::dir().display().to_string();
    let helm = async |args: &[&str]| {
        plane
            .helm(&[args, &["--namespace", "gogrid-system"]].concat())
            .await
            .unwrap()
    };
    let notes = helm(&["install", "gogrid", &dir, "--create-namespace"]).await;
    assert!(notes.contains("kubectl get gpunodes"), "{notes}");
    let job = json!({
        "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob", "metadata": {"name": "kept", "namespace": "default"},
        "spec": {"model": {"uri": "file:m", "sha256": "0".repeat(64)}, "input": {"inline": ["{}"]}, "output": {"configMap": "out"}},
    });
    eventually(Duration::from_secs(30), "jobs to be accepted", || async {
        plane.kubectl_apply(&job.to_string()).await
    })
    .await
    .unwrap();
    policies_have_no_warnings(&plane).await;

    let second = async |more: &str| {
        let install = [
            "install",
            "two",
            &dir,
            "--namespace",
            "elsewhere",
            "--create-namespace",
        ];
        plane.helm(&[&install, &[more][..]].concat()).await
    };
    // Before it has changed anything, whoever brings the CRDs: its policies would deny the first one's writes.
    for crds in ["--set=crds.enabled=true", "--set=crds.enabled=false"] {
        let refused = second(crds).await.unwrap_err().to_string();
        assert!(
            refused.contains("cannot be imported into the current release"),
            "{refused}"
        );
    }
    let operators = ["get", "deployments", "--all-namespaces", "--output", "name"];
    let operators = plane.kubectl(&operators).await.unwrap();
    assert_eq!(operators.trim(), "deployment.apps/gogrid-operator");

    helm(&["upgrade", "gogrid", &dir, "--set", "operator.replicas=1"]).await;
    helm(&["uninstall", "gogrid"]).await;
    let kept = plane
        .kubectl(&[
            "get",
            "inferencejobs",
            "--namespace",
            "default",
            "--output",
            "name",
        ])
        .await
        .unwrap();
    assert_eq!(kept.trim(), "inferencejob.gogrid.dev/kept");
    let gone = plane
        .kubectl(&["get", "validatingadmissionpolicies", "--output", "name"])
        .await
        .unwrap();
    assert_eq!(gone.trim(), "", "nothing but CRDs stays");

    helm(&["install", "gogrid", &dir]).await;
    let columns = plane
        .kubectl(&[
            "get",
            "inferencejobs",
            "--namespace",
            "default",
            "--output",
            "wide",
        ])
        .await
        .unwrap();
    let header: Vec<&str> = columns.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        header,
        [
            "NAME",
            "MODEL",
            "PROFILE",
            "STATUS",
            "PROGRESS",
            "NODE",
            "TOKENS/S",
            "AGE",
            "REASON",
            "VRAM",
            "STAGES",
            "HEARTBEAT",
            "OUTPUT"
        ]
    );

    // The CRDs that stay belong to the release that made them, until another one is told to take them.
    helm(&["uninstall", "gogrid"]).await;
    let refused = second("--skip-crds").await.unwrap_err().to_string();
    assert!(refused.contains("CustomResourceDefinition"), "{refused}");
    second("--take-ownership").await.unwrap();
}

/// The controllers check the types in every expression; a warning there is a rule that fails when it is needed.
async fn policies_have_no_warnings(plane: &ControlPlane) {
    eventually(
        Duration::from_secs(60),
        "the policies' expressions to be checked",
        || async {
            let list = plane
                .kubectl(&["get", "validatingadmissionpolicies", "--output", "json"])
                .await?;
            let list: Value = serde_json::from_str(&list)?;
            for policy in list["items"].as_array().ok_or_else(|| anyhow!("no list"))? {
                let status = &policy["status"];
                if status["observedGeneration"] != policy["metadata"]["generation"] {
                    return Err(anyhow!("{} is not looked at yet", policy["metadata"]["name"]));
                }
                let warnings = status["typeChecking"]["expressionWarnings"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                assert!(
                    warnings.is_empty(),
                    "{}: {warnings:#?}",
                    policy["metadata"]["name"]
                );
            }
            Ok(())
        },
    )
    .await
    .unwrap();
}
