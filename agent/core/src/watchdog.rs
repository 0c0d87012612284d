//! What is done, step by step, about memory beyond its bound.
//!
//! Owns: the ladder from the first sample above a bound to the end of the one above it, and which jobs stand above a
//! cap that has fallen. Must not measure, stop or kill anything.

use crate::session::{Nanos, nanos};
use gogrid_api::{Bytes, Millis};

/// Between two samples of a worker's memory.
pub const WATCH_EVERY: Millis = Millis(1_000);
/// Samples above the bound, one after the other, until the first rung; and below it until the ladder is left.
pub const SAMPLES: u32 = 2;
/// Above the bound for this long: the second rung.
pub const SHED_AFTER: Millis = Millis(5_000);
/// Above the bound for this long: the third.
pub const DRAIN_AFTER: Millis = Millis(15_000);
/// From the third rung to the last.
pub const DRAIN_GRACE: Millis = Millis(10_000);

/// What is done about a worker that holds too much; each rung includes those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rung {
    /// Nothing: it keeps to its bound.
    #[default]
    Clear,
    /// It gets no more records.
    StopAdmitting,
    /// It decodes one sequence at a time.
    Shed,
    /// It finishes what it has begun and hands the rest back.
    Drain,
    /// It is killed.
    Kill,
}

impl Rung {
    /// One word for events and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Rung::Clear => "Clear",
            Rung::StopAdmitting => "StopAdmitting",
            Rung::Shed => "Shed",
            Rung::Drain => "Drain",
            Rung::Kill => "Kill",
        }
    }
}

/// What a worker may be measured with under a reservation: 64 MiB more, or 2 %, for what no arena counts.
pub fn allowance(Bytes(reserved): Bytes) -> Bytes {
    Bytes(reserved.saturating_add((64 << 20).max(reserved / 50)))
}

/// One worker's place on the ladder. It climbs at most one rung a sample, so that every rung is seen, and it never
/// comes down again from draining: what was told to end ends.
#[derive(Clone, Debug, Default)]
pub struct Ladder {
    rung: Rung,
    above_since: Option<Nanos>,
    above: u32,
    below: u32,
}

impl Ladder {
    /// Where it stands.
    pub fn rung(&self) -> Rung {
        self.rung
    }

    /// Takes a sample; returns the rung when it has changed.
    pub fn observe(&mut self, now: Nanos, above: bool) -> Option<Rung> {
        if above {
            self.below = 0;
            self.above = self.above.saturating_add(1);
        } else {
            self.above = 0;
            self.below = self.below.saturating_add(1);
        }
        let since = if above {
            *self.above_since.get_or_insert(now)
        } else {
            if self.below >= SAMPLES {
                self.above_since = None;
            }
            self.above_since.unwrap_or(now)
        };
        let lasted = |millis| above && now.saturating_sub(since) >= nanos(millis);
        let grace = Millis(DRAIN_AFTER.0.saturating_add(DRAIN_GRACE.0));
        let next = match self.rung {
            Rung::Clear if self.above >= SAMPLES => Rung::StopAdmitting,
            Rung::StopAdmitting if lasted(SHED_AFTER) => Rung::Shed,
            Rung::Shed if lasted(DRAIN_AFTER) => Rung::Drain,
            // Told to hand back, it may take its grace whatever it holds meanwhile.
            Rung::Drain if now.saturating_sub(since) >= nanos(grace) => Rung::Kill,
            Rung::StopAdmitting | Rung::Shed if self.below >= SAMPLES => Rung::Clear,
            stays => stays,
        };
        (std::mem::replace(&mut self.rung, next) != next).then_some(next)
    }
}

/// Who must give way under a cap that has fallen below what is held: the newest, as many as it takes.
/// `holdings` are (name, bytes, since when), in any order.
pub fn above_cap(Bytes(cap): Bytes, holdings: &[(&str, Bytes, Nanos)]) -> Vec<String> {
    let mut newest: Vec<_> = holdings.to_vec();
    newest.sort_by_key(|(name, _, since)| (std::cmp::Reverse(*since), *name));
    let mut held = newest
        .iter()
        .fold(0_u64, |sum, (_, Bytes(bytes), _)| sum.saturating_add(*bytes));
    let mut names = vec![];
    for (name, Bytes(bytes), _) in newest {
        if held <= cap {
            break;
        }
        held = held.saturating_sub(bytes);
        names.push(name.to_owned());
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Nanos = 1_000_000_000;

    /// Rungs reached, with the second of each.
    fn climb(above: impl Fn(u64) -> bool, seconds: u64) -> Vec<(u64, Rung)> {
        let mut ladder = Ladder::default();
        (0..seconds)
            .filter_map(|at| Some((at, ladder.observe(at * SECOND, above(at))?)))
            .collect()
    }

    #[test]
    fn a_worker_that_stays_above_its_bound_goes_up_every_rung_at_its_time() {
        let rungs = [
            (1, Rung::StopAdmitting),
            (5, Rung::Shed),
            (15, Rung::Drain),
            (25, Rung::Kill),
        ];
        assert_eq!(climb(|_| true, 60), rungs);
    }

    #[test]
    fn one_sample_above_is_nothing_and_two_below_end_it() {
        assert_eq!(climb(|at| at % 2 == 0, 60), []);
        let rungs = [(1, Rung::StopAdmitting), (5, Rung::Shed), (9, Rung::Clear)];
        assert_eq!(climb(|at| at < 8, 12), rungs);
        // A single dip does not begin the time anew.
        let rungs = [
            (1, Rung::StopAdmitting),
            (5, Rung::Shed),
            (15, Rung::Drain),
            (25, Rung::Kill),
        ];
        assert_eq!(climb(|at| at != 3 && at != 12, 30), rungs);
        // After a real pause it does.
        let again = [
            (1, Rung::StopAdmitting),
            (4, Rung::Clear),
            (7, Rung::StopAdmitting),
            (11, Rung::Shed),
        ];
        assert_eq!(climb(|at| !(3..=5).contains(&at), 13), again);
    }

    #[test]
    fn draining_is_never_taken_back_and_ends_at_its_grace() {
        let rungs = climb(|at| at <= 15, 60);
        assert_eq!(rungs[2..], [(15, Rung::Drain)]);
        let rungs = climb(|at| at <= 15 || at == 17, 60);
        assert_eq!(rungs[2..], [(15, Rung::Drain)]);
        let rungs = climb(|at| at != 24, 60);
        assert_eq!(rungs[2..], [(15, Rung::Drain), (25, Rung::Kill)]);
    }

    #[test]
    fn samples_that_come_late_skip_no_rung() {
        let mut ladder = Ladder::default();
        let rungs: Vec<Rung> = [0, 100, 200, 300, 400]
            .iter()
            .filter_map(|at| ladder.observe(at * SECOND, true))
            .collect();
        assert_eq!(rungs, [Rung::StopAdmitting, Rung::Shed, Rung::Drain, Rung::Kill]);
        assert_eq!(ladder.rung(), Rung::Kill);
        assert_eq!(ladder.observe(500 * SECOND, true), None);
        let words = [
            Rung::Clear,
            Rung::StopAdmitting,
            Rung::Shed,
            Rung::Drain,
            Rung::Kill,
        ]
        .map(Rung::word);
        assert_eq!(words, ["Clear", "StopAdmitting", "Shed", "Drain", "Kill"]);
    }

    #[test]
    fn a_worker_is_allowed_64_mebibytes_or_two_percent_more_than_it_reserved() {
        assert_eq!(allowance(Bytes(0)), Bytes(64 << 20));
        assert_eq!(allowance(Bytes(100 << 30)), Bytes(102 << 30));
    }

    #[test]
    fn under_a_fallen_cap_the_newest_give_way() {
        let holdings = [("old", Bytes(300), 1), ("b", Bytes(200), 5), ("a", Bytes(100), 5)];
        let above = |cap| above_cap(Bytes(cap), &holdings);
        assert_eq!(above(600), Vec::<String>::new());
        assert_eq!(above(599), ["a"]);
        assert_eq!(above(500), ["a"]);
        assert_eq!(above(499), ["a", "b"]);
        assert_eq!(above(0), ["a", "b", "old"]);
    }

    proptest! {
        #[test]
        fn who_stays_fits_under_the_cap_and_nobody_gives_way_in_vain(
            cap in 0_u64..1000, holdings in prop::collection::vec((1_u64..400, 0_u64..5), 0..8),
        ) {
            let names: Vec<String> = (0..holdings.len()).map(|n| n.to_string()).collect();
            let holdings: Vec<(&str, Bytes, u64)> = names.iter().zip(&holdings)
                .map(|(name, (bytes, since))| (name.as_str(), Bytes(*bytes), *since)).collect();
            let gone = above_cap(Bytes(cap), &holdings);
            let kept = |gone: &[String]| holdings.iter().filter(|(n, ..)| !gone.iter().any(|g| g == n))
                .map(|(_, b, _)| b.0).sum::<u64>();
            prop_assert!(kept(&gone) <= cap);
            if let Some((_, rest)) = gone.split_last() {
                prop_assert!(kept(rest) > cap);
            }
        }
    }
}
