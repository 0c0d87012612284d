//! A node of a simulated cluster: its machine, the pool on it, and the real agent.
//!
//! Owns: how the real agent is put on a simulated machine, and what it finds there. Must not know what its clients lead
//! to: a modelled API server or a real one.

use super::cluster::{ClusterError, broken};
use super::link::Link;
use super::pool::{Ailments, SimulatedModels, USER, Yard, serve};
use super::rng::Rng;
use super::time::{Machine, Nanos, Process, SECOND};
use super::truth::Truth;
use clap::{Args as _, Command, FromArgMatches as _};
use gogrid_agent::config::{Config, Flags};
use gogrid_agent::event::{Event, Hub};
use gogrid_agent::kube_client::Clients;
use gogrid_agent::metrics::Metrics;
use gogrid_agent::{Agent, End};
use gogrid_agent_core::session::Session;
use gogrid_api::assignment::ModelFacts;
use gogrid_api::node::{Backend, Device, Health, HeldModel};
use gogrid_api::{Bytes, LeaseTiming};
use serde_json::json;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Memory of every node's one device.
const TOTAL: u64 = 16 << 30;
/// What the profile of every node leaves of it to all jobs together, in percent.
const CAP_PERCENT: u64 = 50;
/// Directory beneath which every node's models lie.
pub const MODEL_ROOT: &str = "/models";
/// The model that every node holds.
pub(super) const MODEL: &str = "file:///models/a.gguf";

/// One life of a program.
#[derive(Clone)]
pub struct Life {
    /// Its process.
    pub process: Process,
    /// Its way to the server.
    pub link: Arc<Link>,
}

/// A node.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its machine.
    pub machine: Machine,
    /// What its workers live in.
    pub yard: Yard,
    /// Its agent, while there is one.
    pub agent: Option<Life>,
    /// Agents that another one was started beside.
    pub twins: Vec<Life>,
    /// Sessions that a later agent knows to be gone, as the record in its state directory says.
    pub(super) former: Vec<String>,
    pub(super) agents: watch::Sender<Option<Hub>>,
    pub(super) kernel: Process,
    pub(super) pool: JoinHandle<()>,
    pub(super) lives: u32,
    pub(super) boots: u32,
    pub(super) rng: Rng,
}

fn facts() -> Result<ModelFacts, ClusterError> {
    serde_json::from_value(json!({
        "architecture": "llama", "name": "tiny", "quantization": "Q8_0", "fileBytes": 1_100_000, "weightBytes": 1_000_000,
        "parameters": 1_000_000, "layers": 4, "embedding": 64, "feedForward": 128, "vocabulary": 512, "contextLength": 4096,
        "kvBytesPerToken": 1024,
    }))
    .map_err(broken)
}

/// What every descriptor of a model is.
pub fn model_file() -> Result<Arc<OwnedFd>, ClusterError> {
    let file = std::fs::File::open("/dev/null").map_err(broken)?;
    Ok(Arc::new(OwnedFd::from(file)))
}

/// The agent's configuration on that node.
pub fn config(node: &str, timing: LeaseTiming) -> Result<Config, ClusterError> {
    let flags = Flags::augment_args(Command::new("agent"))
        .try_get_matches_from([
            "agent",
            "--node-name",
            node,
            "--state-dir",
            "/nowhere",
            "--model-root",
            MODEL_ROOT,
        ])
        .map_err(broken)?;
    let flags = Flags::from_arg_matches(&flags).map_err(broken)?;
    let mut config = Config::try_from(flags).map_err(broken)?;
    config.timing = timing;
    config.pool_uid = USER;
    Ok(config)
}

impl Node {
    /// A machine with a pool that waits for an agent; `longest` is what getting a model takes there at most, and loading it.
    pub fn new(
        name: String,
        machine: Machine,
        truth: &Truth,
        file: &Arc<OwnedFd>,
        longest: (Nanos, Nanos),
        rng: &mut Rng,
    ) -> Result<Self, ClusterError> {
        let yard = Yard {
            node: name.clone(),
            machine: machine.clone(),
            truth: truth.clone(),
            cap: TOTAL / 100 * CAP_PERCENT,
            ailments: Arc::new(Mutex::new(Ailments::default())),
            alive: Arc::default(),
            file: Arc::clone(file),
            facts: facts()?,
            longest,
            stood: Arc::default(),
        };
        let (agents, listening) = watch::channel(None);
        let kernel = Process::new(machine.clone(), rng.split());
        let pool = kernel.begin(Box::pin(serve(
            yard.clone(),
            kernel.clone(),
            listening,
            rng.split(),
        )));
        Ok(Self {
            name,
            machine,
            yard,
            agent: None,
            twins: vec![],
            former: vec![],
            agents,
            kernel,
            pool,
            lives: 0,
            boots: 0,
            rng: rng.split(),
        })
    }

    /// Runs the real agent in that process; `over` is called when it has ended by itself.
    pub fn run_agent(
        &mut self,
        process: &Process,
        config: Config,
        session: Session,
        clients: Clients,
        over: impl FnOnce() + Send + 'static,
    ) -> Result<(), ClusterError> {
        let host: Arc<dyn gogrid_agent::clock::Host> = Arc::new(process.clone());
        let models = SimulatedModels::new(self.yard.clone(), self.rng.split());
        let metrics = Metrics::new(Arc::clone(&host), config.timing).map_err(broken)?;
        let (hub, events) = Hub::new();
        let known = session.to_string();
        let mut agent = Agent::new(config, host, session, clients, Arc::new(models), metrics, 4);
        agent.former.clone_from(&self.former);
        self.former.push(known);
        let (end, own) = (process.clone(), hub.clone());
        process.begin(Box::pin(async move {
            let _: End = agent.run(own, events).await;
            end.kill();
            over();
        }));
        let stock = take_stock(hub.clone(), self.machine.clone(), self.yard.facts.clone());
        process.begin(Box::pin(stock));
        self.agents.send_replace(Some(hub));
        Ok(())
    }
}

/// What an agent is told of its devices and models.
async fn take_stock(hub: Hub, machine: Machine, facts: ModelFacts) {
    let quantity = |bytes: u64| Bytes(bytes).into();
    let device = Device {
        uuid: gogrid_api::names::CPU_DEVICE.into(),
        name: "CPU".into(),
        backend: Backend::Cpu,
        memory_total: quantity(TOTAL),
        memory_reserved: quantity(0),
        memory_foreign: quantity(0),
        memory_free: quantity(TOTAL),
        compute_capability: None,
        health: Health::Healthy,
        message: None,
        holder: None,
    };
    let model = HeldModel {
        uri: MODEL.into(),
        bytes: facts.file_bytes,
        facts: Some(facts),
        reason: None,
        error: None,
    };
    hub.send(Event::Devices(Backend::Cuda, vec![])).await;
    hub.send(Event::Models(vec![model])).await;
    loop {
        hub.send(Event::Devices(Backend::Cpu, vec![device.clone()])).await;
        machine.sleep(10 * SECOND).await;
    }
}
