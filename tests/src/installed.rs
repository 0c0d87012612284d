//! GoGrid as its users have it: installed by helm, running in pods on real nodes.
//!
//! Owns: the images of the programs under test, installing them, and finding a pod's processes on this machine. Must not:
//! know what they decide.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{GpuNode, InferenceJob, condition};
use gogrid_testmodels::demo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::chart;
use crate::cluster::{NAMESPACE, program};
use crate::images::{Built, MODELS};
use crate::jobs::{self, sha256};
use crate::nodes::{Nodes, NodesOptions};
use crate::wait::eventually;

/// Tag of the images that the chart asks for by default.
pub const TAG: &str = env!("CARGO_PKG_VERSION");
/// Length of node leases in these installs; every other time follows from it.
pub const LEASE_SECONDS: u32 = 8;

const READY_WITHIN: Duration = Duration::from_secs(90);

/// Writes the images of the programs beside this one to `dir` and returns their paths.
pub async fn write_images(dir: &Path, tag: &str) -> Result<Vec<PathBuf>> {
    let built = Built {
        operator: program("gogrid-operator")?,
        agent: program("gogrid-agent")?,
        worker: program("gogrid-worker")?,
    };
    let (dir, tag) = (dir.to_owned(), tag.to_owned());
    // Compressing takes seconds.
    tokio::task::spawn_blocking(move || {
        let mut written = vec![];
        for (name, image) in built.images(&tag)? {
            let path = dir.join(format!("gogrid-{name}-{tag}.tar"));
            std::fs::write(&path, image.archive).with_context(|| format!("writing {}", path.display()))?;
            written.push(path);
        }
        Ok(written)
    })
    .await?
}

/// A running install.
pub struct Installed {
    /// The nodes it runs on.
    pub nodes: Arc<Nodes>,
    /// A client with every right.
    pub client: Client,
}

impl Installed {
    /// Starts that many nodes with GoGrid's images of this version and the next, once for this process, and installs on them.
    pub async fn start(count: usize, values: &Value) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut images = write_images(dir.path(), TAG).await?;
        // The same programs: what differs of the next version, tests tell them.
        images.extend(write_images(dir.path(), chart::NEXT).await?);
        let nodes = Nodes::shared(NodesOptions {
            count,
            dir: None,
            images,
        })
        .await?;
        Self::on(nodes, values).await
    }

    /// Installs the chart with `values` on top of short leases, and waits until every node is Ready for jobs.
    pub async fn on(nodes: Arc<Nodes>, values: &Value) -> Result<Self> {
        let client = nodes.control.admin_client().await?;
        let installed = Self { nodes, client };
        installed.helm("install", values).await?;
        for node in installed.nodes.all() {
            installed.until_node_ready(node.name()).await?;
        }
        Ok(installed)
    }

    /// `helm install` or `helm upgrade` of the chart, waiting until every pod is ready.
    pub async fn helm(&self, action: &str, values: &Value) -> Result<String> {
        self.helm_chart(action, &chart::dir(), values).await
    }

    /// As [`Self::helm`], of the chart in that directory.
    pub async fn helm_chart(&self, action: &str, chart: &Path, values: &Value) -> Result<String> {
        let mut merged = json!({
            "operator": {"extraArgs": [format!("--lease-duration-seconds={LEASE_SECONDS}")]},
            "agent": {"extraArgs": [format!("--lease-duration-seconds={LEASE_SECONDS}")]},
        });
        merge(&mut merged, values);
        let file = self.nodes.dir().join("values.json");
        std::fs::write(&file, merged.to_string())?;
        let (chart, file) = (chart.display().to_string(), file.display().to_string());
        self.nodes
            .control
            .helm(&[
                action,
                chart::RELEASE,
                &chart,
                "--namespace",
                NAMESPACE,
                "--create-namespace",
                "--wait",
                "--timeout",
                "120s",
                "--values",
                &file,
            ])
            .await
            .with_context(|| self.nodes.log_tails(6))
    }

    /// Waits until that node's GpuNode says Ready.
    pub async fn until_node_ready(&self, node: &str) -> Result<()> {
        let nodes: Api<GpuNode> = Api::all(self.client.clone());
        eventually(READY_WITHIN, &format!("GpuNode {node} to be Ready"), || async {
            let status = nodes.get(node).await?.status.unwrap_or_default();
            ensure!(
                condition::is_true(&status.conditions, "Ready"),
                "{}",
                jobs::short(&status.conditions)
            );
            Ok(())
        })
        .await
    }

    /// The pods of one component (`operator`, `agent`), those that are being deleted left out.
    pub async fn pods(&self, component: &str) -> Result<Vec<Pod>> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        let selector = format!("app.kubernetes.io/component={component}");
        let found = pods.list(&ListParams::default().labels(&selector)).await?.items;
        Ok(found
            .into_iter()
            .filter(|pod| pod.metadata.deletion_timestamp.is_none())
            .collect())
    }

    /// The agent's pod on that node.
    pub async fn agent_pod(&self, node: &str) -> Result<Pod> {
        let pods = self.pods("agent").await?;
        let on = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node);
        pods.into_iter()
            .find(on)
            .with_context(|| format!("no agent pod on {node}"))
    }

    /// Waits until a job is Finished, either way, and returns it.
    pub async fn until_finished(&self, job: &InferenceJob, within: Duration) -> Result<InferenceJob> {
        let finished = jobs::until_finished(&self.client, job, within).await;
        match finished {
            Ok(job) => Ok(job),
            Err(error) => Err(error.context(self.pod_logs(20).await)),
        }
    }

    /// The last lines of every container of GoGrid's, for a message about something that went wrong.
    pub async fn pod_logs(&self, lines: usize) -> String {
        let mut all = String::new();
        for component in ["operator", "agent"] {
            for pod in self.pods(component).await.unwrap_or_default() {
                let tail = format!("--tail={lines}");
                let name = pod.name_any();
                let args = [
                    "logs",
                    "-n",
                    NAMESPACE,
                    &name,
                    "--all-containers",
                    "--prefix",
                    &tail,
                ];
                let log = self.nodes.control.kubectl(&args).await;
                all += &log.unwrap_or_else(|error| format!("{name}: {error:#}\n"));
            }
        }
        all
    }
}

/// Puts `more` over `base`, object by object; lists are appended to.
fn merge(base: &mut Value, more: &Value) {
    match (base, more) {
        (Value::Object(base), Value::Object(more)) => {
            for (key, value) in more {
                merge(base.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (Value::Array(base), Value::Array(more)) => base.extend(more.iter().cloned()),
        (base, more) => *base = more.clone(),
    }
}

/// A job's spec over inline records with the demo model that every agent's image holds.
pub fn spec(lines: &[String], output: &str) -> Result<Value> {
    let model = demo::Quant::Q4K;
    let mut spec = jobs::spec(lines, output)?;
    spec["model"] = json!({
        "uri": format!("file://{MODELS}/{}", model.file_name()),
        "sha256": sha256(&demo::demo_model_path(model))?,
    });
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_merged_object_by_object_and_lists_grow() {
        let mut base = json!({"a": {"list": [1], "kept": true}});
        merge(&mut base, &json!({"a": {"list": [2]}, "b": 3}));
        assert_eq!(base, json!({"a": {"list": [1, 2], "kept": true}, "b": 3}));
    }
}
