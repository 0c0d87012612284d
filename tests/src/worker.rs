//! Programs that take the place of `gogrid-worker`.
//!
//! Owns: becoming the real one, with faults. Must not do anything else: what a wrapper breaks is its own.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Becomes a worker with this process's arguments and those; returns only with the reason why it could not.
pub fn become_one(more: &[&str]) -> anyhow::Error {
    match crate::cluster::program("gogrid-worker") {
        Ok(worker) => Command::new(worker)
            .args(std::env::args_os().skip(1))
            .args(more)
            .exec()
            .into(),
        Err(error) => error,
    }
}
