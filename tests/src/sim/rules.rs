//! The fence rules that the CRDs carry, as the API server judges them on an update.
//!
//! Owns: a second wording of those rules, proved against the real server's. Must not change anything.

use super::kind::Kind;
use serde_json::Value;

fn number(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

/// What of a job's spec may never change once it was placed.
const FROZEN: [&str; 16] = [
    "task",
    "mode",
    "model",
    "profileName",
    "input",
    "output",
    "generation",
    "contextTokens",
    "parallelSequences",
    "memory",
    "backoffLimit",
    "activeDeadlineSeconds",
    "failurePolicy",
    "managedBy",
    "placement/split",
    "placement/cpuFallback",
];

/// What of them must not change either unless the job was suspended.
const FROZEN_UNLESS_SUSPENDED: [&str; 2] = ["placement/nodeSelector", "placement/tolerations"];

fn stays(old: &Value, new: &Value, pointer: &str) -> bool {
    old.pointer(pointer) == new.pointer(pointer)
}

fn job(old: &Value, new: &Value) -> Option<&'static str> {
    let (before, after) = (number(old, "/status/epoch"), number(new, "/status/epoch"));
    let raised = after == before + 1;
    let same = old.get("spec") == new.get("spec");
    let kept = |field: &&str| stays(old, new, &format!("/spec/{field}"));
    let suspended = old.pointer("/spec/suspend").and_then(Value::as_bool) == Some(true);
    if after != before && !raised {
        Some("status.epoch must stay or grow by exactly 1")
    } else if !raised && !stays(old, new, "/status/placement") {
        Some("status.placement must change only together with status.epoch + 1")
    } else if number(new, "/status/term") < number(old, "/status/term") {
        Some("status.term must never fall")
    } else if before > 0 && !same && !FROZEN.iter().all(kept) {
        Some("spec must not change once the job was placed")
    } else if before > 0 && !same && !suspended && !FROZEN_UNLESS_SUSPENDED.iter().all(kept) {
        Some("spec.placement.nodeSelector and tolerations must not change once the job was placed")
    } else {
        None
    }
}

/// Whether anything but the stop differs from what the other spec says.
fn differs(one: &Value, other: &Value) -> bool {
    let fields = one.get("spec").and_then(Value::as_object).into_iter().flatten();
    let said = |field: &str| other.get("spec").and_then(|spec| spec.get(field));
    fields
        .filter(|(field, _)| *field != "stop")
        .any(|(field, value)| said(field) != Some(value))
}

fn assignment(old: &Value, new: &Value) -> Option<&'static str> {
    fn state(object: &Value) -> Option<&str> {
        object.pointer("/status/state").and_then(Value::as_str)
    }
    let before = state(old);
    let over = before.is_some_and(|s| ["Stopped", "Succeeded", "Failed"].contains(&s));
    if differs(old, new) || differs(new, old) {
        Some("spec must not change, except that stop may be set once")
    } else if old.pointer("/spec/stop").is_some() && !stays(old, new, "/spec/stop") {
        Some("spec.stop must not change once set")
    } else if over && state(new) != before {
        Some("status.state must not leave Stopped, Succeeded or Failed")
    } else {
        None
    }
}

/// The rule that an update breaks.
pub fn broken(kind: Kind, old: &Value, new: &Value) -> Option<&'static str> {
    match kind {
        Kind::Job => job(old, new),
        Kind::Assignment => assignment(old, new),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_epoch_grows_by_one_and_a_placement_changes_only_with_it() {
        let placed = |epoch: i64, node: &str| json!({"spec": {}, "status": {"epoch": epoch, "placement": {"nodeName": node}}});
        assert_eq!(broken(Kind::Job, &placed(1, "a"), &placed(2, "b")), None);
        assert!(broken(Kind::Job, &placed(1, "a"), &placed(1, "b")).is_some());
        assert!(broken(Kind::Job, &placed(1, "a"), &placed(3, "b")).is_some());
        assert!(broken(Kind::Job, &placed(1, "a"), &json!({"spec": {}})).is_some());
    }

    #[test]
    fn an_order_changes_only_by_one_stop_and_never_after_its_end() {
        let order = |stop: Option<&str>, state: &str| {
            let mut order = json!({"spec": {"epoch": 1}, "status": {"state": state}});
            if let Some(stop) = stop {
                order["spec"]["stop"] = json!({"reason": stop});
            }
            order
        };
        let rule = |old: &Value, new: &Value| broken(Kind::Assignment, old, new).is_some();
        assert!(!rule(&order(None, "Running"), &order(Some("a"), "Running")));
        assert!(rule(&order(Some("a"), "Running"), &order(Some("b"), "Running")));
        assert!(rule(&order(Some("a"), "Running"), &order(None, "Running")));
        assert!(rule(&order(None, "Stopped"), &order(None, "Running")));
    }
}
