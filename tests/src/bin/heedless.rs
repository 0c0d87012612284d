//! `gogrid-worker` that computes whether its grant allows it or not.
//!
//! Proves that a share which is exceeded is noticed.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

fn main() -> anyhow::Result<()> {
    let error = Command::new(gogrid_tests::cluster::program("gogrid-worker")?)
        .args(std::env::args_os().skip(1))
        .arg("--fault=heedless")
        .exec();
    Err(error.into())
}
