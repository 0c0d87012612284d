//! The worker's and the pool's end of the agent's socket.
//!
//! Owns: connecting, checking who listens, bounded frames, and the descriptor that travels with one. Must not know what
//! messages mean.

use crate::sys;
use gogrid_agent_core::protocol::{FrameError, Hello, PROTOCOL_VERSION, Role, body_length, decode, encode};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Why the connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the agent closed the connection")]
    Closed,
    #[error("the socket belongs to user {found}; only {own} or 0 may be the agent")]
    WrongUser { found: u32, own: u32 },
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("socket: {0}")]
    Io(#[from] io::Error),
}

/// Connects to the agent and says who we are.
pub(crate) fn connect(path: &Path, role: Role) -> Result<(Sender, Receiver), WireError> {
    let stream = UnixStream::connect(path)?;
    let (found, own) = (sys::peer_user(&stream)?, rustix::process::getuid().as_raw());
    if found != 0 && found != own {
        return Err(WireError::WrongUser { found, own });
    }
    let mut sender = Sender(stream.try_clone()?);
    sender.send(&Hello {
        version: PROTOCOL_VERSION,
        role,
    })?;
    Ok((
        sender,
        Receiver {
            stream,
            descriptors: VecDeque::new(),
        },
    ))
}

/// Sends frames.
pub(crate) struct Sender(UnixStream);

impl Sender {
    pub(crate) fn send<T: Serialize>(&mut self, message: &T) -> Result<(), WireError> {
        let frame = encode(message)?;
        self.0.write_all(&frame)?;
        Ok(())
    }
}

/// Most descriptors kept for frames that have not asked for them.
const MAX_DESCRIPTORS: usize = 4;

/// Receives frames and the descriptors that travel with them.
pub(crate) struct Receiver {
    stream: UnixStream,
    descriptors: VecDeque<OwnedFd>,
}

impl Receiver {
    /// The next message; waits for it.
    pub(crate) fn receive<T: DeserializeOwned + for<'de> serde::Deserialize<'de>>(
        &mut self,
    ) -> Result<T, WireError> {
        let mut header = [0; 4];
        self.fill(&mut header)?;
        let mut body = vec![0; body_length(header)?];
        self.fill(&mut body)?;
        Ok(decode(&body)?)
    }

    /// The oldest descriptor that came and was not taken.
    pub(crate) fn descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    fn fill(&mut self, mut into: &mut [u8]) -> Result<(), WireError> {
        while !into.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let result = recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(into)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            let count = match result {
                Err(rustix::io::Errno::INTR) => continue,
                result => result.map_err(io::Error::from)?.bytes,
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    for descriptor in descriptors {
                        // One too many is closed here.
                        if self.descriptors.len() < MAX_DESCRIPTORS {
                            self.descriptors.push_back(descriptor);
                        }
                    }
                }
            }
            if count == 0 {
                return Err(WireError::Closed);
            }
            into = into.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }
}
