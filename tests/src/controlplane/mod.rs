//! A real etcd, kube-apiserver and kube-controller-manager on loopback for tests and the demo.
//!
//! Owns: finding or building the binaries, starting and stopping the three processes and everything they write, and
//! handing out clients, kubeconfigs and tokens. Must not: know any GoGrid resource, or stand in for the kubelet and the
//! scheduler: nodes are objects and nothing runs in pods.

mod apply;
mod audit;
mod binaries;
mod fixtures;
mod launch;
mod tools;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rustix::process::Signal;

pub use apply::apply_yaml_documents;
pub use audit::{AuditEvent, AuditTail, OURS};
pub use binaries::Binaries;
pub(crate) use binaries::find_set;
pub(crate) use launch::{DIR_PREFIX as WORK_DIR_PREFIX, random_token};
pub use launch::{Network, User};

use crate::process::Process;
use crate::sys;
use launch::{Layout, PortTaken};

/// How often a start is tried again when another program took a port between choosing and using it.
const START_ATTEMPTS: u32 = 4;
/// An API server with open watches takes a second or two to end in good order; nothing here needs longer.
const API_SERVER_GRACE: Duration = Duration::from_secs(2);
const READY_WITHIN: Duration = Duration::from_secs(180);

/// What can be chosen about a control plane; the default suits tests.
#[derive(Clone, Debug, Default)]
pub struct ControlPlaneOptions {
    /// Where everything is written, kept afterwards; a temporary directory, removed at the end, when `None`.
    pub dir: Option<PathBuf>,
    /// The API server's port; a free one when `None`.
    pub port: Option<u16>,
    /// Leaves out the controller manager: faster, but nothing is collected and no default service accounts appear.
    pub without_controllers: bool,
    /// More flags for the API server; where one is set already, the last wins.
    pub api_server_flags: Vec<String>,
    /// Users besides the admin and the controllers.
    pub users: Vec<User>,
    /// Runs in this network instead of on loopback, for nodes with kubelets, which then count as nodes do in earnest.
    pub network: Option<Network>,
}

/// A running control plane; everything of it ends with this value.
#[derive(Debug)]
pub struct ControlPlane {
    layout: Layout,
    binaries: Binaries,
    keep_dir: bool,
    etcd: Process,
    /// Replaced on restart.
    api_server: Mutex<Process>,
    controllers: Option<Process>,
}

impl ControlPlane {
    /// Starts a control plane and returns when it is ready: `/readyz` answers ok and the controllers act.
    ///
    /// Builds the binaries first where that has not been done on this machine, which takes many minutes.
    pub async fn start(options: ControlPlaneOptions) -> Result<Self> {
        launch::sweep_abandoned_dirs();
        let binaries = Binaries::find().await?;
        for _ in 1..START_ATTEMPTS {
            match Self::try_start(&binaries, &options).await {
                Err(error) if error.is::<PortTaken>() && options.port.is_none() => {
                    tracing::debug!(%error, "starting again on other ports");
                }
                outcome => return outcome,
            }
        }
        Self::try_start(&binaries, &options).await
    }

    async fn try_start(binaries: &Binaries, options: &ControlPlaneOptions) -> Result<Self> {
        let layout = Layout::prepare(options)?;
        // Whatever fails from here on, the directory goes and `Process` kills its child.
        let guard = DirGuard {
            dir: layout.dir.clone(),
            keep: options.dir.is_some(),
        };
        let etcd = layout.start_etcd(binaries)?;
        layout.until_etcd_listens(&etcd).await?;
        let api_server = layout.start_api_server(binaries)?;
        layout.until_ready(&api_server, READY_WITHIN).await?;
        let controllers = if options.without_controllers {
            None
        } else {
            let controllers = layout.start_controllers(binaries)?;
            layout.until_controllers_act(&controllers, READY_WITHIN).await?;
            Some(controllers)
        };
        guard.disarm();
        Ok(Self {
            layout,
            binaries: binaries.clone(),
            keep_dir: options.dir.is_some(),
            etcd,
            api_server: Mutex::new(api_server),
            controllers,
        })
    }

    /// The one control plane of this test binary, started by whoever asks first and ended when the process exits.
    pub async fn shared() -> Result<Arc<Self>> {
        static STARTING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let _one_at_a_time = STARTING.lock().await;
        if let Some(running) = shared_slot().as_ref() {
            return Ok(Arc::clone(running));
        }
        let started = Arc::new(Self::start(ControlPlaneOptions::default()).await?);
        sys::at_exit(stop_shared)?;
        *shared_slot() = Some(Arc::clone(&started));
        Ok(started)
    }

    /// Ends it: first the controllers, then the API server, then etcd, because an API server whose etcd has gone does
    /// not end for minutes. Blocks for up to some two seconds; safe to call twice. Dropping does the same.
    pub fn stop(&self) {
        if let Some(controllers) = &self.controllers {
            controllers.kill();
        }
        self.with_api_server(|process| process.stop(API_SERVER_GRACE));
        self.etcd.kill();
        if !self.keep_dir {
            let _ = std::fs::remove_dir_all(&self.layout.dir);
        }
    }

    /// The directory that holds its data, logs and kubeconfigs.
    pub fn dir(&self) -> &Path {
        &self.layout.dir
    }

    /// `https://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        self.layout.url()
    }

    /// The certificate (PEM) that the API server's clients must trust.
    pub fn ca_file(&self) -> PathBuf {
        self.layout.ca_file()
    }

    /// A command that runs where the API server does.
    pub(crate) fn command(&self, program: &Path) -> std::process::Command {
        self.layout.command(program)
    }

    /// Writes the kubeconfig of one of the network's own programs: it names the API server by its address in there.
    pub(crate) fn inner_kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        let path = self.layout.path(&format!("{name}.kubeconfig"));
        launch::write_private(&path, &self.layout.inner_kubeconfig(token))?;
        Ok(path)
    }

    /// A kubeconfig of a cluster admin (user `admin`, group `system:masters`).
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.layout.admin_kubeconfig()
    }

    /// A fresh client with every right. Belongs to the tokio runtime that calls this.
    pub async fn admin_client(&self) -> Result<kube::Client> {
        self.client_for_token(&self.layout.admin_token).await
    }

    /// A fresh client that identifies itself with `token`. Belongs to the tokio runtime that calls this.
    pub async fn client_for_token(&self, token: &str) -> Result<kube::Client> {
        Ok(kube::Client::try_from(self.config_for_token(token).await?)?)
    }

    /// The configuration behind [`Self::client_for_token`], for tests that put layers of their own into the client.
    pub async fn config_for_token(&self, token: &str) -> Result<kube::Config> {
        let kubeconfig = Kubeconfig::from_yaml(&self.layout.kubeconfig(token))?;
        Ok(kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
    }

    /// Writes a kubeconfig that identifies its user with `token`; `name` becomes part of the file's name.
    pub fn kubeconfig_for_token(&self, name: &str, token: &str) -> Result<PathBuf> {
        let path = self.layout.dir.join(format!("{name}.kubeconfig"));
        launch::write_private(&path, &self.layout.kubeconfig(token))?;
        Ok(path)
    }

    /// As [`Self::kubeconfig_for_token`], with the token in a file of its own, [`Self::token_file`], as in a pod.
    pub fn kubeconfig_for_token_file(&self, name: &str, token: &str) -> Result<PathBuf> {
        self.replace_token(name, token)?;
        let path = self.layout.dir.join(format!("{name}.kubeconfig"));
        launch::write_private(&path, &self.layout.kubeconfig_for_file(&self.token_file(name)))?;
        Ok(path)
    }

    /// As [`Self::kubeconfig_for_token_file`] (after it, for the same `name`), for a program that reaches the API server by
    /// another address.
    pub fn kubeconfig_through(&self, name: &str, address: SocketAddr) -> Result<PathBuf> {
        let path = self
            .layout
            .dir
            .join(format!("{name}-{}.kubeconfig", address.ip()));
        let text = self.layout.kubeconfig_through(address, &self.token_file(name));
        launch::write_private(&path, &text)?;
        Ok(path)
    }

    /// Where the API server listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.layout.port))
    }

    fn token_file(&self, name: &str) -> PathBuf {
        self.layout.dir.join(format!("{name}.token"))
    }

    /// Puts another token into that kubeconfig's file at once, as a kubelet does.
    pub fn replace_token(&self, name: &str, token: &str) -> Result<()> {
        let fresh = self.layout.dir.join(format!("{name}.token.next"));
        launch::write_private(&fresh, token)?;
        Ok(std::fs::rename(fresh, self.token_file(name))?)
    }

    /// Freezes the API server: connections stay open and nothing answers, as behind a network that drops everything.
    pub fn pause_api_server(&self) -> Result<()> {
        self.with_api_server(|process| process.signal(Signal::STOP))
    }

    /// Ends [`Self::pause_api_server`].
    pub fn resume_api_server(&self) -> Result<()> {
        self.with_api_server(|process| process.signal(Signal::CONT))
    }

    /// Kills the API server without a warning: every connection breaks and new ones are refused.
    pub fn kill_api_server(&self) {
        self.with_api_server(Process::kill);
    }

    /// Starts a killed API server again on the same port and data, and waits until it is ready.
    pub async fn restart_api_server(&self) -> Result<()> {
        self.kill_api_server();
        let fresh = self.layout.start_api_server(&self.binaries)?;
        self.layout.until_ready(&fresh, READY_WITHIN).await?;
        *self.api_server.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// The last lines of every process's log, for a message about something that went wrong.
    pub fn log_tails(&self, lines: usize) -> String {
        let mut tails = format!("etcd:\n{}\n", self.etcd.log_tail(lines));
        tails += &self.with_api_server(|process| format!("kube-apiserver:\n{}\n", process.log_tail(lines)));
        if let Some(controllers) = &self.controllers {
            tails += &format!("kube-controller-manager:\n{}\n", controllers.log_tail(lines));
        }
        tails
    }

    /// The numbers of its running processes.
    pub fn pids(&self) -> Vec<i32> {
        let controllers = self.controllers.as_ref().map(Process::pid);
        [self.etcd.pid(), self.with_api_server(Process::pid)]
            .into_iter()
            .chain(controllers)
            .collect()
    }

    fn with_api_server<T>(&self, act: impl FnOnce(&Process) -> T) -> T {
        act(&self.api_server.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.stop();
    }
}

fn shared_slot() -> std::sync::MutexGuard<'static, Option<Arc<ControlPlane>>> {
    static SHARED: Mutex<Option<Arc<ControlPlane>>> = Mutex::new(None);
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn stop_shared() {
    // `stop`, not drop: a test thread cut off by `exit` may hold another reference.
    if let Some(running) = shared_slot().take() {
        running.stop();
    }
}

/// Removes the directory of a start that failed.
struct DirGuard {
    dir: PathBuf,
    keep: bool,
}

impl DirGuard {
    fn disarm(mut self) {
        self.keep = true;
    }
}

impl Drop for DirGuard {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
