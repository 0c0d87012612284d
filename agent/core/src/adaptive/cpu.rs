//! What others use of the CPU device, and want of it, from the kernel's counters.
//!
//! Owns: the difference of two looks at the counters as a [`Sample`]. Must not read any file.
//!
//! Time is exact, unlike a device's utilisation: whatever ran and was not ours was others'. Who is held back by us runs
//! less than he wants, so what the pressure counter shows beyond our own threads' waiting is added. Ours is subtracted
//! in full, which errs towards too little: own load alone adds nothing, however our threads push each other.

use super::Sample;
use crate::session::Nanos;
use std::collections::BTreeMap;

/// Share of time in which somebody waited for memory, in permille, from which the device counts as strained.
pub const MEMORY_STRAIN: u64 = 100;

/// One thread of ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    /// Time on a processor, nanoseconds.
    pub ran: u64,
    /// Time ready to run without a processor, nanoseconds.
    pub waited: u64,
}

/// The kernel's counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// When, in nanoseconds of CLOCK_BOOTTIME.
    pub at: Nanos,
    /// Processors.
    pub processors: u64,
    /// Time in which processors ran anything, all together, nanoseconds.
    pub busy: u64,
    /// Time in which somebody waited for a processor, nanoseconds; `None`: the kernel does not count it.
    pub cpu_pressure: Option<u64>,
    /// Time in which somebody waited for memory, nanoseconds; `None`: the kernel does not count it.
    pub memory_pressure: Option<u64>,
    /// Our threads by id; `None`: some can't be seen.
    pub own: Option<BTreeMap<i32, Thread>>,
}

/// What happened between two looks; nothing where no time has passed.
pub fn sample(before: &Counters, after: &Counters) -> Option<Sample> {
    let elapsed = after.at.checked_sub(before.at).filter(|elapsed| *elapsed > 0)?;
    let permille = |time: u64, of: u64| {
        let permille = u128::from(time) * 1000 / u128::from(of.max(1));
        u64::try_from(permille.min(1000)).unwrap_or(1000)
    };
    let pressure =
        |before: Option<u64>, after: Option<u64>| Some(permille(after?.saturating_sub(before?), elapsed));
    let foreign = match (&before.own, &after.own) {
        (Some(old), Some(new)) => {
            let (mut ran, mut waited) = (0_u64, 0_u64);
            for (id, thread) in new {
                let since = old.get(id).copied().unwrap_or_default();
                ran = ran.saturating_add(thread.ran.saturating_sub(since.ran));
                waited = waited.saturating_add(thread.waited.saturating_sub(since.waited));
            }
            let busy = after.busy.saturating_sub(before.busy);
            let machine = elapsed.saturating_mul(after.processors.max(1));
            let used = permille(busy.saturating_sub(ran), machine);
            let stalled = pressure(before.cpu_pressure, after.cpu_pressure).unwrap_or(0);
            let wanted = stalled.saturating_sub(permille(waited, elapsed));
            u16::try_from(used.saturating_add(wanted).min(1000)).ok()
        }
        _ => None,
    };
    let strained = pressure(before.memory_pressure, after.memory_pressure)
        .is_some_and(|stalled| stalled >= MEMORY_STRAIN);
    Some(Sample {
        at: after.at,
        foreign,
        strained,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: u64 = 1_000_000;

    /// Half a second on two processors.
    fn look(own: &[(i32, u64, u64)]) -> (Counters, Counters) {
        let before = Counters {
            at: 1_000 * MILLI,
            processors: 2,
            busy: 7_000 * MILLI,
            cpu_pressure: Some(50 * MILLI),
            memory_pressure: Some(9 * MILLI),
            own: Some(
                own.iter()
                    .map(|(id, ..)| (*id, Thread { ran: 5, waited: 5 }))
                    .collect(),
            ),
        };
        let mut after = before.clone();
        after.at += 500 * MILLI;
        let moved = |(id, ran, waited): &(i32, u64, u64)| {
            (
                *id,
                Thread {
                    ran: 5 + ran * MILLI,
                    waited: 5 + waited * MILLI,
                },
            )
        };
        after.own = Some(own.iter().map(moved).collect());
        (before, after)
    }

    fn foreign(before: &Counters, after: &Counters) -> Option<u16> {
        sample(before, after).unwrap().foreign
    }

    #[test]
    fn what_ran_and_was_not_ours_was_others() {
        let (before, mut after) = look(&[(1, 400, 0), (2, 200, 0)]);
        after.busy += 800 * MILLI;
        assert_eq!(
            sample(&before, &after),
            Some(Sample {
                at: 1_500 * MILLI,
                foreign: Some(200),
                strained: false
            })
        );
        // The counter of busy time is coarser than ours.
        after.busy = before.busy + 590 * MILLI;
        assert_eq!(foreign(&before, &after), Some(0));
    }

    #[test]
    fn a_thread_that_began_between_the_looks_counts_from_its_beginning() {
        let (before, mut after) = look(&[(1, 100, 0)]);
        let new = Thread {
            ran: 300 * MILLI,
            waited: 0,
        };
        after.own.as_mut().unwrap().insert(2, new);
        after.busy += 500 * MILLI;
        assert_eq!(foreign(&before, &after), Some(100));
    }

    #[test]
    fn who_is_held_back_by_us_counts_with_what_he_waits_for() {
        // One of ours and one of theirs share a processor, the other one idles: somebody waits all the time, we half.
        let (before, mut after) = look(&[(1, 250, 250)]);
        after.busy += 500 * MILLI;
        after.cpu_pressure = Some(550 * MILLI);
        assert_eq!(foreign(&before, &after), Some(250 + 500));
    }

    #[test]
    fn own_threads_that_push_each_other_are_nobody_elses_load() {
        let (before, mut after) = look(&[(1, 500, 250), (2, 250, 250), (3, 250, 0)]);
        after.busy += 1_000 * MILLI;
        after.cpu_pressure = Some(550 * MILLI);
        assert_eq!(foreign(&before, &after), Some(0));
    }

    #[test]
    fn a_kernel_without_pressure_counters_still_tells_what_others_use() {
        let (mut before, mut after) = look(&[(1, 100, 0)]);
        after.busy += 500 * MILLI;
        (before.cpu_pressure, before.memory_pressure) = (None, None);
        assert_eq!(foreign(&before, &after), Some(400));
        (after.cpu_pressure, after.memory_pressure) = (None, None);
        assert_eq!(foreign(&before, &after), Some(400));
    }

    #[test]
    fn where_some_of_our_threads_can_not_be_seen_nothing_is_said_of_others() {
        let (before, mut after) = look(&[]);
        after.own = None;
        after.busy += 1_000 * MILLI;
        assert_eq!(foreign(&before, &after), None);
        assert_eq!(
            foreign(
                &after.clone(),
                &Counters {
                    at: after.at + 1,
                    ..before
                }
            ),
            None
        );
    }

    #[test]
    fn a_tenth_of_the_time_waiting_for_memory_is_strain() {
        let (before, mut after) = look(&[]);
        after.memory_pressure = Some((9 + 50) * MILLI - 1);
        assert!(!sample(&before, &after).unwrap().strained);
        after.memory_pressure = Some((9 + 50) * MILLI);
        assert!(sample(&before, &after).unwrap().strained);
    }

    #[test]
    fn more_than_all_is_all_and_no_time_is_no_sample() {
        let (before, mut after) = look(&[]);
        assert_eq!(sample(&before, &before), None);
        assert_eq!(sample(&after, &before), None);
        after.busy += 900 * MILLI;
        after.cpu_pressure = Some(9_000 * MILLI);
        assert_eq!(foreign(&before, &after), Some(1000));
    }
}
