//! Operators of a simulated cluster.
//!
//! Owns: how the real operator is put on a simulated machine, and what can be done to it. Must not choose what is done.

use super::Without;
use super::cluster::{Cluster, ClusterError, OWN, broken};
use super::kind::Kind;
use super::link::{Link, Transport};
use super::node::Life;
use super::server::Sender;
use super::time::{MILLI, Process, SECOND};
use clap::{Args as _, Command, FromArgMatches as _};
use gogrid_operator::Operator;
use gogrid_operator::gate::{GateLayer, Leadership};
use kube::Client;
use std::sync::Arc;
use tokio::sync::watch;
use tower::Layer as _;

impl Cluster {
    /// Starts an operator.
    pub fn start_operator(&mut self, number: usize) -> Result<(), ClusterError> {
        let timing = self.timing(false);
        let without = self.without;
        let Some(control) = self
            .operators
            .get_mut(number)
            .filter(|control| control.life.is_none())
        else {
            return Ok(());
        };
        control.lives += 1;
        let process = Process::new(control.machine.clone(), control.rng.split());
        let link = Link::new(self.time.clone(), control.rng.split(), 330 * SECOND);
        let host: Arc<dyn gogrid_operator::clock::Host> = Arc::new(process.clone());
        let unique = format!("{number}-{}", control.lives);
        let flags = gogrid_operator::config::Flags::augment_args(Command::new("operator"))
            .try_get_matches_from([
                "operator",
                "--namespace",
                OWN,
                "--model-root",
                "/models",
                "--identity",
                "operator",
            ])
            .map_err(broken)?;
        let flags = gogrid_operator::config::Flags::from_arg_matches(&flags).map_err(broken)?;
        let mut config = flags.validate(&unique).map_err(broken)?;
        config.timing = timing;
        if let Some(without) = without {
            without.weaken(&mut config);
        }
        let metrics = Arc::new(gogrid_operator::metrics::Metrics::new().map_err(broken)?);
        let leadership = Arc::new(Leadership::default());
        let mut gate = GateLayer {
            host: Arc::clone(&host),
            leadership: Arc::clone(&leadership),
            deadline: config.call_deadline(),
            metrics: Arc::clone(&metrics),
        };
        if without == Some(Without::LeaderGate) {
            gate.leadership = Arc::new(Leadership::default());
            gate.leadership.hold(gogrid_api::Millis(u64::MAX), 0);
        }
        let id = u32::try_from(number).unwrap_or(0) * 1000 + control.lives;
        let client = || {
            let transport = Transport {
                server: self.server.clone(),
                link: Arc::clone(&link),
                sender: Sender::Operator(id),
                machine: control.machine.clone(),
                limit: 330 * SECOND,
                delivery: timing.leader_delivery().0 * MILLI,
            };
            Client::new(gate.layer(transport), "default")
        };
        let operator = Operator {
            config,
            host,
            work: client(),
            lead: client(),
            leadership,
            metrics,
        };
        let (stop, stopped) = watch::channel(false);
        let end = process.clone();
        process.begin(Box::pin(async move {
            // Ended in good order or not: the process is gone.
            drop(operator.run(stopped).await);
            end.kill();
        }));
        control.stop = Some(stop);
        control.life = Some(Life { process, link });
        Ok(())
    }

    /// Kills an operator.
    pub fn kill_operator(&mut self, number: usize) {
        if let Some(life) = self
            .operators
            .get_mut(number)
            .and_then(|control| control.life.take())
        {
            life.process.kill();
        }
    }

    /// SIGTERM to an operator.
    pub fn end_operator(&mut self, number: usize) {
        if let Some(stop) = self
            .operators
            .get_mut(number)
            .and_then(|control| control.stop.as_ref())
        {
            stop.send_replace(true);
        }
    }

    /// Operators that have ended by themselves.
    pub fn bury_operators(&mut self) -> Vec<usize> {
        let mut ended = vec![];
        for (number, control) in self.operators.iter_mut().enumerate() {
            if control.life.as_ref().is_some_and(|life| !life.process.lives()) {
                control.life = None;
                ended.push(number);
            }
        }
        ended
    }

    /// The operator that holds the leader Lease.
    pub fn leader(&self) -> usize {
        let holder = self.server.look(|store| {
            let lease = store.get(
                Kind::Lease,
                gogrid_api::names::LEADER_NAMESPACE,
                gogrid_api::names::LEADER_LEASE,
            );
            lease.map(|lease| lease.text_at("/spec/holderIdentity").to_owned())
        });
        let number =
            holder.and_then(|holder| holder.strip_prefix("operator_")?.split('-').next()?.parse().ok());
        number.unwrap_or(0)
    }
}
