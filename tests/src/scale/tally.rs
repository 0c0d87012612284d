//! Writes, counted from the API server's audit log as it grows.
//!
//! Owns: who wrote what in which second. Must not: keep requests.

use crate::chart;
use crate::controlplane::{AuditEvent, OURS};
use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;

/// Length of the windows in which agents' writes are judged, in seconds.
pub(super) const WINDOW: i64 = 10;

/// Whose account it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) enum Who {
    Agent,
    Operator,
    /// The garbage collector, which removes what GoGrid's objects own.
    Collector,
    Other,
}

/// Writes that count as one kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    pub(super) who: Who,
    /// Verb, resource and subresource.
    pub(super) what: String,
}

impl Kind {
    /// `leases`, `assignments`, …
    pub(super) fn resource(&self) -> &str {
        let words = self.what.split_once(' ').map_or("", |(_, words)| words);
        words.split('/').next().unwrap_or(words)
    }

    /// Whether it is about a job, its orders or its records: what a job's life costs, Events apart.
    pub(super) fn of_a_job(&self) -> bool {
        let ours = matches!(self.who, Who::Agent | Who::Operator);
        ours && matches!(self.resource(), "inferencejobs" | "assignments" | "configmaps")
    }

    /// Whether it is one of those by which an agent shows that its node lives and what it does.
    pub(super) fn of_a_node(&self) -> bool {
        self.who == Who::Agent && matches!(self.resource(), "leases" | "gpunodes" | "assignments")
    }
}

fn kind(event: &AuditEvent) -> Kind {
    let who = match event.user.strip_prefix(OURS) {
        Some(chart::AGENT) => Who::Agent,
        Some(chart::OPERATOR) => Who::Operator,
        _ if event.user.ends_with(":generic-garbage-collector") => Who::Collector,
        _ => Who::Other,
    };
    let slash = if event.subresource.is_empty() { "" } else { "/" };
    let what = format!("{} {}{slash}{}", event.verb, event.resource, event.subresource);
    Kind { who, what }
}

/// The counts.
#[derive(Default)]
pub(super) struct Tally {
    seconds: BTreeMap<i64, BTreeMap<Kind, u64>>,
    /// By window and node.
    nodes: BTreeMap<i64, BTreeMap<String, u64>>,
    /// By kind and HTTP status.
    refused: BTreeMap<String, u64>,
}

impl Tally {
    /// Takes one request in.
    pub(super) fn take(&mut self, event: &AuditEvent) {
        if !event.writes() {
            return;
        }
        let kind = kind(event);
        if event.code >= 300 {
            let name = format!("{:?} {} {}", kind.who, kind.what, event.code);
            *self.refused.entry(name).or_default() += 1;
            return;
        }
        let second = event.at.as_second();
        if kind.of_a_node() {
            let window = self.nodes.entry(second.div_euclid(WINDOW)).or_default();
            *window.entry(event.node.clone()).or_default() += 1;
        }
        *self.seconds.entry(second).or_default().entry(kind).or_default() += 1;
    }

    /// Accepted writes by kind.
    pub(super) fn between(&self, from: Timestamp, until: Timestamp) -> BTreeMap<Kind, u64> {
        let mut sums = BTreeMap::new();
        for counts in self.seconds.range(from.as_second()..until.as_second()) {
            for (kind, count) in counts.1 {
                *sums.entry(kind.clone()).or_default() += count;
            }
        }
        sums
    }

    /// Writes of agents in the whole windows of that time: the most of a window in all, and the most of one node.
    pub(super) fn worst(&self, from: Timestamp, until: Timestamp) -> (u64, u64) {
        let first = from.as_second().div_euclid(WINDOW) + 1;
        let end = until.as_second().div_euclid(WINDOW);
        let windows = || self.nodes.range(first..end.max(first)).map(|(_, nodes)| nodes);
        let all = windows().map(|nodes| nodes.values().sum::<u64>()).max();
        let one = windows().flat_map(BTreeMap::values).copied().max();
        (all.unwrap_or(0), one.unwrap_or(0))
    }

    /// Writes that the API server refused.
    pub(super) fn refused(&self) -> BTreeMap<String, u64> {
        self.refused.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(second: i64, account: &str, verb: &str, resource: &str, node: &str, code: u16) -> AuditEvent {
        let at = Timestamp::from_second(second).unwrap();
        AuditEvent {
            received: at,
            at,
            user: format!("{OURS}{account}"),
            credential: String::new(),
            node: node.into(),
            verb: verb.into(),
            group: String::new(),
            resource: resource.into(),
            subresource: String::new(),
            namespace: String::new(),
            name: String::new(),
            code,
        }
    }

    #[test]
    fn writes_are_counted_by_kind_and_second_and_agents_by_whole_windows() {
        let mut tally = Tally::default();
        for (second, node) in [(105, "a"), (110, "a"), (111, "a"), (119, "b"), (121, "a")] {
            tally.take(&event(second, chart::AGENT, "update", "leases", node, 200));
        }
        tally.take(&event(112, chart::AGENT, "create", "configmaps", "a", 201));
        tally.take(&event(112, chart::AGENT, "get", "leases", "a", 200));
        tally.take(&event(112, chart::OPERATOR, "create", "assignments", "", 409));
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(tally.worst(at(100), at(125)), (3, 2));
        let sums = tally.between(at(105), at(120));
        let counts: Vec<(&str, u64)> = sums.iter().map(|(kind, n)| (kind.what.as_str(), *n)).collect();
        assert_eq!(counts, [("create configmaps", 1), ("update leases", 4)]);
        let kinds: Vec<(bool, bool)> = sums.keys().map(|k| (k.of_a_job(), k.of_a_node())).collect();
        assert_eq!(kinds, [(true, false), (false, true)]);
        assert_eq!(tally.refused().len(), 1);
    }
}
