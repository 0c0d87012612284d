//! What goes wrong, and when: a seed's schedule.
//!
//! Owns: kinds of fault, the protocol steps at which they strike, and the choice of both. Must not do any of it.

use super::rng::Rng;
use super::time::{Nanos, SECOND};

/// A step of the protocol by which a job lives, as it shows in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// A placement was written.
    Place,
    /// An order was made.
    Order,
    /// An agent claimed it.
    Claim,
    /// The model is fetched.
    Fetch,
    /// A worker loads it.
    Load,
    /// Records are answered.
    Run,
    /// Answers were written, as a chunk or in an order's status.
    Save,
    /// The run is being stopped.
    Stop,
    /// Its end was reported.
    Report,
    /// The result was published.
    Publish,
    /// The job's end was written.
    Finish,
    /// What was made for it is removed.
    CleanUp,
}

/// All steps.
pub const STEPS: [Step; 12] = [
    Step::Place,
    Step::Order,
    Step::Claim,
    Step::Fetch,
    Step::Load,
    Step::Run,
    Step::Save,
    Step::Stop,
    Step::Report,
    Step::Publish,
    Step::Finish,
    Step::CleanUp,
];

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// An agent is killed and starts again.
    AgentCrash,
    /// An agent is told to end and starts again.
    AgentRestart,
    /// A second agent starts on a node while the first one lives, as in a rolling update.
    AgentTwin,
    /// A pool is killed with its workers.
    PoolCrash,
    /// A worker crashes.
    WorkerCrash,
    /// A machine loses its power.
    Reboot,
    /// An agent can't reach the server.
    AgentPartition,
    /// An agent stands still.
    AgentPause,
    /// An operator is killed and starts again.
    OperatorCrash,
    /// An operator is told to end and starts again.
    OperatorRestart,
    /// An operator can't reach the server.
    OperatorPartition,
    /// An operator stands still, with or without what it was about to send.
    OperatorPause,
    /// An operator stands still until another leads, and goes on in the middle of that one's first writes.
    OperatorOvertaken,
    /// Nobody can reach the server.
    Outage,
    /// Requests and answers are lost or slow.
    MessageLoss,
    /// The server answers 429, 500, 503, 504.
    Overload,
    /// Watch events are late, come twice, overtake each other or are lost; lists lag.
    WatchTrouble,
    /// Old versions are gone: 410.
    Compaction,
    /// A slow disk.
    SlowDisk,
    /// A full disk.
    FullDisk,
    /// Killed workers don't go.
    StuckWorkers,
    /// A wall clock steps by up to an hour.
    ClockStep,
    /// A clock's drift changes, within the contract.
    Drift,
    /// Outside the contract: a whole machine stands still, its clock too.
    Freeze,
    /// Outside the contract: a clock that is wrong by more than it may.
    WildClock,
}

/// All kinds.
pub const FAULTS: [Fault; 25] = [
    Fault::AgentCrash,
    Fault::AgentRestart,
    Fault::AgentTwin,
    Fault::PoolCrash,
    Fault::WorkerCrash,
    Fault::Reboot,
    Fault::AgentPartition,
    Fault::AgentPause,
    Fault::OperatorCrash,
    Fault::OperatorRestart,
    Fault::OperatorPartition,
    Fault::OperatorPause,
    Fault::OperatorOvertaken,
    Fault::Outage,
    Fault::MessageLoss,
    Fault::Overload,
    Fault::WatchTrouble,
    Fault::Compaction,
    Fault::SlowDisk,
    Fault::FullDisk,
    Fault::StuckWorkers,
    Fault::ClockStep,
    Fault::Drift,
    Fault::Freeze,
    Fault::WildClock,
];

/// Kinds outside the contract.
const OUTSIDE: [Fault; 2] = [Fault::Freeze, Fault::WildClock];

impl Fault {
    /// Whether no design could promise anything about time under it.
    pub fn outside_contract(self) -> bool {
        OUTSIDE.contains(&self)
    }
}

/// A fault to come: at the first such step from then on, or a minute later without one.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    /// From when.
    pub from: Nanos,
    /// At which step.
    pub step: Step,
    /// What.
    pub fault: Fault,
    /// How long it lasts.
    pub lasts: Nanos,
    /// Between the step and the fault.
    pub after: Nanos,
}

/// What users do.
#[derive(Clone, Copy, Debug)]
pub enum Wish {
    /// A job of that many records.
    Submit(u64),
    /// Suspend it.
    Suspend,
    /// Resume it.
    Resume,
    /// Delete it.
    Delete,
}

/// A whole schedule.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// What users do to which job, in order of time.
    pub wishes: Vec<(Nanos, usize, Wish)>,
    /// What goes wrong, in order of time.
    pub faults: Vec<Planned>,
    /// Whether clocks stay within the contract.
    pub contract: bool,
    /// When every fault is over.
    pub calm: Nanos,
}

/// Faults begin within this time.
const STORM: Nanos = 11 * 60 * SECOND;
/// Nothing is wrong any more from here on.
const CALM: Nanos = 13 * 60 * SECOND;

impl Schedule {
    /// The schedule of a seed.
    pub fn new(rng: &mut Rng, jobs: usize, favoured: &[Fault]) -> Self {
        let contract = !favoured.is_empty() || !rng.permille(200);
        let mut wishes = vec![];
        for job in 0..jobs {
            let at = rng.between(5, 540) * SECOND;
            wishes.push((at, job, Wish::Submit(rng.between(3, 24))));
            if rng.permille(100) {
                let suspended = at + rng.between(10, 120) * SECOND;
                wishes.push((suspended, job, Wish::Suspend));
                wishes.push((suspended + rng.between(5, 90) * SECOND, job, Wish::Resume));
            } else if rng.permille(50) {
                wishes.push((at + rng.between(5, 120) * SECOND, job, Wish::Delete));
            }
        }
        wishes.sort_by_key(|(at, job, _)| (*at, *job));
        let count = rng.between(10, 16);
        let mut faults: Vec<Planned> = (0..count).map(|_| Self::fault(rng, contract, favoured)).collect();
        faults.sort_by_key(|planned| planned.from);
        Self {
            wishes,
            faults,
            contract,
            calm: CALM,
        }
    }

    fn fault(rng: &mut Rng, contract: bool, favoured: &[Fault]) -> Planned {
        let favourite = rng.pick(favoured).copied().filter(|_| rng.permille(600));
        // Few schedules leave the contract: in those, what leaves it strikes often.
        let kinds = if !contract && rng.permille(400) {
            &OUTSIDE[..]
        } else {
            &FAULTS[..]
        };
        let fault = loop {
            if let Some(fault) = favourite {
                break fault;
            }
            let fault = rng.pick(kinds).copied().unwrap_or(Fault::AgentCrash);
            if !(contract && fault.outside_contract()) {
                break fault;
            }
        };
        // Runs are stopped seldom, so that this is waited for more often.
        let step = if rng.permille(150) {
            Step::Stop
        } else {
            rng.pick(&STEPS).copied().unwrap_or(Step::Run)
        };
        let long = favourite.is_some() || rng.permille(300);
        Planned {
            from: rng.between(SECOND, STORM),
            step,
            fault,
            lasts: if long {
                rng.between(20 * SECOND, 110 * SECOND)
            } else {
                rng.between(SECOND, 30 * SECOND)
            },
            after: if rng.permille(500) {
                rng.between(0, SECOND / 20)
            } else {
                rng.between(0, 3 * SECOND)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_fault_is_planned_for_every_step_again_and_again() {
        let mut planned: BTreeMap<(Fault, Step), u32> = BTreeMap::new();
        for seed in 1..=3_000 {
            for fault in Schedule::new(&mut Rng::new(seed), 20, &[]).faults {
                *planned.entry((fault.fault, fault.step)).or_default() += 1;
            }
        }
        for fault in FAULTS {
            for step in STEPS {
                let count = planned.get(&(fault, step)).copied().unwrap_or(0);
                assert!(count >= 60, "{fault:?} at {step:?}: {count}");
            }
        }
    }
}
