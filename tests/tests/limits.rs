//! Limits as the test process itself measures them: from /proc and from stamps, not from what a worker says of itself.

#![allow(
    clippy::disallowed_methods,
    reason = "the test measures real time from outside"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use gogrid_api::InferenceJob;
use gogrid_testmodels::random::RandomLlama;
use gogrid_tests::cluster::{Cluster, ClusterOptions, on_runtime, program, record};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, sha256, spec};
use gogrid_tests::procfs::{self, Seen};
use gogrid_tests::wait::eventually;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(180);
/// `ioprio_get` answers class << 13 | level; 3 is the idle class.
const IOPRIO_CLASS_IDLE: i64 = 3;

fn big_model_dir() -> PathBuf {
    std::env::temp_dir().join(format!("gogrid-limits-{}", std::process::id()))
}

async fn cluster() -> Result<Arc<Cluster>> {
    static SHARED: tokio::sync::OnceCell<Arc<Cluster>> = tokio::sync::OnceCell::const_new();
    let started = SHARED.get_or_try_init(|| async {
        std::fs::create_dir_all(big_model_dir())?;
        let mut options = ClusterOptions::quick(0);
        options.nodes = vec![
            ("gentle".into(), Some("conservative".into())),
            ("shared".into(), Some("share".into())),
        ];
        options.model_roots.push(big_model_dir());
        anyhow::Ok(Arc::new(
            Cluster::start(ControlPlane::shared().await?, options).await?,
        ))
    });
    Ok(Arc::clone(started.await?))
}

async fn job_on(cluster: &Cluster, node: &str, name: &str, mut spec: Value) -> Result<InferenceJob> {
    spec["placement"] = json!({"nodeSelector": {"kubernetes.io/hostname": node}});
    cluster.create_job("default", name, spec).await
}

async fn the_worker(cluster: &Cluster, node: &str) -> Result<Seen> {
    let agent = u32::try_from(cluster.process(node)?.pid())?;
    eventually(Duration::from_secs(30), "a worker", || async {
        procfs::workers_of(agent)?
            .pop()
            .with_context(|| cluster.log_tails(10))
    })
    .await
}

async fn until_running(cluster: &Cluster, job: &InferenceJob) -> Result<()> {
    cluster
        .until_reason(job, "Loaded", "Loaded", LONG)
        .await
        .map(drop)
}

#[test]
fn under_conservative_every_thread_is_at_nice_15_and_idle_io_and_requests_start_100_ms_apart() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let questions = Questions::new(5, 50);
        let job = job_on(&cluster, "gentle", "kind", spec(&questions.lines(), "kind")?).await?;
        until_running(&cluster, &job).await?;
        let worker = the_worker(&cluster, "gentle").await?;
        let threads = procfs::gives_way(worker.pid, 15, IOPRIO_CLASS_IDLE)?;
        let job = cluster.until_finished(&job, LONG).await?;
        let results = cluster.results(&job).await?;
        let mut starts: Vec<i64> = results
            .iter()
            .map(|r| {
                r.pointer("/response/body/gogrid/startedMicros")
                    .and_then(Value::as_i64)
                    .context("no stamp")
            })
            .collect::<Result<_>>()?;
        starts.sort_unstable();
        let least = starts.windows(2).map(|w| w[1] - w[0]).min().context("no gap")?;
        println!(
            "{threads} threads at nice 15, idle I/O, oom_score_adj 1000; least gap of 50 starts {least} µs"
        );
        ensure!(
            starts.len() == 50 && least >= 100_000,
            "{} starts, least gap {least} µs",
            starts.len()
        );
        Ok(())
    })
}

#[test]
fn a_worker_whose_setters_do_nothing_is_found_out() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        cluster.process("gentle")?.stop(Duration::from_secs(5));
        let wrapper = program("without-priority")?;
        cluster.start_agent_with("gentle", &["--worker-binary", &wrapper.display().to_string()])?;
        cluster.until_node_ready("gentle").await?;
        let questions = Questions::new(6, 100);
        let job = job_on(&cluster, "gentle", "unkind", spec(&questions.lines(), "unkind")?).await?;
        until_running(&cluster, &job).await?;
        let worker = the_worker(&cluster, "gentle").await?;
        let verdict = procfs::gives_way(worker.pid, 15, IOPRIO_CLASS_IDLE);
        cluster
            .jobs("default")
            .delete(&job.name_any(), &DeleteParams::default())
            .await?;
        cluster.process("gentle")?.stop(Duration::from_secs(5));
        cluster.start_agent("gentle")?;
        cluster.until_node_ready("gentle").await?;
        match verdict {
            Ok(_) => bail!("setpriority did nothing and the check did not notice"),
            Err(found) => println!("found out: {found:#}"),
        }
        Ok(())
    })
}

#[test]
fn a_saturated_worker_uses_60_percent_of_its_threads_over_20_seconds() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let shape = RandomLlama::LARGE;
        let path = big_model_dir().join("big.gguf");
        shape.write_to(&path)?;
        ensure!(shape.weights() >= 100_000_000, "{} weights", shape.weights());
        let profile = json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "ResourceProfile", "metadata": {"name": "share"},
            "spec": {
                "vram": {"maxPercent": 90}, "compute": {"maxPercent": 60, "minRequestIntervalMillis": 0},
                "cpu": {"niceness": 0}, "maxBatchSize": 4, "nodeSelector": {"gogrid.dev/profile": "share"},
            },
        });
        let profiles: kube::Api<gogrid_api::ResourceProfile> = kube::Api::all(cluster.client.clone());
        profiles
            .patch("share", &PatchParams::apply("test"), &Patch::Apply(&profile))
            .await?;
        let lines: Vec<String> = (0..8)
            .map(|n| record(&format!("r{n}"), "Say something long.", 3000))
            .collect();
        let spec = json!({
            "model": {"uri": format!("file://{}", path.display()), "sha256": sha256(&path)?},
            "input": {"inline": lines}, "output": {"configMap": "saturated"},
            "contextTokens": 4096, "parallelSequences": 4, "generation": {"maxTokens": 3000},
        });
        let job = job_on(&cluster, "shared", "saturated", spec).await?;
        until_running(&cluster, &job).await?;
        let worker = the_worker(&cluster, "shared").await?;
        let used = || procfs::cpu_ticks(worker.pid);
        // The share is a property of the steady state: begin once it decodes.
        let loaded = used()?;
        eventually(Duration::from_secs(30), "the worker to decode", || async {
            ensure!(used()? > loaded + 100, "{} ticks since loaded", used()? - loaded);
            Ok(())
        })
        .await?;
        let (begin, ticks) = (std::time::Instant::now(), used()?);
        tokio::time::sleep(Duration::from_secs(20)).await;
        let (seconds, ticks) = (begin.elapsed().as_secs_f64(), used()? - ticks);
        cluster
            .jobs("default")
            .delete(&job.name_any(), &DeleteParams::default())
            .await?;
        std::fs::remove_file(&path)?;
        let threads = std::thread::available_parallelism()?.get().min(2);
        let share = f64::from(i32::try_from(ticks)?) / seconds / f64::from(u32::try_from(threads)?);
        println!("CPU time {share:.1} % of {threads} threads over {seconds:.1} s");
        ensure!((55.0..=65.0).contains(&share), "{share:.1} %");
        Ok(())
    })
}
