//! The GoGrid operator: observe, validate, plan, apply, status.
//!
//! Owns: wiring the steps together, logs, and an orderly end. Every other module has one step.

mod apply;
mod client;
mod clock;
mod config;
mod events;
mod gate;
mod inputs;
mod leader;
mod metrics;
mod models;
mod observe;
mod order;
mod orphans;
mod owner;
mod presets;
mod probe;
mod profiles;
mod publish;
mod results;
mod round;
#[cfg(test)]
mod simulation;
mod status;
mod store;
mod telemetry;
mod validate;

use crate::config::{Config, Flags, LogFormat};
use anyhow::Context as _;
use clap::Parser as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// An error and all its causes on one line.
pub(crate) fn error_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

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

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let unique = format!("{}-{}", std::process::id(), clock::micro().as_microsecond());
    let config = Flags::parse()
        .validate(&unique)
        .context("the flags can't be used")?;
    start_logs(config.log_format);
    run(config).await
}

async fn run(config: Config) -> anyhow::Result<()> {
    let metrics = Arc::new(metrics::Metrics::new().context("metrics")?);
    let leadership = Arc::new(gate::Leadership::default());
    let deadline = Duration::from_millis(config.timing.renew().0.clamp(3_000, 10_000));
    let gate = gate::GateLayer {
        leadership: leadership.clone(),
        deadline,
        metrics: metrics.clone(),
    };
    let kube_config = client::config().await.context("the API server")?;
    // Beneath the gate: what is struck had been let through.
    #[cfg(feature = "faults")]
    let beneath = gogrid_faults::FaultLayer::new(config.faults.clone());
    #[cfg(not(feature = "faults"))]
    let beneath = tower::layer::util::Identity::new();
    let work_client = client::gated(kube_config.clone(), &beneath, &gate).context("the API server")?;
    // The election has a connection of its own: it must not wait behind a burst of work.
    let lead_client = client::gated(kube_config, &beneath, &gate).context("the API server")?;

    let (stop_serving, serving) = watch::channel(false);
    let (stop_work, working) = watch::channel(false);
    let (stop_leading, leading) = watch::channel(false);
    let (leads, term) = watch::channel(None);
    let mut until = serving.clone();
    let server = tokio::spawn(metrics::serve(config.metrics_addr, metrics.clone(), async move {
        // An error means that the sender is gone: the process ends.
        let _ = until.wait_for(|stop| *stop).await;
    }));
    let seen = observe::start(&work_client, &config.namespace, &metrics);
    let election = leader::Election {
        client: lead_client,
        holder: config.holder.clone(),
        timing: config.timing,
        leadership: leadership.clone(),
        metrics: metrics.clone(),
    };
    let mut election = tokio::spawn(election.run(leads, leading));
    let executor = apply::Executor {
        client: work_client,
        namespace: config.namespace.clone(),
        reporter: config.holder.clone(),
    };
    let mut owner =
        tokio::spawn(owner::Owner::new(config, executor, leadership, metrics).run(seen, term, working));

    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        ended = &mut owner => anyhow::bail!("the owner task ended: {ended:?}"),
        ended = &mut election => anyhow::bail!("the election ended: {ended:?}"),
    }
    stop_work.send_replace(true);
    owner.await.context("the owner task")?;
    stop_leading.send_replace(true);
    election.await.context("the election")?;
    stop_serving.send_replace(true);
    match tokio::time::timeout(Duration::from_secs(2), server).await {
        Ok(ended) => ended.context("the metrics server")?.context("the metrics server"),
        Err(_) => Ok(()),
    }
}
