//! Simulates whole clusters under faults and says whether anybody got less, or anything twice.

use anyhow::{Result, ensure};
use clap::Parser;
use gogrid_tests::sim::Without;
use gogrid_tests::sim::report::{Report, sweep};
use gogrid_tests::sim::run::{Setup, run};

/// A seed is a million small texts and trees: the C library's allocator would take a quarter of its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Simulates whole clusters under faults: the real operators and agents on modelled machines, server and workers.
#[derive(Parser)]
struct Flags {
    /// Schedules to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Only this one.
    #[arg(long)]
    seed: Option<u64>,
    /// Tell everything that happens; for one seed. RUST_LOG adds what the programs log, on standard error.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Nodes.
    #[arg(long, default_value_t = 5)]
    nodes: usize,
    /// Operators.
    #[arg(long, default_value_t = 2)]
    operators: usize,
    /// Jobs.
    #[arg(long, default_value_t = 20)]
    jobs: usize,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Take a layer of the fence away.
    #[arg(long, value_enum)]
    without: Option<Without>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    let setup = Setup {
        nodes: flags.nodes,
        operators: flags.operators,
        jobs: flags.jobs,
        without: flags.without,
        trace: flags.trace,
    };
    ensure!(
        flags.nodes > 0 && flags.operators > 0 && flags.threads > 0,
        "--nodes, --operators and --threads must be at least 1"
    );
    if flags.trace {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .without_time()
            .init();
    }
    #[expect(clippy::disallowed_methods, reason = "says how long it took")]
    let begun = std::time::Instant::now();
    let report = match flags.seed {
        Some(seed) => {
            let outcome = run(seed, setup)?;
            for line in &outcome.trace {
                println!("{line}");
            }
            let mut report = Report::default();
            report.add(&outcome);
            report
        }
        None => sweep(flags.from, flags.seeds, flags.threads, setup)?,
    };
    let seconds = begun.elapsed().as_secs_f64();
    if flags.json {
        println!("{}", report.json(seconds));
    } else {
        print!("{}", report.text(seconds));
    }
    ensure!(report.clean(), "a counter that must be 0 is not");
    Ok(())
}
