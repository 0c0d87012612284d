//! `make demo`: GoGrid's main job on this machine, with the kubectl command that a user would type at every step.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{GpuNode, InferenceJob, condition};
use gogrid_testmodels::demo;
use gogrid_tests::cluster::{Cluster, ClusterOptions, NAMESPACE, answer, repository};
use gogrid_tests::controlplane::{ControlPlane, ControlPlaneOptions};
use gogrid_tests::jobs::{Questions, model_root, sha256};
use gogrid_tests::wait::eventually;
use kube::ResourceExt as _;
use kube::api::Api;
use serde_json::{Value, json};

/// On a machine that is busy with other things a courteous worker takes its time.
const LONG: Duration = Duration::from_secs(600);
const QUESTIONS: usize = 50;
const RIGHT_AT_LEAST: usize = 49;
/// Records of the job whose profile is edited while it runs.
const LONG_JOB: usize = 160;

fn step(text: &str) {
    println!("\n\x1b[1m== {text}\x1b[0m");
}

fn shown(command: &str) {
    println!("\x1b[36m$ {command}\x1b[0m");
}

#[tokio::main]
async fn main() -> Result<()> {
    tokio::select! {
        outcome = demo() => outcome,
        _ = tokio::signal::ctrl_c() => {
            println!("\ninterrupted: everything that was started is being ended");
            Ok(())
        }
    }
}

async fn demo() -> Result<()> {
    let begin = boottime_micros();
    step("A control plane on loopback: etcd, kube-apiserver, kube-controller-manager");
    let control = Arc::new(ControlPlane::start(ControlPlaneOptions::default()).await?);
    println!("ready at {} after {:.1} s", control.url(), seconds_since(begin)?);

    step("GoGrid: the chart's objects, one operator, two agents on two nodes that no kubelet stands behind");
    shown("helm install gogrid charts/gogrid --namespace gogrid-system --create-namespace");
    let mut options = ClusterOptions::quick(2);
    options.nodes = vec![
        ("desk-1".into(), Some("default".into())),
        ("desk-2".into(), Some("default".into())),
    ];
    let cluster = Cluster::start(Arc::clone(&control), options).await?;
    kubectl(&cluster, &["get", "gpunode"]).await?;

    let (right, asked) = fifty_questions(&cluster).await?;
    profile_edit(&cluster).await?;

    step("Everything that GoGrid keeps");
    kubectl(&cluster, &["get", "ijob", "--all-namespaces"]).await?;
    kubectl(&cluster, &["get", "rprof"]).await?;
    kubectl(&cluster, &["get", "gpunode"]).await?;
    kubectl(&cluster, &["get", "assignment", "--namespace", NAMESPACE]).await?;

    step("Done");
    println!(
        "{right} of {asked} answers are right; the whole demo took {:.0} s",
        seconds_since(begin)?
    );
    ensure!(
        right >= RIGHT_AT_LEAST,
        "only {right} of {asked} answers are right: at least {RIGHT_AT_LEAST} must be"
    );
    Ok(())
}

/// Runs kubectl as the admin and prints command and output.
async fn kubectl(cluster: &Cluster, args: &[&str]) -> Result<String> {
    shown(&format!("kubectl {}", args.join(" ")));
    let output = cluster.control.kubectl(args).await?;
    print!("{output}");
    Ok(output)
}

async fn fifty_questions(cluster: &Cluster) -> Result<(usize, usize)> {
    step("An InferenceJob: fifty questions in the OpenAI Batch shape");
    let questions = Questions::new(2026, QUESTIONS);
    let input = cluster.control.dir().join("input.jsonl");
    std::fs::write(&input, questions.lines().join("\n") + "\n")?;
    println!(
        "first record: {}",
        questions.lines().first().context("no question")?
    );
    let from_file = format!("--from-file=input.jsonl={}", input.display());
    kubectl(
        cluster,
        &["create", "configmap", "fifty-questions-input", &from_file],
    )
    .await?;
    let example = std::fs::read_to_string(repository().join("examples/job.yaml"))?;
    let manifest = example
        .replace("MODEL_ROOT", &model_root().display().to_string())
        .replace(
            "MODEL_SHA256",
            &sha256(&demo::demo_model_path(demo::Quant::Q8_0))?,
        );
    let path = cluster.control.dir().join("job.yaml");
    std::fs::write(&path, &manifest)?;
    kubectl(cluster, &["apply", "-f", &path.display().to_string()]).await?;

    step("Where it was placed, and why");
    let jobs = cluster.jobs("default");
    let job = jobs.get("fifty-questions").await?;
    cluster
        .until(&job, "the job to be Placed", LONG, |job| {
            let status = job.status.clone().unwrap_or_default();
            ensure!(
                condition::is_true(&status.conditions, "Placed"),
                "{:?}",
                status.conditions
            );
            Ok(())
        })
        .await?;
    let path = "jsonpath={.status.conditions[?(@.type==\"Placed\")].message}{\"\\n\"}";
    kubectl(cluster, &["get", "ijob", "fifty-questions", "-o", path]).await?;

    let asked_at = boottime_micros();
    step("Its progress");
    shown("kubectl get ijob fifty-questions --watch");
    let mut last = String::new();
    let mut job = jobs.get("fifty-questions").await?;
    while !condition::is_true(&job.status.clone().unwrap_or_default().conditions, "Finished") {
        let line = summary(&job);
        if line != last {
            println!("{line}");
            last = line;
        }
        ensure!(
            seconds_since(asked_at)? < LONG.as_secs_f64(),
            "not finished after {LONG:?}: {line}\n{}",
            cluster.log_tails(25),
            line = last
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
        job = jobs.get("fifty-questions").await?;
    }
    println!("{}", summary(&job));

    step("The answers");
    shown("kubectl get configmap fifty-questions-output -o jsonpath='{.data.results\\.jsonl}'");
    let results = cluster.results(&job).await?;
    let right = questions.right(&results)?;
    for (id, prompt, wanted) in questions.asked().take(12) {
        let of_this = results.iter().find(|r| r["custom_id"] == json!(id));
        let text = of_this.and_then(answer).unwrap_or("(none)").trim().to_owned();
        println!(
            "  {} {prompt}  ->  {text}",
            if text == wanted { "right" } else { "WRONG" }
        );
    }
    println!("  ... {right} of {QUESTIONS} right");
    Ok((right, QUESTIONS))
}

fn summary(job: &InferenceJob) -> String {
    let status = job.status.clone().unwrap_or_default();
    let reason = condition::find(&status.conditions, "Succeeded")
        .map_or("-", |c| c.reason.as_str())
        .to_owned();
    let progress = status.progress.unwrap_or_default();
    let node = status.placement.map(|p| p.node_name).unwrap_or_default();
    format!(
        "  {:<16} {:<12} {:<8} {} tokens/s",
        job.name_any(),
        reason,
        node,
        progress.tokens_per_second
    ) + &format!("  {}", progress.display)
}

async fn profile_edit(cluster: &Cluster) -> Result<()> {
    step("A profile edited under a running job: default becomes as strict as conservative");
    let questions = Questions::new(7, LONG_JOB);
    let mut spec = gogrid_tests::jobs::spec(&[], "long-output")?;
    spec["input"] = cluster
        .create_input("default", "long-input", &questions.lines())
        .await?;
    let job = cluster.create_job("default", "long-job", spec).await?;
    let job = cluster.until_reason(&job, "Loaded", "Loaded", LONG).await?;
    let node = job
        .status
        .clone()
        .and_then(|s| s.placement)
        .context("no placement")?
        .node_name;
    // Long enough a look at the rate before the edit.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let presets: BTreeMap<_, _> = gogrid_api::profile::presets().into_iter().collect();
    let mut strict = serde_json::to_value(presets.get("conservative").context("no preset")?)?;
    strict
        .as_object_mut()
        .context("no object")?
        .remove("nodeSelector");
    let patch = json!({ "spec": strict }).to_string();
    let edited = boottime_micros();
    kubectl(
        cluster,
        &["patch", "rprof", "default", "--type", "merge", "-p", &patch],
    )
    .await?;
    let profiles: Api<gogrid_api::ResourceProfile> = Api::all(cluster.client.clone());
    let generation = profiles
        .get("default")
        .await?
        .metadata
        .generation
        .unwrap_or_default();
    let nodes: Api<GpuNode> = Api::all(cluster.client.clone());
    eventually(LONG, "the edit to be in force on the node", || async {
        let status = nodes.get(&node).await?.status.unwrap_or_default();
        let found = status
            .profiles
            .iter()
            .find(|p| p.name == "default" && p.generation >= generation);
        found.map(drop).with_context(|| format!("{:?}", status.profiles))
    })
    .await?;
    let seconds = seconds_since(edited)?;
    let settled = boottime_micros() + 1_000_000;
    kubectl(cluster, &["get", "assignment", "--namespace", NAMESPACE]).await?;
    let job = cluster.until_finished(&job, LONG).await?;
    let results = cluster.results(&job).await?;
    questions.right(&results)?;
    let before = tokens_per_second(&results, |at| at < edited)?;
    let after = tokens_per_second(&results, |at| at > settled)?;
    println!("in force {seconds:.1} s after the edit, by read-back from every worker thread");
    println!("tokens/s {before:.1} before, {after:.1} after; all {LONG_JOB} records answered once");
    ensure!(
        seconds <= 5.0,
        "the edit took {seconds:.1} s to be in force: at most 5 s are allowed"
    );
    ensure!(after < before, "the stricter profile had no effect");
    Ok(())
}

fn seconds_since(micros: i64) -> Result<f64> {
    Ok(f64::from(i32::try_from((boottime_micros() - micros) / 1000)?) / 1000.0)
}

fn boottime_micros() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1000
}

/// Tokens a second over the results whose end is accepted, by the worker's stamps.
fn tokens_per_second(results: &[Value], accept: impl Fn(i64) -> bool) -> Result<f64> {
    let stamp = |r: &Value| {
        r.pointer("/response/body/gogrid/finishedMicros")
            .and_then(Value::as_i64)
    };
    let tokens = |r: &Value| {
        r.pointer("/response/body/usage/completion_tokens")
            .and_then(Value::as_i64)
    };
    let mut chosen: Vec<(i64, i64)> = results
        .iter()
        .filter_map(|r| Some((stamp(r)?, tokens(r)?)))
        .filter(|(at, _)| accept(*at))
        .collect();
    chosen.sort_unstable();
    let (first, last) = (
        chosen.first().context("no result in the window")?,
        chosen.last().context("none")?,
    );
    ensure!(last.0 > first.0, "only {} results in the window", chosen.len());
    // The first result's tokens were made before the window began.
    let sum: i64 = chosen.iter().skip(1).map(|(_, tokens)| tokens).sum();
    Ok(f64::from(i32::try_from(sum)?) * 1e6 / f64::from(i32::try_from(last.0 - first.0)?))
}
