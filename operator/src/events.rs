//! What people read in `kubectl describe`.
//!
//! Owns: which change of a status is told as an Event. Must not: tell anything twice; an unchanged status says nothing.

use crate::config::Pod;
use gogrid_api::condition::{find, is_true};
use gogrid_api::job::conditions;
use gogrid_api::{ConditionStatus, InferenceJob, InferenceJobStatus, names};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Resource as _;
use kube::api::ObjectMeta;

/// One thing to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) warning: bool,
    pub(crate) reason: String,
    pub(crate) note: String,
}

/// Reasons that are steps on the way and no news.
const ON_THE_WAY: [&str; 7] = [
    "StagingInput",
    "InspectingModel",
    "Suspended",
    "Resumed",
    "Waiting",
    "BackingOff",
    "FormerRunEnding",
];

/// What changed that people want to know.
pub(crate) fn between(old: Option<&InferenceJobStatus>, new: &InferenceJobStatus) -> Vec<Told> {
    let default = InferenceJobStatus::default();
    let old = old.unwrap_or(&default);
    let mut told = vec![];
    let mut tell = |warning, reason: &str, note: &str| {
        told.push(Told {
            warning,
            reason: reason.into(),
            note: note.into(),
        });
    };
    let reason = |s: &InferenceJobStatus, type_: &str| {
        find(&s.conditions, type_).map(|c| (c.status, c.reason.clone()))
    };
    let message = |type_: &str| {
        find(&new.conditions, type_)
            .map(|c| c.message.clone())
            .unwrap_or_default()
    };
    let turned = |type_: &str| is_true(&new.conditions, type_) && !is_true(&old.conditions, type_);
    if new.epoch > old.epoch {
        let note = message(conditions::PLACED);
        tell(false, "Placed", &note);
        if new
            .placement
            .as_ref()
            .is_some_and(|p| p.stages.iter().any(|s| s.gpu_uuid == names::CPU_DEVICE))
        {
            tell(
                false,
                "CPUFallbackUsed",
                &format!("no GPU fits, the CPU serves: {note}"),
            );
        }
    }
    let finished = turned(conditions::FINISHED);
    let failed_attempt = new.last_failure != old.last_failure && !finished;
    if let Some(failure) = new.last_failure.as_ref().filter(|_| failed_attempt) {
        tell(true, &failure.reason, &failure.message);
    }
    if reason(new, conditions::ACCEPTED) != reason(old, conditions::ACCEPTED)
        && let Some((ConditionStatus::False, word)) = reason(new, conditions::ACCEPTED)
    {
        tell(true, &word, &message(conditions::ACCEPTED));
    } else if reason(new, conditions::PLACED) != reason(old, conditions::PLACED)
        && let Some((ConditionStatus::False, word)) = reason(new, conditions::PLACED)
        && !failed_attempt
        && !finished
        && !ON_THE_WAY.contains(&word.as_str())
    {
        tell(
            true,
            "PlacementFailed",
            &format!("{word}: {}", message(conditions::PLACED)),
        );
    }
    if turned(conditions::LOADED) {
        tell(false, "Started", &message(conditions::LOADED));
    }
    for (type_, event) in [
        (conditions::THROTTLED, "Throttled"),
        (conditions::VRAM_EXCEEDED, "VRAMExceeded"),
    ] {
        // Each rung of the watchdog is news, not only the first.
        if is_true(&new.conditions, type_) && reason(new, type_) != reason(old, type_) {
            tell(true, event, &message(type_));
        }
    }
    if turned(conditions::SUSPENDED) {
        tell(false, "Suspended", &message(conditions::SUSPENDED));
    }
    if is_true(&old.conditions, conditions::SUSPENDED) && !is_true(&new.conditions, conditions::SUSPENDED) {
        tell(false, "Resumed", &message(conditions::SUSPENDED));
    }
    if finished {
        if is_true(&new.conditions, conditions::SUCCEEDED) {
            tell(false, "Finished", &message(conditions::FINISHED));
        } else {
            let word = reason(new, conditions::FINISHED).map_or_else(|| "Failed".into(), |(_, word)| word);
            tell(
                true,
                "Failed",
                &format!("{word}: {}", message(conditions::FINISHED)),
            );
            if [
                "DeadlineExceeded",
                "BackoffLimitExceeded",
                "OutputConflict",
                "OutputTooLarge",
            ]
            .contains(&word.as_str())
            {
                tell(true, &word, &message(conditions::FINISHED));
            }
        }
    }
    told
}

/// The object to create for it.
pub(crate) fn object(job: &InferenceJob, told: &Told, reporter: &str, now: Timestamp) -> Event {
    let regarding = ObjectReference {
        resource_version: None,
        ..job.object_ref(&())
    };
    about(regarding, "Reconcile", told, reporter, now)
}

/// The object to create where the operator in that pod refuses to lead.
pub(crate) fn refusal(namespace: &str, pod: &Pod, why: &str, reporter: &str, now: Timestamp) -> Event {
    let regarding = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(namespace.to_owned()),
        name: Some(pod.name.clone()),
        uid: pod.uid.clone(),
        ..ObjectReference::default()
    };
    let told = Told {
        warning: true,
        reason: "LeadershipRefused".into(),
        note: why.to_owned(),
    };
    about(regarding, "Lead", &told, reporter, now)
}

fn about(regarding: ObjectReference, action: &str, told: &Told, reporter: &str, now: Timestamp) -> Event {
    let name: String = regarding
        .name
        .iter()
        .flat_map(|name| name.chars().take(200))
        .collect();
    Event {
        metadata: ObjectMeta {
            // A trailing dash is the only ending that the server takes for a prefix.
            generate_name: Some(format!("{name}-")),
            namespace: regarding.namespace.clone(),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        action: Some(action.to_owned()),
        reason: Some(told.reason.clone()),
        note: Some(told.note.chars().take(1000).collect()),
        type_: Some(if told.warning { "Warning" } else { "Normal" }.into()),
        regarding: Some(regarding),
        reporting_controller: Some("gogrid.dev/operator".into()),
        reporting_instance: Some(reporter.chars().take(128).collect()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Draft;
    use gogrid_planner::Reason;
    use serde_json::json;

    fn job() -> InferenceJob {
        serde_json::from_value(json!({
            "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob", "metadata": {"name": "a", "namespace": "n"},
            "spec": {"model": {"uri": "file:/m/a", "sha256": "0"}, "input": {"inline": ["{}"]}, "output": {"configMap": "o"}},
        }))
        .unwrap()
    }

    #[test]
    fn a_reason_is_told_once_and_again_only_when_the_word_changes() {
        let mut job = job();
        let first = Draft::new(&job, 1).wait(&Reason::NoNodes).done();
        assert_eq!(
            between(None, &first)
                .iter()
                .map(|t| t.reason.as_str())
                .collect::<Vec<_>>(),
            ["PlacementFailed"]
        );
        job.status = Some(first.clone());
        let same = Draft::new(&job, 2).wait(&Reason::NoNodes).done();
        assert_eq!(between(Some(&first), &same), []);
        assert_eq!(first, same, "an unchanged reason is an unchanged status");
        let other = Draft::new(&job, 3)
            .wait(&Reason::NodeNotReady { matching: 1 })
            .done();
        assert_eq!(between(Some(&first), &other).len(), 1);
        let quiet = Draft::new(&job, 4)
            .wait(&Reason::InspectingModel { node: None })
            .done();
        assert_eq!(between(Some(&first), &quiet), []);
    }
}
