//! A thousand agents and fifteen thousand jobs on a real API server, measured against what the design promises.

use anyhow::{Result, ensure};
use clap::Parser;
use gogrid_tests::scale::run::{Options, run};
use std::path::PathBuf;
use std::time::Duration;

/// As for the simulator: a thousand agents are many small texts and trees.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs real agents over modelled machines, and the real operator, on a real API server, and judges what they write and take.
#[derive(Parser)]
struct Flags {
    /// Agents, each on a node of its own.
    #[arg(long, default_value_t = 1_000)]
    agents: usize,
    /// Jobs that are made one after the other.
    #[arg(long, default_value_t = 15_000)]
    jobs: usize,
    /// Jobs a second.
    #[arg(long, default_value_t = 20)]
    rate: u32,
    /// Records of each job, 0.6 to 5 s each.
    #[arg(long, default_value_t = 5)]
    records: u64,
    /// How long to measure without jobs.
    #[arg(long, default_value_t = 60)]
    idle_seconds: u64,
    /// How long to measure with a long job on every node.
    #[arg(long, default_value_t = 120)]
    steady_seconds: u64,
    /// How long each record of the long jobs takes: below 30, answers are written every 30 s on top.
    #[arg(long, default_value_t = 600)]
    steady_record_seconds: u64,
    /// Keep the control plane's files and all logs there.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// A flag for the API server, such as --profiling=true; may be repeated.
    #[arg(long, allow_hyphen_values = true)]
    api_server_flag: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new("warn,kube_client=off"))
        .with_writer(std::io::stderr)
        .init();
    ensure!(
        flags.agents > 0 && flags.jobs > 0 && flags.rate > 0 && flags.steady_record_seconds > 0,
        "--agents, --jobs, --rate and --steady-record-seconds must be at least 1"
    );
    let options = Options {
        agents: flags.agents,
        jobs: flags.jobs,
        rate: flags.rate,
        records: flags.records,
        idle: Duration::from_secs(flags.idle_seconds),
        steady: Duration::from_secs(flags.steady_seconds),
        steady_record: Duration::from_secs(flags.steady_record_seconds),
        dir: flags.dir,
        api_server_flags: flags.api_server_flag,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let report = runtime.block_on(run(options))?;
    runtime.shutdown_background();
    if flags.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.text());
    }
    ensure!(report.good(), "a bar was missed");
    Ok(())
}
