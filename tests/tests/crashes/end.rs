//! What a job leaves behind, in words by which two runs of the same flow are compared.
//!
//! Equal to the undisturbed run, whoever was killed: the conditions' types, statuses and reasons, attempts, progress, node,
//! numbers of records, and every answer byte for byte but for the job's uid and the worker's stamps (when, in how wide a
//! batch). What one death explains, and no more: one epoch, with its cause in `lastFailure` (an order of a leader that was
//! followed by another goes stale, an agent's orders end with its session), and conditions about passing states, which
//! only an operator that was there to see them has set; where they are set they are equal too. Events tell and are not
//! compared: the one of a write whose answer nobody saw is never told.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::job::InferenceJob;
use gogrid_api::names::JOB_UID_LABEL;
use gogrid_api::{Assignment, GpuNode};
use gogrid_tests::cluster::{Cluster, NAMESPACE};
use gogrid_tests::jobs::{self, Questions};
use gogrid_tests::procfs;
use gogrid_tests::prometheus;
use gogrid_tests::wait::eventually;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::World;

/// How long anything may take that needs no lease to run out.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// About passing states: whoever was down meanwhile never sets them.
const PASSING: [&str; 4] = ["Loaded", "LeaseHeld", "Throttled", "VRAMExceeded"];

/// A job that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Over {
    /// Status and reason by type.
    conditions: BTreeMap<String, (String, String)>,
    attempts: i32,
    epoch: i64,
    last_failure: Option<String>,
    done: Option<i64>,
    node: Option<String>,
    /// Records, and failed ones among them.
    records: Option<(i64, i64)>,
    answers: Vec<String>,
}

/// How a flow ends: `None` when its job is deleted.
pub(crate) type End = Option<Over>;

impl Over {
    /// Reads what is stored of a job that is over; each record must be there once, and what was `saved` before unchanged.
    pub(crate) async fn read(
        cluster: &Cluster,
        job: &InferenceJob,
        questions: &Questions,
        saved: &[String],
    ) -> Result<Self> {
        let status = job.status.clone().unwrap_or_default();
        let results = cluster.results(job).await?;
        questions.right(&results)?;
        let text = published(cluster, job).await?;
        for line in saved {
            ensure!(
                text.lines().any(|published| published == line),
                "a saved record was run again: {line}"
            );
        }
        if let Some(result) = &status.result {
            let digest = Sha256::digest(text.as_bytes());
            let digest: String = digest.iter().map(|b| format!("{b:02x}")).collect();
            ensure!(result.sha256 == digest, "the status tells of another text");
        }
        let uid = job.uid().context("no uid")?;
        Ok(Self {
            conditions: status
                .conditions
                .iter()
                .map(|c| (c.type_.clone(), (format!("{:?}", c.status), c.reason.clone())))
                .collect(),
            attempts: status.attempts,
            epoch: status.epoch,
            // Another test's kill for want of memory is counted by the same kernel.
            last_failure: status
                .last_failure
                .map(|f| f.reason.replace("OutOfMemory", "WorkerExited")),
            done: status.progress.map(|p| p.done),
            node: status.placement.map(|p| p.node_name),
            records: status.result.map(|r| (r.records, r.failed_records)),
            answers: results
                .into_iter()
                .map(|answer| without_stamps(answer, &uid))
                .collect(),
        })
    }

    /// Fails where this differs from the undisturbed run by more than one death explains, of which `cause` is the word.
    /// Returns whether it took an epoch more.
    pub(crate) fn explained(&self, undisturbed: &Self, cause: &str) -> Result<bool> {
        let caused = self.last_failure.as_deref() == Some(cause);
        let mut like = undisturbed.clone();
        if caused {
            like.last_failure.clone_from(&self.last_failure);
        }
        // What fails after the epoch that was lost is the last failure in its stead.
        if self.epoch == undisturbed.epoch + 1 && (caused || undisturbed.last_failure.is_some()) {
            like.epoch = self.epoch;
        }
        let types: BTreeSet<&String> = self
            .conditions
            .keys()
            .chain(undisturbed.conditions.keys())
            .collect();
        for type_ in types.into_iter().filter(|t| PASSING.contains(&t.as_str())) {
            match (self.conditions.get(type_), undisturbed.conditions.get(type_)) {
                (Some(mine), None) => like.conditions.insert(type_.clone(), mine.clone()),
                (None, _) => like.conditions.remove(type_),
                (Some(_), Some(_)) => None,
            };
        }
        ensure!(*self == like, "ended as {self:#?}\nundisturbed {undisturbed:#?}");
        Ok(self.epoch > undisturbed.epoch)
    }
}

async fn published(cluster: &Cluster, job: &InferenceJob) -> Result<String> {
    let name = job.spec.output.config_map.clone().context("no output")?;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "default");
    let data = maps.get(&name).await?.data.unwrap_or_default();
    data.get(gogrid_api::names::RESULTS_KEY)
        .cloned()
        .context("no text")
}

fn without_stamps(mut answer: Value, uid: &str) -> String {
    if let Some(body) = answer
        .pointer_mut("/response/body")
        .and_then(Value::as_object_mut)
    {
        body.remove("gogrid");
    }
    answer.to_string().replace(uid, "UID")
}

/// Objects of a job with that uid, by what they are.
pub(crate) async fn objects(
    cluster: &Cluster,
    uid: &str,
) -> Result<(Vec<Assignment>, Vec<ConfigMap>, Vec<ConfigMap>)> {
    let of_job = ListParams::default().labels(&format!("{JOB_UID_LABEL}={uid}"));
    let client = || cluster.client.clone();
    let assignments: Api<Assignment> = Api::namespaced(client(), NAMESPACE);
    let own: Api<ConfigMap> = Api::namespaced(client(), NAMESPACE);
    let users: Api<ConfigMap> = Api::namespaced(client(), "default");
    Ok((
        assignments.list(&of_job).await?.items,
        own.list(&of_job).await?.items,
        users.list(&of_job).await?.items,
    ))
}

/// Waits until nothing is left of a job with that uid but `published` ConfigMaps in its namespace: no order, chunk or staged
/// input, and on its nodes no worker, no reserved byte and no word of it.
pub(crate) async fn nothing_left(world: &World, uid: &str, nodes: &[&str], published: usize) -> Result<()> {
    let cluster = &world.cluster;
    eventually(LONG, "nothing to be left of the job", || async {
        let (assignments, own, users) = objects(cluster, uid).await?;
        ensure!(
            assignments.is_empty() && own.is_empty() && users.len() == published,
            "{} assignments, ConfigMaps {:?}, {} in the job's namespace",
            assignments.len(),
            own.iter().map(ConfigMap::name_any).collect::<Vec<_>>(),
            users.len()
        );
        for node in nodes {
            holds_nothing(world, node, uid).await?;
        }
        Ok(())
    })
    .await
    .with_context(|| cluster.log_tails(25))
}

async fn holds_nothing(world: &World, node: &str, uid: &str) -> Result<()> {
    let cluster = &world.cluster;
    let workers = workers(cluster, node)?;
    ensure!(workers.is_empty(), "{node}: workers {workers:?}");
    let metrics = prometheus::get(*world.metrics.get(node).context("no such node")?, "/metrics").await?;
    for idle in [
        r#"gogrid_device_memory_reserved_bytes{device="cpu"} 0"#,
        "gogrid_assignments 0",
    ] {
        ensure!(metrics.lines().any(|line| line == idle), "{node}: not {idle}");
    }
    let nodes: Api<GpuNode> = Api::all(cluster.client.clone());
    let heartbeat = nodes.get(node).await?.status.unwrap_or_default().heartbeat;
    let running = heartbeat.map(|h| h.running).unwrap_or_default();
    ensure!(
        running.iter().all(|r| !r.assignment.starts_with(uid)),
        "GpuNode {node} still says {running:?}"
    );
    Ok(())
}

/// Workers of that node's agent.
pub(crate) fn workers(cluster: &Cluster, node: &str) -> Result<Vec<u32>> {
    let agent = u32::try_from(cluster.process(node)?.pid())?;
    Ok(procfs::workers_of(agent)?
        .into_iter()
        .map(|worker| worker.pid)
        .collect())
}

/// Spec of a job that is tried on nodes with that label; a slow one takes 100 ms and more a record.
pub(crate) fn spec(questions: &Questions, output: &str, label: (&str, &str), slow: bool) -> Result<Value> {
    let mut spec = jobs::spec(&questions.lines(), output)?;
    spec["placement"] = json!({"nodeSelector": {label.0: label.1}});
    if slow {
        spec["profileName"] = json!("conservative");
    }
    Ok(spec)
}
