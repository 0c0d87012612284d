//! The GoGrid operator's process: flags, logs, connections, metrics, signals and an orderly end.
//!
//! Owns: wiring. What an operator does is in the library.

mod trial;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use gogrid_operator::clock::{Host, Machine};
use gogrid_operator::config::{Config, Flags, LogFormat};
use gogrid_operator::gate::{GateLayer, Leadership};
use gogrid_operator::metrics::Metrics;
use gogrid_operator::{Operator, client, metrics};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

fn start_logs(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,kube_client=warn,tower=warn"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Json => logs.json().flatten_event(true).init(),
        LogFormat::Text => logs.init(),
    }
}

/// Decides where InferenceJobs run and publishes their results.
#[derive(Parser)]
#[command(name = "gogrid-operator", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Subcommand)]
enum Command {
    /// Say what is wrong with the nodes, run one real job and check its answer: what `helm test` does.
    Trial(trial::Trial),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { command, flags } = Cli::parse();
    if let Some(Command::Trial(trial)) = command {
        let client = kube::Client::try_from(client::config().await?).context("the API server")?;
        return Ok(trial.run(client).await?);
    }
    let unique = format!("{}-{}", std::process::id(), Machine.wall().as_microsecond());
    let config = flags.validate(&unique).context("the flags can't be used")?;
    start_logs(config.log_format);
    run(config).await
}

async fn run(config: Config) -> anyhow::Result<()> {
    let host: Arc<dyn Host> = Arc::new(Machine);
    let metrics = Arc::new(Metrics::new().context("metrics")?);
    let leadership = Arc::new(Leadership::default());
    let gate = GateLayer {
        host: Arc::clone(&host),
        leadership: leadership.clone(),
        deadline: config.call_deadline(),
        metrics: metrics.clone(),
    };
    let kube_config = client::config().await.context("the API server")?;
    // Beneath the gate: what is struck had been let through.
    #[cfg(feature = "faults")]
    let (beneath, beneath_election) = {
        let faults = gogrid_faults::FaultLayer::new(config.faults.clone());
        (faults.clone(), faults.beats())
    };
    #[cfg(not(feature = "faults"))]
    let (beneath, beneath_election) = {
        let nothing = tower::layer::util::Identity::new();
        (nothing.clone(), nothing)
    };
    let delivery = Duration::from_millis(config.timing.leader_delivery().0);
    let work = client::gated(&kube_config, delivery, &beneath, &gate).context("the API server")?;
    // The election has a connection of its own: it must not wait behind a burst of work.
    let lead = client::gated(&kube_config, delivery, &beneath_election, &gate).context("the API server")?;

    let (stop_serving, mut serving) = watch::channel(false);
    let listener = metrics::bind(config.metrics_addr).await?;
    let server = tokio::spawn(metrics::serve(listener, metrics.clone(), async move {
        // An error means that the sender is gone: the process ends.
        let _ = serving.wait_for(|stop| *stop).await;
    }));
    let (stop, stopped) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
        stop.send_replace(true);
        stop.closed().await;
    });
    let operator = Operator {
        config,
        host,
        work,
        lead,
        leadership,
        metrics,
    };
    operator.run(stopped).await?;
    stop_serving.send_replace(true);
    match tokio::time::timeout(Duration::from_secs(2), server).await {
        Ok(ended) => ended.context("the metrics server")?.context("the metrics server"),
        Err(_) => Ok(()),
    }
}
