//! An agent whose packets vanish, without a reset, in a network of its own.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_tests::cluster::{on_runtime, tenths_of_lease};
use gogrid_tests::procfs;
use gogrid_tests::wait::{eventually, throughout};
use kube::ResourceExt as _;

use crate::world::{Run, World, long, pid, world};

/// Whether this user may make networks; says so if not.
fn skipped() -> Result<bool> {
    let skipped = !rustix::process::geteuid().is_root();
    if skipped {
        // Not by `eprintln!`: the test runner would keep that to itself.
        writeln!(std::io::stderr(), "SKIPPED: networks of their own need root")?;
    }
    Ok(skipped)
}

async fn stays(world: &World, run: &Run, epoch: i64, span: Duration) -> Result<()> {
    let jobs = world.cluster.jobs("default");
    let name = run.job.name_any();
    throughout(span, "its one placement", || async {
        let now = jobs.get(&name).await?.status.unwrap_or_default().epoch;
        ensure!(now == epoch, "epoch {now}");
        Ok(())
    })
    .await
}

#[test]
fn a_node_cut_off_for_less_than_its_lease_works_on_and_keeps_its_job() -> Result<()> {
    if skipped()? {
        return Ok(());
    }
    on_runtime(async {
        let world = world().await?;
        let run = world.run("cut-short", "cut", 70).await?;
        let outpost = world.outposts.get(&run.node).context("no outpost")?;
        let before = world.steps(&run)?.len();
        outpost.cut().await?;
        // 30 of the 40 seconds of a lease.
        let cut = stays(&world, &run, 1, tenths_of_lease(75) / 10).await;
        let during = world.steps(&run)?.len();
        outpost.heal().await?;
        cut?;
        ensure!(during > before, "no step while it was cut off");
        ensure!(world.finished(&run).await? == 1, "placed again");
        Ok(())
    })
}

#[test]
fn a_node_cut_off_for_longer_stops_in_time_before_its_job_runs_elsewhere_and_takes_nothing_back_when_healed()
-> Result<()> {
    if skipped()? {
        return Ok(());
    }
    on_runtime(async {
        let world = world().await?;
        let run = world.run("cut-long", "cut", 70).await?;
        let outpost = world.outposts.get(&run.node).context("no outpost")?;
        outpost.cut().await?;
        let moved = world.moved(&run, long()).await;
        let elsewhere = eventually(tenths_of_lease(10), "a step elsewhere", || async {
            world.moved_in_time(&run)
        });
        let placed = elsewhere.await;
        outpost.heal().await?;
        moved?;
        let placed = placed?;

        let agent = pid(&world.cluster, &run.node)?;
        let healed = world.cluster.control.now();
        eventually(
            tenths_of_lease(10),
            "the node to be back without its worker",
            || async {
                let lease = gogrid_api::names::node_lease(&run.node);
                let renewed = world.accepted(healed)?.iter().any(|e| e.name == lease);
                let left = procfs::workers_of(agent)?;
                ensure!(renewed && left.is_empty(), "renewed: {renewed}, workers {left:?}");
                Ok(())
            },
        )
        .await?;
        ensure!(world.finished(&run).await? == 2, "placed a third time");

        // What the cut agent's token wrote since: it may speak of itself, end its own dead assignment and leave there what
        // it had answered before the fence; nobody reads that, or a record would be in the result twice.
        let lease = gogrid_api::names::node_lease(&run.node);
        let all = world.accepted(run.since)?;
        let credential = all.iter().find(|e| e.name == lease).map(|e| e.credential.clone());
        let credential = credential
            .filter(|c| !c.is_empty())
            .context("its token has no mark")?;
        let dead = gogrid_api::names::assignment(&run.job.uid().context("no uid")?, 1);
        let stale: Vec<_> = all
            .into_iter()
            .filter(|e| e.credential == credential && e.at > placed.at)
            .filter(|e| !matches!(e.resource.as_str(), "leases" | "gpunodes"))
            .filter(|e| !(e.resource == "assignments" && e.name == dead))
            .filter(|e| !(e.resource == "configmaps" && e.name.starts_with(&format!("result-{dead}."))))
            .collect();
        ensure!(stale.is_empty(), "stale writes: {stale:#?}");
        Ok(())
    })
}
