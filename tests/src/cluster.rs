//! GoGrid on a control plane: the chart's objects, an operator and agents as real processes under the chart's service
//! accounts.
//!
//! Owns: starting, killing and restarting those processes, and making jobs. Must not: know what they decide.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use gogrid_api::{InferenceJob, condition};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::chart;
use crate::controlplane::ControlPlane;
use crate::jobs;
use crate::netns::Outpost;
use crate::process::Process;
use crate::prometheus;
use crate::wait::eventually;

/// GoGrid's own namespace in every test.
pub const NAMESPACE: &str = "gogrid-system";
/// Length of a node lease in tests, in seconds: 4 unless `GOGRID_TEST_LEASE_SECONDS` says otherwise, as `make soak` does (40).
///
/// Every other time of GoGrid is in a fixed ratio to it; waits of tests that follow from one are given in leases.
pub fn lease_seconds() -> u32 {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where tests read their setting"
    )]
    let set = std::env::var("GOGRID_TEST_LEASE_SECONDS");
    set.ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// That many tenths of a node lease.
pub fn tenths_of_lease(tenths: u32) -> Duration {
    Duration::from_millis(u64::from(lease_seconds()) * 100) * tenths
}

/// What the one operator is called where a test doesn't say otherwise.
const OPERATOR: &str = "operator";
const READY_WITHIN: Duration = Duration::from_secs(60);

/// What can be chosen about a cluster.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Names of the nodes, each with the profile it is labelled with (`None`: conservative by default).
    pub nodes: Vec<(String, Option<String>)>,
    /// Length of a node lease in seconds; every other time follows from it.
    pub lease_seconds: u32,
    /// Directories whose models may be run.
    pub model_roots: Vec<PathBuf>,
    /// More flags for every agent.
    pub agent_args: Vec<String>,
    /// More flags for the agents of some nodes.
    pub node_args: BTreeMap<String, Vec<String>>,
    /// More environment for every agent.
    pub agent_env: Vec<(String, String)>,
    /// Whether workers stamp their steps: see [`crate::steps`].
    pub stamped: bool,
    /// Where a program, `operator` or a node's, serves its metrics; any other picks a free port.
    pub metrics: BTreeMap<String, SocketAddr>,
}

impl ClusterOptions {
    /// That many nodes `node-1`… under the `aggressive` profile, with leases of [`lease_seconds`] and the committed models.
    pub fn quick(nodes: usize) -> Self {
        Self {
            nodes: (1..=nodes)
                .map(|n| (format!("node-{n}"), Some("aggressive".to_owned())))
                .collect(),
            lease_seconds: lease_seconds(),
            model_roots: vec![jobs::model_root()],
            agent_args: vec![],
            node_args: BTreeMap::new(),
            agent_env: vec![],
            stamped: false,
            metrics: BTreeMap::new(),
        }
    }
}

/// A running GoGrid.
pub struct Cluster {
    /// The control plane it runs on.
    pub control: Arc<ControlPlane>,
    /// A client with every right.
    pub client: Client,
    options: ClusterOptions,
    /// By the operator's name; all without an entry share the one of `operator`.
    operator_kubeconfigs: Mutex<BTreeMap<String, PathBuf>>,
    agent_kubeconfigs: BTreeMap<String, PathBuf>,
    processes: Mutex<BTreeMap<String, Arc<Process>>>,
    starts: Mutex<u32>,
}

/// One of our programs, built beside the running one.
///
/// # Errors
/// When it has not been built: `cargo build --workspace` does.
pub fn program(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    me.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not beside {}: run `make build` first", me.display()))
}

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

impl Cluster {
    /// Installs the chart, makes the nodes, and starts one operator and one agent a node; returns when all are ready.
    pub async fn start(control: Arc<ControlPlane>, options: ClusterOptions) -> Result<Self> {
        let cluster = Self::install(control, options).await?;
        cluster.begin(&BTreeMap::new()).await?;
        Ok(cluster)
    }

    /// What [`Self::start`] does after [`Self::install`]; agents of nodes that are named here run out there.
    pub async fn begin(&self, outposts: &BTreeMap<String, Outpost>) -> Result<()> {
        self.start_operator(&[])?;
        // Agents that list profiles before there are any would turn the first jobs away.
        self.until_presets().await?;
        for (node, _) in &self.options.nodes {
            match outposts.get(node) {
                Some(outpost) => self.start_agent_at(outpost, node, &[])?,
                None => self.start_agent(node)?,
            };
        }
        for (node, _) in &self.options.nodes {
            self.until_node_ready(node).await?;
        }
        Ok(())
    }

    /// As [`Self::start`], without any process of ours.
    pub async fn install(control: Arc<ControlPlane>, options: ClusterOptions) -> Result<Self> {
        let client = control.admin_client().await?;
        chart::install(&control, NAMESPACE, &json!({})).await?;
        let operator_kubeconfig = operator_kubeconfig(&control, OPERATOR).await?;
        let mut agent_kubeconfigs = BTreeMap::new();
        for (node, profile) in &options.nodes {
            let label: Vec<(&str, &str)> = profile
                .iter()
                .map(|p| (gogrid_api::names::PROFILE_NODE_LABEL, p.as_str()))
                .collect();
            let kubeconfig = chart::admit_node(&control, NAMESPACE, node, &label).await?;
            agent_kubeconfigs.insert(node.clone(), kubeconfig);
        }
        Ok(Self {
            control,
            client,
            options,
            operator_kubeconfigs: Mutex::new(BTreeMap::from([(OPERATOR.to_owned(), operator_kubeconfig)])),
            agent_kubeconfigs,
            processes: Mutex::default(),
            starts: Mutex::default(),
        })
    }

    /// Starts an operator under the chart's service account, with these flags besides the usual ones.
    pub fn start_operator(&self, more: &[&str]) -> Result<Arc<Process>> {
        self.start_operator_as(OPERATOR, more)
    }

    /// Gives operators of that name a token of their own, by which the audit log tells them from others.
    pub async fn admit_operator(&self, name: &str) -> Result<()> {
        let kubeconfig = operator_kubeconfig(&self.control, name).await?;
        let mut all = self
            .operator_kubeconfigs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.insert(name.to_owned(), kubeconfig);
        Ok(())
    }

    /// As [`Self::start_operator`], beside the one that is called `operator`.
    pub fn start_operator_as(&self, name: &str, more: &[&str]) -> Result<Arc<Process>> {
        let kubeconfig = {
            let all = self
                .operator_kubeconfigs
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            all.get(name).or_else(|| all.get(OPERATOR)).cloned()
        };
        let mut command = Command::new(program("gogrid-operator")?);
        command.args([
            "--namespace",
            NAMESPACE,
            "--metrics-addr",
            &self.metrics_flag(name),
            "--log-format",
            "text",
        ]);
        command
            .arg("--lease-duration-seconds")
            .arg(self.options.lease_seconds.to_string());
        for root in &self.options.model_roots {
            command.arg("--model-root").arg(root);
        }
        command
            .args(more)
            .env("KUBECONFIG", kubeconfig.context("no operator's kubeconfig")?)
            .env("NO_COLOR", "1")
            .env("RUST_BACKTRACE", "1");
        self.launch(name, command)
    }

    /// Starts the agent of that node under the chart's service account, with the node's own token.
    pub fn start_agent(&self, node: &str) -> Result<Arc<Process>> {
        self.start_agent_with(node, &[])
    }

    /// As [`Self::start_agent`], with more flags.
    pub fn start_agent_with(&self, node: &str, more: &[&str]) -> Result<Arc<Process>> {
        self.launch(node, self.agent_command(node, more)?)
    }

    /// As [`Self::start_agent_with`], out there; the cable must lead to this cluster's API server.
    pub fn start_agent_at(&self, outpost: &Outpost, node: &str, more: &[&str]) -> Result<Arc<Process>> {
        let mut command = self.agent_command(node, more)?;
        let name = chart::agent_kubeconfig_name(node);
        command.env(
            "KUBECONFIG",
            self.control.kubeconfig_through(&name, outpost.address())?,
        );
        self.launch(node, outpost.command(&command))
    }

    fn agent_command(&self, node: &str, more: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("gogrid-agent")?);
        let state = self.agent_dir(node);
        std::fs::create_dir_all(&state)?;
        command.args([
            "--node-name",
            node,
            "--namespace",
            NAMESPACE,
            "--metrics-addr",
            &self.metrics_flag(node),
        ]);
        command
            .args(["--log-format", "text"])
            .arg("--state-dir")
            .arg(&state);
        if !more.contains(&"--worker-binary") {
            command.arg("--worker-binary").arg(program("gogrid-worker")?);
        }
        command
            .arg("--lease-duration-seconds")
            .arg(self.options.lease_seconds.to_string());
        for root in &self.options.model_roots {
            command.arg("--model-root").arg(root);
        }
        if self.options.stamped {
            let stamps = self.stamps_dir(node);
            std::fs::create_dir_all(&stamps)?;
            command.arg("--stamps").arg(stamps);
        }
        let kubeconfig = self
            .agent_kubeconfigs
            .get(node)
            .with_context(|| format!("no node {node}"))?;
        command
            .args(&self.options.agent_args)
            .args(self.options.node_args.get(node).into_iter().flatten())
            .envs(self.options.agent_env.iter().cloned())
            .args(more)
            .env("KUBECONFIG", kubeconfig)
            .env("RUST_BACKTRACE", "1");
        Ok(command)
    }

    /// Where that node's agent keeps its state.
    pub fn agent_dir(&self, node: &str) -> PathBuf {
        self.control.dir().join(format!("agent-{node}"))
    }

    /// Where workers of that node stamp their steps.
    pub fn stamps_dir(&self, node: &str) -> PathBuf {
        self.agent_dir(node).join("stamps")
    }

    fn launch(&self, name: &str, command: Command) -> Result<Arc<Process>> {
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        *starts += 1;
        let log = self.control.dir().join(format!("{name}-{starts}.log"));
        let process = Arc::new(Process::start(name, command, &log)?);
        self.processes().insert(name.to_owned(), Arc::clone(&process));
        Ok(process)
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process started last under that name: `operator`, or a node's.
    pub fn process(&self, name: &str) -> Result<Arc<Process>> {
        self.processes()
            .get(name)
            .cloned()
            .with_context(|| format!("no process {name}"))
    }

    /// Kills every operator, whatever it is called.
    pub fn kill_operators(&self) {
        let nodes = &self.options.nodes;
        for (name, process) in self.processes().iter() {
            if nodes.iter().all(|(node, _)| node != name) {
                process.kill();
            }
        }
    }

    /// What a program whose metrics have a fixed place says of its readiness: nothing while it is ready.
    pub async fn hindrance(&self, name: &str) -> Result<Option<String>> {
        let place = self
            .options
            .metrics
            .get(name)
            .with_context(|| format!("{name} has no place"))?;
        let (status, body) = prometheus::answer(place.port(), "/readyz").await?;
        Ok((status != 200).then_some(body))
    }

    fn metrics_flag(&self, name: &str) -> String {
        let chosen = self.options.metrics.get(name);
        chosen.map_or_else(|| "127.0.0.1:0".to_owned(), ToString::to_string)
    }

    /// The last lines of every program's log, for a message about something that went wrong.
    pub fn log_tails(&self, lines: usize) -> String {
        self.processes()
            .iter()
            .map(|(name, p)| format!("--- {name}:\n{}\n", p.log_tail(lines)))
            .collect()
    }

    /// Waits until the operator has made the preset profiles.
    pub async fn until_presets(&self) -> Result<()> {
        let profiles: Api<gogrid_api::ResourceProfile> = Api::all(self.client.clone());
        eventually(READY_WITHIN, "the operator to install the presets", || async {
            for (name, _) in gogrid_api::profile::presets() {
                profiles.get(name).await?;
            }
            Ok(())
        })
        .await
        .with_context(|| self.log_tails(30))
    }

    /// Waits until that node's GpuNode says Ready and its Lease is held.
    pub async fn until_node_ready(&self, node: &str) -> Result<()> {
        let nodes: Api<gogrid_api::GpuNode> = Api::all(self.client.clone());
        let process = self.process(node)?;
        eventually(READY_WITHIN, &format!("GpuNode {node} to be Ready"), || async {
            if !process.is_running() {
                bail!("its agent has ended: {}", process.log_tail(20));
            }
            let status = nodes.get(node).await?.status.unwrap_or_default();
            ensure!(
                condition::is_true(&status.conditions, "Ready"),
                "conditions {:?}",
                status.conditions
            );
            Ok(())
        })
        .await
        .with_context(|| process.log_tail(30))
    }

    /// Jobs of one namespace.
    pub fn jobs(&self, namespace: &str) -> Api<InferenceJob> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Creates a job from its spec.
    pub async fn create_job(&self, namespace: &str, name: &str, spec: Value) -> Result<InferenceJob> {
        jobs::create(&self.client, namespace, name, spec).await
    }

    /// Makes a ConfigMap of those records; returns what a job's `input` says of it.
    pub async fn create_input(&self, namespace: &str, name: &str, lines: &[String]) -> Result<Value> {
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            },
            data: Some(BTreeMap::from([("input.jsonl".to_owned(), lines.join("\n"))])),
            ..ConfigMap::default()
        };
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        maps.create(&PostParams::default(), &map).await?;
        Ok(json!({"configMapRef": {"name": name}}))
    }

    /// Waits until a job's condition of that type carries that reason, and returns the job.
    pub async fn until_reason(
        &self,
        job: &InferenceJob,
        type_: &str,
        reason: &str,
        within: Duration,
    ) -> Result<InferenceJob> {
        let what = format!("{} to be {type_}/{reason}", job.name_any());
        self.until(job, &what, within, |job| {
            let status = job.status.clone().unwrap_or_default();
            match condition::find(&status.conditions, type_) {
                Some(found) if found.reason == reason => Ok(()),
                _ => Err(anyhow!("conditions: {}", jobs::short(&status.conditions))),
            }
        })
        .await
    }

    /// Waits until a job is Finished, either way, and returns it.
    pub async fn until_finished(&self, job: &InferenceJob, within: Duration) -> Result<InferenceJob> {
        jobs::until_finished(&self.client, job, within)
            .await
            .with_context(|| self.log_tails(25))
    }

    /// Waits until `accept` is content with the stored job, and returns it.
    pub async fn until(
        &self,
        job: &InferenceJob,
        what: &str,
        within: Duration,
        accept: impl Fn(&InferenceJob) -> Result<()>,
    ) -> Result<InferenceJob> {
        jobs::until(&self.client, job, what, within, accept)
            .await
            .with_context(|| self.log_tails(25))
    }

    /// The published results of a finished job, one JSON value a record.
    pub async fn results(&self, job: &InferenceJob) -> Result<Vec<Value>> {
        jobs::results(&self.client, job).await
    }
}

async fn operator_kubeconfig(control: &ControlPlane, name: &str) -> Result<PathBuf> {
    let token = control.token_for_sa(NAMESPACE, chart::OPERATOR).await?;
    control.kubeconfig_for_token(name, &token)
}

/// One record in the OpenAI Batch shape.
pub fn record(id: &str, prompt: &str, max_tokens: u32) -> String {
    json!({
        "custom_id": id, "method": "POST", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens},
    })
    .to_string()
}

/// The answer's text in one result, if it has one.
pub fn answer(result: &Value) -> Option<&str> {
    result
        .pointer("/response/body/choices/0/message/content")?
        .as_str()
}

/// Runs a test on the one runtime of its binary, so that clients and the shared cluster may outlive a single test.
pub fn on_runtime<T>(test: impl Future<Output = T>) -> T {
    static RUNTIME: std::sync::OnceLock<tokio::runtime::Runtime> = std::sync::OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            #[expect(clippy::expect_used, reason = "a test without a runtime has nothing to say")]
            builder
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a tokio runtime")
        })
        .block_on(test)
}
