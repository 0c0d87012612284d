//! The lease timing contract: every duration of fencing is a fixed ratio of one number.
//!
//! Owns: those ratios. Must not read a clock.

use crate::Millis;

/// Durations of leases, all derived from the node lease's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTiming {
    lease: Millis,
    fence_after: Millis,
    drift_margin: Millis,
}

/// The asked-for lease length is outside 2 to 400 s.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("lease duration {0} ms must be 2000 to 400000 ms")]
pub struct LeaseTimingError(u64);

impl Default for LeaseTiming {
    fn default() -> Self {
        Self::of(Millis(40_000))
    }
}

impl LeaseTiming {
    fn of(lease: Millis) -> Self {
        Self {
            lease,
            fence_after: Millis(lease.0 - lease.0 / 8),
            drift_margin: Millis(lease.0 / 8),
        }
    }

    /// The same with a fence at another time after the last good renewal, and another wait after a lease's end: for
    /// simulations that show what the two are for. No flag leads here.
    #[must_use]
    pub fn with_margins(self, fence_after: Millis, drift_margin: Millis) -> Self {
        Self {
            lease: self.lease,
            fence_after,
            drift_margin,
        }
    }

    /// Timing around a node lease of that length; 40 s in production, shorter in tests, all ratios kept.
    ///
    /// # Errors
    /// Outside 2 s to 400 s.
    pub fn from_lease(lease: Millis) -> Result<Self, LeaseTimingError> {
        if (2_000..=400_000).contains(&lease.0) {
            Ok(Self::of(lease))
        } else {
            Err(LeaseTimingError(lease.0))
        }
    }

    /// Length of a node lease (40 s).
    pub fn lease(self) -> Millis {
        self.lease
    }

    /// Between two renewals (10 s).
    pub fn renew(self) -> Millis {
        Millis(self.lease.0 / 4)
    }

    /// Deadline of one renewal attempt (4 s).
    pub fn attempt(self) -> Millis {
        Millis(self.lease.0 / 10)
    }

    /// How long before the lease's end a worker is stopped (5 s).
    pub fn stop_margin(self) -> Millis {
        Millis(self.lease.0.saturating_sub(self.fence_after.0))
    }

    /// How long after the lease's end the operator waits more, for clocks that drift (5 s).
    pub fn drift_margin(self) -> Millis {
        self.drift_margin
    }

    /// From the sending of the last good renewal to the fence (35 s).
    pub fn fence_after(self) -> Millis {
        self.fence_after
    }

    /// From the last observed change of a lease to placing elsewhere (45 s).
    pub fn replace_after(self) -> Millis {
        Millis(self.lease.0 + self.drift_margin().0)
    }

    /// Length of the leader lease (8 s).
    pub fn leader_lease(self) -> Millis {
        Millis(self.lease.0 / 5)
    }

    /// Between two renewals of the leader lease (2 s).
    pub fn leader_renew(self) -> Millis {
        Millis(self.lease.0 / 20)
    }

    /// From the sending of the last good renewal of the leader lease to the last write under it (6 s).
    pub fn leader_writes(self) -> Millis {
        Millis(self.leader_lease().0 * 3 / 4)
    }

    /// How long what a leader sent may be on its way before its connection is given up (2 s): nothing arrives after the
    /// leader lease's end.
    pub fn leader_delivery(self) -> Millis {
        Millis(self.leader_lease().0 / 4)
    }

    /// How long a stopped worker is kept for its node to come back before it is killed (600 s).
    pub fn fenced_hold(self) -> Millis {
        Millis(self.lease.0 * 15)
    }

    /// Between two batches of progress in a GpuNode while anything runs (30 s).
    pub fn heartbeat_batch(self) -> Millis {
        Millis(self.lease.0 * 3 / 4)
    }

    /// Longest time between two checkpoints of results (30 s).
    pub fn checkpoint(self) -> Millis {
        Millis(self.lease.0 * 3 / 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_worker_always_precedes_a_new_placement_by_both_margins() {
        for lease in [2_000, 8_000, 40_000, 400_000] {
            let t = LeaseTiming::from_lease(Millis(lease)).unwrap();
            assert_eq!(
                t.replace_after().0 - t.fence_after().0,
                t.stop_margin().0 + t.drift_margin().0
            );
            assert!(t.attempt().0 < t.renew().0);
            assert!(t.leader_writes().0 + t.leader_delivery().0 <= t.leader_lease().0);
        }
        assert!(LeaseTiming::from_lease(Millis(1_999)).is_err());
    }

    #[test]
    fn the_default_timing_is_that_of_the_design() {
        let t = LeaseTiming::default();
        let seconds = [
            t.lease(),
            t.renew(),
            t.attempt(),
            t.fence_after(),
            t.replace_after(),
            t.leader_lease(),
            t.leader_renew(),
        ];
        assert_eq!(seconds.map(|m| m.0 / 1000), [40, 10, 4, 35, 45, 8, 2]);
    }
}
