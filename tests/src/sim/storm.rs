//! Faults, done and undone.
//!
//! Owns: what each kind of fault does to a cluster, to whom, and how it ends. Must not choose when.

use super::cluster::{Cluster, ClusterError};
use super::link::Trouble;
use super::pool::Ailments;
use super::rng::Rng;
use super::schedule::{Fault, Planned};
use super::time::{MILLI, Nanos, SECOND, lock};

/// Something to be done later.
#[derive(Clone, Copy, Debug)]
pub enum Undo {
    /// Start an agent.
    StartAgent(usize),
    /// Start an operator.
    StartOperator(usize),
    /// Mend an agent's way; with `true` its connections end.
    MendAgent(usize, bool),
    /// Mend an operator's.
    MendOperator(usize, bool),
    /// An agent goes on.
    WakeAgent(usize),
    /// An operator goes on.
    WakeOperator(usize),
    /// A machine goes on; its clock lost that long.
    Thaw(usize, Nanos),
    /// Nothing is wrong with a node's disk and workers any more.
    Cure(usize),
    /// Ways are in order again.
    EndTrouble,
}

/// Whom a fault is about.
#[derive(Clone, Copy, Debug)]
pub struct Victims {
    /// A node.
    pub node: usize,
    /// An operator.
    pub operator: usize,
}

/// Lets a fault strike; what ends it, and when.
pub fn strike(
    cluster: &mut Cluster,
    rng: &mut Rng,
    planned: &Planned,
    victims: Victims,
) -> Result<Vec<(Nanos, Undo)>, ClusterError> {
    let Victims { node, operator } = victims;
    let now = cluster.time.now();
    let end = now + planned.lasts;
    let soon = now + rng.between(SECOND / 2, 8 * SECOND);
    let reset = rng.permille(500);
    let undo = match planned.fault {
        Fault::AgentCrash => {
            cluster.kill_agent(node);
            vec![(soon, Undo::StartAgent(node))]
        }
        Fault::AgentRestart => {
            cluster.end_agent(node);
            vec![(now + 12 * SECOND, Undo::StartAgent(node))]
        }
        Fault::AgentTwin => {
            cluster.start_twin(node)?;
            vec![]
        }
        Fault::PoolCrash => {
            cluster.kill_pool(node);
            vec![]
        }
        Fault::WorkerCrash => {
            cluster.crash_worker(node);
            vec![]
        }
        Fault::Reboot => {
            cluster.reboot(node);
            vec![(now + rng.between(5, 90) * SECOND, Undo::StartAgent(node))]
        }
        Fault::AgentPartition => {
            if let Some(life) = cluster.nodes.get(node).and_then(|n| n.agent.as_ref()) {
                life.link.cut(reset);
            }
            vec![(end, Undo::MendAgent(node, rng.permille(500)))]
        }
        Fault::AgentPause => {
            if let Some(life) = cluster.nodes.get(node).and_then(|n| n.agent.as_ref()) {
                life.process.stop();
                life.link.hold(reset);
            }
            vec![(end, Undo::WakeAgent(node))]
        }
        Fault::OperatorCrash => {
            cluster.kill_operator(operator);
            vec![(soon, Undo::StartOperator(operator))]
        }
        Fault::OperatorRestart => {
            cluster.end_operator(operator);
            vec![(now + 12 * SECOND, Undo::StartOperator(operator))]
        }
        Fault::OperatorPartition => {
            if let Some(life) = cluster.operators.get(operator).and_then(|o| o.life.as_ref()) {
                life.link.cut(reset);
            }
            vec![(end, Undo::MendOperator(operator, rng.permille(500)))]
        }
        Fault::OperatorPause => {
            if let Some(life) = cluster.operators.get(operator).and_then(|o| o.life.as_ref()) {
                life.process.stop();
                life.link.hold(reset);
            }
            vec![(end, Undo::WakeOperator(operator))]
        }
        Fault::OperatorOvertaken => {
            if let Some(control) = cluster.operators.get_mut(operator)
                && let Some(life) = &control.life
            {
                life.process.stop();
                control.until_followed = true;
            }
            // Whoever follows needs some seconds to be sure.
            vec![(end.max(now + 30 * SECOND), Undo::WakeOperator(operator))]
        }
        Fault::Outage => outage(cluster, end, reset),
        Fault::MessageLoss | Fault::Overload | Fault::WatchTrouble => {
            let trouble = trouble(rng, planned.fault);
            for link in links(cluster) {
                link.trouble(trouble);
            }
            vec![(end, Undo::EndTrouble)]
        }
        Fault::Compaction => {
            cluster.server.compact();
            vec![]
        }
        Fault::SlowDisk | Fault::FullDisk | Fault::StuckWorkers => {
            if let Some(node) = cluster.nodes.get(node) {
                let mut ailments = lock(&node.yard.ailments);
                match planned.fault {
                    Fault::SlowDisk => ailments.slow_disk = rng.between(5, 60) * SECOND,
                    Fault::FullDisk => ailments.full_disk = true,
                    _ => ailments.stuck = 20 * SECOND,
                }
            }
            vec![(end.max(now + 25 * SECOND), Undo::Cure(node))]
        }
        Fault::ClockStep => {
            let step = i64::try_from(rng.between(0, 7200 * SECOND)).unwrap_or(0) - 3_600_000_000_000;
            for machine in machines(cluster, victims) {
                machine.step_wall(step);
            }
            vec![]
        }
        Fault::Drift => {
            for machine in machines(cluster, victims) {
                machine.set_drift(drift(rng));
            }
            vec![]
        }
        Fault::Freeze => {
            cluster.freeze(node, true);
            let lost = if reset { planned.lasts } else { 0 };
            vec![(end, Undo::Thaw(node, lost))]
        }
        Fault::WildClock => {
            let drift = i64::try_from(rng.between(100_000, 400_000)).unwrap_or(0);
            if let Some(node) = cluster.nodes.get(node) {
                node.machine.set_drift(if reset { drift } else { -drift });
            }
            vec![]
        }
    };
    Ok(undo)
}

fn links(cluster: &Cluster) -> Vec<std::sync::Arc<super::link::Link>> {
    let agents = cluster
        .nodes
        .iter()
        .flat_map(|node| node.agent.iter().chain(&node.twins));
    let operators = cluster
        .operators
        .iter()
        .filter_map(|control| control.life.as_ref());
    agents.chain(operators).map(|life| life.link.clone()).collect()
}

fn machines(cluster: &Cluster, Victims { node, operator }: Victims) -> Vec<super::time::Machine> {
    let node = cluster.nodes.get(node).map(|node| node.machine.clone());
    let operator = cluster
        .operators
        .get(operator)
        .map(|control| control.machine.clone());
    node.into_iter().chain(operator).collect()
}

/// Parts per million that a clock within the contract is off at most: one in a hundred.
pub const MOST_DRIFT: i64 = 10_000;

/// What a clock within the contract is off: as often as not as much as it may.
pub fn drift(rng: &mut Rng) -> i64 {
    let within = i64::try_from(rng.between(0, 20_000)).unwrap_or(0) - MOST_DRIFT;
    *rng.pick(&[-MOST_DRIFT, MOST_DRIFT, within, within])
        .unwrap_or(&within)
}

fn outage(cluster: &Cluster, end: Nanos, reset: bool) -> Vec<(Nanos, Undo)> {
    for link in links(cluster) {
        link.cut(reset);
    }
    let agents = (0..cluster.nodes.len()).map(|node| (end, Undo::MendAgent(node, reset)));
    let operators = (0..cluster.operators.len()).map(|operator| (end, Undo::MendOperator(operator, reset)));
    agents.chain(operators).collect()
}

fn trouble(rng: &mut Rng, fault: Fault) -> Trouble {
    match fault {
        Fault::MessageLoss => Trouble {
            loss: rng.between(20, 300),
            slow: rng.between(0, 3000) * MILLI,
            ..Trouble::default()
        },
        Fault::Overload => Trouble {
            refused: rng.between(50, 700),
            ..Trouble::default()
        },
        _ => Trouble {
            late: rng.between(0, 70) * SECOND,
            twice: rng.between(0, 200),
            swapped: rng.between(0, 100),
            dropped: rng.between(0, 100),
            lag: rng.between(0, 50),
            ..Trouble::default()
        },
    }
}

/// Another operator has begun to write: those that stood still until then go on.
pub fn followed(cluster: &Cluster, rng: &mut Rng) -> Vec<(Nanos, Undo)> {
    let now = cluster.time.now();
    let waiting = cluster.operators.iter().enumerate();
    waiting
        .filter(|(_, control)| control.until_followed)
        .map(|(number, _)| (now + rng.between(0, 12 * MILLI), Undo::WakeOperator(number)))
        .collect()
}

/// Ends a fault.
pub fn undo(cluster: &mut Cluster, undo: Undo) -> Result<(), ClusterError> {
    match undo {
        Undo::StartAgent(node) => {
            // One that was told to end and has not is killed, as a kubelet would.
            cluster.kill_agent(node);
            cluster.start_agent(node)?;
        }
        Undo::StartOperator(operator) => {
            cluster.kill_operator(operator);
            cluster.start_operator(operator)?;
        }
        Undo::MendAgent(node, reset) => {
            if let Some(life) = cluster.nodes.get(node).and_then(|n| n.agent.as_ref()) {
                life.link.mend(reset);
            }
        }
        Undo::MendOperator(operator, reset) => {
            if let Some(life) = cluster.operators.get(operator).and_then(|o| o.life.as_ref()) {
                life.link.mend(reset);
            }
        }
        Undo::WakeAgent(node) => {
            if let Some(life) = cluster.nodes.get(node).and_then(|n| n.agent.as_ref()) {
                life.link.hold(false);
                life.process.go_on();
            }
        }
        Undo::WakeOperator(operator) => {
            if let Some(control) = cluster.operators.get_mut(operator) {
                control.until_followed = false;
                if let Some(life) = &control.life {
                    life.link.hold(false);
                    life.process.go_on();
                }
            }
        }
        Undo::Thaw(node, lost) => {
            if let Some(node) = cluster.nodes.get(node) {
                node.machine.lose(lost);
            }
            cluster.freeze(node, false);
        }
        Undo::Cure(node) => {
            if let Some(node) = cluster.nodes.get(node) {
                *lock(&node.yard.ailments) = Ailments::default();
            }
        }
        Undo::EndTrouble => {
            for link in links(cluster) {
                link.trouble(Trouble::default());
            }
        }
    }
    Ok(())
}

/// Ends everything that may still be wrong.
pub fn calm(cluster: &mut Cluster) -> Result<(), ClusterError> {
    undo(cluster, Undo::EndTrouble)?;
    for node in 0..cluster.nodes.len() {
        undo(cluster, Undo::MendAgent(node, false))?;
        undo(cluster, Undo::Thaw(node, 0))?;
        undo(cluster, Undo::WakeAgent(node))?;
        undo(cluster, Undo::Cure(node))?;
        if let Some(node) = cluster.nodes.get(node) {
            node.machine.set_drift(0);
        }
        cluster.start_agent(node)?;
    }
    for operator in 0..cluster.operators.len() {
        undo(cluster, Undo::MendOperator(operator, false))?;
        undo(cluster, Undo::WakeOperator(operator))?;
        cluster.start_operator(operator)?;
    }
    Ok(())
}
