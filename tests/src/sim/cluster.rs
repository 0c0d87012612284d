//! A whole simulated cluster: machines, agents, pools, operators and jobs around one modelled server.
//!
//! Owns: how the real programs are put on simulated machines, and what can be done to them. Must not choose what is done
//! or judge what comes of it.

use super::Without;
use super::kind::{Kind, Place};
use super::link::{Link, Transport};
use super::node::{Life, MODEL, Node, config, model_file};
use super::pool::serve;
use super::rng::Rng;
use super::server::{Sender, Server};
use super::store::Verb;
use super::storm::{MOST_DRIFT, drift};
use super::time::{Machine, Nanos, Process, SECOND, Time, lock};
use super::truth::Truth;
use gogrid_agent::event::Event;
use gogrid_agent::kube_client::Clients;
use gogrid_agent_core::session::Session;
use gogrid_api::{InferenceJob, LeaseTiming};
use kube::Client;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, OnceLock};
use tokio::sync::watch;

/// Namespace of jobs.
pub const TEAM: &str = "team";
/// GoGrid's own.
pub(super) const OWN: &str = "gogrid-system";
/// The longest that getting a model takes, and loading one: some are worth telling, most are not.
const LONGEST: (Nanos, Nanos) = (10 * SECOND, 12 * SECOND);
/// The same where the model is at hand.
const AT_HAND: (Nanos, Nanos) = (SECOND / 4, SECOND / 4);
/// What one job takes of a node's device.
const MEMORY: u64 = 3 << 30;

/// The program could not be put together.
#[derive(Debug, thiserror::Error)]
#[error("the simulated cluster could not be put together: {0}")]
pub struct ClusterError(pub String);

pub(super) fn broken(error: impl std::fmt::Display) -> ClusterError {
    ClusterError(error.to_string())
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
}

/// A record of a job, whose answer is as long as its prompt; how long it takes is chance where it isn't said.
pub fn record(job: &str, number: u64, letters: usize, millis: Option<u64>) -> String {
    let mut body = json!({"prompt": "x".repeat(letters)});
    if let Some(millis) = millis {
        body[super::worker::MILLIS] = millis.into();
    }
    json!({"custom_id": format!("{job}/{number}"), "body": body}).to_string()
}

/// A job over records of [`record`] that fits every node twice.
pub fn job(name: &str, lines: &[String]) -> Result<InferenceJob, ClusterError> {
    serde_json::from_value(json!({
        "apiVersion": Kind::Job.api_version(), "kind": Kind::Job.name(), "metadata": {"name": name, "namespace": TEAM},
        "spec": {
            "model": {"uri": MODEL, "sha256": "0".repeat(64)}, "input": {"inline": lines}, "output": {"configMap": format!("out-{name}")},
            "memory": {"vram": MEMORY.to_string()}, "backoffLimit": 30,
        },
    }))
    .map_err(broken)
}

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
        let file = model_file()?;
        let mut cluster = Self {
            time: time.clone(),
            server,
            truth,
            nodes: vec![],
            operators: vec![],
            ended: Arc::default(),
            without,
        };
        cluster.furnish(nodes)?;
        // Every fourth time all clocks are as wrong as they may be, in the way that is worst for a lease, and models are at hand,
        // so that who is placed anew begins at once.
        let worst = rng.permille(250);
        let longest = if worst { AT_HAND } else { LONGEST };
        for number in 0..nodes {
            let name = format!("node-{number}");
            let slow = if worst { -MOST_DRIFT } else { drift(rng) };
            let machine = Machine::new(time.clone(), rng.between(10, 9_000) * SECOND, slow);
            let node = Node::new(name, machine, &cluster.truth, &file, longest, rng)?;
            cluster.nodes.push(node);
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
        // Some fit into their order and its status, some do for a while, most records of some do not.
        let letters = [1, 1_000, 4_000].get(number % 3).copied().unwrap_or(1);
        let lines: Vec<String> = (1..=records).map(|n| record(&name, n, letters, None)).collect();
        let job = serde_json::to_value(job(&name, &lines)?).map_err(broken)?;
        self.make(&place(Kind::Job, TEAM, &name), job)
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
                delivery: Nanos::MAX,
            };
            Client::new(transport, "default")
        };
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
        let config = config(&node.name, timing)?;
        let clients = Clients::new(client(15), client(130), client(4));
        let over = move || lock(&ended).push(number);
        node.run_agent(&process, config, session, clients, over)?;
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
