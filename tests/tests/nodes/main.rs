//! GoGrid installed by helm on two real nodes: pods, their confinement, their life cycle, and what happens to jobs when
//! parts of a node fail. Skipped, loudly, where real nodes can't be run.

mod devices;
mod failures;
mod install;
mod lifecycle;
mod pod;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{InferenceJob, condition};
use gogrid_simnvml::LIBRARY_FILE;
use gogrid_tests::cluster::on_runtime;
use gogrid_tests::installed::{Installed, spec};
use gogrid_tests::jobs::{self, Questions};
use gogrid_tests::nodes::obstacle;
use kube::ResourceExt as _;
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(90);

/// Runs a scenario on the one install of this test binary, or says why not.
fn on_real_nodes<F>(scenario: impl FnOnce(Arc<Installed>) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    if let Some(obstacle) = obstacle() {
        // Not by `eprintln!`: the test runner would keep that to itself.
        writeln!(std::io::stderr(), "SKIPPED: {obstacle}")?;
        return Ok(());
    }
    on_runtime(async {
        static SHARED: tokio::sync::OnceCell<Arc<Installed>> = tokio::sync::OnceCell::const_new();
        let started = SHARED.get_or_try_init(|| async {
            let installed = Installed::start(2, &values()).await?;
            for node in installed.nodes.all() {
                let label = ["label", "node", node.name(), "gogrid.dev/profile=aggressive"];
                installed.nodes.control.kubectl(&label).await?;
            }
            anyhow::Ok(Arc::new(installed))
        });
        scenario(Arc::clone(started.await?)).await
    })
}

/// Little memory for workers, so that a test can use it up, a driver's library that is there once a test puts it there, and
/// kinds of nodes on which no agent can run.
fn values() -> Value {
    json!({
        "agent": {
            "extraArgs": [
                "--cpu-memory-reserve=256Mi",
                format!("--nvml-library={}/{LIBRARY_FILE}", devices::DRIVER),
                "--cuda-on-cpu",
                "--driver-second-millis=200",
            ],
            // Of nodes that a test labels so.
            "flavours": {
                "no-runtime": {"runtimeClassName": "nowhere"},
                "no-image": {"workers": {"image": {"repository": "gogrid/nowhere"}}},
            },
        },
        "workers": {"resources": {"limits": {"memory": "1Gi"}}},
    })
}

/// A job over `questions` that may run on that node only, if one is named; slow ones take 100 ms and more a record.
async fn submit(
    installed: &Installed,
    name: &str,
    questions: &Questions,
    node: Option<&str>,
    slow: bool,
) -> Result<InferenceJob> {
    let mut spec = spec(&questions.lines(), name)?;
    if let Some(node) = node {
        spec["placement"] = json!({"nodeSelector": {"kubernetes.io/hostname": node}});
    }
    if slow {
        spec["profileName"] = json!("conservative");
    }
    jobs::create(&installed.client, "default", name, spec).await
}

/// Waits for a job's end and checks that every record is answered once and nearly all right.
async fn until_right(
    installed: &Installed,
    job: &InferenceJob,
    questions: &Questions,
) -> Result<InferenceJob> {
    let job = installed.until_finished(job, LONG).await?;
    jobs::succeeded(&job)?;
    let results = jobs::results(&installed.client, &job).await?;
    let (right, asked) = (questions.right(&results)?, questions.asked().count());
    ensure!(
        right * 100 >= asked * 90,
        "{}: {right} of {asked} right",
        job.name_any()
    );
    Ok(job)
}

/// Waits until a job runs and has answered something, and returns it.
async fn until_answering(installed: &Installed, job: &InferenceJob) -> Result<InferenceJob> {
    let what = format!("{} to be answering", job.name_any());
    let running = jobs::until(&installed.client, job, &what, LONG, |job| {
        let status = job.status.clone().unwrap_or_default();
        ensure!(
            condition::is_true(&status.conditions, "Loaded"),
            "{}",
            jobs::short(&status.conditions)
        );
        Ok(())
    })
    .await;
    match running {
        Ok(job) => Ok(job),
        Err(error) => Err(error.context(installed.pod_logs(15).await)),
    }
}

fn node_of(job: &InferenceJob) -> Result<String> {
    let placement = job.status.clone().and_then(|s| s.placement);
    Ok(placement.context("the job has no placement")?.node_name)
}
