//! Many seeds, and what came of them together.
//!
//! Owns: the sharing of seeds among threads, sums, and how they are written. Must not judge a seed.

use super::cluster::ClusterError;
use super::run::{Outcome, Setup, run};
use super::schedule::{FAULTS, Fault, STEPS, Step};
use super::time::SECOND;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Violations that are told.
const TOLD: usize = 50;

/// Sums over seeds.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Seeds run.
    pub schedules: u64,
    /// Sum of all outcomes; its texts are the first few of each.
    pub sum: Outcome,
    /// The first violations and their seeds.
    pub violations: Vec<(u64, String)>,
    /// Seeds with any violation.
    pub bad_seeds: u64,
}

impl Report {
    /// Adds a seed.
    pub fn add(&mut self, outcome: &Outcome) {
        self.schedules += 1;
        let sum = &mut self.sum;
        sum.simulated += outcome.simulated;
        sum.events += outcome.events;
        sum.requests += outcome.requests;
        sum.overlap_millis += outcome.overlap_millis;
        sum.overlap_outside_millis += outcome.overlap_outside_millis;
        sum.lost_jobs += outcome.lost_jobs;
        sum.duplicated_records += outcome.duplicated_records;
        sum.over_commits += outcome.over_commits;
        sum.stale_writes += outcome.stale_writes;
        sum.unfinished_jobs += outcome.unfinished_jobs;
        sum.settled = sum.settled.max(outcome.settled);
        for (fault, count) in &outcome.faults {
            *sum.faults.entry(*fault).or_default() += count;
        }
        for (step, count) in &outcome.steps {
            *sum.steps.entry(*step).or_default() += count;
        }
        for (cell, count) in &outcome.table {
            *sum.table.entry(*cell).or_default() += count;
        }
        self.bad_seeds += u64::from(!outcome.violations.is_empty());
        for what in &outcome.violations {
            if self.violations.len() < TOLD {
                self.violations.push((outcome.seed, what.clone()));
            }
        }
    }

    /// The counters that must be 0, by their names.
    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::from([
            ("overlapMillis", self.sum.overlap_millis),
            ("lostJobs", self.sum.lost_jobs),
            ("duplicatedRecords", self.sum.duplicated_records),
            ("overCommits", self.sum.over_commits),
            ("staleWritesAccepted", self.sum.stale_writes),
            ("unfinishedJobs", self.sum.unfinished_jobs),
        ])
    }

    /// Whether all of them are.
    pub fn clean(&self) -> bool {
        self.counters().values().all(|count| *count == 0)
    }

    fn cell(&self, fault: Fault, step: Step) -> u64 {
        self.sum.table.get(&(fault, step)).copied().unwrap_or(0)
    }

    /// The least number in the table of faults and steps.
    pub fn least_cell(&self) -> u64 {
        let cells = FAULTS
            .iter()
            .flat_map(|fault| STEPS.iter().map(|step| self.cell(*fault, *step)));
        cells.min().unwrap_or(0)
    }

    /// For programs.
    pub fn json(&self, seconds: f64) -> Value {
        let count = |fault: &Fault| self.sum.faults.get(fault).copied().unwrap_or(0);
        let faults: Map<String, Value> = FAULTS
            .iter()
            .map(|f| (format!("{f:?}"), json!(count(f))))
            .collect();
        let taken = |step: &Step| self.sum.steps.get(step).copied().unwrap_or(0);
        let steps: Map<String, Value> = STEPS
            .iter()
            .map(|s| (format!("{s:?}"), json!(taken(s))))
            .collect();
        let row = |fault: &Fault| -> Map<String, Value> {
            STEPS
                .iter()
                .map(|step| (format!("{step:?}"), json!(self.cell(*fault, *step))))
                .collect()
        };
        let table: Map<String, Value> = FAULTS.iter().map(|f| (format!("{f:?}"), json!(row(f)))).collect();
        let violations: Vec<Value> = self
            .violations
            .iter()
            .map(|(seed, what)| json!({"seed": seed, "what": what}))
            .collect();
        let mut whole = json!({
            "schedules": self.schedules,
            "simulatedSeconds": self.sum.simulated / SECOND,
            "events": self.sum.events,
            "requests": self.sum.requests,
            "faults": faults,
            "steps": steps,
            "overlapOutsideContractMillis": self.sum.overlap_outside_millis,
            "longestSettlingSeconds": self.sum.settled / SECOND,
            "violations": violations,
            "seconds": seconds,
            "faultsByStep": table,
            "leastFaultsByStep": self.least_cell(),
        });
        for (name, value) in self.counters() {
            whole[name] = json!(value);
        }
        whole
    }

    /// For people.
    pub fn text(&self, seconds: f64) -> String {
        let mut text = format!(
            "{} schedules, {} simulated minutes, {} events, {} requests in {seconds:.1} s\n",
            self.schedules,
            self.sum.simulated / SECOND / 60,
            self.sum.events,
            self.sum.requests
        );
        for (name, value) in self.counters() {
            text.push_str(&format!("{name:>20} {value}\n"));
        }
        text.push_str(&format!(
            "outside the clock contract, workers overlapped for {} ms; the longest way back to rest took {} s\n",
            self.sum.overlap_outside_millis,
            self.sum.settled / SECOND
        ));
        text.push_str(&format!("\n{:>18}", "fault at step"));
        for step in STEPS {
            text.push_str(&format!("{:>9}", format!("{step:?}")));
        }
        for fault in FAULTS {
            text.push_str(&format!("\n{:>18}", format!("{fault:?}")));
            for step in STEPS {
                text.push_str(&format!("{:>9}", self.cell(fault, step)));
            }
        }
        text.push('\n');
        for (seed, what) in &self.violations {
            text.push_str(&format!("seed {seed}: {what}\n"));
        }
        text
    }
}

/// Runs seeds on that many threads.
///
/// # Errors
/// The programs could not be put together.
pub fn sweep(from: u64, count: u64, threads: usize, setup: Setup) -> Result<Report, ClusterError> {
    let next = AtomicU64::new(from);
    let report = Mutex::new(Report::default());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from.saturating_add(count) || super::time::lock(&failed).is_some() {
                        return;
                    }
                    match run(seed, setup) {
                        Ok(outcome) => super::time::lock(&report).add(&outcome),
                        Err(error) => *super::time::lock(&failed) = Some(error),
                    }
                }
            });
        }
    });
    match super::time::lock(&failed).take() {
        Some(error) => Err(error),
        None => Ok(std::mem::take(&mut *super::time::lock(&report))),
    }
}
