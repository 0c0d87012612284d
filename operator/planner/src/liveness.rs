//! Which nodes are alive, judged by changes that were seen.
//!
//! Owns: the observed-change rule on the operator's own monotonic clock. Must not: look at a timestamp inside a Lease,
//! or give a node up right after the operator itself was blind.

use crate::world::Heartbeat;
use gogrid_api::{LeaseTiming, Millis};
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    /// Whatever differs between two renewals.
    mark: String,
    /// When it was last seen to differ; `None` before the first change.
    changed: Option<Millis>,
    /// When it was first seen.
    first: Millis,
}

/// What was seen of all leases.
#[derive(Clone, Debug)]
pub struct Liveness {
    timing: LeaseTiming,
    leases: BTreeMap<String, Seen>,
    /// Since when nothing was missed.
    sighted: Millis,
    ticked: Millis,
}

impl Liveness {
    /// Nothing seen yet.
    pub fn new(timing: LeaseTiming, now: Millis) -> Self {
        Self {
            timing,
            leases: BTreeMap::new(),
            sighted: now,
            ticked: now,
        }
    }

    /// A Lease as a watch event brought it: one seen first this way is alive, for it was just written.
    pub fn changed(&mut self, now: Millis, name: &str, mark: &str) {
        match self.leases.get_mut(name) {
            Some(seen) if seen.mark == mark => {}
            Some(seen) => {
                *seen = Seen {
                    mark: mark.into(),
                    changed: Some(now),
                    first: seen.first,
                }
            }
            None => {
                self.leases.insert(
                    name.into(),
                    Seen {
                        mark: mark.into(),
                        changed: Some(now),
                        first: now,
                    },
                );
            }
        }
    }

    /// A Lease as a list brought it: it may be of any age, so only a difference counts.
    pub fn listed(&mut self, now: Millis, name: &str, mark: &str) {
        if self.leases.contains_key(name) {
            self.changed(now, name, mark);
        } else {
            self.leases.insert(
                name.into(),
                Seen {
                    mark: mark.into(),
                    changed: None,
                    first: now,
                },
            );
        }
    }

    /// The Lease is gone: the node is given up as if it had fallen silent now.
    pub fn removed(&mut self, name: &str) {
        if let Some(seen) = self.leases.get_mut(name) {
            seen.mark.clear();
        }
    }

    /// Something may have been missed up to now.
    pub fn blind(&mut self, now: Millis) {
        self.sighted = now;
    }

    /// Called at every turn of the loop: a long gap means the operator itself stood still.
    pub fn tick(&mut self, now: Millis) {
        if now.0.saturating_sub(self.ticked.0) > self.timing.renew().0 {
            self.blind(now);
        }
        self.ticked = now;
    }

    /// What is known of a node's Lease.
    pub fn judge(&self, now: Millis, name: &str) -> Heartbeat {
        let seen = self.leases.get(name);
        let last = seen.and_then(|s| s.changed);
        let present = seen.is_some_and(|s| !s.mark.is_empty());
        if present && last.is_some_and(|at| now.0.saturating_sub(at.0) <= self.timing.lease().0) {
            return Heartbeat::Fresh;
        }
        let since = last
            .or(seen.map(|s| s.first))
            .unwrap_or_default()
            .max(self.sighted);
        if now.0.saturating_sub(since.0) > self.timing.replace_after().0 {
            Heartbeat::Lost
        } else {
            Heartbeat::Waiting
        }
    }

    /// When the judgement of a node may next change by itself.
    pub fn next_change(&self, now: Millis, name: &str) -> Option<Millis> {
        let seen = self.leases.get(name)?;
        let since = seen.changed.unwrap_or(seen.first);
        [
            since.0 + self.timing.lease().0 + 1,
            since.max(self.sighted).0 + self.timing.replace_after().0 + 1,
        ]
        .into_iter()
        .filter(|at| *at > now.0)
        .min()
        .map(Millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(seconds: u64) -> Millis {
        Millis(seconds * 1000)
    }

    /// A loop that turns every second.
    fn run(liveness: &mut Liveness, from: u64, to: u64) {
        for second in from..=to {
            liveness.tick(ms(second));
        }
    }

    #[test]
    fn a_node_is_fresh_for_a_lease_and_lost_only_after_the_drift_margin() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        l.changed(ms(0), "a", "1");
        run(&mut l, 0, 50);
        assert_eq!(l.judge(ms(40), "a"), Heartbeat::Fresh);
        assert_eq!(l.judge(ms(41), "a"), Heartbeat::Waiting);
        assert_eq!(l.judge(ms(45), "a"), Heartbeat::Waiting);
        assert_eq!(l.judge(ms(46), "a"), Heartbeat::Lost);
    }

    #[test]
    fn an_old_lease_found_at_the_start_is_neither_fresh_nor_lost_until_time_tells() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(100));
        l.listed(ms(100), "a", "1");
        run(&mut l, 100, 150);
        assert_eq!(l.judge(ms(101), "a"), Heartbeat::Waiting);
        assert_eq!(l.judge(ms(146), "a"), Heartbeat::Lost);
        l.changed(ms(147), "a", "2");
        assert_eq!(l.judge(ms(148), "a"), Heartbeat::Fresh);
    }

    #[test]
    fn nobody_is_given_up_right_after_the_operator_was_blind() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        l.changed(ms(0), "a", "1");
        l.tick(ms(0));
        l.tick(ms(120));
        assert_eq!(l.judge(ms(120), "a"), Heartbeat::Waiting);
        run(&mut l, 120, 166);
        assert_eq!(l.judge(ms(166), "a"), Heartbeat::Lost);
        l.blind(ms(166));
        assert_eq!(l.judge(ms(167), "a"), Heartbeat::Waiting);
    }

    #[test]
    fn the_same_lease_listed_again_is_no_sign_of_life() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        l.changed(ms(0), "a", "1");
        run(&mut l, 0, 44);
        l.listed(ms(44), "a", "1");
        assert_eq!(l.judge(ms(44), "a"), Heartbeat::Waiting);
        l.listed(ms(44), "a", "2");
        assert_eq!(l.judge(ms(44), "a"), Heartbeat::Fresh);
    }

    #[test]
    fn a_deleted_lease_is_not_fresh_and_is_lost_in_time() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        l.changed(ms(0), "a", "1");
        l.removed("a");
        assert_eq!(l.judge(ms(1), "a"), Heartbeat::Waiting);
        run(&mut l, 0, 46);
        assert_eq!(l.judge(ms(46), "a"), Heartbeat::Lost);
    }
}
