//! What comes next for one job.
//!
//! Owns: the order of a job's life: refused, waiting, placed, running, stopped, published, over. One call gives one step;
//! the step's effect is seen in the next observation, so a crash between two steps loses nothing.
//! Must not: choose nodes (`plan` does) or word conditions (the operator's status step does).

use crate::reason::Reason;
use crate::world::Heartbeat;
use gogrid_api::assignment::{Assignment, State, StopReason};
use gogrid_api::condition;
use gogrid_api::job::{Failure, FailureAction, InferenceJob, ResultStatus, conditions};
use gogrid_api::names;

/// Why a spec is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One word.
    pub word: &'static str,
    /// A sentence that names field and value.
    pub message: String,
}

/// The node of a running assignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunsOn {
    /// Its name.
    pub node: String,
    /// What is known of its heartbeat.
    pub heartbeat: Heartbeat,
    /// Session that holds the Lease now; `None` while unknown.
    pub session: Option<String>,
    /// Whether the job must leave the node although it is alive.
    pub leave: bool,
}

/// What is known of the job's model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelState {
    /// Its facts.
    Known,
    /// Someone must look at it.
    ToInspect,
    /// Not usable now.
    Waiting(Reason),
}

/// What became of the job's input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputState {
    /// Not looked at yet.
    ToStage,
    /// Copied to where agents read it.
    Staged,
    /// It can't be used as it is; looked at again from time to time.
    Refused(Refusal),
}

/// What became of publishing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Publication {
    /// It is there.
    Done(ResultStatus),
    /// It can't be published.
    Refused(Failure),
}

/// Everything the next step depends on.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// The job.
    pub job: &'a InferenceJob,
    /// Its assignments of kind Run, of all epochs.
    pub runs: &'a [&'a Assignment],
    /// The operator's clock, seconds since 1970.
    pub now: i64,
    /// Why the spec can't be carried out.
    pub refusal: Option<&'a Refusal>,
    /// Where the newest run is.
    pub runs_on: Option<RunsOn>,
    /// A run of an earlier placement that may still compute: its node is not given up, its session lives and it has not
    /// reported its end.
    pub may_run: Option<&'a Assignment>,
    /// The named PriorityClass, when it does not exist.
    pub priority_missing: Option<&'a str>,
    /// The model.
    pub model: ModelState,
    /// The input.
    pub input: InputState,
    /// Whether an agent was seen to have taken up the order of the status's epoch, in this process's life.
    pub claimed: bool,
    /// What became of publishing, in this process's life.
    pub published: Option<&'a Publication>,
    /// Whether anything made for the job is left over.
    pub leftovers: bool,
}

/// How a job ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With a published result.
    Succeeded(ResultStatus),
    /// Without.
    Failed(Failure),
}

/// The next step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do before something changes.
    Rest,
    /// Say that the spec is refused.
    Refuse(Refusal),
    /// Say why it waits.
    Wait(Reason),
    /// Have the model looked at.
    Inspect,
    /// Copy the input to where agents read it.
    Stage,
    /// Find a place.
    Place,
    /// Create the assignment that the status promises.
    CreateAssignment,
    /// Order an assignment to stop.
    Stop {
        /// Its name.
        assignment: String,
        /// Why.
        reason: StopReason,
    },
    /// Show how it goes.
    Mirror,
    /// Say that it holds nothing because it is suspended.
    Suspend,
    /// Say that it waits again.
    Resume,
    /// Give the place up and wait for another.
    Requeue {
        /// Why.
        failure: Failure,
        /// Whether it counts against the backoff limit.
        counted: bool,
    },
    /// Merge the results and hand them over.
    Publish,
    /// The job is over.
    Finish(Outcome),
    /// Remove what was made for the job.
    CleanUp,
    /// Its time after the end is up.
    DeleteJob,
}

/// A step, and when to look again though nothing changed (seconds since 1970).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// The step.
    pub step: Step,
    /// When to look again.
    pub wake_at: Option<i64>,
}

impl From<Step> for Next {
    fn from(step: Step) -> Self {
        Self { step, wake_at: None }
    }
}

/// Seconds between two attempts where the failure does not count.
const IGNORED_PAUSE: i64 = 5;
/// Word of the failure after which a job is placed anew, uncounted: its node fell silent.
pub const NODE_LOST: &str = "NodeLost";
/// Word of the failure after which a job is placed anew, uncounted: its node's agent started again.
pub const AGENT_RESTARTED: &str = "AgentRestarted";
/// An agent's word for an order of a leader that was followed by another before the agent took it up.
const STALE_TERM: &str = "StaleTerm";

fn state(run: &Assignment) -> Option<State> {
    run.status.as_ref().and_then(|s| s.state)
}

fn over(run: &Assignment) -> bool {
    state(run).is_some_and(State::is_over)
}

fn name(run: &Assignment) -> String {
    run.metadata.name.clone().unwrap_or_default()
}

fn failure(reason: &str, message: String, retryable: bool) -> Failure {
    Failure {
        reason: reason.into(),
        message,
        retryable,
    }
}

/// What the job's policy says of that failure.
fn rule(job: &InferenceJob, reason: &str) -> Option<FailureAction> {
    let mut rules = job.spec.failure_policy.rules.iter();
    rules.find(|r| r.on_reason == reason).map(|r| r.action)
}

fn stop(run: &Assignment, reason: StopReason) -> Step {
    Step::Stop {
        assignment: name(run),
        reason,
    }
}

/// Seconds to wait before attempt `attempts + 1`: 1, 2, 4 … 256.
pub fn backoff_seconds(attempts: i32) -> i64 {
    if attempts <= 0 {
        0
    } else {
        1 << (attempts - 1).min(8)
    }
}

/// The run that the status speaks of, if it is placed.
pub fn current_run<'a>(job: &InferenceJob, runs: &[&'a Assignment]) -> Option<&'a Assignment> {
    let status = job.status.as_ref()?;
    if !condition::is_true(&status.conditions, conditions::PLACED) {
        return None;
    }
    runs.iter().find(|r| r.spec.epoch == status.epoch).copied()
}

/// Decides the next step.
pub fn next(view: &View<'_>) -> Next {
    let job = view.job;
    if (job.spec.managed_by.as_deref()).is_some_and(|manager| manager != names::MANAGER) {
        return Step::Rest.into();
    }
    let default = gogrid_api::InferenceJobStatus::default();
    let status = job.status.as_ref().unwrap_or(&default);
    let is = |type_| condition::is_true(&status.conditions, type_);
    let since =
        |type_| condition::find(&status.conditions, type_).map(|c| c.last_transition_time.0.as_second());
    if is(conditions::FINISHED) {
        return finished(
            view,
            status
                .completion_time
                .as_ref()
                .map_or(view.now, |t| t.0.as_second()),
        );
    }
    let unstopped = |r: &&&Assignment| !over(r) && r.spec.stop.is_none();
    if job.metadata.deletion_timestamp.is_some() {
        let live = view.runs.iter().find(unstopped);
        return live
            .map_or(Step::Rest, |r| stop(r, StopReason::JobDeleted))
            .into();
    }
    let placed = is(conditions::PLACED);
    let stale = |r: &&&Assignment| r.spec.epoch < status.epoch || (r.spec.epoch == status.epoch && !placed);
    if let Some(zombie) = view.runs.iter().filter(unstopped).find(stale) {
        return stop(zombie, StopReason::Superseded).into();
    }
    let current = current_run(job, view.runs);
    if let Some(run) = current.filter(|r| state(r) == Some(State::Succeeded)) {
        return publish(view, run);
    }
    let lost = current.and_then(|run| lost(view, run));
    let live = current.filter(|r| !over(r) && lost.is_none());

    if let Some(refusal) = view.refusal.filter(|_| status.epoch == 0) {
        return Step::Refuse(refusal.clone()).into();
    }
    // The user's word comes first: suspended jobs hold nothing, and their clock stands still.
    if job.spec.suspend {
        return match live {
            Some(run) if run.spec.stop.is_none() => stop(run, StopReason::Suspended).into(),
            Some(_) => Step::Mirror.into(),
            None if is(conditions::SUSPENDED) => Step::Rest.into(),
            None => Step::Suspend.into(),
        };
    }
    if is(conditions::SUSPENDED) {
        return Step::Resume.into();
    }
    if let Some(run) = live.filter(|run| run.spec.stop.is_none())
        && view.runs_on.as_ref().is_some_and(|on| on.leave)
    {
        return stop(run, StopReason::NodeDrained).into();
    }

    let deadline = status.start_time.as_ref().zip(job.spec.active_deadline_seconds);
    let deadline = deadline.map(|(start, limit)| start.0.as_second() + status.suspended_seconds + limit);
    if let Some(at) = deadline.filter(|at| *at <= view.now) {
        let limit = job.spec.active_deadline_seconds.unwrap_or_default();
        return match live {
            Some(run) if run.spec.stop.is_none() => stop(run, StopReason::DeadlineExceeded).into(),
            // An agent that never answers must not keep the job from ending.
            Some(_) if view.now < at + 120 => Next {
                step: Step::Mirror,
                wake_at: Some(at + 120),
            },
            _ => {
                let message = format!("the job did not end within spec.activeDeadlineSeconds = {limit}");
                Step::Finish(Outcome::Failed(failure("DeadlineExceeded", message, false))).into()
            }
        };
    }
    let step = if placed {
        match current {
            Some(run) => placed_step(job, status.attempts, run, lost),
            // Once claimed, an assignment that is gone was deleted by someone, and its chunks with it.
            None if view.claimed || status.lease.is_some() => Step::Requeue {
                failure: failure(
                    "AssignmentLost",
                    format!("the assignment of epoch {} is gone", status.epoch),
                    true,
                ),
                counted: false,
            },
            None => Step::CreateAssignment,
        }
    } else {
        let ignored = status.last_failure.as_ref().and_then(|f| rule(job, &f.reason));
        let least = if ignored == Some(FailureAction::Ignore) {
            IGNORED_PAUSE
        } else {
            0
        };
        let seconds = backoff_seconds(status.attempts).max(least);
        let retry_at = since(conditions::PLACED).map(|t| t + seconds);
        // A pause that seems longer than it is comes of a clock that was set back: it has been served.
        if seconds > 0
            && let Some(at) = retry_at.filter(|at| (1..=seconds).contains(&(at - view.now)))
        {
            let reason = Reason::BackingOff {
                attempts: status.attempts,
                seconds,
            };
            return Next {
                step: Step::Wait(reason),
                wake_at: Some(at),
            };
        }
        waiting_step(view)
    };
    Next {
        step,
        wake_at: deadline,
    }
}

fn finished(view: &View<'_>, completed: i64) -> Next {
    if view.leftovers {
        return Step::CleanUp.into();
    }
    match view
        .job
        .spec
        .ttl_seconds_after_finished
        .map(|ttl| completed + ttl)
    {
        Some(at) if at <= view.now && view.job.metadata.deletion_timestamp.is_none() => {
            Step::DeleteJob.into()
        }
        at => Next {
            step: Step::Rest,
            wake_at: at,
        },
    }
}

fn publish(view: &View<'_>, run: &Assignment) -> Next {
    match view.published {
        None => Step::Publish,
        Some(Publication::Done(result)) => {
            let failed = result.failed_records;
            match view.job.spec.failure_policy.max_failed_records.map(i64::from) {
                Some(most) if failed > most => {
                    let message = format!(
                        "{failed} records failed, spec.failurePolicy.maxFailedRecords is {most} ({})",
                        name(run)
                    );
                    Step::Finish(Outcome::Failed(failure("TooManyFailedRecords", message, false)))
                }
                _ => Step::Finish(Outcome::Succeeded(result.clone())),
            }
        }
        Some(Publication::Refused(failure)) => Step::Finish(Outcome::Failed(failure.clone())),
    }
    .into()
}

/// Whether the run's node is lost to it, and why.
fn lost(view: &View<'_>, run: &Assignment) -> Option<Failure> {
    if over(run) {
        return None;
    }
    let on = view.runs_on.as_ref()?;
    if on.heartbeat == Heartbeat::Lost {
        return Some(failure(
            NODE_LOST,
            format!("node {} stopped renewing its lease", on.node),
            true,
        ));
    }
    let other = on.session.as_ref().is_some_and(|s| *s != run.spec.session);
    other.then(|| {
        failure(
            AGENT_RESTARTED,
            format!("the agent of node {} started a new session", on.node),
            true,
        )
    })
}

fn placed_step(job: &InferenceJob, attempts: i32, run: &Assignment, lost: Option<Failure>) -> Step {
    if let Some(failure) = lost {
        return Step::Requeue {
            failure,
            counted: false,
        };
    }
    let status = run.status.clone().unwrap_or_default();
    match state(run) {
        Some(State::Failed) => {
            let cause = status
                .failure
                .unwrap_or_else(|| failure("Unknown", "the agent gave no reason".into(), true));
            let action = rule(job, &cause.reason);
            // A leader's end is no attempt of the job's: nothing of it ran.
            if action == Some(FailureAction::Ignore) || cause.reason == STALE_TERM {
                Step::Requeue {
                    failure: cause,
                    counted: false,
                }
            } else if action == Some(FailureAction::Fail) || (action.is_none() && !cause.retryable) {
                Step::Finish(Outcome::Failed(cause))
            } else if attempts >= job.spec.backoff_limit {
                let message = format!(
                    "{} attempts failed, spec.backoffLimit is {}; the last: {}: {}",
                    attempts.saturating_add(1),
                    job.spec.backoff_limit,
                    cause.reason,
                    cause.message
                );
                Step::Finish(Outcome::Failed(failure("BackoffLimitExceeded", message, false)))
            } else {
                Step::Requeue {
                    failure: cause,
                    counted: true,
                }
            }
        }
        Some(State::Stopped) => {
            let message = format!("node {} handed the job back", run.spec.node_name);
            Step::Requeue {
                failure: status
                    .failure
                    .unwrap_or_else(|| failure("Stopped", message, true)),
                counted: false,
            }
        }
        _ => Step::Mirror,
    }
}

fn waiting_step(view: &View<'_>) -> Step {
    if let Some(refusal) = view.refusal {
        return Step::Refuse(refusal.clone());
    }
    if let Some(name) = view.priority_missing {
        return Step::Wait(Reason::PriorityClassNotFound { name: name.into() });
    }
    match &view.input {
        InputState::Refused(refusal) => return Step::Refuse(refusal.clone()),
        InputState::ToStage => return Step::Stage,
        InputState::Staged => {}
    }
    match (&view.model, view.may_run) {
        (ModelState::ToInspect, _) => Step::Inspect,
        (ModelState::Waiting(reason), _) => Step::Wait(reason.clone()),
        // Two epochs must never compute at the same time.
        (ModelState::Known, Some(run)) => Step::Wait(Reason::FormerRunEnding {
            node: run.spec.node_name.clone(),
        }),
        (ModelState::Known, None) => Step::Place,
    }
}
