//! Jobs from their creation to their published results: many at once, suspended, resumed, deleted, expired.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{Assignment, InferenceJob, condition, names};
use gogrid_tests::cluster::{Cluster, ClusterOptions, NAMESPACE, on_runtime};
use gogrid_tests::controlplane::{AuditEvent, ControlPlane, OURS};
use gogrid_tests::jobs::{Questions, spec, succeeded, until_kept};
use gogrid_tests::wait::eventually;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(120);

async fn cluster() -> Result<Arc<Cluster>> {
    static SHARED: tokio::sync::OnceCell<Arc<Cluster>> = tokio::sync::OnceCell::const_new();
    let started = SHARED.get_or_try_init(|| async {
        let control = ControlPlane::shared().await?;
        anyhow::Ok(Arc::new(Cluster::start(control, ClusterOptions::quick(3)).await?))
    });
    Ok(Arc::clone(started.await?))
}

/// For each result: when it began and ended, and how many sequences were decoded with it, by the worker's stamps.
fn stamps(results: &[Value]) -> Vec<(i64, i64, i64)> {
    let number = |r: &Value, key: &str| {
        r.pointer(&format!("/response/body/gogrid/{key}"))
            .and_then(Value::as_i64)
    };
    results
        .iter()
        .filter_map(|r| {
            Some((
                number(r, "startedMicros")?,
                number(r, "finishedMicros")?,
                number(r, "batch")?,
            ))
        })
        .collect()
}

/// How many sequences were decoded together at most, by the stamps of all results; never more than the profile's 16.
fn widest_batch(results: &[Value], records: usize) -> Result<i64> {
    let stamps = stamps(results);
    ensure!(
        stamps.len() == records,
        "{} of {records} results are stamped",
        stamps.len()
    );
    for (start, _, batch) in &stamps {
        ensure!(*batch <= 16, "a batch of {batch} under a profile of 16");
        let together = stamps.iter().filter(|(s, e, _)| s <= start && start < e).count();
        ensure!(
            together <= 16,
            "{together} sequences at once under a profile of 16"
        );
    }
    Ok(stamps
        .iter()
        .map(|(_, _, batch)| *batch)
        .max()
        .unwrap_or_default())
}

#[test]
fn twenty_jobs_on_three_agents_all_finish_right_and_batches_fill_to_the_profiles_limit_and_no_further()
-> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let mut jobs = vec![];
        for n in 0..20 {
            let questions = Questions::new(100 + n, 40);
            let output = format!("twenty-{n}");
            let job = cluster
                .create_job("default", &output, spec(&questions.lines(), &output)?)
                .await?;
            jobs.push((job, questions));
        }
        let mut nodes = BTreeMap::new();
        for (job, questions) in jobs {
            let job = cluster.until_finished(&job, LONG).await?;
            let status = job.status.clone().unwrap_or_default();
            succeeded(&job)?;
            let results = cluster.results(&job).await?;
            let right = questions.right(&results)?;
            ensure!(right * 100 >= 40 * 95, "{}: {right} of 40 right", job.name_any());
            widest_batch(&results, 40)?;
            *nodes
                .entry(status.placement.context("no placement")?.node_name)
                .or_insert(0) += 1;
        }
        ensure!(nodes.len() == 3, "only {nodes:?} were used");
        // The twenty shared their devices' batches; one that has a device for itself gets all of it.
        let questions = Questions::new(120, 60);
        let job = cluster
            .create_job("default", "alone", spec(&questions.lines(), "alone")?)
            .await?;
        let job = cluster.until_finished(&job, LONG).await?;
        let widest = widest_batch(&cluster.results(&job).await?, 60)?;
        println!("jobs by node: {nodes:?}; widest batch of one alone {widest}");
        ensure!(
            widest == 16,
            "the widest batch was {widest}, not the profile's 16"
        );
        Ok(())
    })
}

/// Accepted writes of GoGrid's programs about a job and its output, by verb and resource.
fn writes_about(cluster: &Cluster, job: &InferenceJob) -> Result<Vec<String>> {
    let since = job.creation_timestamp().context("not created")?.0;
    let (uid, name) = (job.uid().context("no uid")?, job.name_any());
    let all = cluster.control.audit_accepted(since, cluster.control.now())?;
    let about = |e: &&AuditEvent| {
        let ours = e.resource != "events" && (e.name == name || e.name.contains(&uid));
        ours && e.user.starts_with(OURS) && e.writes()
    };
    let told = |e: &AuditEvent| format!("{} {}/{} {}", e.verb, e.resource, e.subresource, e.name);
    Ok(all.iter().filter(about).map(told).collect())
}

#[test]
fn a_small_jobs_life_costs_seven_writes_and_a_large_ones_input_and_answers_lie_beside_its_order() -> Result<()>
{
    on_runtime(async {
        let cluster = cluster().await?;
        for (name, questions) in [
            ("small", Questions::new(8, 3)),
            ("large", Questions::new(8, 60).wordy()),
        ] {
            let spec = spec(&questions.lines(), name)?;
            let job = cluster.create_job("default", name, spec).await?;
            let job = cluster.until_finished(&job, LONG).await?;
            succeeded(&job)?;
            questions.right(&cluster.results(&job).await?)?;
            let orders: Api<Assignment> = Api::namespaced(cluster.client.clone(), NAMESPACE);
            let order = names::assignment(&job.uid().context("no uid")?, 1);
            let writes = eventually(LONG, "its order to be gone", || async {
                ensure!(orders.get_opt(&order).await?.is_none(), "still there");
                let writes = writes_about(&cluster, &job)?;
                let gone = writes.iter().any(|w| w.starts_with("delete assignments"));
                ensure!(gone, "the removal is not in the audit log yet");
                Ok(writes)
            })
            .await?;
            println!("{name}: {} writes: {writes:#?}", writes.len());
            let beside = |prefix: &str| writes.iter().any(|w| w.contains(prefix));
            let beside = (beside(" input-"), beside(" result-"));
            ensure!(
                beside == (name == "large", name == "large"),
                "{beside:?}: {writes:#?}"
            );
            ensure!(name == "large" || writes.len() == 7, "{writes:#?}");
        }
        Ok(())
    })
}

/// A job that takes a while: many records behind an interval of 100 ms.
async fn slow_job(
    cluster: &Cluster,
    name: &str,
    records: usize,
) -> Result<(gogrid_api::InferenceJob, Questions)> {
    let questions = Questions::new(7, records);
    let mut spec = spec(&questions.lines(), name)?;
    spec["profileName"] = json!("conservative");
    Ok((cluster.create_job("default", name, spec).await?, questions))
}

async fn until_some_are_answered(cluster: &Cluster, job: &gogrid_api::InferenceJob) -> Result<()> {
    let uid = job.uid().context("no uid")?;
    let kept = until_kept(&cluster.client, NAMESPACE, &uid, 1, LONG).await;
    kept.map(drop).with_context(|| cluster.log_tails(5))
}

#[test]
fn a_suspended_job_gives_its_place_back_and_resumes_without_answering_a_record_twice() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let (job, questions) = slow_job(&cluster, "suspended", 150).await?;
        until_some_are_answered(&cluster, &job).await?;
        let jobs = cluster.jobs("default");
        let suspend = |on: bool| Patch::Merge(json!({"spec": {"suspend": on}}));
        jobs.patch("suspended", &PatchParams::default(), &suspend(true))
            .await?;
        let job = cluster
            .until(&job, "the job to be Suspended", LONG, |job| {
                let status = job.status.clone().unwrap_or_default();
                ensure!(
                    condition::is_true(&status.conditions, "Suspended"),
                    "{:?}",
                    status.conditions
                );
                Ok(())
            })
            .await?;
        let done_before = job.status.clone().and_then(|s| s.progress).map_or(0, |p| p.done);
        ensure!(
            done_before > 0 && done_before < 150,
            "{done_before} records were done when suspended"
        );
        let suspended_at = boottime_micros();
        jobs.patch("suspended", &PatchParams::default(), &suspend(false))
            .await?;
        let job = cluster.until_finished(&job, LONG).await?;
        let results = cluster.results(&job).await?;
        let right = questions.right(&results)?;
        ensure!(right * 100 >= 150 * 95, "{right} of 150 right");
        let before = stamps(&results)
            .iter()
            .filter(|(_, end, _)| *end < suspended_at)
            .count();
        println!("{before} records answered before the suspension were kept");
        ensure!(
            i64::try_from(before)? >= done_before,
            "{before} kept of {done_before} reported"
        );
        ensure!(
            job.status.unwrap_or_default().epoch == 2,
            "not placed exactly twice"
        );
        Ok(())
    })
}

fn boottime_micros() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1000
}

#[test]
fn a_job_deleted_while_running_leaves_no_worker_and_no_reserved_byte() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let (job, _) = slow_job(&cluster, "deleted", 200).await?;
        until_some_are_answered(&cluster, &job).await?;
        let uid = job.uid().context("no uid")?;
        cluster
            .jobs("default")
            .delete("deleted", &DeleteParams::default())
            .await?;
        let workers = || gogrid_tests::procfs::workers_of(std::process::id());
        eventually(Duration::from_secs(5), "no worker to be left", || async {
            ensure!(workers()?.is_empty(), "workers {:?}", workers()?);
            Ok(())
        })
        .await?;
        let of_job = ListParams::default().labels(&format!("gogrid.dev/job-uid={uid}"));
        let assignments: Api<Assignment> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        eventually(LONG, "everything of the job to be gone", || async {
            let left = assignments.list(&of_job).await?.items.len() + maps.list(&of_job).await?.items.len();
            ensure!(left == 0, "{left} objects are left");
            Ok(())
        })
        .await
    })
}

#[test]
fn a_finished_job_with_a_ttl_is_deleted_after_it_and_its_result_with_it() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let questions = Questions::new(9, 3);
        let mut spec = spec(&questions.lines(), "expires")?;
        spec["ttlSecondsAfterFinished"] = json!(2);
        cluster.create_job("default", "expires", spec).await?;
        let jobs = cluster.jobs("default");
        eventually(LONG, "the job to be deleted", || async {
            ensure!(jobs.get_opt("expires").await?.is_none(), "still there");
            Ok(())
        })
        .await
    })
}
