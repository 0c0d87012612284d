//! The GoGrid worker: runs one GGUF model inside its limits; the only user of candle.
//!
//! Owns the command line. `pool` and `worker` are started by the agent; `inspect`, `tokenize` and `generate` are for
//! people and touch neither agent nor cluster.

mod cli;
mod clock;
mod confined;
mod engine;
mod failure;
#[cfg(feature = "faults")]
mod faults;
mod inbox;
mod limits;
mod num;
mod permit;
mod pool;
mod records;
mod resident;
mod sandbox;
mod session;
mod stamps;
mod sys;
mod wire;
mod worker;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match cli::run(&cli::Arguments::parse()) {
        Ok(code) => code,
        // Whoever read our output has seen enough.
        Err(error) if broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gogrid-worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Variables that candle and rayon read. Candle computes in the calling thread (its own pool spins); rayon's threads
/// share the work and sleep when there is none.
pub(crate) fn compute_environment(threads: usize) -> Vec<(&'static str, String)> {
    vec![
        ("CANDLE_NUM_THREADS", "1".to_owned()),
        ("RAYON_NUM_THREADS", threads.max(1).to_string()),
    ]
}
