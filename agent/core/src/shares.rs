//! How a device's time, batch and request starts are divided among its workers.
//!
//! Owns: the division, whose sum never exceeds the ceiling of the node's profile. Must not send anything or know time.

use crate::protocol::WorkerId;
use gogrid_api::Percent;

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
    fn a_batch_is_divided_but_never_to_nothing() {
        assert_eq!(
            [batch_each(16, 1), batch_each(16, 3), batch_each(2, 5)],
            [16, 5, 1]
        );
    }

    proptest! {
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
