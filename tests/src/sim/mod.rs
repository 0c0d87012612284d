//! A deterministic simulator of whole clusters: the real operator, the real agents, everything around them modelled.
//!
//! Owns: nothing but the list of parts. The programs run as they are, executors included, over three seams: the service
//! beneath their Kubernetes clients (`store`, `server`, `link`), the protocol of pool and workers (`pool`, `worker`) and
//! the machine (`time`). `watcher` and `truth` judge from the outside. Must not: hold a rule of GoGrid.

mod change;
pub mod cluster;
mod control;
mod feed;
pub mod kind;
pub mod link;
pub mod node;
pub mod pool;
pub mod report;
pub mod rng;
pub mod rules;
pub mod run;
pub mod schedule;
pub mod server;
pub mod store;
pub mod storm;
pub mod time;
pub mod truth;
pub mod watcher;
pub mod worker;

use gogrid_api::{LeaseTiming, Millis};
use schedule::Fault;

/// A layer of the fence that is taken away, to show what it is for: another argument to a constructor of the real code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Without {
    /// Workers are never stopped by themselves.
    SelfFence,
    /// Answers of all epochs stand side by side.
    Epoch,
    /// Nodes are judged right after the operator was blind, and without asking for their Leases.
    ObservedChange,
    /// No time is left between the end of a lease here and there.
    DriftMargin,
    /// Writes are not refused when leadership is lost.
    LeaderGate,
    /// An agent that starts again calls itself what it was called before.
    Session,
}

impl Without {
    /// The timing of an agent or an operator.
    pub fn timing(self, agent: bool) -> LeaseTiming {
        let timing = LeaseTiming::default();
        match (self, agent) {
            (Self::SelfFence, true) => {
                timing.with_margins(Millis(timing.lease().0 * 1_000), timing.drift_margin())
            }
            (Self::DriftMargin, true) => timing.with_margins(timing.lease(), Millis(0)),
            (Self::DriftMargin, false) => timing.with_margins(timing.fence_after(), Millis(0)),
            _ => timing,
        }
    }

    /// Faults that the layer is for: they strike more often without it, and for long.
    pub fn favours(self) -> &'static [Fault] {
        match self {
            Self::SelfFence | Self::Epoch => &[Fault::AgentPartition],
            Self::DriftMargin => &[Fault::AgentPartition, Fault::Drift],
            Self::ObservedChange => &[
                Fault::OperatorPartition,
                Fault::OperatorPause,
                Fault::WatchTrouble,
            ],
            Self::LeaderGate => &[Fault::OperatorOvertaken],
            Self::Session => &[Fault::AgentTwin],
        }
    }

    /// An operator's configuration.
    pub fn weaken(self, config: &mut gogrid_operator::config::Config) {
        match self {
            Self::Epoch => config.layers.one_answer = false,
            Self::ObservedChange => config.layers.observed_change = false,
            _ => {}
        }
    }
}
