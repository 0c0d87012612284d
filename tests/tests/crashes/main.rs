//! Programs that die at the worst moments, and what stays true all the same.

#![allow(
    clippy::disallowed_methods,
    reason = "the test measures real time from outside"
)]

mod end;
mod flows;
mod sweep;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gogrid_api::InferenceJob;
use gogrid_tests::cluster::{Cluster, ClusterOptions, lease_seconds, on_runtime, program, tenths_of_lease};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, lasting, spec, succeeded};
use gogrid_tests::ports;
use gogrid_tests::procfs;
use gogrid_tests::wait::eventually;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;

use flows::Flow;
use sweep::{Sweep, Victim};

const LONG: Duration = Duration::from_secs(120);
/// Label of a flow's nodes.
const FLOW_LABEL: &str = "gogrid.test/flow";

/// What all tests here share.
struct World {
    cluster: Cluster,
    /// Where each node's agent serves its metrics.
    metrics: BTreeMap<&'static str, u16>,
}

async fn world() -> Result<Arc<World>> {
    static SHARED: tokio::sync::OnceCell<Arc<World>> = tokio::sync::OnceCell::const_new();
    let made = SHARED.get_or_try_init(|| async { anyhow::Ok(Arc::new(make().await?)) });
    Ok(Arc::clone(made.await?))
}

async fn make() -> Result<World> {
    let nodes = || {
        Flow::ALL
            .into_iter()
            .flat_map(|flow| flow.nodes().iter().map(move |node| (flow, *node)))
    };
    let mut options = ClusterOptions::quick(0);
    let mut metrics = BTreeMap::new();
    for (_, node) in nodes() {
        let place = ports::fixed()?;
        options
            .nodes
            .push((node.to_owned(), Some("aggressive".to_owned())));
        options.metrics.insert(node.to_owned(), place);
        metrics.insert(node, place.port());
    }
    let cluster = Cluster::install(ControlPlane::shared().await?, options).await?;
    let api: Api<Node> = Api::all(cluster.client.clone());
    for (flow, node) in nodes() {
        let label = Patch::Merge(json!({"metadata": {"labels": {FLOW_LABEL: flow.name()}}}));
        api.patch(node, &PatchParams::default(), &label).await?;
    }
    cluster.begin(&BTreeMap::new()).await?;
    Ok(World { cluster, metrics })
}

/// Kills the operator around each of a flow's calls; those of its start are the same in all.
fn operator_dies_in(flow: Flow) -> Result<()> {
    on_runtime(async {
        let world = world().await?;
        let from_start = flow == Flow::Finish;
        let sweep = Sweep {
            world: &world,
            flow,
            victim: Victim::Operator,
            from_start,
            sample: if from_start { 4 } else { 1 },
        };
        sweep.run().await.map(drop)
    })
}

#[test]
fn an_operator_killed_before_or_after_any_call_of_its_start_and_of_a_job_finishes_the_job_and_each_record_once()
-> Result<()> {
    operator_dies_in(Flow::Finish)
}

#[test]
fn an_operator_killed_before_or_after_any_call_about_a_failure_counts_it_once_and_tries_again() -> Result<()>
{
    operator_dies_in(Flow::Retry)
}

#[test]
fn an_operator_killed_before_or_after_any_call_of_a_suspension_keeps_what_is_saved_and_resumes() -> Result<()>
{
    operator_dies_in(Flow::Suspend)
}

#[test]
fn an_operator_killed_before_or_after_any_call_of_a_drain_moves_the_job_with_what_is_saved() -> Result<()> {
    operator_dies_in(Flow::Drain)
}

#[test]
fn an_operator_killed_before_or_after_any_call_about_a_deletion_leaves_nothing_of_the_job() -> Result<()> {
    operator_dies_in(Flow::Delete)
}

#[test]
fn agents_killed_before_or_after_any_of_their_calls_in_any_flow_leave_what_undisturbed_ones_do() -> Result<()>
{
    on_runtime(async {
        let world = world().await?;
        // Each has nodes of its own: they go on at the same time.
        let sweeps = Flow::ALL.map(|flow| Sweep {
            world: &world,
            flow,
            victim: Victim::Agent,
            from_start: flow == Flow::Finish,
            sample: 2,
        });
        let kills = futures::future::try_join_all(sweeps.iter().map(Sweep::run)).await?;
        ensure!(kills.iter().all(|kills| *kills > 0), "{kills:?}");
        Ok(())
    })
}

async fn finished_right(
    cluster: &Cluster,
    job: &InferenceJob,
    questions: &Questions,
) -> Result<InferenceJob> {
    let job = cluster.until_finished(job, LONG).await?;
    succeeded(&job)?;
    questions.right(&cluster.results(&job).await?)?;
    Ok(job)
}

async fn slow_job_with_a_worker(
    cluster: &Cluster,
    name: &str,
    node: Option<&str>,
) -> Result<(InferenceJob, Questions, String)> {
    // Loaded is told after half a lease.
    let questions = Questions::new(3, lasting(40).max(120));
    let mut spec = spec(&questions.lines(), name)?;
    spec["profileName"] = json!("conservative");
    if let Some(node) = node {
        spec["placement"] = json!({"nodeSelector": {"kubernetes.io/hostname": node}});
    }
    let job = cluster.create_job("default", name, spec).await?;
    let job = cluster.until_reason(&job, "Loaded", "Loaded", LONG).await?;
    let node = job
        .status
        .clone()
        .and_then(|s| s.placement)
        .context("no placement")?
        .node_name;
    Ok((job, questions, node))
}

#[test]
fn an_agent_killed_and_restarted_has_no_worker_within_a_second_and_its_job_a_new_epoch_within_ten()
-> Result<()> {
    on_runtime(async {
        let world = world().await?;
        let cluster = &world.cluster;
        let (job, questions, node) = slow_job_with_a_worker(cluster, "agent-restarted", None).await?;
        dies_with_its_agent(cluster, &job, &questions, &node).await
    })
}

#[test]
fn a_worker_inside_a_kernel_of_ten_seconds_ends_with_its_agent_all_the_same() -> Result<()> {
    on_runtime(async {
        let world = world().await?;
        let cluster = &world.cluster;
        let node = Flow::Finish.nodes()[0];
        cluster.process(node)?.kill();
        let slow = program("slow-kernel")?;
        cluster.start_agent_with(node, &["--worker-binary", slow.to_str().context("path")?])?;
        cluster.until_node_ready(node).await?;
        let (job, questions, _) = slow_job_with_a_worker(cluster, "long-kernel", Some(node)).await?;
        let agent = u32::try_from(cluster.process(node)?.pid())?;
        let worker = procfs::workers_of(agent)?.pop().context("no worker")?.pid;
        let loaded = procfs::cpu_ticks(worker)?;
        eventually(LONG, "the worker to be deep in its kernel", || async {
            let computed = procfs::cpu_ticks(worker)? - loaded;
            ensure!(computed >= 200, "{computed} ticks of 10 ms since it was loaded");
            Ok(())
        })
        .await?;
        dies_with_its_agent(cluster, &job, &questions, node).await
    })
}

async fn dies_with_its_agent(
    cluster: &Cluster,
    job: &InferenceJob,
    questions: &Questions,
    node: &str,
) -> Result<()> {
    let agent = u32::try_from(cluster.process(node)?.pid())?;
    let workers = procfs::workers_of(agent)?;
    ensure!(!workers.is_empty(), "no worker to lose");
    cluster.process(node)?.signal(rustix::process::Signal::KILL)?;
    let killed = Instant::now();
    eventually(Duration::from_secs(1), "its workers to be gone", || async {
        let left: Vec<_> = procfs::processes()?
            .into_iter()
            .filter(|p| workers.iter().any(|w| w.pid == p.pid))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await?;
    let gone = killed.elapsed();
    cluster.start_agent(node)?;
    let again = cluster
        .until(job, "a second epoch", Duration::from_secs(10), |job| {
            let epoch = job.status.clone().unwrap_or_default().epoch;
            ensure!(epoch == 2, "epoch {epoch}");
            Ok(())
        })
        .await?;
    println!(
        "workers gone after {} ms, new epoch after {} ms",
        gone.as_millis(),
        killed.elapsed().as_millis()
    );
    finished_right(cluster, &again, questions).await?;
    cluster
        .jobs("default")
        .delete(&job.name_any(), &DeleteParams::default())
        .await?;
    Ok(())
}

#[test]
fn a_job_whose_agent_stays_down_is_placed_elsewhere_after_the_lease() -> Result<()> {
    on_runtime(async {
        let world = world().await?;
        let cluster = &world.cluster;
        let (job, questions, node) = slow_job_with_a_worker(cluster, "agent-lost", None).await?;
        cluster.process(&node)?.kill();
        let killed = Instant::now();
        let moved = cluster
            .until(&job, "another node", LONG, |job| {
                let status = job.status.clone().unwrap_or_default();
                let now = status.placement.map(|p| p.node_name).unwrap_or_default();
                ensure!(
                    status.epoch == 2 && now != node,
                    "epoch {} on {now}",
                    status.epoch
                );
                Ok(())
            })
            .await?;
        let after = killed.elapsed();
        println!(
            "placed elsewhere {:.1} s after the kill (lease {} s)",
            after.as_secs_f64(),
            lease_seconds()
        );
        // Replaced only after the lease and the drift margin since the last renewal that the operator saw.
        ensure!(
            after >= tenths_of_lease(9),
            "{after:?}: before the lease can have run out"
        );
        finished_right(cluster, &moved, &questions).await?;
        cluster
            .jobs("default")
            .delete(&job.name_any(), &DeleteParams::default())
            .await?;
        cluster.start_agent(&node)?;
        cluster.until_node_ready(&node).await
    })
}
