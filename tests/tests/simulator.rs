//! The simulator's promises: a seed is a seed, whole clusters come through their faults, and each layer of the fence is
//! missed when it is taken away.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

use gogrid_tests::sim::Without;
use gogrid_tests::sim::report::{Report, sweep};
use gogrid_tests::sim::run::{Setup, run};

const SETUP: Setup = Setup {
    nodes: 5,
    operators: 2,
    jobs: 20,
    without: None,
    trace: false,
};

#[test]
fn the_same_seed_is_the_same_run_to_the_last_write() {
    let told = Setup { trace: true, ..SETUP };
    let (first, second) = (run(11, told).unwrap(), run(11, told).unwrap());
    assert!(first.trace.len() > 100, "{:?}", first.trace);
    assert_eq!(first.trace, second.trace);
    assert_ne!(first.trace, run(12, told).unwrap().trace);
}

#[test]
fn nobody_gets_less_than_asked_or_anything_twice_whatever_goes_wrong() {
    let report = sweep(1, 6, 2, SETUP).unwrap();
    assert!(report.clean(), "{:#?}", report.violations);
    assert!(report.sum.simulated >= 6 * 15 * 60 * 1_000_000_000);
    assert!(
        report.sum.faults.values().sum::<u64>() >= 60,
        "{:?}",
        report.sum.faults
    );
}

/// Seeds from `from` on without a layer, until one of the counters that it guards is not 0.
fn missed(without: Without, counter: &str, from: u64, most: u64) -> Report {
    let setup = Setup {
        without: Some(without),
        ..SETUP
    };
    let mut report = Report::default();
    for seed in from..from + most {
        report.add(&run(seed, setup).unwrap());
        if report.counters()[counter] > 0 {
            return report;
        }
    }
    panic!("{most} seeds from {from} on without {without:?} left {counter} at 0");
}

#[test]
fn without_the_self_fence_two_workers_compute_one_job() {
    missed(Without::SelfFence, "overlapMillis", 2, 8);
}

#[test]
fn without_epochs_records_stand_in_a_result_twice() {
    missed(Without::Epoch, "duplicatedRecords", 1, 4);
}

#[test]
fn without_sessions_two_agents_of_one_node_take_too_much_memory_and_lose_jobs() {
    for counter in ["overCommits", "lostJobs"] {
        missed(Without::Session, counter, 2, 3);
    }
}
