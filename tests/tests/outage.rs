//! An API server that doesn't answer for a while: work pauses, and goes on or begins again from what was saved.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{InferenceJob, names};
use gogrid_tests::cluster::{Cluster, ClusterOptions, NAMESPACE, lease_seconds, on_runtime, tenths_of_lease};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, lasting, spec, succeeded, until_kept};
use gogrid_tests::procfs;
use gogrid_tests::steps::{self, Step, boottime_of};
use gogrid_tests::wait::eventually;
use jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::DeleteParams;
use serde_json::{Value, json};

const NODE: &str = "node-1";

/// Longer than anything takes that has to happen.
fn long() -> Duration {
    tenths_of_lease(300)
}

/// Enough for the work to be in the middle for some leases.
fn records() -> usize {
    lasting(120)
}

/// How long the API server is away after the work stands still; with leases of 40 s, five minutes in all.
fn away() -> Duration {
    tenths_of_lease(if lease_seconds() > 4 { 66 } else { 20 })
}

async fn cluster() -> Result<Arc<Cluster>> {
    static SHARED: tokio::sync::OnceCell<Arc<Cluster>> = tokio::sync::OnceCell::const_new();
    let started = SHARED.get_or_try_init(|| async {
        let mut options = ClusterOptions::quick(1);
        options.stamped = true;
        anyhow::Ok(Arc::new(
            Cluster::start(ControlPlane::shared().await?, options).await?,
        ))
    });
    Ok(Arc::clone(started.await?))
}

struct Run {
    job: InferenceJob,
    questions: Questions,
    since: Timestamp,
    worker: u32,
}

impl Run {
    /// A job of many seconds that has saved some of its answers.
    async fn start(cluster: &Cluster, name: &str) -> Result<Self> {
        let since = cluster.control.now();
        let questions = Questions::new(8, records());
        let mut spec = spec(&[], name)?;
        let input = format!("{name}-input");
        spec["input"] = cluster
            .create_input("default", &input, &questions.lines())
            .await?;
        spec["profileName"] = json!("conservative");
        let job = cluster.create_job("default", name, spec).await?;
        let uid = job.uid().context("no uid")?;
        let kept = until_kept(&cluster.client, NAMESPACE, &uid, 1, long()).await;
        kept.with_context(|| cluster.log_tails(5))?;
        let agent = u32::try_from(cluster.process(NODE)?.pid())?;
        let worker = procfs::workers_of(agent)?.pop().context("no worker")?.pid;
        Ok(Self {
            job,
            questions,
            since,
            worker,
        })
    }

    fn steps(&self, cluster: &Cluster) -> Result<Vec<Step>> {
        steps::read(&[cluster.stamps_dir(NODE)], boottime_of(self.since)?)
    }

    /// Its results once it is over, every record there once.
    async fn results(&self, cluster: &Cluster, epoch: i64) -> Result<Vec<Value>> {
        let job = cluster.until_finished(&self.job, long()).await?;
        let status = job.status.clone().unwrap_or_default();
        succeeded(&job)?;
        ensure!(status.epoch == epoch, "epoch {}, not {epoch}", status.epoch);
        let results = cluster.results(&job).await?;
        let right = self.questions.right(&results)?;
        let asked = records();
        ensure!(right * 100 >= asked * 90, "{right} of {asked} right");
        let jobs = cluster.jobs("default");
        jobs.delete(&job.name_any(), &DeleteParams::default()).await?;
        Ok(results)
    }
}

/// The API server answers nobody until `meanwhile` is done.
async fn outage<T>(cluster: &Cluster, meanwhile: impl Future<Output = Result<T>>) -> Result<T> {
    cluster.control.pause_api_server()?;
    let done = meanwhile.await;
    cluster.control.resume_api_server()?;
    done
}

/// Waits until the worker stands still, which it does by itself within 35 of the 40 seconds of a lease.
async fn stands_still(worker: u32) -> Result<()> {
    eventually(tenths_of_lease(10), "the worker to stand still", || async {
        let state = procfs::state(worker)?;
        ensure!(state == 'T', "it is in state {state}");
        Ok(())
    })
    .await
}

#[test]
fn work_pauses_while_the_api_server_is_away_and_goes_on_within_two_seconds_of_its_return_with_no_record_run_again()
-> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let run = Run::start(&cluster, "short-outage").await?;
        let paused_at = outage(&cluster, async {
            stands_still(run.worker).await?;
            let paused_at = steps::now();
            tokio::time::sleep(away()).await;
            Ok(paused_at)
        })
        .await?;
        let back = cluster.control.now();
        let control = &cluster.control;
        let (renewed, step) = eventually(long(), "a step after the outage", || async {
            let lease = names::node_lease(NODE);
            let renewals = control.audit_accepted(back, control.now())?;
            let renewed = renewals
                .iter()
                .find(|e| e.name == lease)
                .context("no renewal")?
                .at;
            let steps = run.steps(&cluster)?;
            let after = steps.iter().find(|s| s.from > paused_at).context("no step")?;
            Ok((boottime_of(renewed)?, after.from))
        })
        .await?;
        let pause = Duration::from_nanos(step.saturating_sub(renewed));
        println!("went on {} ms after the next good renewal", pause.as_millis());
        run.results(&cluster, 1).await?;
        let steps = run.steps(&cluster)?;
        let workers: std::collections::BTreeSet<_> = steps.iter().map(|s| &s.worker).collect();
        ensure!(workers.len() == 1, "{} workers computed it", workers.len());
        let within = steps
            .iter()
            .filter(|s| s.from > paused_at && s.from < step)
            .count();
        ensure!(within == 0, "{within} steps during the outage");
        ensure!(step >= renewed, "a step before the lease was renewed");
        ensure!(pause <= Duration::from_secs(2), "went on only after {pause:?}");
        Ok(())
    })
}

#[test]
fn after_an_outage_longer_than_the_hold_all_workers_are_gone_and_jobs_run_again_from_their_checkpoints()
-> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let run = Run::start(&cluster, "long-outage").await?;
        let agent = u32::try_from(cluster.process(NODE)?.pid())?;
        let began = steps::now();
        outage(&cluster, async {
            stands_still(run.worker).await?;
            // 600 of the 40 seconds of a lease, after the fence.
            eventually(tenths_of_lease(170), "the worker to be gone", || async {
                let left = procfs::workers_of(agent)?;
                ensure!(left.is_empty(), "{left:?}");
                Ok(())
            })
            .await
        })
        .await?;
        let gone = Duration::from_nanos(steps::now().saturating_sub(began));
        println!("gone {} ms after the API server", gone.as_millis());
        ensure!(
            gone >= tenths_of_lease(150),
            "gone after {gone:?}: before the hold was over"
        );
        let results = run.results(&cluster, 2).await?;
        let asked = records();
        let kept = results
            .iter()
            .filter_map(|r| r.pointer("/response/body/gogrid/finishedMicros")?.as_u64())
            .filter(|micros| micros * 1000 < began)
            .count();
        println!("{kept} of {asked} records were kept from before");
        ensure!(kept > 0, "nothing was kept: did it begin anew?");
        Ok(())
    })
}
