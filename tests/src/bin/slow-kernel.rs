//! `gogrid-worker` whose every step of a batch is one kernel of ten seconds, which looks at nothing meanwhile.
//!
//! Proves that an agent's workers end with it whatever they are doing.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

fn main() -> anyhow::Result<()> {
    let error = Command::new(gogrid_tests::cluster::program("gogrid-worker")?)
        .args(std::env::args_os().skip(1))
        .arg("--fault=kernel-millis=10000")
        .exec();
    Err(error.into())
}
