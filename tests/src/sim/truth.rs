//! What really happened, by true time.
//!
//! Owns: the record of computing, of device memory taken, and the judgement of it. Knows no rule by which GoGrid works:
//! only what a user and a neighbour would call a fault.

use super::time::{Nanos, lock};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// One stretch of computing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Worker, unique in a run.
    pub worker: u64,
    /// From when.
    pub from: Nanos,
    /// Until when.
    pub until: Nanos,
}

#[derive(Default)]
struct Record {
    computed: BTreeMap<String, Vec<Stretch>>,
    held: BTreeMap<String, BTreeMap<u64, u64>>,
    over_commits: u64,
    workers: u64,
}

/// The record.
#[derive(Clone, Default)]
pub struct Truth(Arc<Mutex<Record>>);

impl Truth {
    /// A number for a worker that nobody else has.
    pub fn worker(&self) -> u64 {
        let mut record = lock(&self.0);
        record.workers += 1;
        record.workers
    }

    /// A worker computed for a job.
    pub fn computed(&self, job: &str, stretch: Stretch) {
        if stretch.until > stretch.from {
            lock(&self.0)
                .computed
                .entry(job.to_owned())
                .or_default()
                .push(stretch);
        }
    }

    /// A worker takes memory of a node's device, of which `cap` bytes may be taken.
    pub fn takes(&self, node: &str, worker: u64, bytes: u64, cap: u64) -> bool {
        let mut record = lock(&self.0);
        let held = record.held.entry(node.to_owned()).or_default();
        held.insert(worker, bytes);
        let over = held.values().sum::<u64>() > cap;
        record.over_commits += u64::from(over);
        over
    }

    /// A worker is gone, and its memory is free.
    pub fn gone(&self, node: &str, worker: u64) {
        if let Some(held) = lock(&self.0).held.get_mut(node) {
            held.remove(&worker);
        }
    }

    /// Times that more memory was taken than may be.
    pub fn over_commits(&self) -> u64 {
        lock(&self.0).over_commits
    }

    /// Jobs for which two workers computed at the same time, and for how long.
    pub fn overlaps(&self) -> Vec<(String, Nanos)> {
        let record = lock(&self.0);
        let mut found = vec![];
        for (job, stretches) in &record.computed {
            let long = overlap(stretches);
            if long > 0 {
                found.push((job.clone(), long));
            }
        }
        found
    }
}

/// For how long two different workers computed at the same time.
fn overlap(stretches: &[Stretch]) -> Nanos {
    let mut sorted: Vec<&Stretch> = stretches.iter().collect();
    sorted.sort_by_key(|s| (s.from, s.until));
    let mut long = 0;
    for (number, stretch) in sorted.iter().enumerate() {
        for later in sorted
            .iter()
            .skip(number + 1)
            .take_while(|l| l.from < stretch.until)
        {
            if later.worker != stretch.worker {
                long += later.until.min(stretch.until).saturating_sub(later.from);
            }
        }
    }
    long
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_time_in_which_two_workers_compute_counts_as_overlap() {
        let stretch = |worker, from, until| Stretch { worker, from, until };
        assert_eq!(overlap(&[stretch(1, 0, 10), stretch(2, 10, 20)]), 0);
        assert_eq!(overlap(&[stretch(1, 0, 10), stretch(1, 5, 20)]), 0);
        assert_eq!(overlap(&[stretch(2, 7, 20), stretch(1, 0, 10)]), 3);
    }

    #[test]
    fn memory_counts_from_its_taking_until_its_worker_is_gone() {
        let truth = Truth::default();
        assert!(!truth.takes("n", 1, 6, 10));
        assert!(truth.takes("n", 2, 6, 10));
        truth.gone("n", 1);
        assert!(!truth.takes("n", 3, 4, 10));
        assert_eq!(truth.over_commits(), 1);
    }
}
