//! The socket on which pool and workers connect.
//!
//! Owns: frames in and out, their bounds, who the peer is, and the passing of model descriptors. What comes from a
//! worker is hostile: bounded before it is read, decoded strictly, cut off at the first breach. Must not act on messages.

use crate::clock::{Host as _, Machine};
use crate::event::{Event, Greeting, Hub};
use crate::idle::IdleGroup;
use crate::pressure::PoolProcess;
use gogrid_agent_core::protocol::{
    FrameError, FromPool, FromWorker, Hello, PROTOCOL_VERSION, Role, ToPool, ToWorker, WorkerId, body_length,
    decode, encode,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Frames that may wait for a peer that does not read.
const QUEUE: usize = 1024;
/// Peers connected at once.
const MAX_PEERS: u32 = 300;
/// Bytes before a frame's body.
const LENGTH_BYTES: usize = 4;
/// Frames a worker may send in one second of the agent's reading.
const MAX_FRAMES_A_SECOND: u32 = 20_000;

/// Why a peer was cut off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// A frame broke the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The connection.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// Another version.
    #[error("peer speaks protocol {0}, this agent {PROTOCOL_VERSION}")]
    Version(u16),
    /// No hello in time.
    #[error("no hello within {} s", HELLO_DEADLINE.as_secs())]
    NoHello,
    /// The agent does not know this worker, or its nonce is wrong or was used.
    #[error("hello of worker {0} was refused")]
    Refused(WorkerId),
    /// Wrong user.
    #[error("peer runs as user {0}")]
    User(u32),
    /// It floods.
    #[error("more than {MAX_FRAMES_A_SECOND} frames within a second")]
    Flood,
}

struct Out {
    bytes: Vec<u8>,
    fd: Option<Arc<OwnedFd>>,
}

/// A way to one peer. Dropping all of them closes the connection.
#[derive(Clone)]
pub struct Link(mpsc::Sender<Out>);

/// The peer is gone or does not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The message is too long for a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Its queue is full or closed.
    #[error("peer is gone or does not read")]
    Gone,
}

/// Frames that were sent over a [`Link`], for a peer in the same process.
pub struct Frames(mpsc::Receiver<Out>);

impl Frames {
    /// The next frame's body; `None` once every link is gone.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        let mut frame = self.0.recv().await?.bytes;
        Some(frame.split_off(LENGTH_BYTES.min(frame.len())))
    }
}

impl Link {
    /// A link to a peer in the same process.
    pub fn pair() -> (Self, Frames) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self(sender), Frames(receiver))
    }

    fn put<T: serde::Serialize>(&self, message: &T, fd: Option<Arc<OwnedFd>>) -> Result<(), SendError> {
        let bytes = encode(message)?;
        self.0.try_send(Out { bytes, fd }).map_err(|_| SendError::Gone)
    }

    /// To the pool.
    pub(crate) fn pool(&self, message: &ToPool) -> Result<(), SendError> {
        self.put(message, None)
    }

    /// To a worker.
    pub(crate) fn worker(&self, message: &ToWorker) -> Result<(), SendError> {
        self.put(message, None)
    }

    /// Load, with the verified model.
    pub(crate) fn load(&self, message: &ToWorker, model: Arc<OwnedFd>) -> Result<(), SendError> {
        self.put(message, Some(model))
    }
}

/// Makes the socket. An old one of the same name is replaced: the Lease decides who is the node's agent.
pub(crate) fn bind(path: &Path, shared: bool) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    let mode = if shared { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Accepts peers for ever. Workers are moved to `idle`, where there is one, before anybody hears of them.
pub(crate) async fn listen(
    listener: UnixListener,
    hub: Hub,
    allowed: Vec<u32>,
    pool: PoolProcess,
    idle: Option<IdleGroup>,
) {
    let peers = Arc::new(AtomicU32::new(0));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "could not accept a peer");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        if peers.fetch_add(1, Ordering::Relaxed) >= MAX_PEERS {
            peers.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("too many peers");
            continue;
        }
        let (hub, allowed, peers) = (hub.clone(), allowed.clone(), Arc::clone(&peers));
        let (pool, idle) = (pool.clone(), idle.clone());
        tokio::spawn(async move {
            if let Err(error) = serve(stream, &hub, &allowed, &pool, idle).await {
                tracing::warn!(%error, "peer cut off");
            }
            peers.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

async fn serve(
    stream: UnixStream,
    hub: &Hub,
    allowed: &[u32],
    pool: &PoolProcess,
    idle: Option<IdleGroup>,
) -> Result<(), LinkError> {
    let peer = stream.peer_cred()?;
    let user = peer.uid();
    if !allowed.contains(&user) {
        return Err(LinkError::User(user));
    }
    let (mut read, write) = stream.into_split();
    let hello = tokio::time::timeout(HELLO_DEADLINE, frame::<Hello>(&mut read)).await;
    let Hello { version, role } = hello.map_err(|_| LinkError::NoHello)??;
    if version != PROTOCOL_VERSION {
        return Err(LinkError::Version(version));
    }
    let (sender, queue) = mpsc::channel(QUEUE);
    let link = Link(sender);
    let writer = tokio::spawn(write_all(write, queue));
    let result = match role {
        Role::Pool { alive } => {
            pool.set(peer.pid());
            hub.send(Event::PoolHello { alive, user, link }).await;
            let result = from_pool(&mut read, hub).await;
            hub.send(Event::PoolLost).await;
            result
        }
        Role::Worker { worker, nonce } => {
            pool.has_a_worker();
            let (reply, answer) = oneshot::channel();
            let idle = match idle {
                Some(group) => enter(group, peer.pid()).await,
                None => false,
            };
            hub.send(Event::WorkerHello {
                greeting: Greeting {
                    worker,
                    nonce,
                    user,
                    idle,
                },
                link,
                reply,
            })
            .await;
            if !answer.await.unwrap_or(false) {
                return Err(LinkError::Refused(worker));
            }
            let result = from_worker(&mut read, worker, hub).await;
            let why = result.as_ref().err().map(ToString::to_string);
            hub.send(Event::WorkerLost { worker, why }).await;
            result
        }
    };
    writer.abort();
    match result {
        Err(LinkError::Io(error)) => {
            // How a killed peer looks; whoever killed it knows.
            tracing::debug!(%error, "peer is gone");
            Ok(())
        }
        other => other,
    }
}

/// Whether the peer is in the idle group now; where it is not, other means must rank it.
async fn enter(group: IdleGroup, pid: Option<i32>) -> bool {
    // 0: it lives where its processes can't be seen; a cgroup would take that for the one who writes.
    let Some(pid) = pid.filter(|pid| *pid > 0) else {
        tracing::warn!("a worker can't be seen from here: it is not moved to the idle cgroup");
        return false;
    };
    let entered = tokio::task::spawn_blocking(move || group.take(pid)).await;
    match entered.unwrap_or_else(|error| Err(io::Error::other(error))) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%error, pid, "could not move a worker to the idle cgroup");
            false
        }
    }
}

async fn from_pool(read: &mut OwnedReadHalf, hub: &Hub) -> Result<(), LinkError> {
    loop {
        let message = frame::<FromPool>(read).await?;
        hub.send(Event::FromPool(message)).await;
    }
}

async fn from_worker(read: &mut OwnedReadHalf, worker: WorkerId, hub: &Hub) -> Result<(), LinkError> {
    let (mut second, mut frames) = (0, 0_u32);
    loop {
        let message = frame::<FromWorker>(read).await?;
        let now = Machine.boottime() / 1_000_000_000;
        (second, frames) = if now == second {
            (second, frames.saturating_add(1))
        } else {
            (now, 1)
        };
        if frames > MAX_FRAMES_A_SECOND {
            return Err(LinkError::Flood);
        }
        hub.send(Event::FromWorker { worker, message }).await;
    }
}

async fn frame<T: for<'de> serde::Deserialize<'de>>(read: &mut OwnedReadHalf) -> Result<T, LinkError> {
    let mut header = [0; 4];
    read.read_exact(&mut header).await?;
    let mut body = vec![0; body_length(header)?];
    read.read_exact(&mut body).await?;
    Ok(decode(&body)?)
}

async fn write_all(mut write: OwnedWriteHalf, mut queue: mpsc::Receiver<Out>) {
    while let Some(Out { bytes, fd }) = queue.recv().await {
        let result = match fd {
            Some(fd) => with_descriptor(&mut write, &bytes, &fd).await,
            None => write.write_all(&bytes).await,
        };
        if let Err(error) = result {
            tracing::debug!(%error, "peer does not take messages any more");
            return;
        }
    }
}

/// The descriptor travels with the frame's first bytes.
async fn with_descriptor(write: &mut OwnedWriteHalf, bytes: &[u8], fd: &OwnedFd) -> io::Result<()> {
    let stream: &UnixStream = write.as_ref();
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [fd.as_fd()];
            if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            Ok(sendmsg(
                stream,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            )?)
        })
        .await?;
    write.write_all(bytes.get(sent..).unwrap_or_default()).await
}
