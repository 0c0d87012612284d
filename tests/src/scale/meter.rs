//! What the processes take of the machine, and how many requests the API server answers.
//!
//! Owns: reading /proc and the API server's own counters. Must not: judge.

#![allow(clippy::disallowed_methods, reason = "measures")]

use super::number;
use crate::procfs;
use crate::sim::time::lock;
use anyhow::{Context as _, Result};
use kube::Client;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

/// A process by what it is called.
pub(super) type Named = (&'static str, u32);

/// Requests that the API server has answered so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Requests {
    all: f64,
    /// Turned away for want of room.
    pub(super) too_many: f64,
    /// Answered with an error of its own.
    pub(super) broken: f64,
}

/// All counters at one moment.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) at: Instant,
    ticks: BTreeMap<&'static str, i64>,
    requests: Requests,
}

/// What was used between two moments.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Used {
    pub(super) seconds: f64,
    /// Percent of a core, by process.
    pub(super) cpu_percent: BTreeMap<&'static str, f64>,
    pub(super) requests_per_second: f64,
    /// Answers 429 and 5xx.
    pub(super) turned_away: f64,
}

/// The processes and the most memory that each has had.
pub(super) struct Meter {
    processes: Vec<Named>,
    peaks: Mutex<BTreeMap<&'static str, u64>>,
}

fn requests(text: &str) -> Requests {
    let mut requests = Requests::default();
    for line in text.lines().filter(|l| l.starts_with("apiserver_request_total{")) {
        let count: f64 = line
            .rsplit(' ')
            .next()
            .and_then(|n| n.parse().ok())
            .unwrap_or(0.0);
        let code = line.split_once("code=\"").map_or("", |(_, rest)| rest);
        requests.all += count;
        if code.starts_with("429") {
            requests.too_many += count;
        } else if code.starts_with('5') {
            requests.broken += count;
        }
    }
    requests
}

impl Meter {
    pub(super) fn new(processes: Vec<Named>) -> Self {
        Self {
            processes,
            peaks: Mutex::default(),
        }
    }

    /// Notes how much memory each has now.
    pub(super) fn look(&self) -> Result<()> {
        for (name, pid) in &self.processes {
            let kib = procfs::resident_kib(*pid).with_context(|| format!("{name} has ended"))?;
            let mut peaks = lock(&self.peaks);
            let peak = peaks.entry(*name).or_default();
            *peak = kib.max(*peak);
        }
        Ok(())
    }

    /// The most memory that each was seen to have, in MiB.
    pub(super) fn peaks(&self) -> BTreeMap<&'static str, f64> {
        let peaks = lock(&self.peaks);
        peaks
            .iter()
            .map(|(name, kib)| (*name, number(*kib) / 1024.0))
            .collect()
    }

    /// All counters now.
    pub(super) async fn read(&self, client: &Client) -> Result<Reading> {
        let text = client
            .request_text(http::Request::get("/metrics").body(vec![])?)
            .await?;
        let ticks = self
            .processes
            .iter()
            .map(|(name, pid)| Ok((*name, procfs::cpu_ticks(*pid)?)))
            .collect::<Result<_>>()?;
        Ok(Reading {
            at: Instant::now(),
            ticks,
            requests: requests(&text),
        })
    }
}

/// What was used from one reading to a later one.
pub(super) fn used(from: &Reading, until: &Reading) -> Used {
    let seconds = until.at.duration_since(from.at).as_secs_f64().max(0.001);
    let before = |name| from.ticks.get(name).copied().unwrap_or(0);
    let percent = |(name, ticks): (&&'static str, &i64)| {
        // A tick is a hundredth of a second.
        let ticks = u64::try_from(ticks - before(*name)).unwrap_or(0);
        (*name, number(ticks) / seconds)
    };
    let away = |r: &Requests| r.too_many + r.broken;
    Used {
        seconds,
        cpu_percent: until.ticks.iter().map(percent).collect(),
        requests_per_second: (until.requests.all - from.requests.all) / seconds,
        turned_away: away(&until.requests) - away(&from.requests),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_summed_over_everything_but_their_code() {
        let text = "apiserver_request_total{code=\"200\",verb=\"GET\"} 7\nother{code=\"200\"} 9\n\
                    apiserver_request_total{code=\"429\"} 2\napiserver_request_total{code=\"503\"} 1e+01\n";
        let found = requests(text);
        assert!(
            (found.all - 19.0).abs() < 0.01 && (found.too_many - 2.0).abs() < 0.01,
            "{found:?}"
        );
        assert!((found.broken - 10.0).abs() < 0.01, "{found:?}");
    }
}
