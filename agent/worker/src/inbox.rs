//! What the agent says, as soon as it says it.
//!
//! Owns: the thread that reads the socket, moves the fence when a grant arrives, and ends the process when the agent is
//! gone, whatever the computation is doing. Must not act on anything else.

use crate::clock;
use crate::wire::{Receiver, WireError};
use gogrid_agent_core::protocol::ToWorker;
use std::os::fd::OwnedFd;
use std::sync::mpsc;

/// A message and the descriptor that came with it.
pub(crate) type Message = (ToWorker, Option<OwnedFd>);

/// Reads messages until the agent is gone; then the process ends, whatever the other thread does.
pub(crate) fn read(
    mut receiver: Receiver,
    fence: &crate::sys::Fence,
    inbox: &mpsc::Sender<Message>,
) -> WireError {
    loop {
        let message = match receiver.receive() {
            Ok(message) => message,
            Err(error) => return error,
        };
        // One that was overtaken while this process stood still says nothing: armed, it would stop the process again, once
        // for each that waits to be read. The timer keeps what it has, and no step begins without a grant that is good.
        if let ToWorker::Grant { fence_at, .. } = message
            && fence_at > clock::boottime()
            && let Err(error) = fence.set(fence_at)
        {
            return error.into();
        }
        let descriptor = matches!(message, ToWorker::Load { .. })
            .then(|| receiver.descriptor())
            .flatten();
        if inbox.send((message, descriptor)).is_err() {
            return WireError::Closed;
        }
    }
}
