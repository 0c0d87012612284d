//! Clients of the API server: no retry layer, and no call without a deadline.
//!
//! Owns: how connections are made. A retry beneath a write could repeat it after its meaning has changed, and a call
//! without a read timeout can wedge for ever; so kube's defaults for both are off. Must not know what is sent.

use crate::config::Config;
use crate::token;
use kube::Client;
use kube::client::ClientBuilder;
use std::net::IpAddr;
use std::time::Duration;

/// Seconds after which the server ends a watch.
pub(crate) const WATCH_SECONDS: u32 = 120;
/// Deadline of a call that is neither a watch nor a Lease.
pub(crate) const CALL: Duration = Duration::from_secs(15);

/// Addresses of the API server, which no download may contact.
async fn addresses(host: &str, port: u16) -> Vec<IpAddr> {
    match host.parse() {
        Ok(address) => vec![address],
        Err(_) => tokio::net::lookup_host((host, port))
            .await
            .map(|all| all.map(|a| a.ip()).collect())
            .unwrap_or_default(),
    }
}

/// One client per kind of call.
#[derive(Clone)]
pub struct Clients {
    /// Reads and writes.
    pub api: Client,
    /// Watches.
    pub watch: Client,
    /// The node's Lease, on a connection of its own.
    pub lease: Client,
}

/// Clients of the API server that the environment names, and its addresses.
pub(crate) async fn connect(config: &Config) -> Result<(Clients, Vec<IpAddr>), kube::Error> {
    let mut base = kube::Config::infer().await.map_err(kube::Error::InferConfig)?;
    let token = base
        .auth_info
        .token_file
        .take()
        .map(|path| token::from_file(path.into()));
    let token = tower::util::option_layer(token);
    let host = base
        .cluster_url
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']']);
    let addresses = addresses(host, base.cluster_url.port_u16().unwrap_or(443)).await;
    let attempt = Duration::from_millis(config.timing.attempt().0);
    let client = |read: Duration, connect: Duration| {
        let mut config = base.clone();
        config.default_retry = false;
        config.read_timeout = Some(read);
        config.write_timeout = Some(read.min(CALL));
        config.connect_timeout = Some(connect);
        ClientBuilder::try_from(config).map(|client| client.with_layer(&token))
    };
    let api = client(CALL, Duration::from_secs(5))?;
    let lease = client(attempt, attempt)?;
    #[cfg(feature = "faults")]
    let (api, lease) = {
        let faults = gogrid_faults::FaultLayer::new(config.faults.clone());
        (api.with_layer(&faults), lease.with_layer(&faults))
    };
    let clients = Clients {
        api: api.build(),
        watch: client(
            Duration::from_secs(u64::from(WATCH_SECONDS) + 10),
            Duration::from_secs(5),
        )?
        .build(),
        lease: lease.build(),
    };
    Ok((clients, addresses))
}
