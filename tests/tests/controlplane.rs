//! The control plane that the other tests stand on is real, quick to wait for and leaves nothing behind.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use gogrid_tests::controlplane::{ControlPlane, ControlPlaneOptions, apply_yaml_documents};
use gogrid_tests::wait::eventually;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node};
use kube::Api;
use kube::api::{DeleteParams, PostParams};

const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_token_bound_to_an_agents_pod_names_the_pods_node_to_the_api_server() -> Result<()> {
    let plane = ControlPlane::shared().await?;
    plane.create_node("claimed").await?;
    plane.create_agent_pod("claimed", "claims", "agent").await?;
    let token = plane
        .token_bound_to_pod("claims", "agent", "agent-claimed")
        .await?;

    let user = whoami(&plane, &token).await?;
    assert_eq!(
        user.username.as_deref(),
        Some("system:serviceaccount:claims:agent")
    );
    let extra = user.extra.context("the review names no extra attributes")?;
    assert_eq!(
        extra.get("authentication.kubernetes.io/node-name"),
        Some(&vec!["claimed".to_owned()])
    );

    let unbound = whoami(&plane, &plane.token_for_sa("claims", "agent").await?).await?;
    assert!(
        !unbound
            .extra
            .unwrap_or_default()
            .contains_key("authentication.kubernetes.io/node-name")
    );
    Ok(())
}

#[tokio::test]
async fn a_node_made_by_a_test_is_ready_untainted_and_has_what_was_asked_for() -> Result<()> {
    let plane = ControlPlane::shared().await?;
    plane
        .create_node_with("roomy", &[("zone", "a")], &[("memory", "64Gi")])
        .await?;
    let node = Api::<Node>::all(plane.admin_client().await?).get("roomy").await?;
    let allocatable = node
        .status
        .and_then(|status| status.allocatable)
        .unwrap_or_default();
    assert_eq!(
        allocatable.get("memory").map(|quantity| quantity.0.as_str()),
        Some("64Gi")
    );
    assert_eq!(
        allocatable.get("cpu").map(|quantity| quantity.0.as_str()),
        Some("8")
    );
    assert_eq!(
        node.metadata
            .labels
            .unwrap_or_default()
            .get("zone")
            .map(String::as_str),
        Some("a")
    );
    assert!(
        node.spec
            .and_then(|spec| spec.taints)
            .unwrap_or_default()
            .is_empty()
    );
    Ok(())
}

#[tokio::test]
async fn the_audit_log_tells_who_wrote_what_and_nothing_of_reads() -> Result<()> {
    let plane = ControlPlane::shared().await?;
    plane.ensure_service_account("audited", "writer").await?;
    let token = plane.token_for_sa("audited", "writer").await?;
    let writer = Api::<ConfigMap>::namespaced(plane.client_for_token(&token).await?, "audited");

    let since = plane.now();
    let map = serde_json::from_value(serde_json::json!({"metadata": {"name": "note"}}))?;
    let refused = writer.create(&PostParams::default(), &map).await;
    assert!(matches!(refused, Err(kube::Error::Api(status)) if status.code == 403));
    assert!(writer.list(&kube::api::ListParams::default()).await.is_err());

    let events = plane.audit_writes(since, plane.now())?;
    let mine: Vec<_> = events
        .iter()
        .filter(|event| event.user == "system:serviceaccount:audited:writer")
        .collect();
    assert_eq!(mine.len(), 1, "{mine:?}");
    let event = mine[0];
    assert_eq!(
        (
            event.verb.as_str(),
            event.resource.as_str(),
            event.namespace.as_str(),
            event.code
        ),
        ("create", "configmaps", "audited", 403)
    );
    Ok(())
}

#[tokio::test]
async fn yaml_with_a_crd_and_an_object_of_its_kind_applies_in_one_go_and_twice() -> Result<()> {
    let plane = ControlPlane::shared().await?;
    let client = plane.admin_client().await?;
    apply_yaml_documents(&client, WIDGETS).await?;
    apply_yaml_documents(&client, WIDGETS).await?;
    let found = plane
        .kubectl(&["get", "widgets", "-n", "shop", "-o", "name"])
        .await?;
    assert_eq!(found.trim(), "widget.tests.gogrid.dev/first");
    Ok(())
}

#[tokio::test]
async fn a_deleted_namespace_goes_with_all_that_is_in_it() -> Result<()> {
    let plane = ControlPlane::shared().await?;
    plane
        .kubectl_apply("{apiVersion: v1, kind: Namespace, metadata: {name: doomed}}")
        .await?;
    plane
        .kubectl(&["create", "configmap", "note", "-n", "doomed"])
        .await?;
    let namespaces = Api::<Namespace>::all(plane.admin_client().await?);
    namespaces.delete("doomed", &DeleteParams::default()).await?;
    eventually(SOON, "the namespace to go", || async {
        match namespaces.get_opt("doomed").await? {
            None => Ok(()),
            Some(left) => Err(anyhow!("still there: {:?}", left.status)),
        }
    })
    .await
}

#[tokio::test]
async fn helm_talks_to_the_control_plane() -> Result<()> {
    let plane = ControlPlane::shared().await?;
    let releases = plane
        .helm(&["list", "--all-namespaces", "--output", "json"])
        .await?;
    assert_eq!(releases.trim(), "[]");
    Ok(())
}

#[tokio::test]
async fn nothing_is_left_of_a_dropped_control_plane_and_its_data_outlive_a_killed_api_server() -> Result<()> {
    let plane = ControlPlane::start(ControlPlaneOptions::default()).await?;
    plane.create_node("durable").await?;
    plane.restart_api_server().await?;
    Api::<Node>::all(plane.admin_client().await?)
        .get("durable")
        .await?;

    let (pids, dir) = (plane.pids(), plane.dir().to_owned());
    assert_eq!(pids.len(), 3);
    for pid in &pids {
        ensure!(
            Path::new(&format!("/proc/{pid}")).exists(),
            "process {pid} should run"
        );
    }
    drop(plane);
    for pid in pids {
        ensure!(
            !Path::new(&format!("/proc/{pid}")).exists(),
            "process {pid} is left"
        );
    }
    ensure!(!dir.exists(), "{} is left", dir.display());
    Ok(())
}

async fn whoami(plane: &ControlPlane, token: &str) -> Result<k8s_openapi::api::authentication::v1::UserInfo> {
    let reviews = Api::<SelfSubjectReview>::all(plane.client_for_token(token).await?);
    let review = reviews
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await?;
    review
        .status
        .and_then(|status| status.user_info)
        .context("the review names no user")
}

const WIDGETS: &str = "\
apiVersion: tests.gogrid.dev/v1
kind: Widget
metadata: {name: first, namespace: shop}
---
# A document of comments only is skipped.
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.tests.gogrid.dev}
spec:
  group: tests.gogrid.dev
  names: {kind: Widget, plural: widgets}
  scope: Namespaced
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object}}
";
