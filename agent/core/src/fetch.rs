//! What the agent and its fetching child say to each other over a socket pair.
//!
//! Owns: message types; frames are those of [`crate::protocol`]. Must not do I/O. The child downloads and hashes models
//! without the agent's token, at the priority and inside the share that it is told.

use crate::protocol::IoPriority;
use gogrid_api::effective::Limits;
use serde::{Deserialize, Serialize};

/// How the child is to behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manners {
    /// Nice value of every thread and of its autogroup.
    pub niceness: i8,
    /// I/O priority of every thread.
    pub io: IoPriority,
    /// Share of the CPU device in permille; 0 = wait.
    pub share_permille: u16,
}

impl Manners {
    /// Fetching can wait: where the profile asks for kindness at all, it is as kind as can be. Beside the workers' session
    /// it is one more that others share the machine with.
    pub fn under(limits: &Limits, share_permille: u16) -> Self {
        Self {
            niceness: if limits.niceness.0 > 0 {
                19
            } else {
                limits.niceness.0
            },
            io: IoPriority::under(limits),
            share_permille,
        }
    }
}

/// Agent → child.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum ToFetcher {
    /// From now on; sent before anything else.
    Manners(Manners),
    /// Fetch and verify a model.
    Obtain {
        /// Names the request.
        id: u64,
        /// Where it is.
        uri: String,
        /// What its bytes must hash to, in hexadecimal digits.
        sha256: String,
    },
    /// Nobody waits for it any more.
    Cancel {
        /// Which request.
        id: u64,
    },
}

/// Child → agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum FromFetcher {
    /// So many bytes more were downloaded, or read and hashed; about once a second while any are.
    Read {
        /// How many.
        bytes: u64,
    },
    /// The verified model; its read-only descriptor travels with this frame (SCM_RIGHTS).
    Obtained {
        /// Which request.
        id: u64,
        /// Its length.
        bytes: u64,
    },
    /// It can't be had.
    Failed {
        /// Which request.
        id: u64,
        /// One CamelCase word.
        reason: String,
        /// A sentence.
        message: String,
        /// Whether trying again may help.
        retryable: bool,
    },
}
