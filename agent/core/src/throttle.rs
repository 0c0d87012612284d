//! When a request may start and when a device may be used.
//!
//! Owns: the request gate (a shortest time between starts) and the share meter (device time against a share). Must
//! not: read a clock, sleep or hold a lock; `now` is CLOCK_BOOTTIME in nanoseconds and comes in as an argument. Both
//! have one owner at a time, so a check and its effect are one call.

use std::collections::VecDeque;

/// A place in the queue of a [`RequestGate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u64);

/// What [`RequestGate::reserve`] gave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The place; give it to [`RequestGate::start`] or [`RequestGate::cancel`].
    pub slot: Slot,
    /// Earliest start as things are now; a changed interval or a cancelled slot ahead moves it.
    pub start_at: u64,
}

/// First come, first served, with a shortest time between two starts that were really made.
///
/// A place is taken before anybody sleeps, and a start counts from when it happens: a caller that comes late pushes
/// those behind it back, so two starts are never nearer than the interval.
#[derive(Clone, Debug, Default)]
pub struct RequestGate {
    interval: u64,
    last_start: Option<u64>,
    waiting: VecDeque<Slot>,
    next: u64,
}

impl RequestGate {
    /// A gate with this many nanoseconds between starts; 0 = none.
    pub fn new(interval: u64) -> Self {
        Self {
            interval,
            ..Self::default()
        }
    }

    /// Changes the interval for every start from now on, those already waiting included.
    pub fn set_interval(&mut self, interval: u64) {
        self.interval = interval;
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Takes the place behind everybody who waits.
    pub fn reserve(&mut self, now: u64) -> Reservation {
        let slot = Slot(self.next);
        self.next = self.next.saturating_add(1);
        self.waiting.push_back(slot);
        Reservation {
            slot,
            start_at: self.at(self.waiting.len().saturating_sub(1), now),
        }
    }

    /// Earliest start of a place as things are now; `None` for one that started or was cancelled.
    pub fn start_at(&self, slot: Slot, now: u64) -> Option<u64> {
        let place = self.waiting.iter().position(|waiting| *waiting == slot)?;
        Some(self.at(place, now))
    }

    /// Starts now if it is this place's turn and the interval has passed; otherwise says when to ask again (`None`: the
    /// place is gone).
    ///
    /// # Errors
    /// The time to ask again.
    pub fn start(&mut self, slot: Slot, now: u64) -> Result<(), Option<u64>> {
        let Some(at) = self.start_at(slot, now) else {
            return Err(None);
        };
        if self.waiting.front() != Some(&slot) || at > now {
            return Err(Some(at));
        }
        self.waiting.pop_front();
        self.last_start = Some(now);
        Ok(())
    }

    /// Gives a place back; those behind it move up.
    pub fn cancel(&mut self, slot: Slot) {
        self.waiting.retain(|waiting| *waiting != slot);
    }

    /// When the head of the queue may start: the same for a caller that keeps no queue.
    pub fn ready_at(&self, now: u64) -> u64 {
        self.at(0, now)
    }

    fn at(&self, place: usize, now: u64) -> u64 {
        let first = self
            .last_start
            .map_or(now, |last| last.saturating_add(self.interval).max(now));
        let ahead = u64::try_from(place).unwrap_or(u64::MAX);
        first.saturating_add(ahead.saturating_mul(self.interval))
    }
}

/// The right to use a device for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Share of the device's time in permille, at most 1000; 0 = wait.
    pub share_permille: u16,
    /// No step begins from here on.
    pub expires_at: u64,
    /// The kernel stops the process here.
    pub fence_at: u64,
}

impl Grant {
    fn ends_at(&self) -> u64 {
        self.expires_at.min(self.fence_at)
    }

    fn share(&self) -> u16 {
        self.share_permille.min(1000)
    }
}

/// Bills device time against a share: a token bucket that starts empty, holds a small burst, and may go into debt by
/// one step.
///
/// Kept in permille-nanoseconds, so no remainder is ever lost. Time outside a grant earns nothing.
#[derive(Clone, Debug)]
pub struct ShareMeter {
    grant: Option<Grant>,
    /// Credit (or debt) in nanoseconds of device time × 1000.
    level: i128,
    /// Up to when `level` was filled.
    filled_to: u64,
    burst: u64,
}

/// Most device time that an idle worker saves up.
pub const BURST_NANOS: u64 = 50_000_000;

impl Default for ShareMeter {
    fn default() -> Self {
        Self::new(BURST_NANOS)
    }
}

impl ShareMeter {
    /// A meter without a grant; the burst is capped at [`BURST_NANOS`].
    pub fn new(burst: u64) -> Self {
        Self {
            grant: None,
            level: 0,
            filled_to: 0,
            burst: burst.min(BURST_NANOS),
        }
    }

    /// Replaces the grant. What the old one earned until now stays earned, debt stays debt.
    pub fn set_grant(&mut self, now: u64, grant: Grant) {
        self.fill(now);
        self.filled_to = self.filled_to.max(now);
        self.grant = Some(grant);
    }

    /// When a step may begin: a time not after `now` means at once; `None` means never under this grant.
    pub fn ready_at(&mut self, now: u64) -> Option<u64> {
        self.fill(now);
        let grant = self.grant?;
        if now >= grant.ends_at() || grant.share() == 0 {
            return None;
        }
        if self.level >= 0 {
            return Some(now);
        }
        let share = u128::from(grant.share());
        let wait = self.level.unsigned_abs().div_ceil(share);
        let at = self
            .filled_to
            .max(now)
            .saturating_add(u64::try_from(wait).unwrap_or(u64::MAX));
        (at < grant.ends_at()).then_some(at)
    }

    /// Bills device time that was used.
    pub fn bill(&mut self, now: u64, nanoseconds: u64) {
        self.fill(now);
        self.level = self
            .level
            .saturating_sub(i128::from(nanoseconds).saturating_mul(1000));
    }

    /// Earns what the grant gives between the last fill and `now`.
    fn fill(&mut self, now: u64) {
        let Some(grant) = self.grant else {
            self.filled_to = self.filled_to.max(now);
            return;
        };
        let until = now.min(grant.ends_at());
        let elapsed = until.saturating_sub(self.filled_to);
        let earned = i128::from(elapsed).saturating_mul(i128::from(grant.share()));
        let most = i128::from(self.burst).saturating_mul(1000);
        self.level = self.level.saturating_add(earned).min(most);
        self.filled_to = self.filled_to.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MILLI: u64 = 1_000_000;

    #[test]
    fn a_hundred_callers_at_once_start_fifty_milliseconds_apart() {
        let mut gate = RequestGate::new(50 * MILLI);
        let slots: Vec<_> = (0..100).map(|_| gate.reserve(7)).collect();
        assert_eq!(slots[99].start_at, 7 + 99 * 50 * MILLI);
        let mut starts = Vec::new();
        let mut now = 7;
        for (index, reservation) in slots.iter().enumerate() {
            // Every third caller oversleeps, by up to more than an interval.
            now = gate.start_at(reservation.slot, now).unwrap().max(now);
            now += if index % 3 == 0 {
                17 * MILLI * u64::try_from(index % 5).unwrap()
            } else {
                0
            };
            gate.start(reservation.slot, now).unwrap();
            starts.push(now);
        }
        for pair in starts.windows(2) {
            assert!(pair[1] - pair[0] >= 50 * MILLI, "{pair:?}");
        }
    }

    #[test]
    fn a_cancelled_place_is_used_by_the_next_caller() {
        let mut gate = RequestGate::new(10);
        let first = gate.reserve(0);
        gate.start(first.slot, 0).unwrap();
        let second = gate.reserve(0);
        let third = gate.reserve(0);
        assert_eq!((second.start_at, third.start_at), (10, 20));
        gate.cancel(second.slot);
        assert_eq!(gate.start_at(third.slot, 0), Some(10));
        assert_eq!(gate.start(second.slot, 99), Err(None));
        assert_eq!(gate.start(third.slot, 9), Err(Some(10)));
        assert_eq!(gate.start(third.slot, 10), Ok(()));
    }

    #[test]
    fn nobody_overtakes_the_caller_in_front() {
        let mut gate = RequestGate::new(10);
        let first = gate.reserve(0);
        let second = gate.reserve(0);
        assert_eq!(gate.start(second.slot, 1000), Err(Some(1010)));
        assert_eq!(gate.start(first.slot, 1000), Ok(()));
        assert_eq!(gate.start(second.slot, 1009), Err(Some(1010)));
    }

    #[test]
    fn without_a_grant_nothing_runs_and_nothing_is_earned() {
        let mut meter = ShareMeter::default();
        assert_eq!(meter.ready_at(5), None);
        meter.set_grant(
            1000,
            Grant {
                share_permille: 500,
                expires_at: 2000,
                fence_at: 3000,
            },
        );
        assert_eq!(meter.ready_at(1000), Some(1000));
        meter.bill(1000, 100);
        assert_eq!(meter.ready_at(1000), Some(1200));
        assert_eq!(meter.ready_at(2000), None);
        // A new grant long after the old one ended finds only what the old one earned.
        meter.bill(2000, 1_000_000);
        meter.set_grant(
            9_000_000,
            Grant {
                share_permille: 500,
                expires_at: u64::MAX,
                fence_at: u64::MAX,
            },
        );
        assert_eq!(meter.ready_at(9_000_000), Some(9_000_000 + 2 * (1_000_000 - 400)));
    }

    #[test]
    fn a_debt_that_is_repaid_as_the_grant_ends_is_repaid_too_late() {
        for (debt, ready) in [(49, Some(49)), (50, None)] {
            let mut meter = ShareMeter::default();
            let grant = Grant {
                share_permille: 1000,
                expires_at: 50,
                fence_at: 100,
            };
            meter.set_grant(0, grant);
            meter.bill(0, debt);
            assert_eq!(meter.ready_at(0), ready);
        }
    }

    #[test]
    fn a_fence_before_the_expiry_ends_a_grant() {
        let mut meter = ShareMeter::default();
        meter.set_grant(
            0,
            Grant {
                share_permille: 1000,
                expires_at: 100,
                fence_at: 50,
            },
        );
        assert_eq!(meter.ready_at(49), Some(49));
        assert_eq!(meter.ready_at(50), None);
    }

    proptest! {
        #[test]
        fn starts_are_never_nearer_than_the_interval_in_force_and_never_later_than_they_may(
            steps in prop::collection::vec((0u8..4, 0u64..200), 1..300)
        ) {
            let mut interval = 100;
            let mut gate = RequestGate::new(interval);
            let mut now = 0;
            let mut slots: Vec<Slot> = Vec::new();
            let mut last: Option<u64> = None;
            for (what, amount) in steps {
                now += amount;
                match what {
                    0 => slots.push(gate.reserve(now).slot),
                    1 => { if let Some(slot) = slots.pop() { gate.cancel(slot); } }
                    2 => {
                        interval = amount;
                        gate.set_interval(interval);
                    }
                    _ => for slot in slots.clone() {
                        // The first who waits starts as soon as he may.
                        let due = slots.first() == Some(&slot) && last.is_none_or(|last| now - last >= interval);
                        prop_assert_eq!(gate.start(slot, now).is_ok(), due);
                        if due {
                            last = Some(now);
                            slots.retain(|kept| *kept != slot);
                        }
                    },
                }
                prop_assert_eq!(gate.waiting(), slots.len());
            }
        }

        #[test]
        fn billed_time_never_exceeds_the_share_the_burst_and_one_step(
            share in 1u16..=1000,
            burst in 0u64..=50_000_000,
            steps in prop::collection::vec((0u64..80_000_000, 0u64..20_000_000, 1u64..400_000_000), 1..200)
        ) {
            let mut meter = ShareMeter::new(burst);
            let mut now = 1_000_000_000u64;
            let begin = now;
            meter.set_grant(now, Grant { share_permille: share, expires_at: now + 100_000_000, fence_at: u64::MAX });
            let (mut billed, mut longest) = (0u128, 0u128);
            for (pause, step, lease) in steps {
                now += pause;
                if pause % 3 == 0 {
                    let grant = Grant { share_permille: share, expires_at: now + lease, fence_at: u64::MAX };
                    meter.set_grant(now, grant);
                }
                match meter.ready_at(now) {
                    Some(at) if at <= now => {}
                    Some(at) => now = at,
                    None => continue,
                }
                prop_assert!(meter.ready_at(now).is_some_and(|at| at <= now));
                now += step;
                meter.bill(now, step);
                billed += u128::from(step);
                longest = longest.max(u128::from(step));
                let bound = u128::from(now - begin) * u128::from(share) / 1000 + u128::from(burst) + longest + 1;
                prop_assert!(billed <= bound, "{} > {}", billed, bound);
            }
        }

        #[test]
        fn a_busy_worker_gets_its_whole_share(share in 1u16..=1000, step in 1u64..20_000_000) {
            let mut meter = ShareMeter::default();
            meter.set_grant(0, Grant { share_permille: share, expires_at: u64::MAX, fence_at: u64::MAX });
            let (mut now, mut billed) = (0u64, 0u64);
            for _ in 0..200 {
                now = meter.ready_at(now).unwrap().max(now) + step;
                meter.bill(now, step);
                billed += step;
            }
            prop_assert!(u128::from(billed) * 1000 >= u128::from(now - step) * u128::from(share));
        }
    }
}
