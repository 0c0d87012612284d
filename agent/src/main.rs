//! The GoGrid node agent: lease, inventory, supervision of workers.
//!
//! Owns: the start and the end of the process. `gogrid-agent` runs the agent; `gogrid-agent inspect-headers` is the
//! confined child that parses one header. Must not hold policy.

mod api;
mod clock;
mod config;
mod devices;
mod event;
mod header;
mod kube_client;
mod lease;
mod link;
#[cfg(test)]
mod link_tests;
mod metrics;
mod models;
mod owner;
mod previous;
mod spawner;
mod sys;
mod watch;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use config::{Config, Flags, LogFormat};
use event::{Event, Hub};
use gogrid_agent_core::session::Session;
use owner::{End, Owner, Tools};
use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// The GoGrid node agent.
#[derive(Parser)]
#[command(name = "gogrid-agent", version, about, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Child>,
    #[command(flatten)]
    flags: Option<Flags>,
}

/// What the agent starts itself as.
#[derive(Subcommand)]
enum Child {
    /// Parse the header of the model on standard input and print its facts.
    #[command(hide = true)]
    InspectHeaders {
        /// Length of the whole file.
        #[arg(long)]
        bytes: u64,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let Cli { command, flags } = Cli::parse();
    if let Some(Child::InspectHeaders { bytes }) = command {
        header::child(bytes)?;
        return Ok(ExitCode::SUCCESS);
    }
    let flags = flags.context("--node-name and --state-dir are needed")?;
    let config = Config::try_from(flags)?;
    #[cfg(feature = "faults")]
    clock::WALL_OFFSET.store(config.wall_offset_seconds, std::sync::atomic::Ordering::Relaxed);
    // The client's own layer logs every failed request at ERROR; each is judged and logged by its caller.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,kube_client=off"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr);
    match config.log {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    // Its threads give way to everything else on the node: they fetch and hash models.
    let heavy = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("heavy")
        .on_thread_start(|| {
            // On Linux this is the thread's own nice value. Refused or not, the work must be done.
            let _ = rustix::process::setpriority_process(None, 15);
        })
        .enable_all()
        .build()?;
    // The lock outlives everything that this agent started.
    let (end, _lock) = runtime.block_on(run(config, heavy.handle().clone()))?;
    tracing::info!(%end, "the agent ends");
    // Children die with this process; nothing is worth waiting for.
    heavy.shutdown_background();
    runtime.shutdown_background();
    Ok(match end {
        End::Told => ExitCode::SUCCESS,
        End::Superseded(_) => ExitCode::FAILURE,
    })
}

async fn run(config: Config, heavy: tokio::runtime::Handle) -> anyhow::Result<(End, std::fs::File)> {
    std::fs::create_dir_all(&config.state_dir).context("state directory")?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("boot id")?;
    let instance = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("instance id")?;
    let session = Session::new(&boot, &instance);
    let state_dir = config.state_dir.clone();
    let lock = tokio::task::spawn_blocking(move || previous::lock(&state_dir)).await??;
    // Nothing of the old session may run when the new one is published.
    let (processes, ended, former) = loop {
        match previous::Processes::take_over(&config.state_dir, &session) {
            Err(error @ previous::PreviousError::StillThere(_)) => tracing::error!(%error, "waiting for it"),
            other => break other?,
        }
    };
    tracing::info!(%session, node = config.node, ended, "agent starts");

    let metrics = metrics::Metrics::new(config.timing)?;
    let server = tokio::net::TcpListener::bind(config.metrics)
        .await
        .context("--metrics-addr")?;
    tracing::info!(address = %server.local_addr()?, "metrics");
    tokio::spawn(metrics::serve(server, Arc::clone(&metrics)));

    let (clients, api_servers) = kube_client::connect(&config).await?;
    let models = models::Models::open(&config, api_servers, heavy, Arc::clone(&metrics))?;
    let calls = api::Calls::new(&clients.api, &config);
    let (hub, events) = Hub::new();

    let own = rustix::process::geteuid().as_raw();
    let external = config.worker_binary.is_none();
    let listener = link::bind(&config.socket, external).context("socket")?;
    tokio::spawn(link::listen(listener, hub.clone(), vec![own, config.pool_uid]));
    let processes = config
        .worker_binary
        .as_ref()
        .map(|_| Arc::new(Mutex::new(processes)));
    if let (Some(worker), Some(processes)) = (&config.worker_binary, &processes) {
        #[cfg(feature = "faults")]
        let stamps = config.stamps.clone();
        #[cfg(not(feature = "faults"))]
        let stamps = None;
        spawner::start(
            spawner::Pool {
                worker: worker.clone(),
                socket: config.socket.clone(),
                stamps,
            },
            Arc::clone(processes),
            hub.clone(),
        )?;
    }

    tokio::spawn(devices::measure(config.cpu_reserve, hub.clone()));
    tokio::spawn(devices::list_nvidia(config.nvml.clone(), hub.clone()));
    tokio::spawn(models.clone().scan(hub.clone()));
    let watch_again = Arc::new(Notify::new());
    tokio::spawn(watch::keep(
        clients.clone(),
        config.clone(),
        hub.clone(),
        Arc::clone(&watch_again),
    ));
    signals(hub.clone())?;

    let threads =
        std::thread::available_parallelism().map_or(1, |n| u16::try_from(n.get()).unwrap_or(u16::MAX));
    // An external pool may still hold workers of the old session: the Lease waits for its hello.
    let (clear, cleared) = tokio::sync::oneshot::channel();
    let clear = if external {
        Some(clear)
    } else {
        let _ = clear.send(());
        None
    };
    tokio::spawn(keep_lease(
        clients.lease.clone(),
        config.clone(),
        (session.clone(), former),
        cleared,
        hub.clone(),
    ));
    let session = session.to_string();
    let tools = Tools {
        config,
        session,
        hub,
        calls,
        models,
        metrics,
        processes,
        threads,
        clear,
        watch_again,
    };
    Ok((Owner::new(tools).run(events).await, lock))
}

async fn keep_lease(
    client: kube::Client,
    config: Config,
    (session, former): (Session, Option<String>),
    cleared: tokio::sync::oneshot::Receiver<()>,
    hub: Hub,
) {
    if cleared.await.is_err() {
        return;
    }
    let (sender, mut renewals) = tokio::sync::mpsc::channel(16);
    tokio::spawn(lease::Keeper::new(client, &config, session, former).keep(sender));
    while let Some(event) = renewals.recv().await {
        hub.send(Event::Lease(event)).await;
    }
}

fn signals(hub: Hub) -> anyhow::Result<()> {
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
