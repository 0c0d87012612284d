//! The GoGrid node agent: lease, inventory, supervision of workers.
//!
//! Owns: how the parts of one agent that speak to the API server are put together, over clients, models and a machine
//! that are given to it; `start` gives it the real ones. Must not hold policy.

mod api;
pub mod clock;
pub mod config;
mod devices;
pub mod event;
mod fetch;
mod fetcher;
mod frames;
mod header;
mod idle;
pub mod kube_client;
mod lease;
pub mod link;
#[cfg(test)]
mod link_tests;
pub mod metrics;
pub mod models;
mod owned;
mod owner;
mod pressure;
mod previous;
mod spawner;
mod start;
mod sys;
mod token;
mod watch;

pub use devices::nvml::child as probe_nvml;
pub use fetch::{FetchError, Flags as FetchFlags, child as fetch};
pub use header::child as inspect_header;
pub use lease::{Keeper, LeaseEvent};
pub use owner::End;
pub use start::{StartError, run};

use clock::Host;
use config::Config;
use devices::driver::Driver;
use event::{Event, Hub};
use gogrid_agent_core::session::Session;
use kube_client::Clients;
use metrics::Metrics;
use models::ModelSource;
use owner::{Owner, Tools};
use previous::Processes;
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, mpsc, oneshot};

/// One agent and what it works with.
pub struct Agent {
    /// What it goes by. Without a worker program, its Lease waits for the hello of an external pool, which may still
    /// hold workers of an old session.
    pub config: Config,
    /// The machine it runs on.
    pub host: Arc<dyn Host>,
    /// This life of it.
    pub session: Session,
    /// Sessions before it, of which nothing is left.
    pub former: Vec<String>,
    /// To the API server.
    pub clients: Clients,
    /// Where models come from.
    pub models: Arc<dyn ModelSource>,
    /// What is measured of it.
    pub metrics: Arc<Metrics>,
    /// Logical processors that workers may use.
    pub threads: u16,
    /// Record of processes, where the agent starts the pool itself.
    processes: Option<Arc<Mutex<Processes>>>,
    /// The thread that asks the GPU driver, where there is one.
    driver: Option<Driver>,
}

impl Agent {
    /// An agent whose pool of workers is started by somebody else.
    pub fn new(
        config: Config,
        host: Arc<dyn Host>,
        session: Session,
        clients: Clients,
        models: Arc<dyn ModelSource>,
        metrics: Arc<Metrics>,
        threads: u16,
    ) -> Self {
        Self {
            config,
            host,
            session,
            former: vec![],
            clients,
            models,
            metrics,
            threads,
            processes: None,
            driver: None,
        }
    }

    /// Runs until it is told to end, or another session has taken the node's Lease. `hub` leads to `events`, by which
    /// the agent hears of devices, models, pool and workers.
    pub async fn run(self, hub: Hub, events: mpsc::Receiver<Event>) -> End {
        let Self {
            config,
            host,
            session,
            former,
            clients,
            models,
            metrics,
            threads,
            processes,
            driver,
        } = self;
        let watch_again = Arc::new(Notify::new());
        host.spawn(Box::pin(watch::keep(
            Arc::clone(&host),
            clients.clone(),
            config.clone(),
            hub.clone(),
            Arc::clone(&watch_again),
        )));
        let (clear, cleared) = oneshot::channel();
        let clear = if config.worker_binary.is_none() {
            Some(clear)
        } else {
            // The receiver is at hand: it can't be gone.
            let _ = clear.send(());
            None
        };
        let keeper = lease::Keeper::new(
            Arc::clone(&host),
            clients.lease.clone(),
            &config,
            session.clone(),
            former,
        );
        host.spawn(Box::pin(keep_lease(
            Arc::clone(&host),
            keeper,
            cleared,
            hub.clone(),
        )));
        let tools = Tools {
            calls: api::Calls::new(&clients.api, &config),
            server_clock: clients.server_clock.clone(),
            host,
            config,
            session: session.to_string(),
            hub,
            models,
            driver,
            metrics,
            processes,
            threads,
            clear,
            watch_again,
        };
        Owner::new(tools).run(events).await
    }
}

async fn keep_lease(host: Arc<dyn Host>, keeper: lease::Keeper, cleared: oneshot::Receiver<()>, hub: Hub) {
    if cleared.await.is_err() {
        return;
    }
    let (sender, mut renewals) = mpsc::channel(16);
    host.spawn(Box::pin(keeper.keep(sender)));
    while let Some(event) = renewals.recv().await {
        hub.send(Event::Lease(event)).await;
    }
}
