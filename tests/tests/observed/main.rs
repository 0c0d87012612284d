//! What a running GoGrid shows: its metrics to a real Prometheus, its alerts, and which of its rights it uses.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

mod rules;

use anyhow::{Context as _, Result, ensure};
use gogrid_agent_core::protocol::{Hello, PROTOCOL_VERSION, Role, encode};
use gogrid_api::{ResourceProfile, names};
use gogrid_tests::cluster::{Cluster, ClusterOptions, NAMESPACE, on_runtime, program, repository};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, spec};
use gogrid_tests::ports;
use gogrid_tests::prometheus::{Prometheus, check_metrics, get};
use gogrid_tests::rbac;
use gogrid_tests::wait::eventually;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const LONG: Duration = Duration::from_secs(60);
const FIRES: Duration = Duration::from_secs(30);
const PROGRAMS: [&str; 3] = ["operator", "node-1", "node-2"];

struct Scene {
    cluster: Cluster,
    prometheus: Prometheus,
    targets: BTreeMap<String, std::net::SocketAddr>,
}

impl Scene {
    async fn fires(&self, alerts: &[&str]) -> Result<()> {
        let fired = self.prometheus.until(alerts, true, FIRES).await;
        fired.with_context(|| self.cluster.log_tails(15))
    }

    async fn clears(&self, alerts: &[&str]) -> Result<()> {
        self.prometheus.until(alerts, false, FIRES).await
    }

    async fn job(
        &self,
        name: &str,
        records: usize,
        change: impl FnOnce(&mut Value),
    ) -> Result<gogrid_api::InferenceJob> {
        self.job_of(Questions::new(3, records), name, change).await
    }

    async fn job_of(
        &self,
        questions: Questions,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<gogrid_api::InferenceJob> {
        let mut spec = spec(&questions.lines(), name)?;
        change(&mut spec);
        self.cluster.create_job("default", name, spec).await
    }

    /// A job of any number of records, by the ConfigMap NAME-input.
    async fn job_of_map(
        &self,
        name: &str,
        records: usize,
        change: impl FnOnce(&mut Value),
    ) -> Result<gogrid_api::InferenceJob> {
        let lines = Questions::new(5, records).lines();
        let map = format!("{name}-input");
        let input = self.cluster.create_input("default", &map, &lines).await?;
        self.job(name, 1, |spec| {
            change(spec);
            spec["input"] = input;
        })
        .await
    }

    /// Labels a node, for jobs that select it.
    async fn label(&self, node: &str, label: &str) -> Result<()> {
        let nodes: Api<Node> = Api::all(self.cluster.client.clone());
        let label = Patch::Merge(json!({"metadata": {"labels": {label: "yes"}}}));
        nodes.patch(node, &PatchParams::default(), &label).await?;
        Ok(())
    }

    async fn delete(&self, job: &str) -> Result<()> {
        let jobs = self.cluster.jobs("default");
        jobs.delete(job, &DeleteParams::default()).await?;
        eventually(LONG, &format!("{job} to be gone"), || async {
            ensure!(jobs.get_opt(job).await?.is_none(), "still there");
            Ok(())
        })
        .await
    }

    async fn edit_profile(&self, spec: Value) -> Result<()> {
        let profiles: Api<ResourceProfile> = Api::all(self.cluster.client.clone());
        let patch = Patch::Merge(json!({"spec": spec}));
        profiles
            .patch("aggressive", &PatchParams::default(), &patch)
            .await?;
        Ok(())
    }
}

/// A job that takes a while: a request every 100 ms.
fn slowly(spec: &mut Value) {
    spec["profileName"] = json!("conservative");
}

#[test]
fn induced_faults_fire_and_clear_their_alerts_and_the_run_uses_every_right() -> Result<()> {
    on_runtime(async {
        let control = ControlPlane::shared().await?;
        let begun = control.now();
        let mut options = ClusterOptions::quick(2);
        options.agent_args = vec!["--allow-address=127.0.0.1".into()];
        for name in PROGRAMS {
            // Fixed, so that a restarted program is found again at once.
            options.metrics.insert(name.to_owned(), ports::fixed()?);
        }
        let targets = options.metrics.clone();
        let cluster = Cluster::start(control.clone(), options).await?;
        let alerts = std::fs::read_to_string(repository().join("charts/gogrid/files/alerts.yaml"))?;
        let prometheus = Prometheus::start(
            &control.dir().join("prometheus"),
            &rules::hurried(&alerts),
            &targets,
        )
        .await?;
        let scene = Scene {
            cluster,
            prometheus,
            targets,
        };
        scene.clears(&["GoGridNoLeader"]).await?;
        let quiet = scene.prometheus.firing().await?;
        ensure!(quiet.is_empty(), "{quiet:?} fire though nothing is wrong");

        jobs_that_end_well(&scene).await?;
        jobs_that_fail_or_wait(&scene).await?;
        a_worker_over_its_limit_and_a_stranger(&scene).await?;
        a_download_that_stalls(&scene).await?;
        an_agent_that_dies(&scene).await?;
        a_worker_that_heeds_no_grant(&scene).await?;
        answers_that_are_lost(&scene).await?;
        the_page_of_metrics_is_what_is_exported(&scene).await?;
        an_api_server_that_hangs(&scene).await?;
        crds_without_their_rules(&scene).await?;
        an_operator_without_answers(&scene).await?;

        for name in PROGRAMS {
            scene.cluster.process(name)?.stop(Duration::from_secs(10));
        }
        let requests = control.audit_requests(begun, control.now())?;
        println!("{}", rbac::check(&requests, NAMESPACE, rbac::OBSERVED)?);
        Ok(())
    })
}

/// An input from a ConfigMap, one that is deleted after its time, and one that is deleted while it runs.
async fn jobs_that_end_well(scene: &Scene) -> Result<()> {
    let of_map = scene.job_of_map("of-a-map", 5, |_| ()).await?;
    scene
        .job("expires", 2, |spec| spec["ttlSecondsAfterFinished"] = json!(1))
        .await?;
    let deleted = scene.job("deleted", 200, slowly).await?;
    scene
        .cluster
        .until_reason(&deleted, "Succeeded", "Running", LONG)
        .await?;
    scene.delete("deleted").await?;
    scene.cluster.until_finished(&of_map, LONG).await?;
    let jobs = scene.cluster.jobs("default");
    eventually(LONG, "the job to expire", || async {
        ensure!(jobs.get_opt("expires").await?.is_none(), "still there");
        Ok(())
    })
    .await
}

async fn jobs_that_fail_or_wait(scene: &Scene) -> Result<()> {
    for n in 0..4 {
        let wrong = |spec: &mut Value| spec["model"]["sha256"] = json!("0".repeat(64));
        scene.job(&format!("wrong-{n}"), 1, wrong).await?;
    }
    let nowhere = |spec: &mut Value| spec["placement"] = json!({"nodeSelector": {"no": "where"}});
    scene.job("nowhere", 1, nowhere).await?;
    scene.fires(&["GoGridModelVerificationFailed"]).await?;
    scene.fires(&["GoGridJobFailureRateHigh"]).await?;
    scene.fires(&["GoGridJobPendingTooLong"]).await?;
    scene.delete("nowhere").await?;
    scene.clears(&["GoGridJobPendingTooLong"]).await
}

async fn a_worker_over_its_limit_and_a_stranger(scene: &Scene) -> Result<()> {
    scene.label("node-2", "offered").await?;
    let here = |spec: &mut Value| {
        slowly(spec);
        spec["placement"] = json!({"nodeSelector": {"offered": "yes"}});
    };
    let job = scene.job_of_map("over", 2000, here).await?;
    scene
        .cluster
        .until_reason(&job, "Succeeded", "Running", LONG)
        .await?;
    scene
        .edit_profile(json!({"vram": {"maxPercent": 95, "max": "1Mi"}}))
        .await?;
    scene.fires(&["GoGridMemoryLimitBreached"]).await?;
    scene
        .edit_profile(json!({"vram": {"maxPercent": 95, "max": null}}))
        .await?;
    scene.clears(&["GoGridMemoryLimitBreached"]).await?;

    // A stranger in the name of each worker that there may be: whoever has none is merely late.
    let mut strangers = vec![];
    for worker in 1..=8 {
        let nonce = "0".repeat(64);
        let hello = Hello {
            version: PROTOCOL_VERSION,
            role: Role::Worker { worker, nonce },
        };
        let socket = scene.cluster.agent_dir("node-2").join("agent.sock");
        let mut stranger = tokio::net::UnixStream::connect(socket).await?;
        stranger.write_all(&encode(&hello)?).await?;
        strangers.push(stranger);
    }
    scene.fires(&["GoGridProtocolBreach"]).await
}

async fn a_download_that_stalls(scene: &Scene) -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server = tokio::spawn(async move {
        let mut open = vec![];
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            if stream.read(&mut request).await.is_ok() {
                let head = "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nGGUF";
                let _ = stream.write_all(head.as_bytes()).await;
            }
            // Neither more bytes nor an end.
            open.push(stream);
        }
    });
    let url = format!("http://{address}/stalls.gguf");
    scene
        .job("stalls", 1, |spec| spec["model"]["uri"] = json!(url))
        .await?;
    scene.fires(&["GoGridModelDownloadStalled"]).await?;
    scene.delete("stalls").await?;
    server.abort();
    Ok(())
}

/// The job on that node goes to the other one; an edit of the profile can't reach it until its agent is back.
async fn an_agent_that_dies(scene: &Scene) -> Result<()> {
    scene.cluster.process("node-2")?.kill();
    scene.label("node-1", "offered").await?;
    scene.edit_profile(json!({"vram": {"maxPercent": 94}})).await?;
    scene
        .fires(&["GoGridAgentDown", "GoGridLeaseExpired", "GoGridProfileNotApplied"])
        .await?;
    let jobs = scene.cluster.jobs("default");
    eventually(LONG, "its job to be placed on node-1", || async {
        let status = jobs.get("over").await?.status.unwrap_or_default();
        let placed = status.placement.map(|placement| placement.node_name);
        ensure!(placed.as_deref() == Some("node-1"), "{placed:?}");
        Ok(())
    })
    .await?;
    scene.cluster.start_agent("node-2")?;
    scene.cluster.until_node_ready("node-2").await?;
    scene
        .clears(&["GoGridAgentDown", "GoGridProfileNotApplied"])
        .await?;
    scene.delete("over").await
}

/// Another agent on node-2, with these flags.
async fn other_agent(scene: &Scene, flags: &[&str]) -> Result<()> {
    scene.cluster.process("node-2")?.kill();
    scene.cluster.start_agent_with("node-2", flags)?;
    scene.cluster.until_node_ready("node-2").await
}

async fn a_worker_that_heeds_no_grant(scene: &Scene) -> Result<()> {
    let heedless = program("heedless")?;
    other_agent(
        scene,
        &["--worker-binary", heedless.to_str().context("its path")?],
    )
    .await?;
    scene.edit_profile(json!({"compute": {"maxPercent": 10}})).await?;
    let on_node_2 = |spec: &mut Value| spec["placement"] = json!({"nodeSelector": {"heedless": "yes"}});
    scene.label("node-2", "heedless").await?;
    let job = scene.job_of_map("greedy", 5000, on_node_2).await?;
    scene
        .cluster
        .until_reason(&job, "Succeeded", "Running", LONG)
        .await?;
    scene.fires(&["GoGridComputeCapBreached"]).await?;
    scene.delete("greedy").await?;
    scene.edit_profile(json!({"compute": {"maxPercent": 95}})).await?;
    scene.clears(&["GoGridComputeCapBreached"]).await
}

/// What an agent wrote and had no answer for, or wrote twice, is looked up; chunks that grew meanwhile are replaced.
async fn answers_that_are_lost(scene: &Scene) -> Result<()> {
    // First the node's and the order's status, then chunks.
    let faults = ["--fault", "duplicate=1..5", "--fault", "lose-answer=6..14"];
    other_agent(scene, &faults).await?;
    let there = |spec: &mut Value| {
        slowly(spec);
        spec["placement"] = json!({"nodeSelector": {"heedless": "yes"}});
    };
    let questions = Questions::new(3, 60).wordy();
    let job = scene.job_of(questions, "unanswered", there).await?;
    scene.cluster.until_finished(&job, LONG).await?;
    Ok(())
}

/// Every answer to one operator's writes is lost; the first writes of the next are carried out twice, as by a proxy that
/// repeats. An input that its user edits meanwhile is taken as edited; it is too long for an order.
async fn an_operator_without_answers(scene: &Scene) -> Result<()> {
    let other_operator = |fault: &str| {
        scene.cluster.process("operator")?.kill();
        scene.cluster.start_operator(&["--fault", fault])
    };
    other_operator("lose-answer=1..100000")?;
    let edited = scene.job_of_map("edited", 200, |_| ()).await?;
    let staged = names::input_chunk(&edited.uid().context("no uid")?, 0);
    let ours: Api<ConfigMap> = Api::namespaced(scene.cluster.client.clone(), NAMESPACE);
    eventually(LONG, "the input to be staged", || async {
        ensure!(ours.get_opt(&staged).await?.is_some(), "not yet");
        Ok(())
    })
    .await?;
    let questions = Questions::new(6, 200);
    let theirs: Api<ConfigMap> = Api::namespaced(scene.cluster.client.clone(), "default");
    let edit = Patch::Merge(json!({"data": {"input.jsonl": questions.lines().join("\n")}}));
    theirs
        .patch("edited-input", &PatchParams::default(), &edit)
        .await?;

    let mut waiting = vec![];
    let alert = "GoGridReconcileErrorsHigh";
    // Each failure of a job comes later than its last one: others keep coming.
    while !scene.prometheus.firing().await?.contains(alert) {
        let logs = || scene.cluster.log_tails(15);
        ensure!(waiting.len() < 30, "{alert} does not fire: {}", logs());
        let name = format!("unanswered-{}", waiting.len());
        waiting.push(scene.job(&name, 1, |_| ()).await?);
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    other_operator("duplicate=1..40")?;
    for job in &waiting {
        scene.cluster.until_finished(job, LONG).await?;
    }
    let edited = scene.cluster.until_finished(&edited, LONG).await?;
    questions.right(&scene.cluster.results(&edited).await?)?;
    scene.clears(&[alert]).await
}

/// Every name on the pages is exported by a program that has worked, and no other name is.
async fn the_page_of_metrics_is_what_is_exported(scene: &Scene) -> Result<()> {
    let shown = get(scene.targets["operator"].port(), "/metrics").await?;
    on_page(
        "operator",
        &shown,
        &[
            "gogrid_malformed_objects_total",
            "gogrid_reconcile_errors_total",
            "gogrid_watch_errors_total",
        ],
    )?;
    let (mut agents, mut agents_once) = (String::new(), String::new());
    for node in ["node-1", "node-2"] {
        let text = get(scene.targets[node].port(), "/metrics").await?;
        let per_device = text
            .lines()
            .filter(|line| line.contains("device=\"cpu\""))
            .count();
        let all = text.lines().filter(|line| !line.starts_with('#')).count();
        println!("{node}: {all} series, {per_device} of them of its one device");
        ensure!(per_device <= 40, "{per_device} series of one device");
        agents += &text;
        agents_once = text;
    }
    // A GPU driver, a profile that yields and a breach that lasts would bring them.
    on_page(
        "agent",
        &agents,
        &[
            "gogrid_driver_silences_total",
            "gogrid_adaptive_turns_total",
            "gogrid_vram_watchdog_rungs_total",
        ],
    )?;
    // Says what is wrong with names, units and help texts.
    for text in [shown, agents_once] {
        check_metrics(&text)?;
    }
    Ok(())
}

fn on_page(program: &str, text: &str, may_be_absent: &[&str]) -> Result<()> {
    let shown: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|rest| rest.split_whitespace().next())
        .collect();
    let page = std::fs::read_to_string(repository().join(format!("docs/reference/metrics-{program}.md")))?;
    let listed: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let unlisted: Vec<&&str> = shown.difference(&listed).collect();
    let absent: Vec<&&str> = listed
        .difference(&shown)
        .filter(|name| !may_be_absent.contains(name))
        .collect();
    ensure!(
        unlisted.is_empty() && absent.is_empty(),
        "{program}: exported but not on the page: {unlisted:?}; on the page but not exported: {absent:?}"
    );
    Ok(())
}

async fn an_api_server_that_hangs(scene: &Scene) -> Result<()> {
    scene.cluster.control.pause_api_server()?;
    let fired = scene.fires(&["GoGridHeartbeatLate", "GoGridNoLeader"]).await;
    scene.cluster.control.resume_api_server()?;
    fired?;
    scene.clears(&["GoGridHeartbeatLate", "GoGridNoLeader"]).await
}

/// An operator that starts beside CRDs of before the fence rules refuses to lead until they are back.
async fn crds_without_their_rules(scene: &Scene) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(scene.cluster.client.clone());
    let name = "inferencejobs.gogrid.dev";
    let whole = crds.get(name).await?;
    let mut stripped = whole.clone();
    stripped
        .spec
        .versions
        .iter_mut()
        .filter_map(|version| version.schema.as_mut()?.open_api_v3_schema.as_mut())
        .for_each(|root| root.x_kubernetes_validations = None);
    crds.replace(name, &PostParams::default(), &stripped).await?;
    scene.cluster.process("operator")?.kill();
    scene.cluster.start_operator(&[])?;
    scene.fires(&["GoGridCrdVersionSkew", "GoGridNoLeader"]).await?;
    let mut restored = crds.get(name).await?;
    restored.spec = whole.spec;
    crds.replace(name, &PostParams::default(), &restored).await?;
    scene.clears(&["GoGridCrdVersionSkew", "GoGridNoLeader"]).await?;
    let after = scene.job("after", 1, |_| ()).await?;
    scene.cluster.until_finished(&after, LONG).await?;
    Ok(())
}
