//! When workers computed, by the stamps that they leave on disk at every step, and what two of them did at once.
//!
//! Owns: reading the stamps and sums over them, all in nanoseconds of CLOCK_BOOTTIME. Must not ask a program anything.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// One step: from when until when. One that was cut short ends where it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Whose: the file that it stamped.
    pub worker: PathBuf,
    /// Its begin.
    pub from: u64,
    /// Its end.
    pub until: u64,
}

/// CLOCK_BOOTTIME.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)).unwrap_or(0)
}

/// What an instant of the wall clock was on CLOCK_BOOTTIME; the wall clock must not have been set since.
pub fn boottime_of(at: Timestamp) -> Result<u64> {
    let (wall, boot) = (Timestamp::now(), now());
    let ago = u64::try_from(wall.duration_since(at).as_nanos()).context("an instant to come")?;
    Ok(boot.saturating_sub(ago))
}

/// Steps of all workers that stamped into these directories, those that began at `since` or later, in order.
pub fn read(dirs: &[PathBuf], since: u64) -> Result<Vec<Step>> {
    let mut steps = vec![];
    for dir in dirs {
        for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
            let worker = entry?.path();
            let bytes = std::fs::read(&worker)?;
            let (stamps, _) = bytes.as_chunks::<8>();
            for pair in stamps.chunks(2) {
                let [from, until] = match pair {
                    [from, until] => [from, until],
                    [from] => [from, from],
                    _ => continue,
                }
                .map(|stamp| u64::from_le_bytes(*stamp));
                let worker = worker.clone();
                steps.push(Step { worker, from, until });
            }
        }
    }
    steps.retain(|step| step.from >= since);
    steps.sort_by_key(|step| step.from);
    Ok(steps)
}

/// For how long two different workers computed at once; `steps` are in order.
pub fn overlap(steps: &[Step]) -> Duration {
    let mut sum = 0;
    for (n, one) in steps.iter().enumerate() {
        let later = steps
            .iter()
            .skip(n + 1)
            .take_while(|other| other.from < one.until);
        sum += later
            .filter(|other| other.worker != one.worker)
            .map(|other| one.until.min(other.until).saturating_sub(other.from))
            .sum::<u64>();
    }
    Duration::from_nanos(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_touch_do_not_overlap_and_what_two_workers_do_at_once_is_summed() {
        let steps = |all: &[(&str, u64, u64)]| -> Vec<Step> {
            all.iter()
                .map(|(worker, from, until)| Step {
                    worker: PathBuf::from(worker),
                    from: *from,
                    until: *until,
                })
                .collect()
        };
        let of = |all: &[(&str, u64, u64)]| overlap(&steps(all)).as_nanos();
        assert_eq!(
            of(&[("a", 0, 10), ("b", 10, 20), ("a", 20, 30), ("b", 30, 50)]),
            0
        );
        assert_eq!(of(&[("a", 0, 10), ("a", 5, 8), ("b", 9, 9)]), 0);
        assert_eq!(
            of(&[
                ("a", 0, 10),
                ("b", 5, 8),
                ("a", 20, 30),
                ("b", 25, 45),
                ("a", 40, 41)
            ]),
            3 + 5 + 1
        );
    }

    #[test]
    fn a_step_that_was_cut_short_ends_where_it_began() {
        let dir = tempfile::tempdir().unwrap();
        let stamps: Vec<u8> = [5_u64, 6, 9].iter().flat_map(|s| s.to_le_bytes()).collect();
        let worker = dir.path().join("1");
        std::fs::write(&worker, stamps).unwrap();
        let step = |from, until| Step {
            worker: worker.clone(),
            from,
            until,
        };
        let read = |since| read(&[dir.path().to_owned()], since).unwrap();
        assert_eq!(read(0), [step(5, 6), step(9, 9)]);
        assert_eq!(read(7), [step(9, 9)]);
    }

    #[test]
    fn an_instant_of_the_wall_clock_is_found_on_the_other_clock() {
        let (before, at, after) = (now(), Timestamp::now(), now());
        let found = boottime_of(at).unwrap();
        assert!(
            found + 50_000_000 > before && found < after + 50_000_000,
            "{before} {found} {after}"
        );
    }
}
