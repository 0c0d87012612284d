//! Which nodes are alive, judged by changes that were seen.
//!
//! Owns: the observed-change rule on the operator's own monotonic clock, the pace at which silent nodes are given up, and
//! the back-off of nodes that come and go. Must not: look at a timestamp inside a Lease, or give a node up right after the
//! operator itself was blind.

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
    /// Given up, and not seen to change since.
    lost: bool,
    /// How often it was given up and came back, steady times forgiven.
    flaps: u32,
    /// Nothing is placed there before that.
    trusted: Millis,
}

impl Seen {
    fn new(mark: &str, changed: Option<Millis>, first: Millis) -> Self {
        Self {
            mark: mark.into(),
            changed,
            first,
            lost: false,
            flaps: 0,
            trusted: Millis(0),
        }
    }
}

/// Fewest nodes that may be given up within one lease; more where a tenth of all nodes is more.
const FEWEST_LOSSES: usize = 5;
/// The longest back-off of a node that comes and goes, in leases.
const LONGEST_BACKOFF: u64 = 32;

/// What was seen of all leases.
#[derive(Clone, Debug)]
pub struct Liveness {
    timing: LeaseTiming,
    leases: BTreeMap<String, Seen>,
    /// Since when nothing was missed.
    sighted: Millis,
    ticked: Millis,
    /// When nodes were given up within the last lease.
    losses: Vec<Millis>,
    /// Whether a node is given time after the operator was blind.
    patient: bool,
}

impl Liveness {
    /// Nothing seen yet.
    pub fn new(timing: LeaseTiming, now: Millis) -> Self {
        Self {
            timing,
            leases: BTreeMap::new(),
            sighted: now,
            ticked: now,
            losses: vec![],
            patient: true,
        }
    }

    /// The same without patience after blindness: for simulations that show what it is for. No flag leads here.
    #[must_use]
    pub fn hasty(self) -> Self {
        Self {
            patient: false,
            ..self
        }
    }

    /// A Lease as a watch event brought it: one seen first this way is alive, for it was just written.
    pub fn changed(&mut self, now: Millis, name: &str, mark: &str) {
        let lease = self.timing.lease().0;
        match self.leases.get_mut(name) {
            Some(seen) if seen.mark == mark => {}
            Some(seen) => {
                if std::mem::take(&mut seen.lost) {
                    // The first loss may be anything; from the second on the node must prove itself for longer each time.
                    let backoff = match seen.flaps {
                        0 => 0,
                        n => lease.saturating_mul((1 << (n - 1).min(5)).min(LONGEST_BACKOFF)),
                    };
                    seen.flaps = seen.flaps.saturating_add(1);
                    seen.trusted = Millis(now.0.saturating_add(backoff));
                } else if now.0.saturating_sub(seen.trusted.0) > lease.saturating_mul(LONGEST_BACKOFF) {
                    seen.flaps = 0;
                }
                seen.mark = mark.into();
                seen.changed = Some(now);
            }
            None => {
                self.leases.insert(name.into(), Seen::new(mark, Some(now), now));
            }
        }
    }

    /// A Lease as a list brought it: it may be of any age, so only a difference counts.
    pub fn listed(&mut self, now: Millis, name: &str, mark: &str) {
        if self.leases.contains_key(name) {
            self.changed(now, name, mark);
        } else {
            self.leases.insert(name.into(), Seen::new(mark, None, now));
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
        if self.patient {
            self.sighted = now;
        }
    }

    /// Called at every turn of the loop: a long gap means the operator itself stood still. Gives silent nodes up, the
    /// longest silent first, and not all at once: when many fall silent together, the network is the likelier cause.
    pub fn tick(&mut self, now: Millis) {
        if now.0.saturating_sub(self.ticked.0) > self.timing.renew().0 {
            self.blind(now);
        }
        self.ticked = now;
        let lease = self.timing.lease().0;
        self.losses.retain(|at| now.0.saturating_sub(at.0) < lease);
        let most = FEWEST_LOSSES.max(self.leases.len() / 10);
        let mut silent: Vec<(bool, Millis, String)> = self
            .leases
            .iter()
            .filter(|(_, seen)| !seen.lost && self.overdue(now, seen))
            .map(|(name, seen)| (seen.changed.is_some(), self.since(seen), name.clone()))
            .collect();
        silent.sort();
        for (lived, _, name) in silent {
            // Those that were dead when this operator began to look do not count.
            if lived && self.losses.len() >= most {
                break;
            }
            if let Some(seen) = self.leases.get_mut(&name) {
                seen.lost = true;
                self.losses.extend(lived.then_some(now));
            }
        }
    }

    fn since(&self, seen: &Seen) -> Millis {
        seen.changed.unwrap_or(seen.first).max(self.sighted)
    }

    fn overdue(&self, now: Millis, seen: &Seen) -> bool {
        now.0.saturating_sub(self.since(seen).0) > self.timing.replace_after().0
    }

    /// What is known of a node's Lease.
    pub fn judge(&self, now: Millis, name: &str) -> Heartbeat {
        let Some(seen) = self.leases.get(name) else {
            // Never seen: given up once it would have been seen.
            let unseen = now.0.saturating_sub(self.sighted.0) > self.timing.replace_after().0;
            return if unseen {
                Heartbeat::Lost
            } else {
                Heartbeat::Waiting
            };
        };
        let recent = |at: Millis| now.0.saturating_sub(at.0) <= self.timing.lease().0;
        if !seen.mark.is_empty() && seen.changed.is_some_and(recent) {
            return if now < seen.trusted {
                Heartbeat::Waiting
            } else {
                Heartbeat::Fresh
            };
        }
        // Blindness that came after the loss takes it back: what was missed may have been a renewal.
        if seen.lost && self.overdue(now, seen) {
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
    fn many_nodes_that_fall_silent_together_are_given_up_a_few_a_lease() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        let names: Vec<String> = (0..20).map(|n| format!("node-{n}")).collect();
        for name in &names {
            l.changed(ms(0), name, "1");
        }
        let lost = |l: &Liveness, now| {
            names
                .iter()
                .filter(|n| l.judge(ms(now), n) == Heartbeat::Lost)
                .count()
        };
        run(&mut l, 0, 84);
        assert_eq!(lost(&l, 84), FEWEST_LOSSES);
        run(&mut l, 85, 90);
        assert_eq!(lost(&l, 90), 2 * FEWEST_LOSSES);
        run(&mut l, 91, 400);
        assert_eq!(lost(&l, 400), 20);
    }

    #[test]
    fn one_lost_node_of_many_is_given_up_at_once() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        l.changed(ms(0), "a", "0");
        for second in 0..=46 {
            l.changed(ms(second), "b", &second.to_string());
            l.tick(ms(second));
        }
        assert_eq!(l.judge(ms(46), "a"), Heartbeat::Lost);
        assert_eq!(l.judge(ms(46), "b"), Heartbeat::Fresh);
    }

    #[test]
    fn a_node_that_comes_and_goes_is_trusted_later_each_time_until_it_was_steady_for_long() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        l.changed(ms(0), "a", "0");
        let mut now = 0;
        for (loss, backoff) in [0, 40, 80, 160].into_iter().enumerate() {
            run(&mut l, now, now + 46);
            now += 46;
            assert_eq!(l.judge(ms(now), "a"), Heartbeat::Lost, "loss {loss}");
            for second in 0..=backoff {
                l.changed(ms(now + second), "a", &format!("{loss}-{second}"));
                l.tick(ms(now + second));
                let fresh = l.judge(ms(now + second), "a") == Heartbeat::Fresh;
                assert_eq!(
                    fresh,
                    second == backoff,
                    "loss {loss}, {second} s after its return"
                );
            }
            now += backoff;
        }
        for second in 1..=40 * (LONGEST_BACKOFF + 1) {
            l.changed(ms(now + second), "a", &format!("steady-{second}"));
            l.tick(ms(now + second));
        }
        now += 40 * (LONGEST_BACKOFF + 1);
        run(&mut l, now, now + 46);
        l.changed(ms(now + 46), "a", "back");
        assert_eq!(l.judge(ms(now + 46), "a"), Heartbeat::Fresh, "forgiven");
    }

    #[test]
    fn a_turn_that_comes_a_renewal_after_the_last_is_no_blindness_and_without_patience_none_counts() {
        for step in [10, 11] {
            let mut patient = Liveness::new(LeaseTiming::default(), ms(0));
            let mut hasty = patient.clone().hasty();
            for l in [&mut patient, &mut hasty] {
                l.changed(ms(0), "a", "1");
                for turn in 0..=9 {
                    l.tick(ms(turn * step));
                }
            }
            assert_eq!(hasty.judge(ms(9 * step), "a"), Heartbeat::Lost);
            let lost = patient.judge(ms(9 * step), "a") == Heartbeat::Lost;
            assert_eq!(lost, step == 10, "a turn every {step} s");
        }
    }

    #[test]
    fn a_node_that_was_never_seen_is_lost_once_it_would_have_been_seen() {
        let l = Liveness::new(LeaseTiming::default(), ms(100));
        assert_eq!(l.judge(ms(101), "none"), Heartbeat::Waiting);
        assert_eq!(l.judge(ms(145), "none"), Heartbeat::Waiting);
        assert_eq!(l.judge(Millis(145_001), "none"), Heartbeat::Lost);
        assert_eq!(l.judge(ms(300), "none"), Heartbeat::Lost);
    }

    #[test]
    fn a_tenth_of_many_nodes_is_given_up_within_a_lease_and_the_next_as_it_is_over() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        for n in 0..130 {
            l.changed(ms(0), &format!("node-{n}"), "1");
        }
        let lost = |l: &Liveness, now| {
            let lost = |n: &u64| l.judge(ms(now), &format!("node-{n}")) == Heartbeat::Lost;
            (0..130).filter(lost).count()
        };
        run(&mut l, 0, 85);
        assert_eq!(lost(&l, 85), 13);
        l.tick(ms(86));
        assert_eq!(lost(&l, 86), 26);
    }

    #[test]
    fn a_node_is_forgiven_only_after_more_than_the_longest_backoff() {
        let steady = 40 * LONGEST_BACKOFF;
        for (seconds, forgiven) in [(steady, false), (steady + 7, true)] {
            let mut l = Liveness::new(LeaseTiming::default(), ms(0));
            l.changed(ms(0), "a", "0");
            run(&mut l, 0, 46);
            l.changed(ms(46), "a", "back");
            // It was steady for so long, and nobody saw it in between.
            l.changed(ms(46 + seconds), "a", "steady");
            run(&mut l, 46 + seconds, 92 + seconds);
            l.changed(ms(92 + seconds), "a", "again");
            let fresh = l.judge(ms(92 + seconds), "a") == Heartbeat::Fresh;
            assert_eq!(fresh, forgiven, "after {seconds} s");
        }
    }

    #[test]
    fn the_next_look_is_due_when_a_lease_or_the_wait_after_it_has_just_run_out() {
        let mut l = Liveness::new(LeaseTiming::default(), ms(0));
        assert_eq!(l.next_change(ms(0), "a"), None);
        l.changed(ms(0), "a", "1");
        assert_eq!(l.next_change(ms(0), "a"), Some(Millis(40_001)));
        assert_eq!(l.next_change(Millis(40_001), "a"), Some(Millis(45_001)));
        assert_eq!(l.next_change(Millis(45_001), "a"), None);
        l.listed(ms(5), "b", "1");
        l.blind(ms(10));
        assert_eq!(l.next_change(ms(10), "b"), Some(Millis(45_001)));
        assert_eq!(l.next_change(ms(46), "b"), Some(Millis(55_001)));
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
