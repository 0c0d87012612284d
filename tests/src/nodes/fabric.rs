//! The network that connects control plane and nodes, and the one way into it from this machine.
//!
//! Owns: a network namespace with a bridge, the nodes' cables, and a forwarder from a port on loopback to the API server.
//! Must not: touch this machine's own interfaces, addresses or tables.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::controlplane::Network;
use crate::process::Process;
use crate::wait::eventually;

/// The control plane's address in the network.
pub(super) const CONTROL: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);

/// The running network; it ends with this value.
pub(super) struct Fabric {
    holder: Process,
    port: u16,
    _forwarder: oneshot::Sender<()>,
}

impl Fabric {
    /// Makes the network for that many nodes.
    pub(super) async fn start(dir: &Path, nodes: usize) -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--", "sleep", "infinity"]);
        let holder = Process::start("fabric", command, &dir.join("fabric.log"))?;
        let namespace = namespace_of(holder.pid());
        let own = std::fs::read_link("/proc/self/ns/net")?;
        eventually(Duration::from_secs(10), "a network namespace", || async {
            ensure!(std::fs::read_link(&namespace)? != own, "{}", holder.log_tail(3));
            Ok(())
        })
        .await?;
        // 10.96.0.1 is the Service `kubernetes`.
        let mut script = format!(
            "ip link set lo up
             ip link add nodes type bridge
             ip addr add {CONTROL}/24 dev nodes
             ip addr add 10.96.0.1/32 dev nodes
             ip link set nodes up
             echo 1 >/proc/sys/net/ipv4/ip_forward\n"
        );
        for node in 1..=nodes {
            script += &format!("ip route add 10.244.{node}.0/24 via 10.200.0.{}\n", 10 + node);
        }
        inside(&namespace, &script).await?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
        let port = listener.local_addr()?.port();
        let (stop, stopped) = oneshot::channel();
        forward(
            listener,
            &namespace,
            SocketAddr::from((Ipv4Addr::LOCALHOST, 443)),
            stopped,
        )?;
        Ok(Self {
            holder,
            port,
            _forwarder: stop,
        })
    }

    /// What the control plane needs to know of it.
    pub(super) fn network(&self) -> Network {
        Network {
            namespace: namespace_of(self.holder.pid()),
            address: CONTROL,
            port: self.port,
        }
    }

    /// Lays the cable of a node whose process 1 has that number here; it appears there as `eth0`.
    pub(super) async fn plug(&self, node: usize, pid: i32) -> Result<()> {
        // Of a node that just died, the kernel may still be pulling the cable.
        eventually(Duration::from_secs(10), "a cable", || async {
            self.inside(&format!(
                "ip link add port{node} type veth peer name eth0 netns {pid}
                 ip link set port{node} master nodes up"
            ))
            .await
        })
        .await
    }

    /// Cuts a node's cable, or joins it again.
    pub(super) async fn set_cable(&self, node: usize, whole: bool) -> Result<()> {
        let state = if whole { "up" } else { "down" };
        self.inside(&format!("ip link set port{node} {state}")).await
    }

    async fn inside(&self, script: &str) -> Result<()> {
        inside(&namespace_of(self.holder.pid()), script).await
    }
}

fn namespace_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// Runs shell commands in a network namespace.
async fn inside(namespace: &Path, script: &str) -> Result<()> {
    let ended = tokio::process::Command::new("nsenter")
        .arg(format!("--net={}", namespace.display()))
        .args(["--", "sh", "-euc", script])
        .stdin(Stdio::null())
        .output()
        .await
        .context("running nsenter")?;
    ensure!(
        ended.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&ended.stderr).trim()
    );
    Ok(())
}

/// Accepts here and connects there, until told to stop: a thread is in one network, a socket stays where it was made.
fn forward(
    listener: TcpListener,
    namespace: &Path,
    to: SocketAddr,
    stopped: oneshot::Receiver<()>,
) -> Result<()> {
    listener.set_nonblocking(true)?;
    let namespace = File::open(namespace)?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("forwarder".into())
        .spawn(move || {
            let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
            let failed = entered.is_err() || runtime.is_err();
            let _ = ready.send(entered.map_err(std::io::Error::from));
            let Ok(runtime) = runtime else { return };
            if failed {
                return;
            }
            runtime.block_on(async move {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
                    return;
                };
                let serve = async {
                    while let Ok((mut near, _)) = listener.accept().await {
                        tokio::spawn(async move {
                            // A connection that fails is the client's to try again.
                            if let Ok(mut far) = TcpStream::connect(to).await {
                                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                            }
                        });
                    }
                };
                tokio::select! {
                    () = serve => {}
                    _ = stopped => {}
                }
            });
        })?;
    is_ready
        .recv()
        .context("the forwarder has ended")?
        .context("entering the network namespace")
}
