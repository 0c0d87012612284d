//! What a job can go through, from its creation until nothing is left of it.
//!
//! Owns: each flow's steps as a user, a node's admin or a failing worker does them. Knows nothing of who is killed meanwhile.

use anyhow::{Context as _, Result, ensure};
use gogrid_api::assignment::State;
use gogrid_api::condition;
use gogrid_api::job::InferenceJob;
use gogrid_api::names::{DRAIN_NODE_ANNOTATION, RESULTS_KEY, result_chunk};
use gogrid_tests::cluster::Cluster;
use gogrid_tests::jobs::{Questions, short};
use gogrid_tests::wait::eventually;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::end::{End, LONG, Over, nothing_left, objects, spec, workers};
use crate::{FLOW_LABEL, World};

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Placed, run, published.
    Finish,
    /// A worker is killed once; the job is tried again.
    Retry,
    /// Suspended when records are saved, and resumed.
    Suspend,
    /// Its node is drained when records are saved; it goes on elsewhere.
    Drain,
    /// Deleted while it runs.
    Delete,
}

impl Flow {
    pub(crate) const ALL: [Self; 5] = [
        Self::Finish,
        Self::Retry,
        Self::Suspend,
        Self::Drain,
        Self::Delete,
    ];

    /// Its name, which is also its nodes' label.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Finish => "finish",
            Self::Retry => "retry",
            Self::Suspend => "suspend",
            Self::Drain => "drain",
            Self::Delete => "delete",
        }
    }

    /// Nodes that no other flow uses; a job begins on the first.
    pub(crate) fn nodes(self) -> &'static [&'static str] {
        match self {
            Self::Finish => &["finish-1"],
            Self::Retry => &["retry-1"],
            Self::Suspend => &["suspend-1"],
            Self::Drain => &["drain-1", "drain-2"],
            Self::Delete => &["delete-1"],
        }
    }

    /// Runs it with a job of that name; returns how it ends, once nothing else is left.
    pub(crate) async fn run(self, world: &World, name: &str) -> Result<End> {
        let cluster = &world.cluster;
        let (records, slow) = match self {
            Self::Finish => (6, false),
            // Long enough to be Running, which is told after half a lease.
            Self::Retry => (40, true),
            Self::Suspend | Self::Drain | Self::Delete => (60, true),
        };
        let questions = Questions::new(1, records);
        // Inputs and answers of some travel in the order, those of others beside it.
        let questions = match self {
            Self::Finish | Self::Retry | Self::Suspend => questions,
            Self::Drain | Self::Delete => questions.wordy(),
        };
        if self == Self::Drain {
            drain(cluster, self.nodes()[0], false).await?;
            drain(cluster, self.nodes()[1], true).await?;
        }
        let mut spec = spec(&questions, name, (FLOW_LABEL, self.name()), slow)?;
        spec["backoffLimit"] = json!(1);
        let job = cluster.create_job("default", name, spec).await?;
        let uid = job.uid().context("no uid")?;
        let saved = match self {
            Self::Finish => vec![],
            Self::Retry => {
                fail_once(cluster, &job, self.nodes()[0]).await?;
                vec![]
            }
            Self::Suspend => {
                let saved = until_saved(cluster, &uid).await?;
                self.suspend_and_resume(cluster, &job).await?;
                saved
            }
            Self::Drain => {
                let saved = until_saved(cluster, &uid).await?;
                drain(cluster, self.nodes()[1], false).await?;
                drain(cluster, self.nodes()[0], true).await?;
                saved
            }
            Self::Delete => {
                until_running(cluster, &uid).await?;
                let jobs = cluster.jobs("default");
                jobs.delete(name, &DeleteParams::default()).await?;
                nothing_left(world, &uid, self.nodes(), 0).await?;
                ensure!(jobs.get_opt(name).await?.is_none(), "the job is still there");
                return Ok(None);
            }
        };
        let job = cluster.until_finished(&job, LONG).await?;
        nothing_left(world, &uid, self.nodes(), 1).await?;
        let over = Over::read(cluster, &job, &questions, &saved).await?;
        let jobs = cluster.jobs("default");
        jobs.delete(name, &DeleteParams::default()).await?;
        Ok(Some(over))
    }

    async fn suspend_and_resume(self, cluster: &Cluster, job: &InferenceJob) -> Result<()> {
        let jobs = cluster.jobs("default");
        let suspend = async |on: bool| {
            let patch = Patch::Merge(json!({"spec": {"suspend": on}}));
            jobs.patch(&job.name_any(), &PatchParams::default(), &patch).await
        };
        suspend(true).await?;
        cluster
            .until(job, "the job to be Suspended", LONG, |job| {
                let conditions = job.status.clone().unwrap_or_default().conditions;
                ensure!(
                    condition::is_true(&conditions, "Suspended"),
                    "{}",
                    short(&conditions)
                );
                Ok(())
            })
            .await?;
        let left = workers(cluster, self.nodes()[0])?;
        ensure!(left.is_empty(), "suspended beside workers {left:?}");
        suspend(false).await?;
        Ok(())
    }
}

/// Kills the job's workers, once they run, until one attempt is counted.
async fn fail_once(cluster: &Cluster, job: &InferenceJob, node: &str) -> Result<()> {
    let jobs = cluster.jobs("default");
    eventually(LONG, "a counted failure", || async {
        // In this order: a worker that is seen before no attempt is counted is not the second attempt's.
        let workers = workers(cluster, node)?;
        let status = jobs.get(&job.name_any()).await?.status.unwrap_or_default();
        if status.attempts > 0 {
            return Ok(());
        }
        let (orders, _, _) = objects(cluster, &job.uid().context("no uid")?).await?;
        let newest = orders.iter().max_by_key(|order| order.spec.epoch);
        let state = newest.and_then(|order| order.status.as_ref()?.state);
        // One that is killed while it starts has another word for it.
        ensure!(state == Some(State::Running), "the newest order is {state:?}");
        for worker in &workers {
            let pid = Pid::from_raw(i32::try_from(*worker)?).context("no process has number 0")?;
            // It may have ended by itself meanwhile, with its agent.
            let _ = kill_process(pid, Signal::KILL);
        }
        anyhow::bail!("workers {workers:?}; {}", short(&status.conditions))
    })
    .await
    .with_context(|| cluster.log_tails(25))
}

/// Waits until an order says that some of its job's records are saved, and returns these.
async fn until_saved(cluster: &Cluster, uid: &str) -> Result<Vec<String>> {
    eventually(LONG, "saved records", || async {
        let (assignments, chunks, _) = objects(cluster, uid).await?;
        let text = |name: &str| {
            let map = chunks.iter().find(|map| map.name_any() == name);
            map.and_then(|map| map.data.clone()?.remove(RESULTS_KEY))
        };
        let mut saved = vec![];
        let mut keep = |text: &str| saved.extend(text.lines().map(str::to_owned));
        for order in &assignments {
            let checkpoint = order.status.as_ref().and_then(|s| s.checkpoint.clone());
            let checkpoint = checkpoint.unwrap_or_default();
            for n in 0..u32::try_from(checkpoint.chunks)? {
                let name = result_chunk(&order.name_any(), &order.spec.node_name, n);
                keep(&text(&name).with_context(|| format!("{name} is saved and not there"))?);
            }
            keep(&checkpoint.text.unwrap_or_default());
        }
        ensure!(!saved.is_empty(), "none in {} orders", assignments.len());
        Ok(saved)
    })
    .await
    .with_context(|| cluster.log_tails(25))
}

async fn until_running(cluster: &Cluster, uid: &str) -> Result<()> {
    eventually(LONG, "an order to be Running", || async {
        let (assignments, _, _) = objects(cluster, uid).await?;
        let states: Vec<Option<State>> = assignments
            .iter()
            .map(|a| a.status.as_ref().and_then(|s| s.state))
            .collect();
        ensure!(states.contains(&Some(State::Running)), "{states:?}");
        Ok(())
    })
    .await
    .with_context(|| cluster.log_tails(25))
}

/// Asks for a node's jobs to leave it, or no more.
async fn drain(cluster: &Cluster, node: &str, on: bool) -> Result<()> {
    let value = if on { json!("true") } else { Value::Null };
    let patch = Patch::Merge(json!({"metadata": {"annotations": {DRAIN_NODE_ANNOTATION: value}}}));
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    nodes.patch(node, &PatchParams::default(), &patch).await?;
    Ok(())
}
