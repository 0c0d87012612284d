//! The GoGrid operator: observe, validate, plan, apply, status.
//!
//! Owns: how the steps of one operator are put together, over clients and a machine that are given to it. Every other
//! module has one step. Must not: read flags, make connections or catch signals.

mod apply;
pub mod client;
pub mod clock;
pub mod config;
mod events;
pub mod gate;
mod housing;
mod inputs;
mod jobs;
mod leader;
pub mod metrics;
mod models;
mod observe;
mod order;
mod orphans;
mod owner;
mod pace;
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

use crate::clock::Host;
use crate::config::Config;
use crate::gate::Leadership;
use crate::metrics::Metrics;
use kube::Client;
use std::sync::Arc;
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

/// One operator and what it works with.
pub struct Operator {
    /// What it goes by.
    pub config: Config,
    /// The machine it runs on.
    pub host: Arc<dyn Host>,
    /// To the API server, behind the gate.
    pub work: Client,
    /// The same for the election alone, so that it never waits behind a burst of work.
    pub lead: Client,
    /// Whether it leads, as the gate sees it.
    pub leadership: Arc<Leadership>,
    /// What is measured of it.
    pub metrics: Arc<Metrics>,
}

/// A task that lasts as long as the operator ended before it.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The owner of the world.
    #[error("the owner task ended")]
    Owner(#[source] Option<tokio::task::JoinError>),
    /// The election.
    #[error("the election ended")]
    Election(#[source] Option<tokio::task::JoinError>),
}

impl Operator {
    /// Runs until `stop` says true; then finishes what is on its way and gives the leader Lease back.
    pub async fn run(self, mut stop: watch::Receiver<bool>) -> Result<(), OperatorError> {
        let Self {
            config,
            host,
            work,
            lead,
            leadership,
            metrics,
        } = self;
        let (stop_work, working) = watch::channel(false);
        let (stop_leading, leading) = watch::channel(false);
        let (leads, term) = watch::channel(None);
        let seen = observe::start(&host, &work, &config.namespace, &metrics);
        let election = leader::Election {
            host: Arc::clone(&host),
            client: lead,
            holder: config.holder.clone(),
            release: config.release.clone(),
            namespace: config.namespace.clone(),
            pod: config.pod.clone(),
            timing: config.timing,
            leadership: Arc::clone(&leadership),
            metrics: Arc::clone(&metrics),
        };
        let mut election = host.spawn(Box::pin(election.run(leads, leading)));
        let executor = apply::Executor {
            host: Arc::clone(&host),
            client: work,
            namespace: config.namespace.clone(),
            reporter: config.holder.clone(),
            one_answer: config.layers.one_answer,
        };
        let owner = owner::Owner::new(config, executor, leadership, metrics);
        let mut owner = host.spawn(Box::pin(owner.run(seen, term, working)));
        tokio::select! {
            biased;
            // An error means that nobody can say stop any more: the process ends.
            _ = stop.wait_for(|stop| *stop) => {}
            ended = &mut owner => return Err(OperatorError::Owner(ended.err())),
            ended = &mut election => return Err(OperatorError::Election(ended.err())),
        }
        stop_work.send_replace(true);
        owner.await.map_err(|e| OperatorError::Owner(Some(e)))?;
        stop_leading.send_replace(true);
        election.await.map_err(|e| OperatorError::Election(Some(e)))
    }
}
