//! Real agents with real clients on modelled machines.
//!
//! Owns: admitting the nodes, starting an agent on each and keeping simulated time at the real one. Must not: measure.

#![allow(clippy::disallowed_methods, reason = "simulated time follows the real one")]

use crate::chart;
use crate::cluster::NAMESPACE;
use crate::controlplane::ControlPlane;
use crate::sim::node::{self, Node};
use crate::sim::rng::Rng;
use crate::sim::time::{Machine, Nanos, Process, SECOND, Time};
use crate::sim::truth::Truth;
use anyhow::Result;
use futures::{StreamExt as _, TryStreamExt as _};
use gogrid_agent_core::session::Session;
use gogrid_api::LeaseTiming;
use jiff::Timestamp;
use kube::config::{KubeConfigOptions, Kubeconfig};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How late simulated time may be.
const PUMP_EVERY: Duration = Duration::from_millis(5);
/// The longest that getting a model takes, and loading one: they are at hand.
const LONGEST: (Nanos, Nanos) = (3 * SECOND, 4 * SECOND);
/// Nodes admitted at the same time.
const ADMITTED_TOGETHER: usize = 8;

/// A node and the kubeconfig of its agent.
pub(super) type Admitted = (String, PathBuf);

/// Makes that many nodes, each with an agent's pod and token.
pub(super) async fn admit(control: &ControlPlane, count: usize) -> Result<Vec<Admitted>> {
    let admit = |n: usize| async move {
        let name = format!("node-{n:04}");
        let kubeconfig = chart::admit_node(control, NAMESPACE, &name, &[]).await?;
        anyhow::Ok((name, kubeconfig))
    };
    futures::stream::iter((1..=count).map(admit))
        .buffered(ADMITTED_TOGETHER)
        .try_collect()
        .await
}

/// All agents.
pub(super) struct Fleet {
    nodes: Vec<Node>,
    truth: Truth,
    ended: Arc<AtomicUsize>,
}

impl Fleet {
    /// Starts the agents, spread over that long.
    pub(super) async fn start(admitted: Vec<Admitted>, spread: Duration) -> Result<Self> {
        let (time, truth, mut rng) = (Time::default(), Truth::default(), Rng::new(1));
        let file = node::model_file()?;
        let begun = Instant::now();
        let wall = Timestamp::now();
        let follows = time.clone();
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(PUMP_EVERY);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                let now = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
                while follows.advance(now) {}
            }
        });
        let mut fleet = Self {
            nodes: vec![],
            truth,
            ended: Arc::default(),
        };
        let pause = spread / u32::try_from(admitted.len().max(1))?;
        for (name, kubeconfig) in admitted {
            let machine = Machine::new(time.clone(), rng.between(10, 9_000) * SECOND, 0);
            let shown = machine.wall().as_nanosecond() - i128::from(time.now());
            machine.step_wall(i64::try_from(wall.as_nanosecond() - shown)?);
            let mut node = Node::new(
                name.clone(),
                machine.clone(),
                &fleet.truth,
                &file,
                LONGEST,
                &mut rng,
            )?;
            let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
            let server =
                kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            let config = node::config(&name, LeaseTiming::default())?;
            let clients = gogrid_agent::kube_client::clients(server, &config)?;
            let ended = Arc::clone(&fleet.ended);
            let over = move || {
                ended.fetch_add(1, Ordering::Relaxed);
            };
            let session = Session::new("boot", &name);
            node.run_agent(
                &Process::new(machine, rng.split()),
                config,
                session,
                clients,
                over,
            )?;
            fleet.nodes.push(node);
            tokio::time::sleep(pause).await;
        }
        Ok(fleet)
    }

    /// What must never be, in words.
    pub(super) fn wrong(&self) -> Vec<String> {
        let mut wrong = vec![];
        let ended = self.ended.load(Ordering::Relaxed);
        if ended > 0 {
            wrong.push(format!(
                "{ended} of {} agents ended by themselves",
                self.nodes.len()
            ));
        }
        let taken = self.truth.over_commits();
        if taken > 0 {
            wrong.push(format!("too much device memory was taken {taken} times"));
        }
        let twice = self.truth.overlaps();
        if let Some((job, _)) = twice.first() {
            wrong.push(format!(
                "{} jobs were computed twice at a time, {job} among them",
                twice.len()
            ));
        }
        wrong
    }
}
