//! A whole agent on the real machine.
//!
//! Owns: the order in which its parts start: nothing of the old session may run when the new one is published. Must not
//! hold policy.

use crate::clock::{Host, Machine};
use crate::config::Config;
use crate::event::{Event, Hub};
use crate::idle::IdleGroup;
use crate::metrics::{self, Metrics};
use crate::{Agent, End, devices, kube_client, link, models, owned, owner, pressure, previous, spawner};
use gogrid_agent_core::driver::watch::Timing;
use gogrid_agent_core::session::Session;
use std::error::Error;
use std::sync::{Arc, Mutex};
use tokio::signal::unix::{SignalKind, signal};

/// The agent could not start.
#[derive(Debug, thiserror::Error)]
#[error("{what} could not be made ready")]
pub struct StartError {
    what: &'static str,
    #[source]
    source: Box<dyn Error + Send + Sync>,
}

/// A step of the start, with its name.
trait Step<T> {
    fn step(self, what: &'static str) -> Result<T, StartError>;
}

impl<T, E: Error + Send + Sync + 'static> Step<T> for Result<T, E> {
    fn step(self, what: &'static str) -> Result<T, StartError> {
        self.map_err(|source| StartError {
            what,
            source: Box::new(source),
        })
    }
}

/// Runs one agent on this machine until it ends. The file that comes back is the lock on the state directory: it must
/// outlive everything that this agent started.
pub async fn run(config: Config) -> Result<(End, std::fs::File), StartError> {
    std::fs::create_dir_all(&config.state_dir).step("the state directory")?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").step("the boot id")?;
    let instance = std::fs::read_to_string("/proc/sys/kernel/random/uuid").step("the instance id")?;
    let session = Session::new(&boot, &instance);
    let state_dir = config.state_dir.clone();
    let lock = tokio::task::spawn_blocking(move || previous::lock(&state_dir))
        .await
        .step("the lock on the state directory")?
        .step("the lock on the state directory")?;
    // Nothing of the old session may run when the new one is published.
    let (processes, ended, former) = loop {
        match previous::Processes::take_over(&config.state_dir, &session) {
            Err(error @ previous::PreviousError::StillThere(_)) => tracing::error!(%error, "waiting for it"),
            other => break other.step("the record of processes")?,
        }
    };
    tracing::info!(%session, node = config.node, ended, "agent starts");

    let host: Arc<dyn Host> = Arc::new(Machine);
    let metrics = Metrics::new(Arc::clone(&host), config.timing).step("metrics")?;
    let server = tokio::net::TcpListener::bind(config.metrics)
        .await
        .step("--metrics-addr")?;
    let address = server.local_addr().step("--metrics-addr")?;
    tracing::info!(%address, "metrics");
    tokio::spawn(metrics::serve(server, Arc::clone(&metrics)));

    let (clients, api_servers) = kube_client::connect(&config).await.step("the API server")?;
    let ours = owned::until_ours(clients.watch.clone(), &config.release, &metrics).await;
    if !ours.step("signals")? {
        return Ok((End::Told, lock));
    }
    let idle = config.idle_cgroup.as_deref().map(IdleGroup::open).transpose();
    let idle = idle.step("the idle cgroup")?;
    let manners = owner::first_manners().step("the conservative profile")?;
    let models = models::Models::open(&config, api_servers, manners, idle.clone(), Arc::clone(&metrics))
        .step("the models' source")?;
    let (hub, events) = Hub::new();

    let own = rustix::process::geteuid().as_raw();
    let external = config.worker_binary.is_none();
    let listener = link::bind(&config.socket, external).step("the socket")?;
    let pool = pressure::PoolProcess::default();
    let users = vec![own, config.pool_uid];
    tokio::spawn(link::listen(listener, hub.clone(), users, pool.clone(), idle));
    tokio::spawn(pressure::sense(Arc::clone(&host), pool, hub.clone()));
    let processes = config
        .worker_binary
        .as_ref()
        .map(|_| Arc::new(Mutex::new(processes)));
    if let (Some(worker), Some(processes)) = (&config.worker_binary, &processes) {
        #[cfg(feature = "faults")]
        let stamps = config.stamps.clone();
        #[cfg(not(feature = "faults"))]
        let stamps = None;
        let pool = spawner::Pool {
            worker: worker.clone(),
            socket: config.socket.clone(),
            stamps,
        };
        spawner::start(pool, Arc::clone(processes), hub.clone()).step("the pool of workers")?;
    }

    tokio::spawn(devices::cpu::measure(
        config.cpu_reserve,
        config.workers_limit,
        hub.clone(),
    ));
    let driver = devices::driver::start(
        config.nvml.clone(),
        Timing::with_second(config.driver_second),
        config.cuda_on_cpu,
        Arc::clone(&metrics),
        hub.clone(),
    )
    .step("the thread of the driver")?;
    if let Some(socket) = config.pod_resources.clone() {
        tokio::spawn(devices::kubelet::watch(socket, hub.clone()));
    }
    tokio::spawn(models.clone().scan(hub.clone()));
    signals(hub.clone()).step("signals")?;
    let threads =
        std::thread::available_parallelism().map_or(1, |n| u16::try_from(n.get()).unwrap_or(u16::MAX));
    let agent = Agent {
        config,
        host,
        session,
        former,
        clients,
        models: Arc::new(models),
        metrics,
        threads,
        processes,
        driver: Some(driver),
    };
    Ok((agent.run(hub, events).await, lock))
}

fn signals(hub: Hub) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        hub.send(Event::Shutdown).await;
    });
    Ok(())
}
