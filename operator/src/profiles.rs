//! What a ResourceProfile's status says.
//!
//! Owns: Accepted, Applied and the counts. Pure. Must not: write.

use crate::clock;
use crate::store::Store;
use gogrid_api::condition::set_condition;
use gogrid_api::effective::{Limits, effective_profile};
use gogrid_api::job::conditions;
use gogrid_api::{Condition, ConditionStatus, ResourceProfileStatus, condition};
use std::collections::{BTreeMap, BTreeSet};

/// The status that every profile should have now.
pub(crate) fn statuses(store: &Store, now: i64) -> BTreeMap<String, ResourceProfileStatus> {
    let named = store.named_profiles();
    let none = BTreeMap::new();
    let mut governed: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for node in store.gpu_nodes.keys() {
        let labels = store.nodes.get(node).map_or(&none, |n| &n.labels);
        let source = effective_profile(&named, labels, None)
            .ok()
            .and_then(|e| e.sources.into_iter().next());
        let invalid = || gogrid_api::effective::governing(&named, labels).map(|p| p.name.clone());
        if let Some(name) = source.map(|(name, _)| name).or_else(invalid) {
            governed.entry(name).or_default().insert(node);
        }
    }
    let mut statuses = BTreeMap::new();
    for (name, profile) in &store.profiles {
        let generation = profile.metadata.generation.unwrap_or(0);
        let nodes = governed.remove(name).unwrap_or_default();
        let in_force = |node: &&&str| {
            let status = store.gpu_nodes.get(**node).and_then(|g| g.status.as_ref());
            status.is_some_and(|s| {
                s.profiles
                    .iter()
                    .any(|p| p.name == *name && p.generation == generation)
            })
        };
        let applied = nodes.iter().filter(in_force).count();
        let unfinished = store.jobs.live().filter(|(_, j)| {
            let status = j.status.as_ref();
            let placed = status
                .filter(|s| condition::is_true(&s.conditions, conditions::PLACED))
                .and_then(|s| s.placement.as_ref());
            j.spec.profile_name.as_ref() == Some(name)
                || placed.is_some_and(|p| nodes.contains(p.node_name.as_str()))
        });
        let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let mut status = profile.status.clone().unwrap_or_default();
        let mut set = |type_: &str, word, reason: &str, message: String| {
            let new = Condition {
                type_: type_.into(),
                status: word,
                reason: reason.into(),
                message,
                observed_generation: generation,
                last_transition_time: clock::time(now),
            };
            set_condition(&mut status.conditions, new);
        };
        match Limits::try_from(&profile.spec) {
            Ok(_) => set(
                "Accepted",
                ConditionStatus::True,
                "Accepted",
                "every field is enforced".into(),
            ),
            Err(error) => set(
                "Accepted",
                ConditionStatus::False,
                "Unsupported",
                error.to_string(),
            ),
        }
        let matched = nodes.len();
        let message = format!("{applied} of {matched} nodes report generation {generation} in force");
        match (matched, applied) {
            (0, _) => set(
                "Applied",
                ConditionStatus::Unknown,
                "NoNodes",
                "this profile governs no node".into(),
            ),
            (m, a) if m == a => set("Applied", ConditionStatus::True, "InForce", message),
            _ => set("Applied", ConditionStatus::False, "Waiting", message),
        }
        status.nodes_matched = count(matched);
        status.nodes_applied = count(applied);
        status.jobs = count(unfinished.count());
        statuses.insert(name.clone(), status);
    }
    statuses
}
