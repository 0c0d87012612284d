//! Single reads and writes at the API server, each with one meaning and one deadline.
//!
//! Owns: how an object is written: server-side apply with the agents' one manager, with `resourceVersion` where two
//! could race. Must not decide what is written or when.

use crate::config::Config;
use crate::event::WriteFailure;
use gogrid_agent_core::results::Chunk;
use gogrid_api::names::{
    AGENT_MANAGER, ASSIGNMENT_LABEL, INPUT_KEY, JOB_UID_LABEL, LEADER_LEASE, LEADER_NAMESPACE, NODE_LABEL,
    RESULTS_KEY, ROLE_LABEL, result_chunk,
};
use gogrid_api::{Assignment, AssignmentStatus, GpuNode, GpuNodeStatus};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource as _};
use serde_json::json;
use std::collections::BTreeMap;

/// The calls of one agent.
#[derive(Clone)]
pub(crate) struct Calls {
    assignments: Api<Assignment>,
    config_maps: Api<ConfigMap>,
    gpu_nodes: Api<GpuNode>,
    nodes: Api<Node>,
    leaders: Api<Lease>,
    node: String,
}

fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    }
}

impl From<kube::Error> for WriteFailure {
    fn from(error: kube::Error) -> Self {
        Self {
            gone: code(&error) == 404,
            error: error.to_string(),
        }
    }
}

/// Which assignment, exactly.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Its name.
    pub(crate) name: String,
    /// Its uid.
    pub(crate) uid: String,
    /// The job's uid.
    pub(crate) job_uid: String,
    /// Its version as last seen.
    pub(crate) resource_version: String,
}

impl Calls {
    /// Calls over that client.
    pub(crate) fn new(client: &Client, config: &Config) -> Self {
        Self {
            assignments: Api::namespaced(client.clone(), &config.namespace),
            config_maps: Api::namespaced(client.clone(), &config.namespace),
            gpu_nodes: Api::all(client.clone()),
            nodes: Api::all(client.clone()),
            leaders: Api::namespaced(client.clone(), LEADER_NAMESPACE),
            node: config.node.clone(),
        }
    }

    /// An owner reference to this agent's Node, if that can be read.
    pub(crate) async fn node_owner(&self) -> Result<Option<OwnerReference>, kube::Error> {
        let node = self.nodes.get_opt(&self.node).await?;
        Ok(node.and_then(|node| node.owner_ref(&())))
    }

    /// Term of the leader Lease; 0 where there is none.
    pub(crate) async fn leader_term(&self) -> Result<i64, kube::Error> {
        let lease = self.leaders.get_opt(LEADER_LEASE).await?;
        Ok(i64::from(
            lease
                .and_then(|l| l.spec)
                .and_then(|s| s.lease_transitions)
                .unwrap_or(0),
        ))
    }

    /// An assignment as it is now.
    pub(crate) async fn assignment(&self, name: &str) -> Result<Option<Assignment>, kube::Error> {
        self.assignments.get_opt(name).await
    }

    /// Text of a staged input; `None` when the ConfigMap or its key is missing.
    pub(crate) async fn input(&self, name: &str) -> Result<Option<String>, kube::Error> {
        let map = self.config_maps.get_opt(name).await?;
        Ok(map
            .and_then(|m| m.data)
            .and_then(|mut data| data.remove(INPUT_KEY)))
    }

    /// Writes an assignment's status. A conflict is resolved once, by looking: the spec may have got its stop.
    pub(crate) async fn status(
        &self,
        target: &Target,
        status: &AssignmentStatus,
    ) -> Result<String, WriteFailure> {
        match self.apply_status(target, &target.resource_version, status).await {
            Err(error) if code(&error) == 409 => {
                let gone = || WriteFailure {
                    gone: true,
                    error: "the assignment is another one now".into(),
                };
                let now = self.assignments.get_opt(&target.name).await?.ok_or_else(gone)?;
                if now.metadata.uid.as_deref() != Some(&target.uid) {
                    return Err(gone());
                }
                let version = now.metadata.resource_version.unwrap_or_default();
                Ok(self.apply_status(target, &version, status).await?)
            }
            other => Ok(other?),
        }
    }

    async fn apply_status(
        &self,
        t: &Target,
        version: &str,
        status: &AssignmentStatus,
    ) -> Result<String, kube::Error> {
        let patch = json!({
            "apiVersion": Assignment::api_version(&()),
            "kind": Assignment::kind(&()),
            "metadata": {"name": t.name, "resourceVersion": version},
            "status": status,
        });
        let params = PatchParams::apply(AGENT_MANAGER);
        let written = self
            .assignments
            .patch_status(&t.name, &params, &Patch::Apply(patch))
            .await?;
        Ok(written.metadata.resource_version.unwrap_or_default())
    }

    /// Makes a result chunk durable. One of the same name is from an attempt whose answer got lost: it is replaced.
    pub(crate) async fn chunk(
        &self,
        target: &Target,
        number: u32,
        chunk: Chunk,
    ) -> Result<String, WriteFailure> {
        let name = result_chunk(&target.name, &self.node, number);
        let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let mut map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(BTreeMap::from([
                    label(JOB_UID_LABEL, &target.job_uid),
                    label(ASSIGNMENT_LABEL, &target.name),
                    label(ROLE_LABEL, "result"),
                    label(NODE_LABEL, &self.node),
                ])),
                owner_references: Some(vec![OwnerReference {
                    api_version: Assignment::api_version(&()).into_owned(),
                    kind: Assignment::kind(&()).into_owned(),
                    name: target.name.clone(),
                    uid: target.uid.clone(),
                    ..OwnerReference::default()
                }]),
                ..ObjectMeta::default()
            },
            data: Some(BTreeMap::from([(RESULTS_KEY.to_owned(), chunk.text)])),
            ..ConfigMap::default()
        };
        let params = PostParams {
            field_manager: Some(AGENT_MANAGER.into()),
            ..PostParams::default()
        };
        let written = match self.config_maps.create(&params, &map).await {
            Err(error) if code(&error) == 409 => {
                let old = self.config_maps.get(&name).await?;
                if old.data == map.data && old.metadata.owner_references == map.metadata.owner_references {
                    old
                } else {
                    map.metadata.resource_version = old.metadata.resource_version;
                    self.config_maps.replace(&name, &params, &map).await?
                }
            }
            other => other?,
        };
        Ok(written.metadata.resource_version.unwrap_or_default())
    }

    /// Makes the node's GpuNode, or gives it its owner.
    pub(crate) async fn ensure_gpu_node(&self, owner: Option<&OwnerReference>) -> Result<(), kube::Error> {
        let patch = json!({
            "apiVersion": GpuNode::api_version(&()),
            "kind": GpuNode::kind(&()),
            "metadata": {"name": self.node, "ownerReferences": owner.into_iter().collect::<Vec<_>>()},
            "spec": {"nodeName": self.node},
        });
        self.gpu_nodes
            .patch(
                &self.node,
                &PatchParams::apply(AGENT_MANAGER),
                &Patch::Apply(patch),
            )
            .await?;
        Ok(())
    }

    /// Writes the GpuNode's status; makes the object first when it is missing.
    pub(crate) async fn gpu_node_status(
        &self,
        status: &GpuNodeStatus,
        ensure: bool,
    ) -> Result<(), kube::Error> {
        if ensure {
            let owner = self.node_owner().await?;
            self.ensure_gpu_node(owner.as_ref()).await?;
        }
        let patch = json!({
            "apiVersion": GpuNode::api_version(&()),
            "kind": GpuNode::kind(&()),
            "metadata": {"name": self.node},
            "status": status,
        });
        self.gpu_nodes
            .patch_status(
                &self.node,
                &PatchParams::apply(AGENT_MANAGER),
                &Patch::Apply(patch),
            )
            .await?;
        Ok(())
    }
}
