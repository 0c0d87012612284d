//! Agents, pools and workers that stand still, are started anew, overlap or don't end.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{condition, names};
use gogrid_tests::cluster::{NAMESPACE, on_runtime, tenths_of_lease};
use gogrid_tests::jobs::{Questions, short};
use gogrid_tests::process::Undying;
use gogrid_tests::procfs;
use gogrid_tests::wait::{eventually, throughout};
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt as _;
use kube::api::{Api, Patch, PatchParams};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::world::{Run, World, long, pid, world};

fn signal(number: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(number)?).context("no process")?;
    kill_process(pid, signal).with_context(|| format!("signalling process {number}"))
}

/// Two leases long the process stands still.
async fn stands_still(process: u32, what: impl Future<Output = Result<()>>) -> Result<()> {
    signal(process, Signal::STOP)?;
    let (observed, ()) = tokio::join!(what, tokio::time::sleep(tenths_of_lease(20)));
    signal(process, Signal::CONT)?;
    observed
}

async fn holder(world: &World, node: &str) -> Result<Option<String>> {
    let leases: Api<Lease> = Api::namespaced(world.cluster.client.clone(), NAMESPACE);
    let lease = leases.get(&names::node_lease(node)).await?;
    Ok(lease.spec.and_then(|s| s.holder_identity))
}

async fn no_worker_of(agent: u32, within: Duration) -> Result<()> {
    eventually(within, "the old worker to be gone", || async {
        let left = procfs::workers_of(agent)?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

/// Its clock and that of the node that follows are two hours apart.
async fn agent_stands_still(world: &World) -> Result<()> {
    let run = world.run("agent-stopped", "one", 70).await?;
    let agent = pid(&world.cluster, &run.node)?;
    stands_still(agent, async {
        world.moved(&run, long()).await?;
        eventually(tenths_of_lease(10), "a step elsewhere", || async {
            world.moved_in_time(&run).map(drop)
        })
        .await
    })
    .await?;
    no_worker_of(agent, tenths_of_lease(10)).await?;
    ensure!(world.finished(&run).await? == 2, "placed a third time");
    Ok(())
}

async fn pool_stands_still(world: &World) -> Result<()> {
    let run = world.run("pool-stopped", "two", 70).await?;
    let pool = procfs::pool_of(pid(&world.cluster, &run.node)?)?;
    let before = world.steps(&run)?.len();
    stands_still(pool, async { Ok(()) }).await.context("the pool")?;
    let during = world.steps(&run)?.len();
    ensure!(during > before, "its worker took no step meanwhile");
    ensure!(
        world.finished(&run).await? == 1,
        "placed again though its node lives"
    );
    Ok(())
}

async fn worker_stands_still(world: &World) -> Result<()> {
    let run = world.run("worker-stopped", "three", 50).await?;
    let workers = procfs::workers_of(pid(&world.cluster, &run.node)?)?;
    let worker = workers.first().context("no worker")?.pid;
    // Its agent wakes a worker that it doesn't hear; here that never lasts.
    stands_still(worker, async {
        throughout(tenths_of_lease(19), "a worker that stands still", || async {
            signal(worker, Signal::STOP)
        })
        .await
    })
    .await?;
    ensure!(
        world.finished(&run).await? == 1,
        "placed again though its node lives"
    );
    Ok(())
}

#[test]
fn an_agent_a_pool_and_a_worker_that_stand_still_for_two_leases_never_make_two_workers_compute_one_job_whatever_clocks_say()
-> Result<()> {
    on_runtime(async {
        let world = world().await?;
        tokio::try_join!(
            agent_stands_still(&world),
            pool_stands_still(&world),
            worker_stands_still(&world)
        )?;
        Ok(())
    })
}

async fn agent_restarts(world: &World) -> Result<()> {
    let run = world.run("restarted", "one", 50).await?;
    world.cluster.process(&run.node)?.signal(Signal::KILL)?;
    world.cluster.start_agent(&run.node)?;
    world.moved(&run, tenths_of_lease(25)).await?;
    ensure!(world.finished(&run).await? == 2, "not placed exactly twice");
    Ok(())
}

async fn agents_overlap(world: &World) -> Result<()> {
    let run = world.run("updated", "two", 70).await?;
    let old = world.cluster.process(&run.node)?;
    let session = holder(world, &run.node).await?;
    world.cluster.start_agent(&run.node)?;
    let new = pid(&world.cluster, &run.node)?;
    throughout(tenths_of_lease(5), "one agent", || async {
        ensure!(
            holder(world, &run.node).await? == session,
            "the second took the lease"
        );
        ensure!(procfs::workers_of(new)?.is_empty(), "the second started a worker");
        Ok(())
    })
    .await?;
    old.signal(Signal::TERM)?;
    eventually(long(), "the second to hold the lease", || async {
        ensure!(holder(world, &run.node).await? != session, "the first still does");
        ensure!(!old.is_running(), "the first has not ended");
        Ok(())
    })
    .await?;
    ensure!(world.finished(&run).await? == 2, "not placed exactly twice");
    Ok(())
}

async fn worker_does_not_end(world: &World) -> Result<()> {
    let cluster = &world.cluster;
    let half = json!({"memory": {"vram": "900Mi"}});
    let run = world.run_with("stuck", "three", 60, half).await?;
    let on_node = json!({"kubernetes.io/hostname": run.node});
    let worker = worker_of(world, &run)?;
    let held = Undying::hold(worker)?;

    // Suspended, its place is wanted by another, which may have it only when nothing is left there.
    let suspend = |on: bool| Patch::Merge(json!({"spec": {"suspend": on}}));
    let jobs = cluster.jobs("default");
    jobs.patch("stuck", &PatchParams::default(), &suspend(true))
        .await?;
    let next_since = cluster.control.now();
    let questions = Questions::new(4, 10);
    let mut spec = gogrid_tests::jobs::spec(&questions.lines(), "next")?;
    spec["placement"] = json!({"nodeSelector": on_node});
    spec["memory"] = json!({"vram": "1200Mi"});
    let next = cluster.create_job("default", "next", spec).await?;
    eventually(long(), "the worker to be killed", || async {
        let state = procfs::state(worker)?;
        ensure!(state == 't', "it is in state {state}");
        Ok(())
    })
    .await?;
    // 20 of the 40 seconds of a lease.
    let waited = throughout(tenths_of_lease(5), "a place that is still taken", || async {
        let first = jobs.get("stuck").await?.status.unwrap_or_default();
        ensure!(
            !condition::is_true(&first.conditions, "Suspended"),
            "said to hold nothing: {}",
            short(&first.conditions)
        );
        let second = jobs.get("next").await?.status.unwrap_or_default();
        ensure!(
            second.epoch == 0,
            "the place was given to another: epoch {}",
            second.epoch
        );
        Ok(())
    })
    .await;
    let let_go = cluster.control.now();
    drop(held);
    waited?;
    let next = Run {
        job: next,
        questions,
        pair: "three",
        node: run.node.clone(),
        since: next_since,
    };
    world.finished(&next).await?;
    let placed = world.placed(&next, 1)?;
    ensure!(placed.at > let_go, "placed before the old worker was gone");

    // The agent dies, its worker doesn't: the next agent is not there before it is.
    jobs.patch("stuck", &PatchParams::default(), &suspend(false))
        .await?;
    world.moved(&run, long()).await?;
    eventually(long(), "a worker again", || async {
        worker_of(world, &run).map(drop)
    })
    .await?;
    let node = placement_node(world, "stuck").await?;
    let worker = worker_on(world, &node)?;
    let held = Undying::hold(worker)?;
    let session = holder(world, &node).await?;
    cluster.process(&node)?.signal(Signal::KILL)?;
    cluster.start_agent(&node)?;
    let waited = throughout(tenths_of_lease(5), "a node that is not back yet", || async {
        ensure!(
            holder(world, &node).await? == session,
            "the next agent took the lease beside the old worker"
        );
        Ok(())
    })
    .await;
    drop(held);
    waited?;
    eventually(long(), "the next agent to take the lease", || async {
        ensure!(
            holder(world, &node).await? != session,
            "the lease is still the old one's"
        );
        Ok(())
    })
    .await?;
    ensure!(world.finished(&run).await? == 3, "not placed exactly three times");
    Ok(())
}

async fn placement_node(world: &World, job: &str) -> Result<String> {
    let status = world
        .cluster
        .jobs("default")
        .get(job)
        .await?
        .status
        .unwrap_or_default();
    Ok(status.placement.context("no placement")?.node_name)
}

fn worker_on(world: &World, node: &str) -> Result<u32> {
    let workers = procfs::workers_of(pid(&world.cluster, node)?)?;
    Ok(workers.first().context("no worker")?.pid)
}

fn worker_of(world: &World, run: &Run) -> Result<u32> {
    let mut of_pair = World::nodes(run.pair).into_iter();
    let found = of_pair.find_map(|node| worker_on(world, node).ok());
    found.with_context(|| format!("no worker of {}", run.job.name_any()))
}

#[test]
fn agents_that_restart_or_overlap_and_workers_that_do_not_end_never_share_a_job_or_a_byte() -> Result<()> {
    on_runtime(async {
        let world = world().await?;
        tokio::try_join!(
            agent_restarts(&world),
            agents_overlap(&world),
            worker_does_not_end(&world)
        )?;
        Ok(())
    })
}
