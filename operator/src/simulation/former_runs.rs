//! What becomes of a run whose agent started again, or whose node fell silent and came back.

use super::*;

#[test]
fn an_agent_that_started_again_gets_the_job_back_at_once() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    sim.job(&json!({}));
    sim.settle();
    sim.agent("u-1", &json!({"state": "Running"}));
    sim.settle();
    sim.node("b", "t1");
    sim.node("a", "s2");
    sim.settle();
    let second = sim.run("u-2");
    assert_eq!(
        (second.spec.node_name.as_str(), second.spec.session.as_str()),
        ("a", "s2")
    );
}

#[test]
fn memory_of_a_session_that_is_gone_is_free_for_the_next_one() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    // The conservative half of 8 GiB holds it once.
    sim.job(&json!({"memory": {"vram": "3Gi"}}));
    sim.settle();
    sim.agent("u-1", &json!({"state": "Running"}));
    sim.node("a", "s2");
    sim.settle();
    assert_eq!(sim.run("u-2").spec.session, "s2");
    assert!(
        sim.silent.is_empty(),
        "a new session proves that the old one is gone"
    );
}

#[test]
fn a_node_that_returns_before_its_job_found_another_place_must_first_end_the_old_run() {
    let mut sim = Sim::new();
    sim.node("a", "s1");
    sim.job(&json!({}));
    sim.settle();
    sim.agent("u-1", &json!({"state": "Running"}));
    sim.settle();
    sim.pass(46, &[]);
    sim.settle();
    assert!(sim.run("u-1").spec.stop.is_some() && !sim.is("Placed"));
    sim.beat("a", "s1");
    sim.settle();
    assert_eq!(sim.reason(), "FormerRunEnding");
    sim.agent("u-1", &json!({"state": "Stopped"}));
    sim.settle();
    assert_eq!(sim.run("u-2").spec.node_name, "a");
}
