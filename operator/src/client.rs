//! How the operator talks to the API server.
//!
//! Owns: building the clients, and how long what they send may be on its way. Must not: retry; kube's own retry layer
//! would hold a write back until it is stale.

use crate::gate::GateLayer;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt as _, DynBody};
use kube::{Client, Config};
use std::time::Duration;
use tower::util::BoxService;
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt as _};

/// A way to the API server.
type GenericService = BoxService<Request<Body>, Response<Box<DynBody>>, BoxError>;

/// No client could be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Neither a kubeconfig nor a service account.
    #[error("no way to the API server is configured")]
    Infer(#[from] kube::config::InferConfigError),
    /// A proxy is in the way.
    #[error(
        "the API server would be reached through the proxy {0}, which is not supported: take proxy-url out of the kubeconfig \
         and HTTPS_PROXY out of the environment"
    )]
    Proxy(http::Uri),
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

/// TCP connections that the kernel gives up when something sent is not received within `delivery`: also when the asker has
/// given up before, or its process stands still. Otherwise what a partition held back would arrive when it heals, up to
/// a quarter of an hour later, from a leader that leads no more.
fn connector(delivery: Duration) -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_tcp_user_timeout(Some(delivery));
    connector
}

/// What kube makes of a configuration, over connections that give up in time.
fn service(config: &Config, delivery: Duration) -> Result<GenericService, kube::Error> {
    let mut connector =
        TimeoutConnector::new(config.rustls_https_connector_with_connector(connector(delivery))?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(client);
    let boxed = |body: hyper::body::Incoming| -> Box<DynBody> { Box::new(body.map_err(BoxError::from)) };
    Ok(service
        .map_response(move |response: Response<_>| response.map(boxed))
        .boxed())
}

/// A client with a connection of its own, behind the gate; `beneath` lies between the two. What it sends is received
/// within `delivery`, or never.
pub fn gated<L>(
    config: &Config,
    delivery: Duration,
    beneath: &L,
    gate: &GateLayer,
) -> Result<Client, ClientError>
where
    L: Layer<GenericService>,
    L::Service: Service<Request<Body>, Response = Response<Box<DynBody>>, Error = BoxError> + Send + 'static,
    <L::Service as Service<Request<Body>>>::Future: Send + 'static,
{
    if let Some(proxy) = &config.proxy_url {
        return Err(ClientError::Proxy(proxy.clone()));
    }
    let service = service(config, delivery).map_err(|e| ClientError::Build(Box::new(e)))?;
    let builder = ClientBuilder::new(service, config.default_namespace.clone());
    Ok(builder.with_layer(beneath).with_layer(gate).build())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Machine;
    use crate::gate::Leadership;
    use crate::metrics::Metrics;
    use rustix::net::sockopt::tcp_user_timeout;

    #[test]
    fn a_proxy_is_refused_by_name_and_not_passed_by() {
        let gate = GateLayer {
            host: std::sync::Arc::new(Machine),
            leadership: std::sync::Arc::new(Leadership::default()),
            deadline: Duration::from_secs(3),
            metrics: std::sync::Arc::new(Metrics::new().unwrap()),
        };
        let mut config = Config::new("https://127.0.0.1:6443".parse().unwrap());
        config.proxy_url = Some("http://proxy:3128".parse().unwrap());
        let beneath = tower::layer::util::Identity::new();
        let refused = gated(&config, Duration::from_secs(2), &beneath, &gate)
            .err()
            .unwrap();
        assert!(refused.to_string().contains("http://proxy:3128"), "{refused}");
    }

    #[tokio::test]
    async fn the_kernel_gives_up_what_it_could_not_deliver_in_time() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", server.local_addr().unwrap());
        let connection = connector(Duration::from_millis(1_234))
            .oneshot(uri.parse::<http::Uri>().unwrap())
            .await
            .unwrap();
        assert_eq!(tcp_user_timeout(connection.inner()).unwrap(), 1_234);
    }
}
