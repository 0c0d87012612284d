//! Death at a chosen request, for fault sweeps.
//!
//! Owns: counting mutating requests (Leases apart) and killing the process around the N-th. Built only with the
//! feature `faults`.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

/// Before or after which mutating request to die; 1 is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The server never sees it.
    KillBefore(u64),
    /// The server has answered it, the operator has not seen the answer.
    KillAfter(u64),
}

/// The flag is malformed.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} must be kill-before=N or kill-after=N")]
pub(crate) struct FaultError(String);

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let error = || FaultError(text.into());
        let (word, number) = text.split_once('=').ok_or_else(error)?;
        let number = number.parse().map_err(|_| error())?;
        match word {
            "kill-before" => Ok(Fault::KillBefore(number)),
            "kill-after" => Ok(Fault::KillAfter(number)),
            _ => Err(error()),
        }
    }
}

/// Counts requests and strikes.
#[derive(Debug)]
pub(crate) struct Striker {
    fault: Fault,
    count: AtomicU64,
}

impl Striker {
    pub(crate) fn new(fault: Fault) -> Self {
        Self {
            fault,
            count: AtomicU64::new(0),
        }
    }

    /// A mutating request is about to be sent; returns its number.
    pub(crate) fn sending(&self) -> u64 {
        let number = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        if self.fault == Fault::KillBefore(number) {
            die(number);
        }
        number
    }

    /// It was answered.
    pub(crate) fn answered(&self, number: u64) {
        if self.fault == Fault::KillAfter(number) {
            die(number);
        }
    }
}

fn die(number: u64) {
    tracing::warn!(number, "fault: the process kills itself");
    if rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).is_err() {
        std::process::abort();
    }
}
