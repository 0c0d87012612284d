//! Parts of a node fail while jobs run on it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::InferenceJob;
use gogrid_tests::cluster::NAMESPACE;
use gogrid_tests::installed::{Installed, LEASE_SECONDS};
use gogrid_tests::jobs::{self, Questions};
use gogrid_tests::wait::{eventually, throughout};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams};

use crate::{LONG, node_of, on_real_nodes, submit, until_answering, until_right};

/// Waits until the job is placed on that node.
async fn until_on(installed: &Installed, job: &InferenceJob, node: &str) -> Result<InferenceJob> {
    let what = format!("{} to be on {node}", job.name_any());
    jobs::until(&installed.client, job, &what, LONG, |job| {
        let found = node_of(job)?;
        ensure!(found == node, "it is on {found}");
        Ok(())
    })
    .await
    .with_context(|| format!("{what}, which is a matter of the operator"))
}

async fn kubectl(installed: &Installed, args: &[&str]) -> Result<String> {
    installed.nodes.control.kubectl(args).await
}

#[test]
fn a_drain_annotation_moves_a_running_job_and_its_removal_lets_new_ones_in() -> Result<()> {
    on_real_nodes(|installed| async move {
        let questions = Questions::new(11, 150);
        let job = submit(&installed, "drained", &questions, None, true).await?;
        let job = until_answering(&installed, &job).await?;
        let (from, to) = match node_of(&job)?.as_str() {
            "node-1" => ("node-1", "node-2"),
            _ => ("node-2", "node-1"),
        };
        kubectl(&installed, &["annotate", "node", from, "gogrid.dev/drain=now"]).await?;
        until_on(&installed, &job, to).await?;
        let only_there = submit(
            &installed,
            "only-there",
            &Questions::new(12, 2),
            Some(from),
            false,
        )
        .await?;
        jobs::until(
            &installed.client,
            &only_there,
            "the refusal to be said",
            LONG,
            |job| {
                let status = job.status.clone().unwrap_or_default();
                let placed = gogrid_api::condition::find(&status.conditions, "Placed");
                let reason = placed.map(|c| c.reason.clone()).unwrap_or_default();
                ensure!(reason == "NoMatchingNode", "{}", jobs::short(&status.conditions));
                Ok(())
            },
        )
        .await?;
        kubectl(&installed, &["annotate", "node", from, "gogrid.dev/drain-"]).await?;
        until_right(&installed, &only_there, &Questions::new(12, 2)).await?;
        until_right(&installed, &job, &questions).await?;
        Ok(())
    })
}

#[test]
fn a_killed_kubelet_stops_no_job_and_keeps_new_ones_away() -> Result<()> {
    on_real_nodes(|installed| async move {
        let questions = Questions::new(13, 250);
        let job = submit(&installed, "unwatched", &questions, Some("node-2"), true).await?;
        until_answering(&installed, &job).await?;
        installed.nodes.node("node-2")?.kill_kubelet()?;
        installed.nodes.until_ready("node-2", false).await?;
        let other = submit(&installed, "elsewhere", &Questions::new(14, 5), None, false).await?;
        let other = until_right(&installed, &other, &Questions::new(14, 5)).await?;
        ensure!(node_of(&other)? == "node-1", "a job went where no kubelet is");
        let same = jobs::until(&installed.client, &job, "the job as it is", LONG, |_| Ok(())).await?;
        let epoch = same.status.map_or(0, |s| s.epoch);
        ensure!(epoch == 1, "the job was placed {epoch} times");
        installed.nodes.node("node-2")?.start_kubelet()?;
        installed.nodes.until_ready("node-2", true).await?;
        let job = until_right(&installed, &job, &questions).await?;
        ensure!(job.status.map_or(0, |s| s.epoch) == 1, "the job was placed again");
        Ok(())
    })
}

#[test]
fn a_deleted_agent_pod_costs_its_jobs_a_moment_and_no_record() -> Result<()> {
    on_real_nodes(|installed| async move {
        let questions = Questions::new(15, 150);
        let job = submit(&installed, "orphaned", &questions, Some("node-1"), true).await?;
        until_answering(&installed, &job).await?;
        let pod = installed.agent_pod("node-1").await?;
        let pods: Api<Pod> = Api::namespaced(installed.client.clone(), NAMESPACE);
        pods.delete(&pod.name_any(), &DeleteParams::default()).await?;
        eventually(LONG, "another pod", || async {
            let fresh = installed.agent_pod("node-1").await?;
            ensure!(fresh.uid() != pod.uid(), "it is the same one");
            Ok(())
        })
        .await?;
        let job = until_right(&installed, &job, &questions).await?;
        // Handed back by a pod that had said before that it ends: nothing is placed there in between.
        let placements = job.status.map_or(0, |s| s.epoch);
        ensure!(placements == 2, "{placements} placements");
        Ok(())
    })
}

#[test]
fn a_worker_killed_for_want_of_memory_hurts_neither_its_agent_nor_other_jobs() -> Result<()> {
    on_real_nodes(|installed| async move {
        let (a, b) = (Questions::new(16, 220), Questions::new(17, 220));
        let first = submit(&installed, "victim", &a, Some("node-1"), true).await?;
        let second = submit(&installed, "neighbour", &b, Some("node-1"), true).await?;
        until_answering(&installed, &first).await?;
        until_answering(&installed, &second).await?;
        let agent = installed.agent_pod("node-1").await?;
        let node = installed.nodes.node("node-1")?;
        let worker = node
            .processes()?
            .into_iter()
            .find(|p| p.command.contains("gogrid-worker worker"));
        node.run_out_of_memory(&worker.context("no worker")?).await?;
        let first = until_right(&installed, &first, &a).await?;
        let second = until_right(&installed, &second, &b).await?;
        let epochs = [&first, &second].map(|job| job.status.clone().map_or(0, |s| s.epoch));
        // The kernel may take the second one too before the first one's memory is back.
        let placements = epochs.iter().sum::<i64>();
        ensure!((3..=4).contains(&placements), "placements: {epochs:?}");
        let after = installed.agent_pod("node-1").await?;
        ensure!(after.uid() == agent.uid(), "the agent's pod was replaced");
        let restarts = after
            .status
            .and_then(|s| s.container_statuses)
            .unwrap_or_default();
        ensure!(
            restarts.iter().all(|c| c.restart_count == 0),
            "a container was restarted"
        );
        Ok(())
    })
}

/// Named so that it comes late: a node has to start anew after it.
#[test]
fn y_a_node_that_loses_power_has_its_jobs_elsewhere_once_its_lease_is_over() -> Result<()> {
    on_real_nodes(|installed| async move {
        let questions = Questions::new(18, 250);
        // The operator's own pod would be made anew only minutes after its node is gone.
        let operator = installed.pods("operator").await?.pop().context("no operator")?;
        let (kept, lost) = match operator.spec.and_then(|spec| spec.node_name).as_deref() {
            Some("node-1") => ("node-1", "node-2"),
            _ => ("node-2", "node-1"),
        };
        kubectl(&installed, &["cordon", kept]).await?;
        let job = submit(&installed, "powerless", &questions, None, true).await?;
        until_answering(&installed, &job).await?;
        kubectl(&installed, &["uncordon", kept]).await?;
        installed.nodes.node(lost)?.kill();
        throughout(
            Duration::from_secs(u64::from(LEASE_SECONDS) - 2),
            "the job stays where it may still run",
            || async {
                let same = jobs::until(&installed.client, &job, "the job", LONG, |_| Ok(())).await?;
                let found = node_of(&same)?;
                ensure!(found == lost, "it is on {found} already");
                Ok(())
            },
        )
        .await?;
        until_on(&installed, &job, kept).await?;
        until_right(&installed, &job, &questions).await?;
        installed.nodes.boot_again(lost).await?;
        installed.until_node_ready(lost).await
    })
}
