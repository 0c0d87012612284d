//! How much of the machine processes take, sampled from /proc by the test itself.
//!
//! Owns: samples and the windows over them. Must not ask the processes under test anything.

#![allow(
    clippy::disallowed_methods,
    reason = "measures real processes by a real clock"
)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::procfs;

/// CPU time and time spent runnable but not running, per thread.
#[derive(Clone, Debug, Default)]
struct Sample {
    at: Duration,
    /// By thread: nanoseconds on a CPU, nanoseconds waiting for one.
    threads: BTreeMap<u32, (u64, u64)>,
}

/// Samples of some processes over time.
#[derive(Clone, Debug)]
pub struct Samples {
    begun: Instant,
    samples: Vec<Sample>,
}

/// One window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// Percent of the device that the processes took.
    pub percent: f64,
    /// Percent of the window that the worst thread waited for a CPU.
    pub delay_percent: f64,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            samples: vec![],
        }
    }
}

impl Samples {
    /// Looks at every thread of these processes.
    pub fn look(&mut self, pids: &[u32]) -> Result<()> {
        let mut threads = BTreeMap::new();
        // The moment between the looks at the first and the last thread.
        let before = self.begun.elapsed();
        for pid in pids {
            for thread in procfs::threads(*pid)? {
                // A thread may have ended since the listing.
                if let Ok(times) = procfs::schedule(*pid, thread) {
                    threads.insert(thread, times);
                }
            }
        }
        let at = (before + self.begun.elapsed()) / 2;
        self.samples.push(Sample { at, threads });
        Ok(())
    }

    /// Samples these processes every `step` for the length of `span`.
    pub fn over(pids: &[u32], span: Duration, step: Duration) -> Result<Self> {
        let mut samples = Self::default();
        loop {
            samples.look(pids)?;
            let now = samples.begun.elapsed();
            if now >= span {
                return Ok(samples);
            }
            std::thread::sleep(step.min(span.saturating_sub(now)));
        }
    }

    /// Every window of that length, of a device with `cores` cores.
    pub fn windows(&self, length: Duration, cores: u32) -> Vec<Window> {
        let mut windows = vec![];
        for (first, begin) in self.samples.iter().enumerate() {
            let rest = self.samples.get(first..).unwrap_or_default();
            if let Some(end) = rest.iter().find(|s| s.at >= begin.at + length) {
                windows.push(window(begin, end, cores));
            }
        }
        windows
    }

    /// The whole time as one window.
    pub fn whole(&self, cores: u32) -> Option<Window> {
        let (begin, end) = (self.samples.first()?, self.samples.last()?);
        (end.at > begin.at).then(|| window(begin, end, cores))
    }
}

fn window(begin: &Sample, end: &Sample, cores: u32) -> Window {
    let wall = end.at.saturating_sub(begin.at).as_secs_f64() * 1e9;
    let (mut cpu, mut delay) = (0, 0);
    for (thread, (ran, waited)) in &end.threads {
        let (ran_before, waited_before) = begin.threads.get(thread).copied().unwrap_or_default();
        cpu += ran.saturating_sub(ran_before);
        delay = delay.max(waited.saturating_sub(waited_before));
    }
    Window {
        percent: nanos(cpu) / wall / f64::from(cores) * 100.0,
        delay_percent: nanos(delay) / wall * 100.0,
    }
}

/// Nanoseconds as a float: exact to a microsecond over 100 days.
fn nanos(value: u64) -> f64 {
    Duration::from_nanos(value).as_secs_f64() * 1e9
}

/// A window that is below its share by no more needs no excuse.
const BELOW: f64 = 2.0;
/// A thread that waits for a CPU a larger part of a window could not have used its share there.
const DELAYED: f64 = 1.0;

/// What windows say about a share that was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Windows looked at.
    pub windows: usize,
    /// Windows more than two points below the share, or what of it can be used, in which a thread waited for a CPU more than 1 % of the time.
    pub excluded: usize,
    /// Most points above the share in any window.
    pub above: f64,
    /// Most points below the share, or what of it can be used, in a window that is not excluded.
    pub below: f64,
    /// Percent of its length that a thread waited for a CPU, in the middle one of all windows.
    pub delay_percent: f64,
}

impl Verdict {
    /// Judges windows against a share in percent, of which those that have it can use `most`.
    pub fn of(windows: &[Window], asked: f64, most: f64) -> Self {
        let usable = asked.min(most);
        let excused = |w: &&Window| usable - w.percent > BELOW && w.delay_percent > DELAYED;
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let mut delays: Vec<f64> = windows.iter().map(|w| w.delay_percent).collect();
        delays.sort_by(f64::total_cmp);
        Self {
            windows: windows.len(),
            excluded: windows.iter().filter(excused).count(),
            above: most(&mut windows.iter().map(|w| w.percent - asked)),
            below: most(&mut windows.iter().filter(|w| !excused(w)).map(|w| usable - w.percent)),
            delay_percent: delays.get(delays.len() / 2).copied().unwrap_or(0.0),
        }
    }

    /// Percent of the windows that are excluded.
    pub fn excluded_percent(&self) -> f64 {
        let count = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
        100.0 * count(self.excluded) / count(self.windows.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(millis: u64, threads: &[(u32, u64, u64)]) -> Sample {
        Sample {
            at: Duration::from_millis(millis),
            threads: threads
                .iter()
                .map(|(t, ran, waited)| (*t, (*ran, *waited)))
                .collect(),
        }
    }

    #[test]
    fn a_window_counts_all_threads_and_those_that_came_within_it() {
        let samples = Samples {
            samples: vec![
                sample(0, &[(1, 100_000_000, 0)]),
                sample(1000, &[(1, 700_000_000, 20_000_000), (2, 300_000_000, 0)]),
            ],
            ..Samples::default()
        };
        let found = samples.windows(Duration::from_secs(1), 2);
        let [window] = found.as_slice() else {
            panic!("{found:?}")
        };
        assert!((window.percent - 45.0).abs() < 1e-6 && (window.delay_percent - 2.0).abs() < 1e-6);
    }

    #[test]
    fn a_window_with_a_waiting_thread_excuses_too_little_and_never_too_much() {
        let window = |percent, delay_percent| Window {
            percent,
            delay_percent,
        };
        let windows = [window(59.0, 0.2), window(30.0, 40.0), window(63.0, 40.0)];
        let verdict = Verdict::of(&windows, 60.0, 100.0);
        assert_eq!((verdict.windows, verdict.excluded), (3, 1));
        assert!((verdict.above - 3.0).abs() < 1e-9 && (verdict.below - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_window_below_its_share_in_which_nobody_waited_is_not_excused() {
        let below = Window {
            percent: 50.0,
            delay_percent: 0.9,
        };
        let verdict = Verdict::of(&[below], 60.0, 100.0);
        assert_eq!(verdict.excluded, 0);
        assert!((verdict.below - 10.0).abs() < 1e-9);
        let verdict = Verdict::of(&[below], 60.0, 50.5);
        assert!((verdict.below - 0.5).abs() < 1e-9, "it can't use more");
    }
}
