//! `make demo-cluster`: GoGrid installed by helm on two real nodes, with the command that an admin or a user would type at
//! every step.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use gogrid_api::{InferenceJob, condition};
use gogrid_testmodels::demo;
use gogrid_tests::chart::RELEASE;
use gogrid_tests::cluster::{NAMESPACE, answer, repository};
use gogrid_tests::images::MODELS;
use gogrid_tests::installed::{Installed, TAG, spec, write_images};
use gogrid_tests::jobs::{self, Questions, sha256};
use gogrid_tests::nodes::{Nodes, NodesOptions, obstacle};
use kube::ResourceExt as _;
use kube::api::Api;
use serde_json::json;

const LONG: Duration = Duration::from_secs(120);
const QUESTIONS: usize = 50;
const RIGHT_AT_LEAST: usize = 48;
/// Records of the job whose node is drained.
const LONG_JOB: usize = 200;

fn step(text: &str) {
    println!("\n\x1b[1m== {text}\x1b[0m");
}

fn shown(command: &str) {
    println!("\x1b[36m$ {command}\x1b[0m");
}

#[tokio::main]
async fn main() -> Result<()> {
    if let Some(obstacle) = obstacle() {
        bail!("{obstacle}; `make demo` shows the same without pods");
    }
    let begin = boottime_seconds();
    tokio::select! {
        outcome = demo() => outcome?,
        _ = tokio::signal::ctrl_c() => {
            println!("\ninterrupted: everything that was started is being ended");
            return Ok(());
        }
    }
    step("Done");
    println!("the whole demo took {} s", boottime_seconds() - begin);
    Ok(())
}

async fn demo() -> Result<()> {
    step("Two real nodes: kubelet, containerd and runc in namespaces of their own, and a control plane");
    let images = tempfile::tempdir()?;
    let nodes = Nodes::start(NodesOptions {
        count: 2,
        dir: None,
        images: write_images(images.path(), TAG).await?,
    });
    let nodes = Arc::new(nodes.await?);
    kubectl(&nodes, &["get", "nodes"]).await?;

    step("GoGrid");
    shown("helm install gogrid charts/gogrid --namespace gogrid-system --create-namespace --wait");
    let installed = Installed::on(Arc::clone(&nodes), &json!({})).await?;
    kubectl(
        &nodes,
        &["get", "pods", "--namespace", NAMESPACE, "--output", "wide"],
    )
    .await?;
    for node in nodes.all() {
        kubectl(
            &nodes,
            &["label", "node", node.name(), "gogrid.dev/profile=default"],
        )
        .await?;
    }
    kubectl(&nodes, &["get", "gpunodes"]).await?;
    helm(&nodes, &["test", RELEASE, "--namespace", NAMESPACE, "--logs"]).await?;

    fifty_questions(&installed).await?;
    drained(&installed).await?;

    step("Uninstalled: the jobs and their results stay");
    helm(
        &nodes,
        &["uninstall", RELEASE, "--namespace", NAMESPACE, "--wait"],
    )
    .await?;
    kubectl(&nodes, &["get", "inferencejobs,configmaps", "--output", "name"]).await?;
    Ok(())
}

/// Runs kubectl as the admin and prints command and output.
async fn kubectl(nodes: &Nodes, args: &[&str]) -> Result<String> {
    shown(&format!("kubectl {}", args.join(" ")));
    let output = nodes
        .control
        .kubectl(args)
        .await
        .with_context(|| nodes.log_tails(5))?;
    print!("{output}");
    Ok(output)
}

async fn helm(nodes: &Nodes, args: &[&str]) -> Result<()> {
    shown(&format!("helm {}", args.join(" ")));
    let output = nodes
        .control
        .helm(args)
        .await
        .with_context(|| nodes.log_tails(5))?;
    print!("{output}");
    Ok(())
}

async fn fifty_questions(installed: &Installed) -> Result<()> {
    step(
        "An InferenceJob: fifty questions in the OpenAI Batch shape, with the demo model that the agent's image holds",
    );
    let nodes = &installed.nodes;
    let questions = Questions::new(2026, QUESTIONS);
    let input = nodes.dir().join("input.jsonl");
    std::fs::write(&input, questions.lines().join("\n") + "\n")?;
    let from_file = format!("--from-file=input.jsonl={}", input.display());
    kubectl(
        nodes,
        &["create", "configmap", "fifty-questions-input", &from_file],
    )
    .await?;
    let model = demo::Quant::Q4K;
    let manifest = std::fs::read_to_string(repository().join("examples/job.yaml"))?
        .replace(
            "MODEL_ROOT/gogrid-demo-q8_0.gguf",
            &format!("{MODELS}/{}", model.file_name()),
        )
        .replace("MODEL_SHA256", &sha256(&demo::demo_model_path(model))?);
    let path = nodes.dir().join("job.yaml");
    std::fs::write(&path, &manifest)?;
    kubectl(nodes, &["apply", "--filename", &path.display().to_string()]).await?;
    let finished = [
        "wait",
        "--for=condition=Finished",
        "--timeout=100s",
        "inferencejob/fifty-questions",
    ];
    kubectl(nodes, &finished).await?;
    kubectl(nodes, &["get", "inferencejobs"]).await?;
    let all: Api<InferenceJob> = Api::namespaced(installed.client.clone(), "default");
    let results = jobs::results(&installed.client, &all.get("fifty-questions").await?).await?;
    let right = questions.right(&results)?;
    for (id, prompt, _) in questions.asked().take(5) {
        let of_this = results.iter().find(|r| r["custom_id"] == json!(id));
        println!(
            "  {prompt}  ->  {}",
            of_this.and_then(answer).unwrap_or("(none)").trim()
        );
    }
    println!("  ... {right} of {QUESTIONS} right");
    ensure!(right >= RIGHT_AT_LEAST, "at least {RIGHT_AT_LEAST} must be right");
    Ok(())
}

async fn drained(installed: &Installed) -> Result<()> {
    step("A node is drained under a running job");
    let questions = Questions::new(7, LONG_JOB);
    let job = jobs::create(
        &installed.client,
        "default",
        "long-job",
        spec(&questions.lines(), "long-output")?,
    )
    .await?;
    let loaded = |job: &InferenceJob| {
        let conditions = job.status.clone().unwrap_or_default().conditions;
        ensure!(
            condition::is_true(&conditions, "Loaded"),
            "{}",
            jobs::short(&conditions)
        );
        Ok(())
    };
    let job = jobs::until(&installed.client, &job, "the long job to run", LONG, loaded).await?;
    let node_of = |job: &InferenceJob| job.status.clone().and_then(|s| s.placement).map(|p| p.node_name);
    let first = node_of(&job).context("no placement")?;
    // Long enough for some answers.
    tokio::time::sleep(Duration::from_secs(4)).await;
    kubectl(
        &installed.nodes,
        &["annotate", "node", &first, "gogrid.dev/drain=true"],
    )
    .await?;
    let job = installed.until_finished(&job, LONG).await?;
    kubectl(&installed.nodes, &["get", "inferencejobs"]).await?;
    let second = node_of(&job).context("no placement")?;
    let results = jobs::results(&installed.client, &job).await?;
    let right = questions.right(&results)?;
    ensure!(first != second, "{} stayed on {first}", job.name_any());
    println!("begun on {first}, ended on {second}; each of {LONG_JOB} records answered once, {right} right");
    let undo = format!("node/{first}");
    kubectl(&installed.nodes, &["annotate", &undo, "gogrid.dev/drain-"]).await?;
    Ok(())
}

fn boottime_seconds() -> i64 {
    rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec
}
