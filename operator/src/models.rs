//! What is known of models.
//!
//! Owns: finding a model's facts among what agents reported, and judging inspections. Pure. Must not: parse a model.

use crate::order::attempt;
use crate::store::Store;
use crate::validate::canonical;
use gogrid_api::assignment::{Kind, ModelFacts, State};
use gogrid_api::{Assignment, InferenceJob, Millis};
use gogrid_planner::lifecycle::ModelState;
use gogrid_planner::{Heartbeat, Reason, estimate};
use std::collections::BTreeMap;

/// Inspections of one job that may fail before its model is given up.
const ATTEMPTS: u32 = 3;
/// Inspections of one job in all, those whose node was lost included.
const INSPECTIONS: u32 = 20;

/// What agents reported, by model.
pub(crate) struct Models<'a> {
    by_digest: BTreeMap<(&'a str, &'a str), &'a ModelFacts>,
    by_file: BTreeMap<String, Result<&'a ModelFacts, (&'a str, &'a str)>>,
    inspected: BTreeMap<(&'a str, &'a str), &'a str>,
}

fn state(a: &Assignment) -> Option<State> {
    a.status.as_ref().and_then(|s| s.state)
}

impl<'a> Models<'a> {
    /// Everything that the store holds.
    pub(crate) fn new(store: &'a Store, now: Millis) -> Self {
        let mut new = Self {
            by_digest: BTreeMap::new(),
            by_file: BTreeMap::new(),
            inspected: BTreeMap::new(),
        };
        for a in store.assignments.values() {
            let key = (a.spec.model.uri.as_str(), a.spec.model.sha256.as_str());
            if let Some(facts) = a.status.as_ref().and_then(|s| s.facts.as_ref()) {
                new.by_digest.insert(key, facts);
            } else if a.spec.kind == Kind::Inspect
                && !state(a).is_some_and(State::is_over)
                && !lost(store, now, a)
            {
                new.inspected.insert(key, &a.spec.node_name);
            }
        }
        for held in store
            .gpu_nodes
            .values()
            .filter_map(|g| g.status.as_ref())
            .flat_map(|s| &s.models)
        {
            let key = canonical(&held.uri);
            let word = held.reason.as_deref().unwrap_or("InvalidModel");
            match (&held.facts, &held.error) {
                (Some(facts), _) => {
                    new.by_file.insert(key, Ok(facts));
                }
                (None, Some(error)) => {
                    new.by_file.entry(key).or_insert(Err((word, error)));
                }
                (None, None) => {}
            }
        }
        new
    }

    /// What is known of a job's model; facts where `ModelState::Known`.
    pub(crate) fn of(
        &self,
        store: &Store,
        now: Millis,
        job: &InferenceJob,
        assignments: &[&Assignment],
    ) -> (ModelState, Option<&'a ModelFacts>) {
        let uri = job.spec.model.uri.as_str();
        let sha = job.spec.model.sha256.as_deref().unwrap_or("");
        let facts = match self.by_digest.get(&(uri, sha)) {
            Some(facts) => Some(*facts),
            None => match self.by_file.get(&canonical(uri)) {
                Some(Ok(facts)) => Some(*facts),
                Some(Err((word, error))) => {
                    let refused = Reason::ModelRefused {
                        word: (*word).to_owned(),
                        message: format!("{uri} can't be used: {error}"),
                    };
                    return (ModelState::Waiting(refused), None);
                }
                None => None,
            },
        };
        if let Some(facts) = facts {
            return match estimate::supported(facts, job.spec.context_tokens) {
                Ok(()) => (ModelState::Known, Some(facts)),
                Err(error) => (
                    ModelState::Waiting(Reason::UnsupportedModel {
                        message: error.to_string(),
                    }),
                    None,
                ),
            };
        }
        (self.unknown(store, now, (uri, sha), assignments), None)
    }

    fn unknown(
        &self,
        store: &Store,
        now: Millis,
        key: (&str, &str),
        assignments: &[&Assignment],
    ) -> ModelState {
        if let Some(node) = self.inspected.get(&key) {
            return ModelState::Waiting(Reason::InspectingModel {
                node: Some((*node).to_owned()),
            });
        }
        let mine = |a: &&&Assignment| {
            a.spec.kind == Kind::Inspect && (a.spec.model.uri.as_str(), a.spec.model.sha256.as_str()) == key
        };
        let inspections: Vec<_> = assignments.iter().filter(mine).collect();
        let failed = inspections
            .iter()
            .filter(|a| state(a) == Some(State::Failed))
            .count();
        let Some(last) = inspections.iter().max_by_key(|a| attempt(a)) else {
            return ModelState::ToInspect;
        };
        let failure = last.status.as_ref().and_then(|s| s.failure.clone());
        match (state(last), failure) {
            (Some(State::Failed), Some(f))
                if !f.retryable || failed >= usize::try_from(ATTEMPTS).unwrap_or(3) =>
            {
                ModelState::Waiting(Reason::ModelRefused {
                    word: f.reason,
                    message: f.message,
                })
            }
            (Some(State::Succeeded), _) => {
                let message = format!(
                    "node {} read the model and reported no facts",
                    last.spec.node_name
                );
                ModelState::Waiting(Reason::ModelRefused {
                    word: "InspectionFailed".into(),
                    message,
                })
            }
            (Some(State::Failed | State::Stopped), _) if attempt(last) < INSPECTIONS => ModelState::ToInspect,
            (None | Some(_), _) if lost(store, now, last) && attempt(last) < INSPECTIONS => {
                ModelState::ToInspect
            }
            _ => ModelState::Waiting(Reason::InspectingModel {
                node: Some(last.spec.node_name.clone()),
            }),
        }
    }
}

/// Whether nobody will carry the order out any more.
pub(crate) fn lost(store: &Store, now: Millis, a: &Assignment) -> bool {
    let (heartbeat, session) = store.heartbeat(now, &a.spec.node_name);
    heartbeat == Heartbeat::Lost || session.is_some_and(|s| s != a.spec.session)
}
