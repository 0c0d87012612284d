//! Real nodes beside the control plane: kubelets that run real pods, in namespaces of their own, without Docker.
//!
//! Owns: the nodes, their network and scheduler, and everything they write; nothing of it is left when it is dropped, not
//! even after a SIGKILL of this process, but for empty cgroups that the next start removes. Needs root.
//! Must not: know any GoGrid resource.
//!
//! There is no Service proxy and no DNS: the one Service that pods use is `kubernetes`, whose address is the control
//! plane's own. All nodes share this machine's kernel, CPU and memory.

mod cgroups;
mod fabric;
mod node;
mod programs;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::api::Api;
use rustix::event::{Timespec, poll};

pub use node::Node;
pub use programs::Programs;

use crate::controlplane::{ControlPlane, ControlPlaneOptions, User, WORK_DIR_PREFIX, random_token};
use crate::images;
use crate::process::Process;
use crate::sys;
use crate::wait::eventually;
use fabric::Fabric;

const READY_WITHIN: Duration = Duration::from_secs(90);
/// Bit of CAP_SYS_RESOURCE in /proc/self/status.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// What can be chosen about real nodes.
#[derive(Clone, Debug, Default)]
pub struct NodesOptions {
    /// How many.
    pub count: usize,
    /// Where everything is written, kept afterwards; a temporary directory, removed at the end, when `None`.
    pub dir: Option<PathBuf>,
    /// OCI archives that every node has from the start.
    pub images: Vec<PathBuf>,
}

/// Running nodes and their control plane; everything of it ends with this value.
pub struct Nodes {
    /// The control plane they belong to.
    pub control: Arc<ControlPlane>,
    all: Vec<Node>,
    scheduler: Process,
    fabric: Fabric,
    /// Last: fields are dropped in this order.
    dir: WorkDir,
}

/// Why real nodes can't be run here, or `None` where they can.
pub fn obstacle() -> Option<String> {
    let uid = rustix::process::getuid();
    (!uid.is_root()).then(|| format!("real nodes need root, and this is user {}", uid.as_raw()))
}

/// The name of node `number`, counted from 1.
pub fn node_name(number: usize) -> String {
    format!("node-{number}")
}

/// Whether containers may be given a lower `oom_score_adj` than this process has.
fn may_lower_oom_score() -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(effective.context("no CapEff")?.trim(), 16)?;
    Ok(effective & CAP_SYS_RESOURCE != 0)
}

/// A moment, for what the kernel announces in no other way.
fn pause() {
    let moment = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    // Interrupted: shorter, which does no harm.
    let _ = poll(&mut [], Some(&moment));
}

impl Nodes {
    /// Starts control plane, scheduler and nodes and returns when all nodes are Ready.
    ///
    /// Builds their programs first where that has not been done on this machine, which takes many minutes.
    pub async fn start(options: NodesOptions) -> Result<Self> {
        if let Some(obstacle) = obstacle() {
            bail!("{obstacle}");
        }
        cgroups::sweep()?;
        let programs = Programs::find().await?;
        let dir = WorkDir::prepare(options.dir.as_deref())?;
        let control_dir = dir.path.join("control");
        let fabric = Fabric::start(&dir.path, options.count).await?;
        let mut users = vec![User {
            name: "system:kube-scheduler".into(),
            group: String::new(),
            token: random_token()?,
        }];
        let mut nodes = vec![];
        for number in 1..=options.count {
            let name = node_name(number);
            let kubeconfig = control_dir.join(format!("{name}.kubeconfig"));
            nodes.push(Node::new(
                number,
                options.count,
                &dir.path,
                kubeconfig,
                &programs,
            )?);
            users.push(User {
                name: format!("system:node:{name}"),
                group: "system:nodes".into(),
                token: random_token()?,
            });
        }
        let pause_image = dir.path.join("pause.tar");
        std::fs::write(&pause_image, images::pause(&programs.path("pause"))?)?;
        let control = ControlPlane::start(ControlPlaneOptions {
            dir: Some(control_dir),
            users: users.clone(),
            network: Some(fabric.network()),
            ..ControlPlaneOptions::default()
        });
        let archives = || std::iter::once(&pause_image).chain(&options.images);
        let booted = futures::future::try_join_all(nodes.iter().map(|node| async {
            node.boot(&fabric).await?;
            for archive in archives() {
                node.import(archive).await?;
            }
            anyhow::Ok(())
        }));
        let (control, _) = tokio::try_join!(control, booted)?;
        for User { name, token, .. } in &users {
            let file = name.rsplit(':').next().unwrap_or(name);
            control.inner_kubeconfig(file, token)?;
        }
        let mut command = control.command(&programs.path("kube-scheduler"));
        command
            .arg(format!(
                "--kubeconfig={}",
                control.dir().join("kube-scheduler.kubeconfig").display()
            ))
            .args(["--leader-elect=false", "--secure-port=0"]);
        let scheduler = Process::start("kube-scheduler", command, &dir.path.join("kube-scheduler.log"))?;
        let started = Self {
            control: Arc::new(control),
            all: nodes,
            scheduler,
            fabric,
            dir,
        };
        for node in &started.all {
            node.start_kubelet()?;
        }
        for node in &started.all {
            started.until_ready(node.name(), true).await?;
        }
        Ok(started)
    }

    /// The one set of nodes of this test binary, started by whoever asks first and ended when the process exits.
    pub async fn shared(options: NodesOptions) -> Result<Arc<Self>> {
        static STARTING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let _one_at_a_time = STARTING.lock().await;
        if let Some(running) = shared_slot().as_ref() {
            return Ok(Arc::clone(running));
        }
        let started = Arc::new(Self::start(options).await?);
        sys::at_exit(stop_shared)?;
        *shared_slot() = Some(Arc::clone(&started));
        Ok(started)
    }

    /// All nodes.
    pub fn all(&self) -> &[Node] {
        &self.all
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        let found = self.all.iter().find(|n| n.name() == name);
        found.with_context(|| format!("no node {name}"))
    }

    /// Where everything is written.
    pub fn dir(&self) -> &Path {
        &self.dir.path
    }

    /// Waits until the API server says that a node is Ready, or that it isn't.
    pub async fn until_ready(&self, name: &str, wanted: bool) -> Result<()> {
        let nodes: Api<KubeNode> = Api::all(self.control.admin_client().await?);
        eventually(READY_WITHIN, &format!("{name} to be Ready={wanted}"), || async {
            let node = nodes.get(name).await?;
            let conditions = node.status.and_then(|s| s.conditions).unwrap_or_default();
            let ready = conditions.iter().find(|c| c.type_ == "Ready");
            let ready = ready.with_context(|| format!("no Ready condition: {conditions:?}"))?;
            ensure!((ready.status == "True") == wanted, "{ready:?}");
            Ok(())
        })
        .await
        .with_context(|| self.log_tails(8))
    }

    /// Starts a killed node again, as after a power cut.
    pub async fn boot_again(&self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node.boot(&self.fabric).await?;
        node.start_kubelet()?;
        self.until_ready(name, true).await
    }

    /// Cuts a node off the network, or joins it again.
    pub async fn set_cable(&self, name: &str, whole: bool) -> Result<()> {
        self.fabric.set_cable(self.node(name)?.number(), whole).await
    }

    /// Ends everything. Blocks for some seconds; safe to call twice. Dropping does the same.
    pub fn stop(&self) {
        for node in &self.all {
            if let Err(error) = node.clear() {
                tracing::error!(node = node.name(), error = format!("{error:#}"), "left behind");
            }
        }
        self.scheduler.kill();
        self.control.stop();
        self.dir.remove();
    }

    /// What is left on this machine of nodes that this process has stopped.
    pub fn leftovers() -> Result<Vec<PathBuf>> {
        cgroups::of_this_process()
    }

    /// The last lines of every program's log, for a message about something that went wrong.
    pub fn log_tails(&self, lines: usize) -> String {
        let nodes: String = self.all.iter().map(|n| n.log_tail(lines)).collect();
        format!(
            "{}--- kube-scheduler:\n{}\n{nodes}",
            self.control.log_tails(lines),
            self.scheduler.log_tail(lines)
        )
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.stop();
    }
}

fn shared_slot() -> std::sync::MutexGuard<'static, Option<Arc<Nodes>>> {
    static SHARED: Mutex<Option<Arc<Nodes>>> = Mutex::new(None);
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn stop_shared() {
    // `stop`, not drop: a test thread cut off by `exit` may hold another reference.
    if let Some(running) = shared_slot().take() {
        running.stop();
    }
}

/// The directory, removed with this value unless someone asked for that one.
struct WorkDir {
    path: PathBuf,
    keep: bool,
}

impl WorkDir {
    fn prepare(given: Option<&Path>) -> Result<Self> {
        if let Some(path) = given {
            std::fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
            let path = path.canonicalize()?;
            return Ok(Self { path, keep: true });
        }
        let path = tempfile::Builder::new()
            .prefix(&format!("{WORK_DIR_PREFIX}{}-", std::process::id()))
            .tempdir()
            .context("creating a temporary directory")?
            .keep();
        Ok(Self { path, keep: false })
    }

    fn remove(&self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        self.remove();
    }
}
