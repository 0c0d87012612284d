//! Who the agent is, how long its lease carries its workers, and whose orders it takes.
//!
//! Owns: the session's name, the renewal state machine, the fence, and the check of an order's term. Must not read a
//! clock or renew anything: time comes in as CLOCK_BOOTTIME nanoseconds.

use gogrid_api::{LeaseTiming, Millis};
use std::fmt;

/// Nanoseconds of CLOCK_BOOTTIME.
pub type Nanos = u64;

/// A duration in nanoseconds.
pub fn nanos(Millis(millis): Millis) -> Nanos {
    millis.saturating_mul(1_000_000)
}

/// One life of one agent: holder of the node's Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    boot: String,
    instance: String,
}

impl Session {
    /// A session of this boot of the machine.
    pub fn new(boot_id: &str, instance: &str) -> Self {
        Self {
            boot: boot_id.trim().to_owned(),
            instance: instance.trim().to_owned(),
        }
    }

    /// The boot's id.
    pub fn boot(&self) -> &str {
        &self.boot
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.boot, self.instance)
    }
}

/// One renewal on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// When it was sent.
    pub sent: Nanos,
    /// When it is given up.
    pub deadline: Nanos,
}

/// What the lease says about the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// No renewal has succeeded yet: nothing may start.
    Unproven,
    /// They may run.
    Held,
    /// The fence has passed: their kernel timers have stopped them; they may be continued on contact.
    Fenced,
    /// They were stopped for too long: they must be killed.
    Expired,
}

/// Renewals of the node's lease, and the fence that follows from them.
#[derive(Clone, Debug)]
pub struct Renewals {
    timing: LeaseTiming,
    last_good: Option<Nanos>,
    last_sent: Option<Nanos>,
    failures: u32,
}

impl Renewals {
    /// None sent yet.
    pub fn new(timing: LeaseTiming) -> Self {
        Self {
            timing,
            last_good: None,
            last_sent: None,
            failures: 0,
        }
    }

    /// Begins a renewal.
    pub fn begin(&mut self, now: Nanos) -> Attempt {
        self.last_sent = Some(now);
        Attempt {
            sent: now,
            deadline: now.saturating_add(nanos(self.timing.attempt())),
        }
    }

    /// The API server has said yes: the fence counts from before the renewal was sent.
    pub fn succeeded(&mut self, sent: Nanos) {
        self.failures = 0;
        self.last_good = Some(self.last_good.map_or(sent, |last| last.max(sent)));
    }

    /// The renewal failed or its deadline passed.
    pub fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
    }

    /// When to renew next: one interval after the last good one was sent, sooner after a failure.
    pub fn next(&self) -> Nanos {
        let Some(last) = self.last_sent else { return 0 };
        let renew = nanos(self.timing.renew());
        last.saturating_add(if self.failures == 0 { renew } else { renew / 4 })
    }

    /// Failures since the last good renewal.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// The instant after which no worker may run.
    pub fn fence_at(&self) -> Option<Nanos> {
        self.last_good
            .map(|sent| sent.saturating_add(nanos(self.timing.fence_after())))
    }

    /// What that means now.
    pub fn standing(&self, now: Nanos) -> Standing {
        match self.fence_at() {
            None => Standing::Unproven,
            Some(fence) if now < fence => Standing::Held,
            Some(fence) if now < fence.saturating_add(nanos(self.timing.fenced_hold())) => Standing::Fenced,
            Some(_) => Standing::Expired,
        }
    }
}

/// Whether a session that begins may take the Lease from the one that holds it.
///
/// It may where nothing of the holder can be left: it is one of `former`, whose processes in this state directory are gone; the
/// machine was started since; or its Lease was seen `unchanged` for so long that its workers, which stood still at the
/// fence, were killed after the hold as well. Otherwise they still take memory that would be given away a second time.
pub fn may_take(
    holder: Option<&str>,
    session: &Session,
    former: &[String],
    unchanged: Millis,
    timing: LeaseTiming,
) -> bool {
    let Some(holder) = holder.filter(|h| !h.is_empty()) else {
        return true;
    };
    let boot = holder.split_once('/').map_or(holder, |(boot, _)| boot);
    let killed = timing.replace_after().0.saturating_add(timing.fenced_hold().0);
    former.iter().any(|former| former == holder) || boot != session.boot || unchanged.0 > killed
}

/// The order was written by a leader that has been followed by another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ordered under leader term {ordered}, but the leader lease is at term {current}")]
pub struct StaleTerm {
    /// Term in the order.
    pub ordered: i64,
    /// Term of the leader Lease.
    pub current: i64,
}

/// Whether an order of that term may be taken.
///
/// # Errors
/// [`StaleTerm`] when a later leader has been seen.
pub fn check_term(ordered: i64, current: i64) -> Result<(), StaleTerm> {
    if ordered < current {
        Err(StaleTerm { ordered, current })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_session_is_named_by_boot_and_instance() {
        assert_eq!(Session::new("b\n", "i").to_string(), "b/i");
    }

    #[test]
    fn a_lease_is_taken_only_from_a_session_of_which_nothing_can_be_left() {
        let timing = LeaseTiming::default();
        let me = Session::new("boot", "me");
        let take = |holder, former: &[&str]| {
            let former: Vec<String> = former.iter().map(|&session| session.into()).collect();
            may_take(holder, &me, &former, Millis(0), timing)
        };
        assert!(take(None, &[]) && take(Some(""), &[]), "nobody's");
        assert!(
            take(Some("boot/a"), &["boot/a", "boot/b"]),
            "its processes were ended"
        );
        assert!(take(Some("earlier/a"), &[]), "the machine was started since");
        assert!(!take(Some("boot/a"), &[]), "it may live");
        assert!(!take(Some("boot/a"), &["boot/b"]), "somebody else's were");
    }

    #[test]
    fn workers_that_stand_still_hold_memory_so_their_lease_is_taken_only_once_they_were_killed() {
        let timing = LeaseTiming::default();
        let me = Session::new("boot", "me");
        let take = |unchanged| may_take(Some("boot/a"), &me, &[], Millis(unchanged), timing);
        assert!(!take(45_001), "they stand still");
        assert!(!take(645_000));
        assert!(take(645_001));
    }

    #[test]
    fn an_order_of_an_earlier_term_is_refused_with_both_terms() {
        assert!(check_term(3, 3).is_ok());
        assert!(check_term(4, 3).is_ok());
        assert_eq!(
            check_term(2, 3),
            Err(StaleTerm {
                ordered: 2,
                current: 3
            })
        );
    }

    #[test]
    fn a_failed_renewal_is_tried_again_sooner_than_a_good_one() {
        let mut renewals = Renewals::new(LeaseTiming::default());
        assert_eq!(renewals.next(), 0);
        assert_eq!(renewals.standing(0), Standing::Unproven);
        let attempt = renewals.begin(1_000);
        assert_eq!(attempt.deadline, 4_000_001_000);
        renewals.failed();
        assert_eq!(renewals.next(), 2_500_001_000);
        renewals.succeeded(1_000);
        assert_eq!(renewals.next(), 10_000_001_000);
    }

    #[test]
    fn failures_are_counted_until_a_renewal_is_good_and_fenced_workers_are_held_for_so_long_and_no_longer() {
        let timing = LeaseTiming::default();
        let mut renewals = Renewals::new(timing);
        renewals.failed();
        renewals.failed();
        assert_eq!(renewals.failures(), 2);
        renewals.succeeded(1_000);
        assert_eq!(renewals.failures(), 0);
        let expires = 1_000 + nanos(timing.fence_after()) + nanos(timing.fenced_hold());
        assert_eq!(renewals.standing(expires - 1), Standing::Fenced);
        assert_eq!(renewals.standing(expires), Standing::Expired);
        assert_eq!(Session::new("boot", "a").boot(), "boot");
    }

    proptest! {
        #[test]
        fn a_fence_never_lies_later_than_the_last_good_send_and_35_of_40_parts_of_the_lease(
            lease in 2_000_u64..400_000,
            attempts in prop::collection::vec((0_u64..20_000_000_000, any::<bool>(), 0_u64..9_000_000_000), 1..40),
        ) {
            let timing = LeaseTiming::from_lease(Millis(lease)).unwrap();
            let mut renewals = Renewals::new(timing);
            let (mut now, mut good) = (0, None::<u64>);
            for (wait, ok, took) in attempts {
                now += wait;
                let attempt = renewals.begin(now);
                now += took;
                if ok {
                    renewals.succeeded(attempt.sent);
                    good = Some(attempt.sent);
                } else {
                    renewals.failed();
                }
                match (renewals.fence_at(), good) {
                    (Some(fence), Some(sent)) => {
                        prop_assert!(fence <= sent + lease * 1_000_000 * 35 / 40 + 1_000_000);
                        prop_assert_eq!(renewals.standing(fence), Standing::Fenced);
                        prop_assert_eq!(renewals.standing(fence - 1), Standing::Held);
                    }
                    (fence, good) => prop_assert!(fence.is_none() && good.is_none()),
                }
            }
        }
    }
}
