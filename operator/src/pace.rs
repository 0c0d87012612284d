//! Writes that only show how far jobs are.
//!
//! Owns: how many of them there may be a second, however many jobs run, and which come first. Must not: hold back a write
//! that says anything else.

use gogrid_api::Millis;
use std::collections::VecDeque;

/// Most begun in any second. Twenty a second are promised of any ten: an API server that stands still for a moment takes
/// what was begun meanwhile all at once, and 18 were seen to become 20.4.
const MOST: usize = 16;
const SECOND: u64 = 1_000;

/// When the last of them were begun.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace(VecDeque<Millis>);

impl Pace {
    /// Which of these may be begun now, each with the time of its job's last write: those that were written longest ago.
    pub(crate) fn admit<T>(&mut self, now: Millis, mut asked: Vec<(Option<Millis>, T)>) -> Vec<T> {
        while self
            .0
            .front()
            .is_some_and(|at| now.0.saturating_sub(at.0) >= SECOND)
        {
            self.0.pop_front();
        }
        let room = MOST.saturating_sub(self.0.len());
        asked.sort_by_key(|(written, _)| *written);
        asked.truncate(room);
        self.0.extend(asked.iter().map(|_| now));
        asked.into_iter().map(|(_, asked)| asked).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn however_many_jobs_run_sixteen_a_second_are_shown_and_each_in_its_turn() {
        let mut pace = Pace::default();
        let mut written: BTreeMap<u32, Option<Millis>> = (0..3_000).map(|job| (job, None)).collect();
        let (mut now, mut all) = (Millis(0), VecDeque::new());
        // A new leader knows of no write: all of them are due at once.
        while now.0 < 400_000 {
            let due = |at: &Option<Millis>| at.is_none_or(|at| now.0 - at.0 >= 60_000);
            let asked = written
                .iter()
                .filter(|(_, at)| due(at))
                .map(|(job, at)| (*at, *job));
            for job in pace.admit(now, asked.collect()) {
                written.insert(job, Some(now));
                all.push_back(now);
            }
            now = Millis(now.0 + 50);
        }
        let within = |from: usize| {
            all.iter()
                .skip(from)
                .take_while(|at| at.0 - all[from].0 < SECOND)
                .count()
        };
        assert_eq!((0..all.len()).map(within).max(), Some(MOST));
        // 3 000 at 16 a second: none waits for longer than that takes.
        let longest = written.values().map(|at| now.0 - at.unwrap().0).max();
        assert!(longest <= Some(190_000), "{longest:?}");
    }
}
