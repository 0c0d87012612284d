//! How a device's time, batch and request starts are divided among its workers.
//!
//! Owns: the division, whose sum never exceeds the ceiling of the node's profile, grants that are still out included.
//! Must not send anything or read a clock.

use crate::protocol::WorkerId;
use crate::session::Nanos;
use gogrid_api::Percent;
use std::collections::BTreeMap;

/// One worker's claim on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Which.
    pub worker: WorkerId,
    /// What its own limits allow, in permille of the device.
    pub most: u16,
    /// Whether it has anything to do.
    pub active: bool,
}

/// A percentage as permille.
pub fn permille(Percent(percent): Percent) -> u16 {
    u16::from(percent.min(100)) * 10
}

/// Divides `ceiling` permille evenly among the active workers, none above its own limit; what one can't use goes to
/// the others. Idle workers get nothing until they have something to do.
pub fn divide(ceiling: u16, claims: &[Claim]) -> Vec<(WorkerId, u16)> {
    let mut order: Vec<&Claim> = claims.iter().filter(|c| c.active).collect();
    order.sort_by_key(|c| (c.most, c.worker));
    let (mut left, mut shares) = (ceiling.min(1000), vec![]);
    for (i, claim) in order.iter().enumerate() {
        let waiting = u16::try_from(order.len() - i).unwrap_or(u16::MAX);
        let share = claim.most.min(left / waiting.max(1));
        left -= share;
        shares.push((claim.worker, share));
    }
    shares.extend(claims.iter().filter(|c| !c.active).map(|c| (c.worker, 0)));
    shares
}

/// Grants of one device that are out: what each of its workers may still act on.
///
/// A worker acts on the last grant it has read, at most until that expires. So a share that shrinks stays counted in
/// full until the larger grant has run out, and nobody else grows into it before: the sum of all grants that anybody
/// may act on never exceeds the ceiling.
#[derive(Clone, Debug, Default)]
pub struct Outstanding {
    out: BTreeMap<WorkerId, Vec<(u16, Nanos)>>,
}

impl Outstanding {
    /// What `worker` may act on at most.
    fn most(&self, worker: WorkerId) -> u16 {
        let grants = self.out.get(&worker).into_iter().flatten();
        grants.map(|(share, _)| *share).max().unwrap_or(0)
    }

    /// Shares to grant now, until `expires_at`: those wanted, in this order, as far as what others may still act on
    /// leaves room below the ceiling.
    pub fn issue(
        &mut self,
        now: Nanos,
        expires_at: Nanos,
        ceiling: u16,
        wanted: &[(WorkerId, u16)],
    ) -> Vec<(WorkerId, u16)> {
        for grants in self.out.values_mut() {
            grants.retain(|(_, expires)| *expires > now);
        }
        self.out.retain(|_, grants| !grants.is_empty());
        let mut issued = vec![];
        for (worker, share) in wanted {
            let others = self
                .out
                .keys()
                .filter(|other| *other != worker)
                .fold(0_u16, |sum, other| sum.saturating_add(self.most(*other)));
            let share = (*share).min(ceiling.saturating_sub(others));
            let grants = self.out.entry(*worker).or_default();
            grants.retain(|(old, _)| *old > share);
            grants.push((share, expires_at));
            issued.push((*worker, share));
        }
        issued
    }

    /// The worker has ended: it acts on nothing any more.
    pub fn ended(&mut self, worker: WorkerId) {
        self.out.remove(&worker);
    }
}

/// The batch limit of one of `workers` workers on a device: their sum stays within the device's, each may do one.
pub fn batch_each(device: u16, workers: usize) -> u16 {
    let workers = u16::try_from(workers.max(1)).unwrap_or(u16::MAX);
    (device / workers).max(1)
}

/// How many records a worker may hold unanswered: enough to keep its batch full while the next are on their way.
pub fn window(batch: u16) -> usize {
    usize::from(batch.max(1)) * 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_idle_worker_leaves_its_share_to_the_busy_ones() {
        let claim = |worker, most, active| Claim { worker, most, active };
        assert_eq!(
            divide(600, &[claim(1, 1000, true), claim(2, 1000, false)]),
            [(1, 600), (2, 0)]
        );
        assert_eq!(
            divide(600, &[claim(1, 1000, true), claim(2, 100, true)]),
            [(2, 100), (1, 500)]
        );
    }

    #[test]
    fn who_grows_waits_until_the_larger_grant_of_who_shrank_has_run_out() {
        let mut grants = Outstanding::default();
        assert_eq!(grants.issue(0, 100, 600, &[(1, 600)]), [(1, 600)]);
        assert_eq!(
            grants.issue(50, 150, 600, &[(1, 300), (2, 300)]),
            [(1, 300), (2, 0)]
        );
        assert_eq!(
            grants.issue(99, 199, 600, &[(1, 300), (2, 300)]),
            [(1, 300), (2, 0)]
        );
        assert_eq!(
            grants.issue(100, 200, 600, &[(1, 300), (2, 300)]),
            [(1, 300), (2, 300)]
        );
        // One that has ended is not waited for; one that is alone never waits.
        grants.ended(1);
        assert_eq!(grants.issue(101, 201, 600, &[(2, 600)]), [(2, 600)]);
        assert_eq!(grants.issue(102, 202, 50, &[(2, 600)]), [(2, 50)]);
        assert_eq!(grants.issue(103, 203, 600, &[(2, 600)]), [(2, 600)]);
    }

    #[test]
    fn a_batch_is_divided_but_never_to_nothing() {
        assert_eq!(
            [batch_each(16, 1), batch_each(16, 3), batch_each(2, 5)],
            [16, 5, 1]
        );
    }

    proptest! {
        #[test]
        fn grants_that_anybody_may_act_on_never_exceed_the_ceiling(
            rounds in prop::collection::vec((1_u64..400, prop::collection::vec((0_u64..4, 0_u16..=1000), 1..4)), 1..40),
        ) {
            let (mut grants, mut now) = (Outstanding::default(), 0);
            let mut out: Vec<(u64, u16, u64)> = vec![];
            for (pause, wanted) in rounds {
                now += pause;
                for (worker, share) in grants.issue(now, now + 500, 800, &wanted) {
                    out.push((worker, share, now + 500));
                }
                // Whoever reads late acts on the largest grant that has not expired.
                let most = |w: u64| out.iter().filter(|g| g.0 == w && g.2 > now).map(|g| g.1).max().unwrap_or(0);
                let sum: u16 = (0..4).map(most).sum();
                prop_assert!(sum <= 800, "{} at {}", sum, now);
            }
        }

        #[test]
        fn shares_never_exceed_the_ceiling_nor_a_workers_own_limit(
            ceiling in 0_u16..=1000, claims in prop::collection::vec((0_u16..=1000, any::<bool>()), 0..12),
        ) {
            let claims: Vec<Claim> = (0..).zip(claims)
                .map(|(worker, (most, active))| Claim { worker, most, active }).collect();
            let shares = divide(ceiling, &claims);
            prop_assert_eq!(shares.len(), claims.len());
            prop_assert!(shares.iter().map(|(_, s)| u32::from(*s)).sum::<u32>() <= u32::from(ceiling));
            for claim in &claims {
                let (_, share) = shares.iter().find(|(w, _)| *w == claim.worker).unwrap();
                prop_assert!(*share <= claim.most && (claim.active || *share == 0));
            }
        }
    }
}
