//! Clients of the API server: no retry layer, and no call without a deadline.
//!
//! Owns: how connections are made. A retry beneath a write could repeat it after its meaning has changed, and a call
//! without a read timeout can wedge for ever; so kube's defaults for both are off. Must not know what is sent.

use crate::clock::wall_now;
use crate::config::Config;
use crate::token;
use http::{HeaderMap, Response, header};
use jiff::fmt::rfc2822;
use kube::Client;
use kube::client::ClientBuilder;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tower::util::MapResponseLayer;

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

/// Nothing was compared yet.
const NEVER: i64 = i64::MIN;

/// By how much this machine's clock differs from the API server's, as the last renewal's answer said.
#[derive(Clone, Debug)]
pub struct ServerClock(Arc<AtomicI64>);

impl Default for ServerClock {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(NEVER)))
    }
}

impl ServerClock {
    /// Seconds by which this machine's clock is ahead, if an answer ever bore a date.
    pub(crate) fn ahead(&self) -> Option<i64> {
        let ahead = self.0.load(Ordering::Relaxed);
        (ahead != NEVER).then_some(ahead)
    }

    fn seen(&self, headers: &HeaderMap, now: i64) {
        let date = headers.get(header::DATE).and_then(|value| value.to_str().ok());
        if let Some(date) = date.and_then(|text| rfc2822::parse(text).ok()) {
            self.0.store(
                now.saturating_sub(date.timestamp().as_second()),
                Ordering::Relaxed,
            );
        }
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
    /// What renewals tell of the clock.
    pub server_clock: ServerClock,
}

impl Clients {
    /// Clients that were made elsewhere.
    pub fn new(api: Client, watch: Client, lease: Client) -> Self {
        Self {
            api,
            watch,
            lease,
            server_clock: ServerClock::default(),
        }
    }
}

/// Clients of the API server that the environment names, and its addresses.
pub(crate) async fn connect(config: &Config) -> Result<(Clients, Vec<IpAddr>), kube::Error> {
    let base = kube::Config::infer().await.map_err(kube::Error::InferConfig)?;
    let host = base
        .cluster_url
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']']);
    let addresses = addresses(host, base.cluster_url.port_u16().unwrap_or(443)).await;
    Ok((clients(base, config)?, addresses))
}

/// Clients of that API server.
pub fn clients(mut base: kube::Config, config: &Config) -> Result<Clients, kube::Error> {
    let token = base
        .auth_info
        .token_file
        .take()
        .map(|path| token::from_file(path.into()));
    let token = tower::util::option_layer(token);
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
        (api.with_layer(&faults), lease.with_layer(&faults.beats()))
    };
    let server_clock = ServerClock::default();
    let clock = server_clock.clone();
    let lease = lease.with_layer(&MapResponseLayer::new(move |answer: Response<_>| {
        clock.seen(answer.headers(), wall_now().as_second());
        answer
    }));
    let watch = client(
        Duration::from_secs(u64::from(WATCH_SECONDS) + 10),
        Duration::from_secs(5),
    )?;
    Ok(Clients {
        server_clock,
        ..Clients::new(api.build(), watch.build(), lease.build())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_compared_with_the_date_of_an_answer_and_with_nothing_that_is_none() {
        let clock = ServerClock::default();
        let at = |date: &str| HeaderMap::from_iter([(header::DATE, date.parse().unwrap())]);
        clock.seen(&HeaderMap::new(), 5);
        clock.seen(&at("yesterday"), 5);
        assert_eq!(clock.ahead(), None);
        clock.seen(&at("Thu, 01 Jan 1970 00:01:40 GMT"), 95);
        assert_eq!(clock.ahead(), Some(-5));
        clock.seen(&at("Fri, 27 Nov 2026 18:51:35 GMT"), 1_795_805_500);
        assert_eq!(clock.ahead(), Some(5));
    }
}
