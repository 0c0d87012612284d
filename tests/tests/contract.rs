//! What an outside queue such as Kueue may rely on: it admits a job by ending its suspension on nodes of its choice,
//! evicts it by suspending it again, and keeps the whole job to itself by `managedBy`.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{InferenceJob, InferenceJobStatus, condition};
use gogrid_tests::cluster::{Cluster, ClusterOptions, NAMESPACE, on_runtime, tenths_of_lease};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, short, spec, succeeded, until_kept};
use gogrid_tests::procfs;
use gogrid_tests::wait::throughout;
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(90);
const RECORDS: usize = 100;

/// What the queue writes when it admits a job: where it may run, and that it may.
fn admission(node: &str) -> Value {
    json!({"spec": {"suspend": false, "placement": {"nodeSelector": {"kubernetes.io/hostname": node}}}})
}

async fn write(cluster: &Cluster, job: &InferenceJob, patch: Value) -> Result<()> {
    let jobs = cluster.jobs("default");
    let params = PatchParams::default();
    jobs.patch(&job.name_any(), &params, &Patch::Merge(patch)).await?;
    Ok(())
}

async fn until_suspended(cluster: &Cluster, job: &InferenceJob) -> Result<InferenceJobStatus> {
    let job = cluster.until_reason(job, "Suspended", "Suspended", LONG).await?;
    let status = job.status.unwrap_or_default();
    ensure!(status.lease.is_none(), "suspended with a lease");
    ensure!(
        !condition::is_true(&status.conditions, "Placed"),
        "suspended with a place: {}",
        short(&status.conditions)
    );
    Ok(status)
}

async fn until_answered(cluster: &Cluster, job: &InferenceJob, epoch: i64) -> Result<()> {
    let uid = job.uid().context("no uid")?;
    let kept = until_kept(&cluster.client, NAMESPACE, &uid, epoch, LONG).await;
    kept.map(drop).with_context(|| cluster.log_tails(5))
}

#[test]
fn a_queue_admits_a_job_evicts_it_and_admits_it_elsewhere_with_what_it_had_done_kept_and_shown() -> Result<()>
{
    on_runtime(async {
        let control = ControlPlane::shared().await?;
        let cluster = Cluster::start(control, ClusterOptions::quick(2)).await?;
        let questions = Questions::new(9, RECORDS);
        let mut wanted = spec(&questions.lines(), "queued")?;
        wanted["profileName"] = json!("conservative");
        wanted["suspend"] = json!(true);
        let job = cluster.create_job("default", "queued", wanted).await?;

        let waiting = until_suspended(&cluster, &job).await?;
        ensure!(waiting.epoch == 0, "placed before it was admitted");
        write(&cluster, &job, admission("node-1")).await?;
        until_answered(&cluster, &job, 1).await?;

        write(&cluster, &job, json!({"spec": {"suspend": true}})).await?;
        let evicted = until_suspended(&cluster, &job).await?;
        let agent = u32::try_from(cluster.process("node-1")?.pid())?;
        let left = procfs::workers_of(agent)?;
        ensure!(left.is_empty(), "said to hold nothing, but {left:?} runs");
        let done = evicted.progress.clone().map_or(0, |p| p.done);
        ensure!(
            done > 0,
            "nothing is shown of what it had done: {:?}",
            evicted.progress
        );

        write(&cluster, &job, admission("node-2")).await?;
        let jobs = cluster.jobs("default");
        let again = async {
            throughout(tenths_of_lease(10), "progress that never falls", || async {
                let now = jobs.get("queued").await?.status.unwrap_or_default();
                let shown = now.progress.as_ref().map_or(0, |p| p.done);
                ensure!(shown >= done, "{shown} records done after {done} were");
                Ok(())
            })
            .await
        };
        again.await?;
        let job = cluster.until_finished(&job, LONG).await?;
        let status = job.status.clone().unwrap_or_default();
        succeeded(&job)?;
        let node = status.placement.as_ref().map(|p| p.node_name.as_str());
        ensure!(
            (status.epoch, node) == (2, Some("node-2")),
            "epoch {} on {node:?}",
            status.epoch
        );
        ensure!(status.attempts == 0, "an eviction was counted as an attempt");
        let results = cluster.results(&job).await?;
        let right = questions.right(&results)?;
        ensure!(right * 100 >= RECORDS * 90, "{right} of {RECORDS} right");
        println!("{done} of {RECORDS} records were done when it was evicted, each is there once");

        // A job that another controller has to itself.
        let mut theirs = spec(&questions.lines(), "theirs")?;
        theirs["managedBy"] = json!("kueue.x-k8s.io/multikueue");
        let since = cluster.control.now();
        let job = cluster.create_job("default", "theirs", theirs).await?;
        let uid = job.uid().context("no uid")?;
        throughout(tenths_of_lease(10), "no write about it", || async {
            let control = &cluster.control;
            let writes = control.audit_accepted(since, control.now())?;
            let about = writes
                .iter()
                .find(|e| e.name == "theirs" || e.name.contains(&uid));
            ensure!(about.is_none(), "{about:?}");
            let status = jobs.get("theirs").await?.status;
            ensure!(status.is_none(), "{status:?}");
            Ok(())
        })
        .await
    })
}
