//! How the operator talks to the API server.
//!
//! Owns: building the clients. Must not: retry; kube's own retry layer would hold a write back until it is stale.

use crate::gate::GateLayer;
use kube::client::ClientBuilder;
use kube::{Client, Config};
use std::time::Duration;

/// No client could be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Neither a kubeconfig nor a service account.
    #[error("no way to the API server is configured")]
    Infer(#[from] kube::config::InferConfigError),
    /// The configuration can't be used.
    #[error("the configured way to the API server can't be used")]
    Build(#[source] Box<kube::Error>),
}

/// The configuration of all clients.
pub(crate) async fn config() -> Result<Config, ClientError> {
    let mut config = Config::infer().await?;
    config.default_retry = false;
    config.connect_timeout = Some(Duration::from_secs(5));
    config.write_timeout = Some(Duration::from_secs(10));
    // Watches are ended by the server within five minutes and carry bookmarks before that.
    config.read_timeout = Some(Duration::from_secs(330));
    Ok(config)
}

/// A client with a connection of its own, behind the gate.
pub(crate) fn gated(config: Config, gate: &GateLayer) -> Result<Client, ClientError> {
    let builder = ClientBuilder::try_from(config).map_err(|e| ClientError::Build(Box::new(e)))?;
    Ok(builder.with_layer(gate).build())
}
