//! How the operator talks to the API server.
//!
//! Owns: building the clients. Must not: retry; kube's own retry layer would hold a write back until it is stale.

use crate::gate::GateLayer;
use http::{Request, Response};
use kube::client::{Body, ClientBuilder, DynBody};
use kube::{Client, Config};
use std::time::Duration;
use tower::util::BoxService;
use tower::{BoxError, Layer, Service};

/// What kube makes of a configuration.
type GenericService = BoxService<Request<Body>, Response<Box<DynBody>>, BoxError>;

/// No client could be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Neither a kubeconfig nor a service account.
    #[error("no way to the API server is configured")]
    Infer(#[from] kube::config::InferConfigError),
    /// The configuration can't be used.
    #[error("the configured way to the API server can't be used")]
    Build(#[source] Box<kube::Error>),
}

/// The configuration of all clients.
pub async fn config() -> Result<Config, ClientError> {
    let mut config = Config::infer().await?;
    config.default_retry = false;
    config.connect_timeout = Some(Duration::from_secs(5));
    config.write_timeout = Some(Duration::from_secs(10));
    // Watches carry a bookmark about once a minute: one that is silent for longer hangs on a dead connection.
    config.read_timeout = Some(Duration::from_secs(90));
    Ok(config)
}

/// A client with a connection of its own, behind the gate; `beneath` lies between the two.
pub fn gated<L>(config: Config, beneath: &L, gate: &GateLayer) -> Result<Client, ClientError>
where
    L: Layer<GenericService>,
    L::Service: Service<Request<Body>, Response = Response<Box<DynBody>>, Error = BoxError> + Send + 'static,
    <L::Service as Service<Request<Body>>>::Future: Send + 'static,
{
    let builder = ClientBuilder::try_from(config).map_err(|e| ClientError::Build(Box::new(e)))?;
    Ok(builder.with_layer(beneath).with_layer(gate).build())
}
