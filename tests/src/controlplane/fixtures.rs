//! Nodes, agent pods and tokens as a kubelet would have them, made of objects alone.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::core::NamespaceResourceScope;
use kube::{Resource, ResourceExt as _};
use serde_json::json;

use super::ControlPlane;

const FIELD_MANAGER: &str = "gogrid-tests";
/// Long enough for any test; the API server caps nothing below a day.
const TOKEN_SECONDS: i64 = 6 * 3600;

impl ControlPlane {
    /// Makes a Ready, untainted node of 8 CPUs and 32 GiB that no kubelet stands behind.
    pub async fn create_node(&self, name: &str) -> Result<Node> {
        self.create_node_with(name, &[], &[]).await
    }

    /// As [`Self::create_node`], with more labels and more (or other) allocatable resources, each as `(name, value)`.
    pub async fn create_node_with(
        &self,
        name: &str,
        labels: &[(&str, &str)],
        allocatable: &[(&str, &str)],
    ) -> Result<Node> {
        let nodes: Api<Node> = Api::all(self.admin_client().await?);
        let mut all_labels: BTreeMap<&str, &str> = [
            ("kubernetes.io/hostname", name),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", "amd64"),
        ]
        .into();
        all_labels.extend(labels.iter().copied());
        let node = serde_json::from_value(json!({"metadata": {"name": name, "labels": all_labels}}))?;
        nodes
            .create(&PostParams::default(), &node)
            .await
            .with_context(|| format!("creating node {name}"))?;
        let mut resources: BTreeMap<&str, &str> = [
            ("cpu", "8"),
            ("memory", "32Gi"),
            ("ephemeral-storage", "100Gi"),
            ("pods", "110"),
        ]
        .into();
        resources.extend(allocatable.iter().copied());
        let status = json!({"status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Test", "message": "made by a test"}],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": name}],
        }});
        nodes
            .patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
            .await?;
        // Admission taints every new node as not ready; the controller that would take it away is switched off.
        let untainted = json!({"spec": {"taints": null}});
        Ok(nodes
            .patch(name, &PatchParams::default(), &Patch::Merge(&untainted))
            .await?)
    }

    /// Makes the namespace unless it is there.
    pub async fn ensure_namespace(&self, name: &str) -> Result<Namespace> {
        let namespaces: Api<Namespace> = Api::all(self.admin_client().await?);
        let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let parameters = PatchParams::apply(FIELD_MANAGER);
        Ok(namespaces.patch(name, &parameters, &Patch::Apply(&body)).await?)
    }

    /// Makes the service account, and its namespace, unless they are there.
    pub async fn ensure_service_account(&self, namespace: &str, name: &str) -> Result<ServiceAccount> {
        self.ensure_namespace(namespace).await?;
        let accounts = self.namespaced::<ServiceAccount>(namespace).await?;
        let body = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
        let parameters = PatchParams::apply(FIELD_MANAGER);
        Ok(accounts.patch(name, &parameters, &Patch::Apply(&body)).await?)
    }

    /// Makes the pod `<service_account>-<node>` bound to `node`, as a DaemonSet and the scheduler would, with its
    /// namespace and service account. Nothing runs in it.
    pub async fn create_agent_pod(&self, node: &str, namespace: &str, service_account: &str) -> Result<Pod> {
        let name = format!("{service_account}-{node}");
        self.create_pod_on(node, namespace, service_account, &name).await
    }

    /// As [`Self::create_agent_pod`], under that name.
    pub async fn create_pod_on(
        &self,
        node: &str,
        namespace: &str,
        service_account: &str,
        name: &str,
    ) -> Result<Pod> {
        self.ensure_service_account(namespace, service_account).await?;
        let pod = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"app.kubernetes.io/name": service_account}},
            "spec": {
                "nodeName": node,
                "serviceAccountName": service_account,
                "containers": [{"name": "main", "image": "gogrid.test/none"}],
            },
        }))?;
        let pods = self.namespaced::<Pod>(namespace).await?;
        pods.create(&PostParams::default(), &pod)
            .await
            .with_context(|| format!("creating pod {namespace}/{name}"))
    }

    /// A token as the kubelet would project it into `pod`: it carries the pod's node and dies with the pod.
    pub async fn token_bound_to_pod(
        &self,
        namespace: &str,
        service_account: &str,
        pod: &str,
    ) -> Result<String> {
        let uid = self.namespaced::<Pod>(namespace).await?.get(pod).await?.uid();
        let bound = BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(pod.to_owned()),
            uid,
        };
        self.token(namespace, service_account, Some(bound)).await
    }

    /// A token bound to nothing but the service account, for programs whose node does not matter.
    pub async fn token_for_sa(&self, namespace: &str, service_account: &str) -> Result<String> {
        self.token(namespace, service_account, None).await
    }

    async fn token(
        &self,
        namespace: &str,
        service_account: &str,
        bound_object_ref: Option<BoundObjectReference>,
    ) -> Result<String> {
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: Vec::new(),
                bound_object_ref,
                expiration_seconds: Some(TOKEN_SECONDS),
            },
            ..TokenRequest::default()
        };
        let accounts = self.namespaced::<ServiceAccount>(namespace).await?;
        let answer = accounts
            .create_token_request(service_account, &PostParams::default(), &request)
            .await
            .with_context(|| format!("asking for a token of {namespace}/{service_account}"))?;
        Ok(answer.status.context("the API server sent no token")?.token)
    }

    async fn namespaced<K>(&self, namespace: &str) -> Result<Api<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Ok(Api::namespaced(self.admin_client().await?, namespace))
    }
}
