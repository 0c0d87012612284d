//! What was made for a job outlives it by a little only.
//!
//! Owns: finding assignments and staged inputs whose job is over or gone, and the order in which they go. Pure.

use crate::apply::Op;
use crate::models;
use crate::round::{Round, Work, over};
use crate::store::Store;
use gogrid_api::Assignment;
use gogrid_api::assignment::{Kind, StopReason};
use std::collections::{BTreeMap, BTreeSet};

impl<'a> Round<'a> {
    /// What was made for jobs that are gone, also while nobody led.
    pub(crate) fn orphans(&self, by_job: &BTreeMap<&str, Vec<&'a Assignment>>, works: &mut Vec<Work>) {
        let uids: BTreeSet<&str> = by_job
            .keys()
            .copied()
            .chain(self.has_inputs.iter().map(String::as_str))
            .collect();
        for uid in uids
            .into_iter()
            .filter(|u| !self.store.jobs.contains_key(u) && !self.busy.contains_key(*u))
        {
            if self.memory.get(uid).is_some_and(|m| m.not_before > self.now) {
                continue;
            }
            let missing = self
                .missing_since
                .get(uid)
                .map_or(0, |since| self.now.0.saturating_sub(since.0));
            let assignments = by_job.get(uid).cloned().unwrap_or_default();
            let mut ops = vec![];
            for a in &assignments {
                let patience = missing < self.config.timing.checkpoint().0 * 2;
                let runs = a.spec.kind == Kind::Run
                    && !over(a)
                    && !models::lost(self.store, self.now, a)
                    && patience;
                match (runs, a.spec.stop.is_none()) {
                    (true, true) => ops.push(Op::Stop(
                        Box::new((*a).clone()),
                        self.stop_order(StopReason::JobDeleted),
                    )),
                    (true, false) => {}
                    (false, _) => ops.push(Op::DeleteAssignment(Box::new((*a).clone()))),
                }
            }
            // Inputs go last, and only after the job's absence can't be a cache that lags.
            if assignments.is_empty()
                && self.has_inputs.contains(uid)
                && missing > self.config.timing.drift_margin().0
            {
                ops.push(Op::DeleteInputs(uid.into()));
            }
            if !ops.is_empty() {
                let only_if_gone = assignments.first().map(|a| a.spec.job.clone());
                works.push(Work {
                    uid: uid.into(),
                    job: None,
                    only_if_gone,
                    step: "Orphan",
                    ops,
                    claim: None,
                });
            }
        }
    }

    /// Uids that something exists for, without a job.
    pub(crate) fn missing(store: &Store, has_inputs: &BTreeSet<String>) -> BTreeSet<String> {
        let made_for = store
            .assignments
            .values()
            .map(|a| a.spec.job.uid.clone())
            .chain(has_inputs.iter().cloned());
        made_for.filter(|uid| !store.jobs.contains_key(uid)).collect()
    }
}

/// Everything made for a job that is over, ConfigMaps with its input among it where any were `staged`.
pub(crate) fn clean_up(uid: &str, assignments: &[&Assignment], staged: bool) -> Vec<Op> {
    let deletes = assignments
        .iter()
        .map(|a| Op::DeleteAssignment(Box::new((*a).clone())));
    deletes
        .chain(staged.then(|| Op::DeleteInputs(uid.into())))
        .collect()
}
