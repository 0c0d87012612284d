//! Frames on a blocking socket, with a descriptor where one travels along.
//!
//! Owns: both ends of the socket pair between the agent and its fetching child. Must not know what messages mean.

use gogrid_agent_core::protocol::{body_length, decode, encode};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Most descriptors kept for frames that have not asked for them.
const MAX_DESCRIPTORS: usize = 4;

/// Sends one message, and a descriptor with its first bytes.
pub(crate) fn send<T: Serialize>(
    stream: &UnixStream,
    message: &T,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let frame = encode(message).map_err(io::Error::other)?;
    let mut sent = 0;
    if let Some(fd) = fd {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        sent = sendmsg(
            stream.as_fd(),
            &[IoSlice::new(&frame)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
    }
    let mut stream = stream;
    stream.write_all(frame.get(sent..).unwrap_or_default())
}

/// Receives messages and the descriptors that travel with them.
pub(crate) struct Receiver {
    stream: UnixStream,
    descriptors: VecDeque<OwnedFd>,
}

impl Receiver {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            descriptors: VecDeque::new(),
        }
    }

    /// The next message; waits for it.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut header = [0; 4];
        self.fill(&mut header)?;
        let mut body = vec![0; body_length(header).map_err(io::Error::other)?];
        self.fill(&mut body)?;
        decode(&body).map_err(io::Error::other)
    }

    /// The oldest descriptor that came and was not taken.
    pub(crate) fn descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    fn fill(&mut self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(into)];
            let count = match recvmsg(&self.stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?.bytes,
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
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into = into.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }
}
