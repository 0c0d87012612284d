//! One node: a kubelet and a containerd in namespaces of their own.
//!
//! Owns: its start, its parts' ends (kubelet, cable, everything), and what is seen of it from outside. Must not: know what
//! runs on it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use super::cgroups;
use super::fabric::Fabric;
use super::programs::Programs;
use crate::process::Process;
use crate::procfs::{self, Seen};
use crate::wait::eventually;

/// All processes of a node end with its process 1; the kernel needs a moment for that.
const END_WITHIN: Duration = Duration::from_secs(20);
const START_WITHIN: Duration = Duration::from_secs(30);

/// One node.
pub struct Node {
    name: String,
    number: usize,
    count: usize,
    dir: PathBuf,
    cgroup: String,
    kubeconfig: PathBuf,
    programs: Programs,
    running: Mutex<Option<Running>>,
}

struct Running {
    unshare: Process,
    pid: i32,
    pidfd: OwnedFd,
}

impl Node {
    /// Describes node `number` of `count`, which keeps its files beneath `dir`; nothing runs yet.
    pub(super) fn new(
        number: usize,
        count: usize,
        dir: &Path,
        kubeconfig: PathBuf,
        programs: &Programs,
    ) -> Result<Self> {
        let name = super::node_name(number);
        let dir = dir.join(&name);
        std::fs::create_dir_all(&dir)?;
        Ok(Self {
            name,
            number,
            count,
            dir,
            cgroup: cgroups::name(number),
            kubeconfig,
            programs: programs.clone(),
            running: Mutex::default(),
        })
    }

    /// Its name, `node-<number>`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where that absolute path of the node lies on this machine; below `/opt`, `/srv`, `/var/lib` and `/var/log` only.
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.dir.join("fs").join(absolute.trim_start_matches('/'))
    }

    /// The last lines of what its programs wrote.
    pub fn log_tail(&self, lines: usize) -> String {
        ["node.log", "log/containerd.log", "log/kubelet.log"]
            .iter()
            .map(|file| {
                let text = std::fs::read_to_string(self.dir.join(file)).unwrap_or_default();
                let all: Vec<&str> = text.lines().collect();
                let tail = all.get(all.len().saturating_sub(lines)..).unwrap_or_default();
                format!("--- {} {file}:\n{}\n", self.name, tail.join("\n"))
            })
            .collect()
    }

    /// Starts it, without a kubelet.
    pub(super) async fn boot(&self, fabric: &Fabric) -> Result<()> {
        cgroups::create(&self.cgroup)?;
        self.hold_kubelet()?;
        // Of the life before.
        let socket = self.socket();
        let _ = std::fs::remove_file(&socket);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("nodes/node.sh");
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--net",
                "--pid",
                "--uts",
                "--ipc",
                "--fork",
                "--kill-child",
            ])
            .args(["--propagation", "private", "--"])
            .arg(script)
            .env("NODE", &self.name)
            .env("NUMBER", self.number.to_string())
            .env("COUNT", self.count.to_string())
            .env("DIR", &self.dir)
            .env("BIN", self.programs.dir())
            .env("CGROUP", &self.cgroup)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("RESTRICT_OOM", (!super::may_lower_oom_score()?).to_string());
        let unshare = Process::start(&self.name, command, &self.dir.join("node.log"))?;
        let children = format!("/proc/{pid}/task/{pid}/children", pid = unshare.pid());
        let pid: i32 = eventually(START_WITHIN, "the node's process 1", || async {
            let text = std::fs::read_to_string(&children)?;
            text.trim().parse().with_context(|| unshare.log_tail(5))
        })
        .await?;
        let pidfd = pidfd_open(Pid::from_raw(pid).context("no number")?, PidfdFlags::empty())?;
        *self.running() = Some(Running { unshare, pid, pidfd });
        fabric.plug(self.number, pid).await?;
        eventually(START_WITHIN, "containerd to answer", || async {
            ensure!(socket.exists(), "no socket yet: {}", self.log_tail(5));
            self.ctr(&["version"]).await.map(drop)
        })
        .await
    }

    /// Puts an OCI archive into its containerd.
    pub async fn import(&self, archive: &Path) -> Result<()> {
        let archive = archive.display().to_string();
        self.ctr(&["--namespace", "k8s.io", "images", "import", &archive])
            .await
            .map(drop)
    }

    /// Runs `ctr` on its containerd and returns what it wrote.
    pub async fn ctr(&self, args: &[&str]) -> Result<String> {
        let ended = tokio::process::Command::new(self.programs.path("ctr"))
            .arg("--address")
            .arg(self.socket())
            .args(args)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .context("running ctr")?;
        ensure!(
            ended.status.success(),
            "ctr {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&ended.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
    }

    /// A command that runs in the node's namespaces.
    pub fn command(&self, program: &Path) -> Result<Command> {
        let pid = self.running().as_ref().map(|r| r.pid);
        let pid = pid.with_context(|| format!("{} is down", self.name))?;
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &pid.to_string()])
            .args(["--mount", "--net", "--pid", "--uts", "--ipc", "--"])
            .arg(program);
        Ok(command)
    }

    /// A program of the node set, run in the node's namespaces until it is dropped.
    pub fn start_program(&self, name: &str, args: &[&str]) -> Result<Process> {
        let mut command = self.command(&self.programs.path(name))?;
        command.args(args);
        Process::start(name, command, &self.dir.join(format!("{name}.log")))
    }

    /// The processes in its pods, by their numbers on this machine.
    pub fn processes(&self) -> Result<Vec<Seen>> {
        let mut all = procfs::processes()?;
        all.retain(|seen| {
            // One that has ended meanwhile is in no pod.
            std::fs::read_to_string(format!("/proc/{}/cgroup", seen.pid))
                .is_ok_and(|text| text.contains(&format!("/{}/kubepods", self.cgroup)))
        });
        Ok(all)
    }

    /// Fills the memory of that process's container until the kernel kills one of the container's processes for it.
    pub async fn run_out_of_memory(&self, process: &Seen) -> Result<()> {
        let cgroup = cgroups::of_memory(process.pid)?;
        // Pages of a file in memory count as their writer's and can't be given back; the writer itself is small.
        let script = r#"
            kills() { cat "$CGROUP/memory.oom_control" "$CGROUP/memory.events" 2>/dev/null | grep '^oom_kill '; }
            before=$(kills)
            echo $$ >"$CGROUP/cgroup.procs"
            trap 'rm -f "$FILE"' EXIT
            while [ "$(kills)" = "$before" ]; do dd if=/dev/zero bs=1M count=1 2>/dev/null >>"$FILE" || true; done"#;
        let ended = tokio::process::Command::new("sh")
            .args(["-euc", script])
            .env("CGROUP", cgroup)
            .env("FILE", format!("/dev/shm/{}", self.cgroup))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let ended = tokio::time::timeout(START_WITHIN, ended).await??;
        ensure!(
            ended.status.success(),
            "filling memory: {}",
            String::from_utf8_lossy(&ended.stderr)
        );
        Ok(())
    }

    /// Lets the kubelet run.
    pub fn start_kubelet(&self) -> Result<()> {
        std::fs::remove_file(self.hold()).context("the kubelet runs already")
    }

    /// Kills the kubelet, and it stays down until [`Self::start_kubelet`]. Pods go on.
    pub fn kill_kubelet(&self) -> Result<()> {
        self.hold_kubelet()?;
        // Written by the node's own process 1: a number in its pid namespace, so found by what it is from here.
        let mark = format!("--hostname-override={}", self.name);
        for seen in procfs::processes()? {
            if seen.command.starts_with("kubelet ") && seen.command.contains(&mark) {
                let pid = Pid::from_raw(i32::try_from(seen.pid)?).context("no number")?;
                kill_process(pid, Signal::KILL)?;
            }
        }
        Ok(())
    }

    /// Ends everything of it at once, as when its power fails. Blocks for the moment that takes; safe to call twice.
    pub fn kill(&self) {
        let Some(running) = self.running().take() else {
            return;
        };
        // Fails only when it has ended.
        let _ = pidfd_send_signal(&running.pidfd, Signal::KILL);
        // It ends when all the node's processes have; being asked does nothing to it.
        running.unshare.stop(END_WITHIN);
    }

    /// After [`Self::kill`]: removes what the kernel still holds of it.
    pub(super) fn clear(&self) -> Result<()> {
        self.kill();
        cgroups::remove(&self.cgroup)
    }

    /// Its number among the nodes, from 1.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    fn hold(&self) -> PathBuf {
        self.dir.join("kubelet.stop")
    }

    fn hold_kubelet(&self) -> Result<()> {
        std::fs::write(self.hold(), "").with_context(|| format!("writing to {}", self.dir.display()))
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
