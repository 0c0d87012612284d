//! A whole simulated cluster: machines, agents, pools, operators and jobs around one modelled server.
//!
//! Owns: how the real programs are put on simulated machines, and what can be done to them. Must not choose what is done
//! or judge what comes of it.

use super::Without;
use super::kind::{Kind, Place};
use super::link::{Link, Transport};
use super::pool::{Ailments, SimulatedModels, USER, Yard, serve};
use super::rng::Rng;
use super::server::{Sender, Server};
use super::store::Verb;
use super::storm::{MOST_DRIFT, drift};
use super::time::{Machine, Process, SECOND, Time, lock};
use super::truth::Truth;
use clap::{Args as _, Command, FromArgMatches as _};
use gogrid_agent::event::{Event, Hub};
use gogrid_agent::kube_client::Clients;
use gogrid_agent::{Agent, End};
use gogrid_agent_core::session::Session;
use gogrid_api::assignment::ModelFacts;
use gogrid_api::node::{Backend, Device, Health, HeldModel};
use gogrid_api::{Bytes, InferenceJob, LeaseTiming};
use kube::Client;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Namespace of jobs.
pub const TEAM: &str = "team";
/// GoGrid's own.
pub(super) const OWN: &str = "gogrid-system";
/// Memory of every node's one device.
const TOTAL: u64 = 16 << 30;
/// What the profile of every node leaves of it to all jobs together, in percent.
const CAP_PERCENT: u64 = 50;
/// What one job takes of it.
const MEMORY: u64 = 3 << 30;

/// The program could not be put together.
#[derive(Debug, thiserror::Error)]
#[error("the simulated cluster could not be put together: {0}")]
pub struct ClusterError(pub String);

pub(super) fn broken(error: impl std::fmt::Display) -> ClusterError {
    ClusterError(error.to_string())
}

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
    former: Vec<String>,
    agents: watch::Sender<Option<Hub>>,
    kernel: Process,
    pool: JoinHandle<()>,
    lives: u32,
    boots: u32,
    rng: Rng,
}

/// An operator.
pub struct Control {
    /// Its machine.
    pub machine: Machine,
    /// It, while it lives.
    pub life: Option<Life>,
    /// It stands still until another one leads.
    pub until_followed: bool,
    pub(super) stop: Option<watch::Sender<bool>>,
    pub(super) lives: u32,
    pub(super) rng: Rng,
}

/// All of it.
pub struct Cluster {
    /// True time.
    pub time: Time,
    /// The server.
    pub server: Server,
    /// The record.
    pub truth: Truth,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Operators.
    pub operators: Vec<Control>,
    ended: Arc<Mutex<Vec<usize>>>,
    pub(super) without: Option<Without>,
    facts: ModelFacts,
}

fn facts() -> Result<ModelFacts, ClusterError> {
    serde_json::from_value(json!({
        "architecture": "llama", "name": "tiny", "quantization": "Q8_0", "fileBytes": 1_100_000, "weightBytes": 1_000_000,
        "parameters": 1_000_000, "layers": 4, "embedding": 64, "feedForward": 128, "vocabulary": 512, "contextLength": 4096,
        "kvBytesPerToken": 1024,
    }))
    .map_err(broken)
}

const MODEL: &str = "file:///models/a.gguf";

fn place(kind: Kind, namespace: &str, name: &str) -> Place {
    Place {
        kind,
        namespace: namespace.to_owned(),
        name: Some(name.to_owned()),
        status: false,
    }
}

impl Cluster {
    /// Machines, a server and nobody on them yet.
    pub fn new(
        rng: &mut Rng,
        nodes: usize,
        operators: usize,
        without: Option<Without>,
    ) -> Result<Self, ClusterError> {
        let time = Time::default();
        let server = Server::new(time.clone());
        let truth = Truth::default();
        let file = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").map_err(broken)?));
        let mut cluster = Self {
            time: time.clone(),
            server,
            truth,
            nodes: vec![],
            operators: vec![],
            ended: Arc::default(),
            without,
            facts: facts()?,
        };
        cluster.furnish(nodes)?;
        // Every fourth time all clocks are as wrong as they may be, in the way that is worst for a lease.
        let worst = rng.permille(250);
        for number in 0..nodes {
            let name = format!("node-{number}");
            let slow = if worst { -MOST_DRIFT } else { drift(rng) };
            let machine = Machine::new(time.clone(), rng.between(10, 9_000) * SECOND, slow);
            let yard = Yard {
                node: name.clone(),
                machine: machine.clone(),
                truth: cluster.truth.clone(),
                cap: TOTAL / 100 * CAP_PERCENT,
                ailments: Arc::new(Mutex::new(Ailments::default())),
                alive: Arc::default(),
                file: Arc::clone(&file),
                facts: cluster.facts.clone(),
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
            cluster.nodes.push(Node {
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
            });
        }
        for _ in 0..operators {
            let fast = if worst { MOST_DRIFT } else { drift(rng) };
            cluster.operators.push(Control {
                machine: Machine::new(time.clone(), rng.between(10, 9_000) * SECOND, fast),
                life: None,
                until_followed: false,
                stop: None,
                lives: 0,
                rng: rng.split(),
            });
        }
        Ok(cluster)
    }

    /// What is in the store from the start.
    fn furnish(&self, nodes: usize) -> Result<(), ClusterError> {
        static DEFINITIONS: OnceLock<Vec<Value>> = OnceLock::new();
        let made = || {
            let all = gogrid_api::crds().into_iter();
            all.filter_map(|crd| serde_json::to_value(&crd).ok()).collect()
        };
        for object in DEFINITIONS.get_or_init(made).clone() {
            let name = object
                .pointer("/metadata/name")
                .and_then(Value::as_str)
                .unwrap_or("")
                .to_owned();
            self.make(&place(Kind::Definition, "", &name), object)?;
        }
        for number in 0..nodes {
            let name = format!("node-{number}");
            self.make(
                &place(Kind::Node, "", &name),
                json!({"metadata": {"labels": {"zone": "a"}}, "spec": {}}),
            )?;
        }
        Ok(())
    }

    fn make(&self, place: &Place, object: Value) -> Result<(), ClusterError> {
        let made = self.server.act(&Sender::User, place, Verb::Create(object));
        made.map(|_| ()).map_err(|refused| ClusterError(refused.message))
    }

    /// A user asks for a job of that many records.
    pub fn submit(&self, number: usize, records: u64) -> Result<(), ClusterError> {
        let name = format!("j{number}");
        let line = |n: u64| json!({"custom_id": format!("{name}/{n}"), "body": {"prompt": "x"}}).to_string();
        let lines: Vec<String> = (1..=records).map(line).collect();
        let job: InferenceJob = serde_json::from_value(json!({
            "apiVersion": Kind::Job.api_version(), "kind": Kind::Job.name(), "metadata": {"name": name, "namespace": TEAM},
            "spec": {
                "model": {"uri": MODEL, "sha256": "0".repeat(64)}, "input": {"inline": lines}, "output": {"configMap": format!("out-{name}")},
                "memory": {"vram": MEMORY.to_string()}, "backoffLimit": 30,
            },
        }))
        .map_err(broken)?;
        self.make(
            &place(Kind::Job, TEAM, &name),
            serde_json::to_value(&job).map_err(broken)?,
        )
    }

    /// A user changes a job, if it is there and may be.
    pub fn patch(&self, number: usize, patch: Value) {
        let _ = self.server.act(
            &Sender::User,
            &place(Kind::Job, TEAM, &format!("j{number}")),
            Verb::Merge(patch),
        );
    }

    /// A user deletes a job.
    pub fn delete(&self, number: usize) {
        let verb = Verb::Delete {
            uid: None,
            version: None,
        };
        let _ = self.server.act(
            &Sender::User,
            &place(Kind::Job, TEAM, &format!("j{number}")),
            verb,
        );
    }

    pub(super) fn timing(&self, agent: bool) -> LeaseTiming {
        match self.without {
            Some(without) => without.timing(agent),
            None => LeaseTiming::default(),
        }
    }

    /// Starts a node's agent.
    pub fn start_agent(&mut self, number: usize) -> Result<(), ClusterError> {
        let timing = self.timing(true);
        let (without, server, ended) = (self.without, self.server.clone(), Arc::clone(&self.ended));
        let Some(node) = self.nodes.get_mut(number).filter(|node| node.agent.is_none()) else {
            return Ok(());
        };
        node.lives += 1;
        let process = Process::new(node.machine.clone(), node.rng.split());
        let link = Link::new(self.time.clone(), node.rng.split(), 130 * SECOND);
        let client = |limit: u64| {
            let transport = Transport {
                server: server.clone(),
                link: Arc::clone(&link),
                sender: Sender::Agent(node.name.clone(), node.lives),
                machine: node.machine.clone(),
                limit: limit * SECOND,
            };
            Client::new(transport, "default")
        };
        let host: Arc<dyn gogrid_agent::clock::Host> = Arc::new(process.clone());
        let flags = gogrid_agent::config::Flags::augment_args(Command::new("agent"))
            .try_get_matches_from([
                "agent",
                "--node-name",
                &node.name,
                "--state-dir",
                "/nowhere",
                "--model-root",
                "/models",
            ])
            .map_err(broken)?;
        let flags = gogrid_agent::config::Flags::from_arg_matches(&flags).map_err(broken)?;
        let mut config = gogrid_agent::config::Config::try_from(flags).map_err(broken)?;
        config.timing = timing;
        config.pool_uid = USER;
        let life = if without == Some(Without::Session) {
            0
        } else {
            node.lives
        };
        let boot = if without == Some(Without::Session) {
            0
        } else {
            node.boots
        };
        let session = Session::new(&format!("boot-{boot}"), &format!("life-{life}"));
        let models = SimulatedModels::new(node.yard.clone(), node.rng.split());
        let metrics = gogrid_agent::metrics::Metrics::new(Arc::clone(&host), timing).map_err(broken)?;
        let clients = Clients::new(client(15), client(130), client(4));
        let (hub, events) = Hub::new();
        let known = session.to_string();
        let mut agent = Agent::new(config, host, session, clients, Arc::new(models), metrics, 4);
        agent.former.clone_from(&node.former);
        node.former.push(known);
        let (end, own) = (process.clone(), hub.clone());
        process.begin(Box::pin(async move {
            let _: End = agent.run(own, events).await;
            end.kill();
            lock(&ended).push(number);
        }));
        let (inventory, machine, facts) = (hub.clone(), node.machine.clone(), self.facts.clone());
        process.begin(Box::pin(
            async move { take_stock(inventory, machine, facts).await },
        ));
        node.agents.send_replace(Some(hub));
        node.agent = Some(Life { process, link });
        Ok(())
    }

    /// Starts another agent beside the one that lives, with a pool of its own.
    pub fn start_twin(&mut self, number: usize) -> Result<(), ClusterError> {
        if let Some(node) = self.nodes.get_mut(number) {
            let (agents, listening) = watch::channel(None);
            node.agents = agents;
            node.twins.extend(node.agent.take());
            // It has a state directory of its own.
            node.former.clear();
            let task = serve(
                node.yard.clone(),
                node.kernel.clone(),
                listening,
                node.rng.split(),
            );
            // The old pool ends when it can't be told of another agent any more.
            node.pool = node.kernel.begin(Box::pin(task));
        }
        self.start_agent(number)
    }

    /// Agents that have ended by themselves since the last call.
    pub fn take_ended(&mut self) -> Vec<usize> {
        let ended = std::mem::take(&mut *lock(&self.ended));
        let mut without = vec![];
        for number in ended {
            if let Some(node) = self.nodes.get_mut(number) {
                node.twins.retain(|life| life.process.lives());
                node.agent.take_if(|life| !life.process.lives());
                if node.agent.is_none() {
                    without.push(number);
                }
            }
        }
        without
    }

    /// Kills a node's agent.
    pub fn kill_agent(&mut self, number: usize) {
        if let Some(node) = self.nodes.get_mut(number) {
            for life in node.agent.take().into_iter().chain(node.twins.drain(..)) {
                life.process.kill();
            }
        }
    }

    /// Tells a node's agent to end in good order.
    pub fn end_agent(&self, number: usize) {
        if let Some(node) = self.nodes.get(number)
            && let Some(hub) = node.agents.borrow().clone()
        {
            tokio::spawn(async move { hub.send(Event::Shutdown).await });
        }
    }

    /// Kills a node's pool and with it its workers; another one starts.
    pub fn kill_pool(&mut self, number: usize) {
        let Some(node) = self.nodes.get_mut(number) else {
            return;
        };
        node.pool.abort();
        if let Some(hub) = node.agents.borrow().clone() {
            tokio::spawn(async move { hub.send(Event::PoolLost).await });
        }
        let task = serve(
            node.yard.clone(),
            node.kernel.clone(),
            node.agents.subscribe(),
            node.rng.split(),
        );
        node.pool = node.kernel.begin(Box::pin(task));
    }

    /// Crashes one of a node's workers.
    pub fn crash_worker(&mut self, number: usize) {
        let Some(node) = self.nodes.get_mut(number) else {
            return;
        };
        let alive: Vec<_> = lock(&node.yard.alive).values().cloned().collect();
        if let Some(crash) = node.rng.pick(&alive) {
            crash.notify_one();
        }
    }

    /// The machine loses its power and comes up again: nothing of before is left.
    pub fn reboot(&mut self, number: usize) {
        self.kill_agent(number);
        if let Some(node) = self.nodes.get_mut(number) {
            node.boots += 1;
            node.agents.send_replace(None);
        }
        self.kill_pool(number);
    }

    /// The whole machine stands still, kernel and all, or goes on.
    pub fn freeze(&mut self, number: usize, frozen: bool) {
        let Some(node) = self.nodes.get_mut(number) else {
            return;
        };
        node.yard.frozen(frozen);
        for process in node
            .agent
            .iter()
            .chain(&node.twins)
            .map(|life| &life.process)
            .chain([&node.kernel])
        {
            process.freeze(frozen);
        }
        if let Some(life) = &node.agent {
            life.link.hold(frozen);
        }
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
