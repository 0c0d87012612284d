//! The GoGrid node agent's process.
//!
//! Owns: the start and the end of the process. `gogrid-agent` runs the agent; `gogrid-agent inspect-headers` is the
//! confined child that parses one header, `gogrid-agent probe-nvml` the one that
//! loads the GPU driver's library, `gogrid-agent fetch` the niced one that fetches and hashes. Must not hold policy.

use clap::{Parser, Subcommand as _};
use gogrid_agent::End;
use gogrid_agent::config::{Config, Flags, LogFormat};
use std::path::PathBuf;
use std::process::ExitCode;

/// The GoGrid node agent.
#[derive(Parser)]
#[command(name = "gogrid-agent", version, about)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
}

/// What the agent starts itself as. Apart from the flags, part of which the environment of a pod sets.
#[derive(Parser)]
enum Child {
    /// Parse the header of the model on standard input and print its facts.
    InspectHeaders {
        /// Length of the whole file.
        #[arg(long)]
        bytes: u64,
    },
    /// Answer questions about the NVIDIA driver on standard input until it closes.
    ProbeNvml {
        /// Library to load instead of the driver's.
        #[arg(long)]
        library: Option<PathBuf>,
    },
    /// Fetch, hash and keep models for the agent at the other end of standard input.
    Fetch(gogrid_agent::FetchFlags),
}

fn main() -> anyhow::Result<ExitCode> {
    let first = std::env::args_os().nth(1).unwrap_or_default();
    if first.to_str().is_some_and(Child::has_subcommand) {
        match Child::parse() {
            Child::InspectHeaders { bytes } => gogrid_agent::inspect_header(bytes)?,
            Child::ProbeNvml { library } => gogrid_agent::probe_nvml(library.as_deref())?,
            Child::Fetch(flags) => {
                tracing_subscriber::fmt()
                    .json()
                    .with_writer(std::io::stderr)
                    .init();
                gogrid_agent::fetch(flags)?;
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    let Cli { flags } = Cli::parse();
    let config = Config::try_from(flags)?;
    #[cfg(feature = "faults")]
    gogrid_agent::clock::WALL_OFFSET.store(config.wall_offset_seconds, std::sync::atomic::Ordering::Relaxed);
    // The client's own layer logs every failed request at ERROR; each is judged and logged by its caller.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,kube_client=off"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr);
    match config.log {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    // The lock outlives everything that this agent started.
    let (end, _lock) = runtime.block_on(gogrid_agent::run(config))?;
    tracing::info!(%end, "the agent ends");
    // Children die with this process; nothing is worth waiting for.
    runtime.shutdown_background();
    Ok(match end {
        End::Told => ExitCode::SUCCESS,
        End::Superseded(_) => ExitCode::FAILURE,
    })
}
