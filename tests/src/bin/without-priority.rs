//! `gogrid-worker` on a kernel that ignores priorities: setting them answers "done" and does nothing.
//!
//! Proves that the checks of niceness and I/O class can fail.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

fn main() -> anyhow::Result<()> {
    gogrid_tests::process::ignore_priorities()?;
    let error = Command::new(gogrid_tests::cluster::program("gogrid-worker")?)
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error.into())
}
