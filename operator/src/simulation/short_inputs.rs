//! Inputs that travel in the order, and those that lie beside it.

use super::*;

/// An input that was staged in a ConfigMap.
pub(super) fn beside_the_order() -> StagedInput {
    StagedInput {
        config_map: Some("input-u-0".into()),
        text: None,
        first_line: 1,
        records: 2,
    }
}

/// One that the order carries.
fn in_the_order(text: &str) -> StagedInput {
    StagedInput {
        config_map: None,
        text: Some(text.into()),
        ..beside_the_order()
    }
}

/// A job with that input that has just been placed.
fn placed(input: StagedInput) -> Sim {
    let mut sim = Sim::new();
    sim.input = input;
    sim.node("a", "s1");
    sim.job(&json!({}));
    sim.settle();
    sim
}

#[test]
fn an_input_in_the_order_is_nowhere_else_and_nothing_but_the_order_is_removed_at_the_end() {
    let mut sim = placed(in_the_order("{}\n{}\n"));
    assert_eq!(sim.run("u-1").spec.inputs, [in_the_order("{}\n{}\n")]);
    assert!(sim.has_inputs.is_empty());
    assert_eq!(sim.memory["u"].staged, None, "the order has it");
    sim.agent("u-1", &json!({"state": "Claimed"}));
    sim.settle();
    sim.agent(
        "u-1",
        &json!({"state": "Succeeded", "checkpoint": {"text": "{}\n"}}),
    );
    sim.settle();
    assert!(sim.is("Finished") && sim.store.assignments.is_empty());
    assert_eq!(sim.steps, ["Stage", "Place", "Publish", "Finish", "CleanUp"]);
    assert_eq!(sim.writes, 2);
}

#[test]
fn what_was_staged_first_is_what_every_epoch_gets_also_after_the_operators_crash() {
    let mut sim = placed(in_the_order("first\nfirst\n"));
    // The user's ConfigMap says something else by now.
    sim.input = in_the_order("later\nlater\n");
    sim.memory.clear();
    sim.agent("u-1", &json!({"state": "Stopped"}));
    sim.settle();
    assert_eq!(sim.run("u-2").spec.inputs, [in_the_order("first\nfirst\n")]);
}

#[test]
fn an_input_is_staged_anew_where_no_order_is_left_that_carries_it() {
    let mut sim = placed(in_the_order("first\nfirst\n"));
    sim.agent("u-1", &json!({"state": "Claimed"}));
    sim.settle();
    sim.input = in_the_order("later\nlater\n");
    sim.store.drop_assignment("u-1", "uid-u-1");
    sim.settle();
    assert_eq!(sim.run("u-2").spec.inputs, [in_the_order("later\nlater\n")]);
}

#[test]
fn an_input_that_an_agent_did_not_find_is_staged_again_before_the_next_attempt() {
    let mut sim = placed(beside_the_order());
    sim.agent("u-1", &json!({"state": "Failed", "failure": {"reason": "InputMissing", "message": "no", "retryable": true}}));
    let before = sim.steps.len();
    sim.has_inputs.clear();
    sim.settle();
    assert!(
        sim.steps[before..].contains(&"Requeue".to_owned()),
        "{:?}",
        sim.steps
    );
    assert!(sim.has_inputs.contains("u"));
}
