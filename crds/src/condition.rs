//! Conditions after the Kubernetes API conventions.
//!
//! Owns: the bounded condition type and the rule when `lastTransitionTime` moves.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Not decided yet.
    Unknown,
}

/// One aspect of an object's state: a word for machines and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Which aspect; unique in the list.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Z][A-Za-z]*$"))]
    pub type_: String,
    /// True, False or Unknown.
    pub status: ConditionStatus,
    /// One CamelCase word that says why.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Z][A-Za-z0-9]*$"))]
    pub reason: String,
    /// A sentence with the numbers behind the reason.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// The `metadata.generation` this was judged at.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub observed_generation: i64,
    /// When `status` last changed.
    #[schemars(schema_with = "crate::schema::time")]
    pub last_transition_time: Time,
}

/// Sets one condition; keeps `lastTransitionTime` unless the status word changed.
///
/// The message is cut at 1,024 characters. Returns whether anything but the time changed.
pub fn set_condition(conditions: &mut Vec<Condition>, mut new: Condition) -> bool {
    if let Some((cut, _)) = new.message.char_indices().nth(1024) {
        new.message.truncate(cut);
    }
    let Some(old) = conditions.iter_mut().find(|c| c.type_ == new.type_) else {
        conditions.push(new);
        return true;
    };
    if old.status == new.status {
        new.last_transition_time = old.last_transition_time.clone();
    }
    let changed = *old != new;
    *old = new;
    changed
}

/// The condition of that type, if set.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == type_)
}

/// Whether the condition of that type is True.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(|c| c.status == ConditionStatus::True)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::jiff::Timestamp;

    fn condition(status: ConditionStatus, message: &str, second: i64) -> Condition {
        Condition {
            type_: "Placed".into(),
            status,
            reason: "NoNodes".into(),
            message: message.into(),
            observed_generation: 1,
            last_transition_time: Time(Timestamp::from_second(second).unwrap()),
        }
    }

    #[test]
    fn the_transition_time_moves_only_when_the_status_word_changes() {
        let mut list = vec![];
        assert!(set_condition(
            &mut list,
            condition(ConditionStatus::False, "a", 1)
        ));
        assert!(!set_condition(
            &mut list,
            condition(ConditionStatus::False, "a", 2)
        ));
        assert!(set_condition(
            &mut list,
            condition(ConditionStatus::False, "b", 3)
        ));
        assert_eq!(list[0].last_transition_time.0.as_second(), 1);
        assert!(set_condition(&mut list, condition(ConditionStatus::True, "b", 4)));
        assert_eq!(list[0].last_transition_time.0.as_second(), 4);
    }
}
