//! Programs that die at the worst moments, and what stays true all the same.

#![allow(
    clippy::disallowed_methods,
    reason = "the test measures real time from outside"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{InferenceJob, condition};
use gogrid_tests::cluster::{Cluster, ClusterOptions, lease_seconds, on_runtime, program, tenths_of_lease};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, spec};
use gogrid_tests::procfs;
use gogrid_tests::wait::eventually;
use kube::ResourceExt as _;
use kube::api::DeleteParams;
use serde_json::json;

const LONG: Duration = Duration::from_secs(120);
/// No job needs more writes than this; a sweep that gets here is not making progress.
const MOST_WRITES: u32 = 60;

async fn cluster() -> Result<Arc<Cluster>> {
    static SHARED: tokio::sync::OnceCell<Arc<Cluster>> = tokio::sync::OnceCell::const_new();
    let started = SHARED.get_or_try_init(|| async {
        let control = ControlPlane::shared().await?;
        anyhow::Ok(Arc::new(Cluster::start(control, ClusterOptions::quick(2)).await?))
    });
    Ok(Arc::clone(started.await?))
}

async fn finished_right(
    cluster: &Cluster,
    job: &InferenceJob,
    questions: &Questions,
) -> Result<InferenceJob> {
    let job = cluster.until_finished(job, LONG).await?;
    let status = job.status.clone().unwrap_or_default();
    ensure!(
        condition::is_true(&status.conditions, "Succeeded"),
        "{:?}",
        status.conditions
    );
    questions.right(&cluster.results(&job).await?)?;
    Ok(job)
}

#[test]
fn an_operator_killed_before_or_after_any_of_its_writes_finishes_every_job_and_record_once() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let mut kills = 0;
        for moment in ["kill-before", "kill-after"] {
            for write in 1..=MOST_WRITES {
                cluster.process("operator")?.kill();
                let fault = format!("{moment}={write}");
                let doomed = cluster.start_operator(&["--fault", &fault])?;
                let name = format!("{moment}-{write}");
                let questions = Questions::new(u64::from(write), 6);
                let job = cluster
                    .create_job("default", &name, spec(&questions.lines(), &name)?)
                    .await?;
                let jobs = cluster.jobs("default");
                let died = eventually(LONG, "the operator to die or the job to finish", || async {
                    let status = jobs.get(&name).await?.status.unwrap_or_default();
                    let over = condition::is_true(&status.conditions, "Finished");
                    ensure!(over || !doomed.is_running(), "{:?}", status.conditions);
                    Ok(!doomed.is_running())
                })
                .await
                .with_context(|| cluster.log_tails(20))?;
                if died {
                    kills += 1;
                    cluster.start_operator(&[])?;
                }
                finished_right(&cluster, &job, &questions)
                    .await
                    .with_context(|| fault.clone())?;
                jobs.delete(&name, &DeleteParams::default()).await?;
                if !died {
                    println!("{moment}: the job needs {} writes", write - 1);
                    break;
                }
            }
        }
        println!("{kills} kills");
        ensure!(kills >= 10, "only {kills} kills: is the fault layer in?");
        Ok(())
    })
}

async fn slow_job_with_a_worker(
    cluster: &Cluster,
    name: &str,
    node: Option<&str>,
) -> Result<(InferenceJob, Questions, String)> {
    let questions = Questions::new(3, 120);
    let mut spec = spec(&questions.lines(), name)?;
    spec["profileName"] = json!("conservative");
    if let Some(node) = node {
        spec["placement"] = json!({"nodeSelector": {"kubernetes.io/hostname": node}});
    }
    let job = cluster.create_job("default", name, spec).await?;
    let job = cluster
        .until(&job, "the job to be Loaded", LONG, |job| {
            let status = job.status.clone().unwrap_or_default();
            ensure!(
                condition::is_true(&status.conditions, "Loaded"),
                "{:?}",
                status.conditions
            );
            Ok(())
        })
        .await?;
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
        let cluster = cluster().await?;
        let (job, questions, node) = slow_job_with_a_worker(&cluster, "agent-restarted", None).await?;
        dies_with_its_agent(&cluster, &job, &questions, &node).await
    })
}

#[test]
fn a_worker_inside_a_kernel_of_ten_seconds_ends_with_its_agent_all_the_same() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let node = "node-1";
        cluster.process(node)?.kill();
        let slow = program("slow-kernel")?;
        cluster.start_agent_with(node, &["--worker-binary", slow.to_str().context("path")?])?;
        cluster.until_node_ready(node).await?;
        let (job, questions, _) = slow_job_with_a_worker(&cluster, "long-kernel", Some(node)).await?;
        let agent = u32::try_from(cluster.process(node)?.pid())?;
        let worker = procfs::workers_of(agent)?.pop().context("no worker")?.pid;
        let loaded = procfs::cpu_ticks(worker)?;
        eventually(LONG, "the worker to be deep in its kernel", || async {
            let computed = procfs::cpu_ticks(worker)? - loaded;
            ensure!(computed >= 200, "{computed} ticks of 10 ms since it was loaded");
            Ok(())
        })
        .await?;
        dies_with_its_agent(&cluster, &job, &questions, node).await
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
        let cluster = cluster().await?;
        let (job, questions, node) = slow_job_with_a_worker(&cluster, "agent-lost", None).await?;
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
        finished_right(&cluster, &moved, &questions).await?;
        cluster
            .jobs("default")
            .delete(&job.name_any(), &DeleteParams::default())
            .await?;
        cluster.start_agent(&node)?;
        cluster.until_node_ready(&node).await
    })
}
