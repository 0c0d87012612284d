//! The network that connects control plane and nodes, and the one way into it from this machine.
//!
//! Owns: a network namespace with a bridge, the nodes' cables, and a forwarder from a port on loopback to the API server.
//! Must not: touch this machine's own interfaces, addresses or tables.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::sync::oneshot;

use crate::controlplane::Network;
use crate::netns::{Namespace, enter, relay};
use crate::wait::eventually;

/// The control plane's address in the network.
pub(super) const CONTROL: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);

/// The running network; it ends with this value.
pub(super) struct Fabric {
    namespace: Namespace,
    port: u16,
    _forwarder: oneshot::Sender<()>,
}

impl Fabric {
    /// Makes the network for that many nodes.
    pub(super) async fn start(dir: &Path, nodes: usize) -> Result<Self> {
        let namespace = Namespace::start("fabric", dir).await?;
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
        namespace.run(&script).await?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
        let port = listener.local_addr()?.port();
        let (stop, stopped) = oneshot::channel();
        forward(
            listener,
            namespace.file(),
            SocketAddr::from((Ipv4Addr::LOCALHOST, 443)),
            stopped,
        )?;
        Ok(Self {
            namespace,
            port,
            _forwarder: stop,
        })
    }

    /// What the control plane needs to know of it.
    pub(super) fn network(&self) -> Network {
        Network {
            namespace: self.namespace.file(),
            address: CONTROL,
            port: self.port,
        }
    }

    /// Lays the cable of a node whose process 1 has that number here; it appears there as `eth0`.
    pub(super) async fn plug(&self, node: usize, pid: i32) -> Result<()> {
        // Of a node that just died, the kernel may still be pulling the cable.
        eventually(Duration::from_secs(10), "a cable", || async {
            self.namespace
                .run(&format!(
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
        self.namespace
            .run(&format!("ip link set port{node} {state}"))
            .await
    }
}

/// Accepts here and connects there, until told to stop: a thread is in one network, a socket stays where it was made.
fn forward(
    listener: TcpListener,
    namespace: PathBuf,
    to: SocketAddr,
    stopped: oneshot::Receiver<()>,
) -> Result<()> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("forwarder".into())
        .spawn(move || {
            let runtime = enter(&namespace).and_then(|()| {
                Ok(tokio::runtime::Builder::new_current_thread()
                    .enable_io()
                    .build()?)
            });
            let (runtime, entered) = match runtime {
                Ok(runtime) => (Some(runtime), Ok(())),
                Err(error) => (None, Err(error)),
            };
            let _ = ready.send(entered);
            let Some(runtime) = runtime else { return };
            runtime.block_on(async move {
                tokio::select! {
                    () = relay(listener, to) => {}
                    _ = stopped => {}
                }
            });
        })?;
    is_ready.recv().context("the forwarder has ended")?
}
