//! Network namespaces on this machine, and a node's only cable to an API server on loopback.
//!
//! Owns: making and ending them, what runs and listens inside, and cutting the cable so that packets vanish without a
//! reset. Must not: touch this machine's own interfaces, addresses or tables.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::process::Process;
use crate::wait::eventually;

/// A network namespace; it ends with this value and the last process inside.
#[derive(Debug)]
pub struct Namespace {
    holder: Process,
}

impl Namespace {
    /// Makes an empty one; its log goes into `dir`. Needs root.
    pub async fn start(name: &str, dir: &Path) -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--", "sleep", "infinity"]);
        let holder = Process::start(name, command, &dir.join(format!("{name}.log")))?;
        let this = Self { holder };
        let own = std::fs::read_link("/proc/self/ns/net")?;
        eventually(Duration::from_secs(10), "a network namespace", || async {
            ensure!(
                std::fs::read_link(this.file())? != own,
                "{}",
                this.holder.log_tail(3)
            );
            Ok(())
        })
        .await?;
        Ok(this)
    }

    /// The file that stands for it.
    pub fn file(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.holder.pid()))
    }

    /// A process that lives in it for as long as it does.
    pub fn pid(&self) -> i32 {
        self.holder.pid()
    }

    /// Runs shell commands inside.
    pub async fn run(&self, script: &str) -> Result<()> {
        let mut command = tokio::process::Command::new("nsenter");
        let ended = command
            .arg(format!("--net={}", self.file().display()))
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

    /// That command, inside. It becomes the program: the process that is started is the one that is signalled.
    pub fn command(&self, inner: &Command) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.file().display())).arg("--");
        command.arg(inner.get_program()).args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }

    /// Calls `act` on a thread that is inside. What it opens stays inside, wherever it is used.
    pub fn inside<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.file();
        let entered = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&file)?;
                act()
            });
            thread.join()
        });
        entered.map_err(|_| anyhow!("the thread inside the network namespace panicked"))?
    }
}

/// Moves the calling thread there.
pub(crate) fn enter(namespace: &Path) -> Result<()> {
    let file = File::open(namespace).with_context(|| namespace.display().to_string())?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .context("entering the network namespace")
}

/// Leads every connection that `listener` gets to `to`, for ever. A connection that fails is the client's to try again.
pub(crate) async fn relay(listener: TcpListener, to: SocketAddr) {
    let listener = listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::TcpListener::from_std(listener));
    let Ok(listener) = listener else { return };
    while let Ok((mut near, _)) = listener.accept().await {
        tokio::spawn(async move {
            if let Ok(mut far) = TcpStream::connect(to).await {
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}

/// A place without any network but one cable, whose other end leads to one address of this machine.
#[derive(Debug)]
pub struct Outpost {
    far: Namespace,
    hub: Namespace,
    address: SocketAddr,
    relay: JoinHandle<()>,
}

impl Outpost {
    const HUB: Ipv4Addr = Ipv4Addr::new(10, 202, 0, 1);

    /// Makes the place and lays the cable to `to`. Needs root.
    pub async fn start(name: &str, dir: &Path, to: SocketAddr) -> Result<Self> {
        let far = Namespace::start(&format!("{name}-far"), dir).await?;
        let hub = Namespace::start(&format!("{name}-hub"), dir).await?;
        hub.run(&format!(
            "ip link add cable address 02:00:00:00:00:01 type veth peer name eth0 netns {}
             ip addr add {}/24 dev cable
             ip link set cable up",
            far.pid(),
            Self::HUB
        ))
        .await?;
        // Whom the cable leads to is known for good: a cut must look like lost packets, not like a host that is not there.
        far.run(&format!(
            "ip link set lo up
             ip addr add 10.202.0.2/24 dev eth0
             ip link set eth0 up
             ip neigh replace {} lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
            Self::HUB
        ))
        .await?;
        let address = SocketAddr::from((Self::HUB, to.port()));
        let listener = hub.inside(|| Ok(TcpListener::bind(address)?))?;
        let relay = tokio::spawn(relay(listener, to));
        Ok(Self {
            far,
            hub,
            address,
            relay,
        })
    }

    /// What stands for the machine's address in there.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// That command, in there.
    pub fn command(&self, inner: &Command) -> Command {
        self.far.command(inner)
    }

    /// From now on packets vanish, both ways; connections on both sides stay open.
    pub async fn cut(&self) -> Result<()> {
        self.hub.run("ip link set cable down").await
    }

    /// Ends [`Self::cut`].
    pub async fn heal(&self) -> Result<()> {
        self.hub.run("ip link set cable up").await
    }
}

impl Drop for Outpost {
    fn drop(&mut self) {
        self.relay.abort();
    }
}
