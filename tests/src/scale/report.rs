//! What was measured, against what is asked.
//!
//! Owns: the bars and the wording of the report. Must not: measure.

use super::meter::Used;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// A figure that must not be larger than asked.
#[derive(Clone, Debug, Serialize)]
pub struct Bar {
    name: &'static str,
    most: f64,
    measured: f64,
    unit: &'static str,
    met: bool,
}

impl Bar {
    pub(super) fn new(name: &'static str, most: f64, measured: f64, unit: &'static str) -> Self {
        Self {
            name,
            most,
            measured,
            unit,
            met: measured <= most,
        }
    }
}

/// How long jobs waited for a place, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) most: f64,
}

impl Latency {
    /// Of these waits, shortest first.
    pub(super) fn of(sorted: &[Duration]) -> Self {
        let at = |percent: usize| {
            let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
            sorted
                .get(index)
                .map_or(f64::INFINITY, |d| d.as_secs_f64() * 1000.0)
        };
        Self {
            p50: at(50),
            p90: at(90),
            p99: at(99),
            most: at(100),
        }
    }
}

/// One phase.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Phase {
    pub(super) name: &'static str,
    /// Leases, GpuNode and Assignments, per node and 10 s.
    pub(super) agent_writes: f64,
    /// The same of all nodes in the worst 10 s.
    pub(super) agent_writes_worst_window: f64,
    /// The most of one node within 10 s.
    pub(super) agent_writes_worst_node: u64,
    /// Writes a second that showed progress alone, in the worst 10 s.
    pub(super) progress_worst: f64,
    /// All of those.
    pub(super) progress: usize,
    /// Accepted writes by account and kind.
    pub(super) writes: BTreeMap<String, u64>,
    pub(super) used: Used,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub(super) agents: usize,
    pub(super) jobs: usize,
    pub(super) rate: u32,
    pub(super) bars: Vec<Bar>,
    /// From the answer to a job's creation to Placed in this program's own watch.
    pub(super) latency: Latency,
    /// K8s Events, which are no state, per job.
    pub(super) events_per_job: f64,
    pub(super) phases: Vec<Phase>,
    /// Most memory of each process.
    pub(super) memory_mib: BTreeMap<&'static str, f64>,
    /// Changes of jobs' words by the summary's reason after them.
    pub(super) turns: BTreeMap<String, u64>,
    pub(super) refused: BTreeMap<String, u64>,
    /// What must never be, in words.
    pub(super) wrong: Vec<String>,
}

impl Report {
    /// Whether every bar is met and nothing was wrong.
    pub fn good(&self) -> bool {
        self.wrong.is_empty() && self.bars.iter().all(|bar| bar.met)
    }

    /// The same for people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{} agents, {} jobs at {} a second\n\n",
            self.agents, self.jobs, self.rate
        );
        for bar in &self.bars {
            let Bar {
                name,
                most,
                measured,
                unit,
                met,
            } = bar;
            let word = if *met { "met" } else { "MISSED" };
            text.push_str(&format!(
                "{name:<42} {measured:>9.2} {unit:<4} of {most:>6} {word}\n"
            ));
        }
        let Latency { p50, p90, p99, most } = &self.latency;
        text.push_str(&format!(
            "\nplacement, from the answer to a creation to Placed in a watch: p50 {p50:.0} ms, p90 {p90:.0} ms, p99 {p99:.0} ms, \
             longest {most:.0} ms\nEvents per job, which are no state: {:.2}\n",
            self.events_per_job
        ));
        for phase in &self.phases {
            text.push_str(&phase.text());
        }
        text.push_str("\nmost memory:");
        for (name, mib) in &self.memory_mib {
            text.push_str(&format!(" {name} {mib:.0} MiB;"));
        }
        text.push_str(&format!("\nturns of jobs by reason: {:?}\n", self.turns));
        text.push_str(&format!("refused writes: {:?}\n", self.refused));
        for wrong in &self.wrong {
            text.push_str(&format!("WRONG: {wrong}\n"));
        }
        text
    }
}

impl Phase {
    fn text(&self) -> String {
        let Used {
            seconds,
            cpu_percent,
            requests_per_second,
            turned_away,
        } = &self.used;
        let mut text = format!(
            "\n{}, {seconds:.0} s: agents wrote {:.2} times per node and 10 s, {:.2} in the worst window, {} the most of one node; progress \
             {} writes, {:.1}/s in the worst window\n  API server: {requests_per_second:.0} requests/s, {turned_away:.0} turned away; \
             percent of a core:",
            self.name,
            self.agent_writes,
            self.agent_writes_worst_window,
            self.agent_writes_worst_node,
            self.progress,
            self.progress_worst
        );
        for (name, percent) in cpu_percent {
            text.push_str(&format!(" {name} {percent:.0};"));
        }
        text.push_str("\n  writes:");
        for (name, count) in &self.writes {
            text.push_str(&format!(" {name} {count};"));
        }
        text.push('\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_wait_that_was_measured_and_none_is_never_a_bar_met() {
        let waits: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        let latency = Latency::of(&waits);
        let near = |found: f64, wanted: f64| (found - wanted).abs() < 0.5;
        assert!(near(latency.p50, 100.0) && near(latency.p99, 198.0) && near(latency.most, 200.0));
        assert!(!Bar::new("p99", 1.0, Latency::of(&[]).p99, "ms").met);
    }
}
