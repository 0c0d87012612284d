//! `make cluster-up` and `make cluster-down`: a cluster of two real nodes to play with, GoGrid's images on both of them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::{Parser, Subcommand};
use gogrid_tests::cluster::repository;
use gogrid_tests::installed;
use gogrid_tests::nodes::{Nodes, NodesOptions, Programs, obstacle};
use gogrid_tests::wait::eventually;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::signal::unix::{SignalKind, signal};

const UP_WITHIN: Duration = Duration::from_secs(300);
const DOWN_WITHIN: Duration = Duration::from_secs(60);

/// A cluster of real nodes on this machine.
#[derive(Parser)]
struct Arguments {
    /// Everything about it is in here.
    #[arg(long, default_value = "/tmp/gogrid-cluster")]
    dir: PathBuf,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start it and leave it running.
    Up {
        /// How many nodes.
        #[arg(long, default_value_t = 2)]
        nodes: usize,
    },
    /// End it and remove everything.
    Down,
    /// Be it; started by `up`.
    #[command(hide = true)]
    Hold {
        /// How many nodes.
        #[arg(long)]
        nodes: usize,
    },
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { dir, action } = Arguments::parse();
    match action {
        Action::Up { nodes } => up(&dir, nodes).await,
        Action::Down => down(&dir).await,
        Action::Hold { nodes } => hold(&dir, nodes).await,
    }
}

async fn up(dir: &Path, nodes: usize) -> Result<()> {
    if let Some(obstacle) = obstacle() {
        bail!("{obstacle}: run this as root");
    }
    if let Some(pid) = holder(dir) {
        bail!(
            "a cluster runs already (process {}): make cluster-down",
            pid.as_raw_nonzero()
        );
    }
    if dir.exists() {
        // Of one that was killed.
        std::fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    // Here, so that a build of many minutes is seen and not waited for in the dark.
    Programs::find().await?;
    std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let log = std::fs::File::create(dir.join("cluster.log"))?;
    let mut child = Command::new("setsid")
        .arg(std::env::current_exe()?)
        .arg("--dir")
        .arg(dir)
        .args(["hold", "--nodes", &nodes.to_string()])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting setsid")?;
    let ready = dir.join("ready");
    let outcome: Result<Result<()>> = eventually(UP_WITHIN, "the cluster", || async {
        if ready.exists() {
            return Ok(Ok(()));
        }
        // Its number is the first thing it writes.
        if dir.join("pid").exists() && holder(dir).is_none() {
            return Ok(Err(anyhow!("it ended")));
        }
        bail!("it is starting")
    })
    .await;
    // `setsid` has become the cluster, or has forked it and ended.
    let _ = child.try_wait();
    if let Err(error) = outcome.and_then(|ended| ended) {
        let log = std::fs::read_to_string(dir.join("cluster.log")).unwrap_or_default();
        return Err(error.context(log));
    }
    let kubeconfig = dir.join("control/admin.kubeconfig");
    let tools = std::fs::read_to_string(dir.join("tools"))?;
    println!("{nodes} nodes are Ready, and GoGrid's images are on them. In this or any other shell:\n");
    println!("  export KUBECONFIG={} PATH={tools}:$PATH", kubeconfig.display());
    println!("  kubectl get nodes");
    let chart = repository().join("charts/gogrid").canonicalize()?;
    println!(
        "  helm install gogrid {} -n gogrid-system --create-namespace --wait",
        chart.display()
    );
    println!("  make cluster-down");
    Ok(())
}

async fn hold(dir: &Path, nodes: usize) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let pid = dir.join("pid");
    std::fs::write(&pid, std::process::id().to_string())?;
    let images = installed::write_images(dir, installed::TAG).await?;
    let cluster = Nodes::start(NodesOptions {
        count: nodes,
        dir: Some(dir.to_owned()),
        images,
    })
    .await?;
    let tools = cluster.control.kubectl_path();
    let tools = tools.parent().context("kubectl lies in a directory")?;
    std::fs::write(dir.join("tools"), tools.display().to_string())?;
    std::fs::write(dir.join("ready"), "")?;
    terminate.recv().await;
    cluster.stop();
    std::fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))
}

async fn down(dir: &Path) -> Result<()> {
    let Some(pid) = holder(dir) else {
        if dir.exists() {
            std::fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        println!("no cluster runs in {}", dir.display());
        return Ok(());
    };
    kill_process(pid, Signal::TERM).context("asking it to end")?;
    eventually(DOWN_WITHIN, "the cluster to end", || async {
        ensure!(
            test_kill_process(pid).is_err(),
            "process {} runs",
            pid.as_raw_nonzero()
        );
        Ok(())
    })
    .await?;
    ensure!(
        !dir.exists(),
        "{} is still there: see cluster.log in it",
        dir.display()
    );
    println!("the cluster is gone");
    Ok(())
}

/// The process that is the cluster in that directory, if it runs.
fn holder(dir: &Path) -> Option<Pid> {
    let pid: i32 = std::fs::read_to_string(dir.join("pid"))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let ours = String::from_utf8_lossy(&command).contains("hold");
    Pid::from_raw(pid).filter(|_| ours)
}
