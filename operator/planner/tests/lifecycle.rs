//! A job's life, step by step: the whole table of what comes next.

use gogrid_api::assignment::{Assignment, StopReason};
use gogrid_api::job::{Failure, InferenceJob, ResultStatus};
use gogrid_planner::lifecycle::{
    InputState, ModelState, Outcome, Publication, Refusal, RunsOn, Step, View, backoff_seconds, next,
};
use gogrid_planner::{Heartbeat, Reason};
use serde_json::{Value, from_value, json};

#[expect(clippy::unwrap_used, reason = "helpers of tests")]
mod make {
    use super::{Assignment, InferenceJob, NOW, Value, from_value, json};

    pub(super) fn time(seconds: i64) -> Value {
        json!(
            k8s_openapi::jiff::Timestamp::from_second(seconds)
                .unwrap()
                .to_string()
        )
    }

    pub(super) fn condition(type_: &str, status: &str, since: i64) -> Value {
        json!({"type": type_, "status": status, "reason": "R", "message": "", "observedGeneration": 1, "lastTransitionTime": time(since)})
    }

    pub(super) fn job(spec: &Value, status: &Value) -> InferenceJob {
        let mut whole = json!({
            "model": {"uri": "file:/m/a", "sha256": "0"}, "input": {"inline": ["{}"]}, "output": {"configMap": "o"},
        });
        for (key, value) in spec.as_object().unwrap() {
            whole[key] = value.clone();
        }
        from_value(json!({
        "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob", "metadata": {"name": "j", "namespace": "n", "uid": "u"},
        "spec": whole, "status": status,
    }))
    .unwrap()
    }

    pub(super) fn placed(spec: &Value) -> InferenceJob {
        job(
            spec,
            &json!({"epoch": 1, "startTime": time(NOW - 100), "conditions": [condition("Placed", "True", NOW - 100)]}),
        )
    }

    pub(super) fn run(epoch: i64, status: &Value) -> Assignment {
        from_value(json!({
        "apiVersion": "gogrid.dev/v1alpha1", "kind": "Assignment", "metadata": {"name": format!("u-{epoch}")},
        "spec": {
            "kind": "Run", "job": {"namespace": "n", "name": "j", "uid": "u"}, "epoch": epoch, "term": 1, "nodeName": "a",
            "session": "s1", "model": {"uri": "file:/m/a", "sha256": "0"}, "contextTokens": 16, "parallelSequences": 1,
        },
        "status": status,
    }))
    .unwrap()
    }
}
use make::{condition, job, placed, run, time};

const NOW: i64 = 1_000_000;

struct Case {
    job: InferenceJob,
    runs: Vec<Assignment>,
    on: RunsOn,
    may_run: Option<Assignment>,
    refusal: Option<Refusal>,
    priority_missing: Option<&'static str>,
    model: ModelState,
    input: InputState,
    claimed: bool,
    published: Option<Publication>,
    leftovers: bool,
}

impl Case {
    fn new(job: InferenceJob, runs: Vec<Assignment>) -> Self {
        Self {
            job,
            runs,
            on: RunsOn {
                node: "a".into(),
                heartbeat: Heartbeat::Fresh,
                session: Some("s1".into()),
                leave: false,
            },
            may_run: None,
            refusal: None,
            priority_missing: None,
            model: ModelState::Known,
            input: InputState::Staged,
            claimed: false,
            published: None,
            leftovers: false,
        }
    }

    fn step(&self) -> Step {
        let runs: Vec<_> = self.runs.iter().collect();
        next(&View {
            job: &self.job,
            runs: &runs,
            now: NOW,
            refusal: self.refusal.as_ref(),
            runs_on: Some(self.on.clone()),
            may_run: self.may_run.as_ref(),
            priority_missing: self.priority_missing,
            model: self.model.clone(),
            input: self.input.clone(),
            claimed: self.claimed,
            published: self.published.as_ref(),
            leftovers: self.leftovers,
        })
        .step
    }
}

fn stop(name: &str, reason: StopReason) -> Step {
    Step::Stop {
        assignment: name.into(),
        reason,
    }
}

fn new_job() -> InferenceJob {
    job(&json!({}), &json!({}))
}

fn result() -> ResultStatus {
    ResultStatus {
        location: "configmap/o".into(),
        sha256: "0".into(),
        bytes: 1,
        records: 1,
        failed_records: 0,
        preview: String::new(),
    }
}

#[test]
fn a_new_job_is_refused_staged_inspected_and_placed_in_that_order() {
    let mut case = Case::new(new_job(), vec![]);
    assert_eq!(case.step(), Step::Place);
    case.model = ModelState::ToInspect;
    assert_eq!(case.step(), Step::Inspect);
    case.model = ModelState::Waiting(Reason::NoNodes);
    assert_eq!(case.step(), Step::Wait(Reason::NoNodes));
    case.input = InputState::ToStage;
    assert_eq!(case.step(), Step::Stage);
    let refusal = Refusal {
        word: "InputNotFound",
        message: "m".into(),
    };
    case.input = InputState::Refused(refusal.clone());
    assert_eq!(case.step(), Step::Refuse(refusal));
    case.priority_missing = Some("high");
    assert_eq!(
        case.step(),
        Step::Wait(Reason::PriorityClassNotFound { name: "high".into() })
    );
    let refusal = Refusal {
        word: "Unsupported",
        message: "m".into(),
    };
    case.refusal = Some(refusal.clone());
    assert_eq!(case.step(), Step::Refuse(refusal));
}

#[test]
fn a_job_on_a_node_that_it_must_leave_is_stopped_once_and_waits_for_another_place_uncounted() {
    let mut case = Case::new(placed(&json!({})), vec![run(1, &json!({"state": "Running"}))]);
    assert_eq!(case.step(), Step::Mirror);
    case.on.leave = true;
    assert_eq!(case.step(), stop("u-1", StopReason::NodeDrained));
    case.runs[0].spec.stop = from_value(json!({"reason": "NodeDrained", "graceSeconds": 30})).unwrap();
    assert_eq!(case.step(), Step::Mirror, "the order was given");
    case.runs[0].status = from_value(json!({"state": "Stopped"})).unwrap();
    assert!(matches!(case.step(), Step::Requeue { counted: false, .. }));
}

#[test]
fn a_placed_job_without_its_order_gets_it_unless_an_agent_had_claimed_it() {
    let mut case = Case::new(placed(&json!({})), vec![]);
    assert_eq!(case.step(), Step::CreateAssignment);
    let lost = |case: &Case| matches!(case.step(), Step::Requeue { failure: Failure { reason, .. }, counted: false } if reason == "AssignmentLost");
    case.claimed = true;
    assert!(lost(&case), "seen claimed, and nothing worth telling since");
    case.claimed = false;
    case.job.status.as_mut().unwrap().lease = from_value(json!({"name": "node-a", "holder": "s1"})).unwrap();
    assert!(lost(&case));
}

#[test]
fn a_running_job_is_mirrored_and_placed_anew_when_its_node_or_session_is_lost() {
    let mut case = Case::new(placed(&json!({})), vec![run(1, &json!({"state": "Running"}))]);
    assert_eq!(case.step(), Step::Mirror);
    case.on.heartbeat = Heartbeat::Waiting;
    assert_eq!(case.step(), Step::Mirror, "silence alone is no loss");
    case.on.heartbeat = Heartbeat::Lost;
    assert!(
        matches!(case.step(), Step::Requeue { failure: Failure { reason, .. }, counted: false } if reason == "NodeLost")
    );
    case.on.heartbeat = Heartbeat::Fresh;
    case.on.session = Some("s2".into());
    assert!(
        matches!(case.step(), Step::Requeue { failure: Failure { reason, .. }, counted: false } if reason == "AgentRestarted")
    );
}

#[test]
fn an_order_of_an_earlier_epoch_is_stopped_before_anything_else() {
    let mut job = placed(&json!({}));
    job.status.as_mut().unwrap().epoch = 2;
    let case = Case::new(
        job,
        vec![run(1, &json!({"state": "Running"})), run(2, &json!({}))],
    );
    assert_eq!(case.step(), stop("u-1", StopReason::Superseded));
}

#[test]
fn a_failure_is_tried_again_only_where_that_may_help_and_only_so_often() {
    let failed = |retryable| {
        run(
            1,
            &json!({"state": "Failed", "failure": {"reason": "OutOfMemory", "message": "m", "retryable": retryable}}),
        )
    };
    let mut case = Case::new(placed(&json!({"backoffLimit": 1})), vec![failed(true)]);
    assert!(matches!(case.step(), Step::Requeue { counted: true, .. }));
    case.job.status.as_mut().unwrap().attempts = 1;
    assert!(
        matches!(case.step(), Step::Finish(Outcome::Failed(f)) if f.reason == "BackoffLimitExceeded" && f.message.contains("OutOfMemory"))
    );
    let case = Case::new(placed(&json!({})), vec![failed(false)]);
    assert!(matches!(case.step(), Step::Finish(Outcome::Failed(f)) if f.reason == "OutOfMemory"));
    let stopped = run(1, &json!({"state": "Stopped"}));
    assert!(matches!(
        Case::new(placed(&json!({})), vec![stopped]).step(),
        Step::Requeue { counted: false, .. }
    ));
}

#[test]
fn no_place_is_looked_for_while_an_earlier_run_may_still_compute() {
    let mut case = Case::new(new_job(), vec![]);
    case.may_run = Some(run(1, &json!({"state": "Stopping"})));
    assert_eq!(
        case.step(),
        Step::Wait(Reason::FormerRunEnding { node: "a".into() })
    );
    case.may_run = None;
    assert_eq!(case.step(), Step::Place);
}

#[test]
fn a_rule_for_a_failure_beats_what_the_agent_says_of_it() {
    let failed = |retryable| {
        run(
            1,
            &json!({"state": "Failed", "failure": {"reason": "OutOfMemory", "message": "m", "retryable": retryable}}),
        )
    };
    let with = |action: &str, limit: i32, retryable| {
        let rules =
            json!([{"onReason": "Other", "action": "Fail"}, {"onReason": "OutOfMemory", "action": action}]);
        let spec = json!({"backoffLimit": limit, "failurePolicy": {"rules": rules}});
        Case::new(placed(&spec), vec![failed(retryable)]).step()
    };
    assert!(matches!(with("Fail", 3, true), Step::Finish(Outcome::Failed(f)) if f.reason == "OutOfMemory"));
    assert!(matches!(
        with("Retry", 1, false),
        Step::Requeue { counted: true, .. }
    ));
    assert!(
        matches!(with("Retry", 0, false), Step::Finish(Outcome::Failed(f)) if f.reason == "BackoffLimitExceeded")
    );
    assert!(matches!(
        with("Ignore", 0, false),
        Step::Requeue { counted: false, .. }
    ));
}

#[test]
fn a_failure_that_does_not_count_is_not_repeated_without_a_pause() {
    let spec = json!({"failurePolicy": {"rules": [{"onReason": "OutOfMemory", "action": "Ignore"}]}});
    let waiting = |since| {
        let status = json!({
            "epoch": 1, "conditions": [condition("Placed", "False", since)],
            "lastFailure": {"reason": "OutOfMemory", "message": "m", "retryable": true},
        });
        Case::new(job(&spec, &status), vec![]).step()
    };
    assert_eq!(
        waiting(NOW - 4),
        Step::Wait(Reason::BackingOff {
            attempts: 0,
            seconds: 5
        })
    );
    assert_eq!(waiting(NOW - 5), Step::Place);
}

#[test]
fn a_job_that_another_controller_manages_is_never_touched() {
    for status in [
        json!({}),
        json!({"conditions": [condition("Suspended", "True", NOW)]}),
    ] {
        let case = Case::new(
            job(&json!({"managedBy": "kueue.x-k8s.io/multikueue"}), &status),
            vec![],
        );
        assert_eq!(case.step(), Step::Rest);
    }
    let own = job(&json!({"managedBy": "gogrid.dev/operator"}), &json!({}));
    assert_eq!(Case::new(own, vec![]).step(), Step::Place);
}

#[test]
fn a_clock_set_back_an_hour_keeps_no_job_waiting_for_an_hour() {
    let failed = |since| {
        let status = json!({"epoch": 3, "attempts": 3, "conditions": [condition("Placed", "False", since)]});
        Case::new(job(&json!({}), &status), vec![]).step()
    };
    assert!(matches!(failed(NOW), Step::Wait(_)));
    assert_eq!(failed(NOW + 3600), Step::Place);
}

#[test]
fn an_order_refused_because_its_leader_was_followed_by_another_is_no_attempt_of_the_jobs() {
    let refused = run(
        1,
        &json!({"state": "Failed", "failure": {"reason": "StaleTerm", "message": "m", "retryable": true}}),
    );
    for rules in [json!([]), json!([{"onReason": "StaleTerm", "action": "Fail"}])] {
        let spec = json!({"backoffLimit": 0, "failurePolicy": {"rules": rules}});
        let step = Case::new(placed(&spec), vec![refused.clone()]).step();
        assert!(matches!(step, Step::Requeue { counted: false, .. }), "{step:?}");
    }
}

#[test]
fn a_repeated_attempt_waits_longer_each_time() {
    let status = json!({"epoch": 3, "attempts": 3, "conditions": [condition("Placed", "False", NOW - 2)]});
    let mut case = Case::new(job(&json!({}), &status), vec![]);
    assert_eq!(
        case.step(),
        Step::Wait(Reason::BackingOff {
            attempts: 3,
            seconds: 4
        })
    );
    case.job = job(
        &json!({}),
        &json!({"epoch": 3, "attempts": 3, "conditions": [condition("Placed", "False", NOW - 4)]}),
    );
    assert_eq!(case.step(), Step::Place);
    assert_eq!([0, 1, 2, 3, 9, 50].map(backoff_seconds), [0, 1, 2, 4, 256, 256]);
}

#[test]
fn a_suspended_job_is_stopped_first_and_says_so_only_when_nothing_runs() {
    let spec = json!({"suspend": true});
    let mut case = Case::new(placed(&spec), vec![run(1, &json!({"state": "Running"}))]);
    assert_eq!(case.step(), stop("u-1", StopReason::Suspended));
    case.runs[0].spec.stop = from_value(json!({"reason": "Suspended", "graceSeconds": 30})).unwrap();
    assert_eq!(case.step(), Step::Mirror);
    case.runs[0].status = from_value(json!({"state": "Stopped"})).unwrap();
    assert_eq!(case.step(), Step::Suspend);
    let suspended = json!({"epoch": 1, "conditions": [condition("Suspended", "True", NOW), condition("Placed", "False", NOW)]});
    case.job = job(&spec, &suspended);
    assert_eq!(case.step(), Step::Rest);
    case.job = job(&json!({}), &suspended);
    assert_eq!(case.step(), Step::Resume);
}

#[test]
fn the_deadline_stops_the_run_and_then_ends_the_job_but_not_while_suspended() {
    let spec = json!({"activeDeadlineSeconds": 100});
    let mut case = Case::new(placed(&spec), vec![run(1, &json!({"state": "Running"}))]);
    assert_eq!(case.step(), stop("u-1", StopReason::DeadlineExceeded));
    case.runs[0].spec.stop = from_value(json!({"reason": "DeadlineExceeded", "graceSeconds": 30})).unwrap();
    assert_eq!(case.step(), Step::Mirror);
    case.runs[0].status = from_value(json!({"state": "Stopped"})).unwrap();
    assert!(
        matches!(case.step(), Step::Finish(Outcome::Failed(f)) if f.reason == "DeadlineExceeded" && f.message.contains("100"))
    );
    case.job.status.as_mut().unwrap().suspended_seconds = 1;
    assert!(
        matches!(case.step(), Step::Requeue { .. }),
        "a suspended second does not count"
    );
}

#[test]
fn a_success_is_published_before_the_job_is_over_even_when_it_was_suspended_meanwhile() {
    let mut case = Case::new(
        placed(&json!({"suspend": true})),
        vec![run(1, &json!({"state": "Succeeded"}))],
    );
    assert_eq!(case.step(), Step::Publish);
    case.published = Some(Publication::Done(result()));
    assert_eq!(case.step(), Step::Finish(Outcome::Succeeded(result())));
    let conflict = Failure {
        reason: "OutputConflict".into(),
        message: "m".into(),
        retryable: false,
    };
    case.published = Some(Publication::Refused(conflict.clone()));
    assert_eq!(case.step(), Step::Finish(Outcome::Failed(conflict)));
    case.job = placed(&json!({"failurePolicy": {"maxFailedRecords": 0}}));
    case.published = Some(Publication::Done(ResultStatus {
        failed_records: 1,
        ..result()
    }));
    assert!(matches!(case.step(), Step::Finish(Outcome::Failed(f)) if f.reason == "TooManyFailedRecords"));
}

#[test]
fn a_finished_job_is_cleaned_up_then_rests_and_goes_when_its_time_is_up() {
    let status = json!({"epoch": 1, "completionTime": time(NOW - 60), "conditions": [condition("Finished", "True", NOW - 60)]});
    let mut case = Case::new(job(&json!({"ttlSecondsAfterFinished": 60}), &status), vec![]);
    case.leftovers = true;
    assert_eq!(case.step(), Step::CleanUp);
    case.leftovers = false;
    assert_eq!(case.step(), Step::DeleteJob);
    case.job = job(&json!({"ttlSecondsAfterFinished": 61}), &status);
    assert_eq!(case.step(), Step::Rest);
    case.job = job(&json!({}), &status);
    assert_eq!(case.step(), Step::Rest);
}

#[test]
fn a_job_on_its_way_out_only_has_its_runs_stopped() {
    let mut case = Case::new(placed(&json!({})), vec![run(1, &json!({"state": "Running"}))]);
    case.job.metadata.deletion_timestamp = from_value(time(NOW)).unwrap();
    assert_eq!(case.step(), stop("u-1", StopReason::JobDeleted));
    case.runs[0].spec.stop = from_value(json!({"reason": "JobDeleted", "graceSeconds": 30})).unwrap();
    assert_eq!(case.step(), Step::Rest);
}
