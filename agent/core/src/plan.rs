//! What to do next with each assignment.
//!
//! Owns: the life of an assignment on this node as a function of what is ordered, what is observed and the time. The
//! executor carries the steps out without choosing. Must not do I/O, read a clock or touch a worker.

use crate::protocol::WorkerId;
use crate::session::{Nanos, Standing, check_term, nanos};
use crate::vram::{Ledger, Shortage};
use gogrid_api::assignment::{Kind, State};
use gogrid_api::job::Failure;
use gogrid_api::{Assignment, Bytes, Millis};
use std::collections::BTreeMap;

/// How long a worker may take from being ordered to saying hello.
pub const START_DEADLINE: Millis = Millis(30_000);
/// How long a worker that loads may say nothing: it tells its counters every second while it loads or waits for its share.
pub const LOAD_SILENCE: Millis = Millis(120_000);

/// An assignment as last seen, and what was learnt about it since.
#[derive(Clone, Debug)]
pub struct Order {
    /// The object.
    pub assignment: Assignment,
    /// Term of the leader Lease, read after the assignment was first seen.
    pub leader_term: Option<i64>,
    /// How it ends without having begun, whatever is free: its profile can't be enforced, or its device can't be used.
    pub obstacle: Option<Ending>,
}

/// How far a job of this session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Bytes are reserved.
    Claimed,
    /// A header is being read; nothing else will happen.
    Inspecting,
    /// The model is being fetched and verified.
    Fetching,
    /// The verified model is at hand.
    Verified,
    /// The pool was asked for a worker.
    Starting,
    /// The worker has said hello.
    Connected,
    /// It was told to load.
    Loading,
    /// It takes records.
    Running,
    /// It was told to drain so that another one takes its place.
    Renewing,
    /// It has drained for that; it goes, and the job is `Verified` again.
    Renewed,
    /// It was told to drain.
    Draining,
    /// It has drained.
    Drained,
    /// Over; only the last report may still be on its way.
    Over,
}

/// Why a job is being ended other than by its own failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopping {
    /// When the worker is killed at the latest.
    pub deadline: Nanos,
}

/// A job of this session as observed.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent observations, not states of one machine"
)]
pub struct Job {
    /// How far it is.
    pub phase: Phase,
    /// When that phase began.
    pub since: Nanos,
    /// The API server has taken the claim: nothing is fetched or spawned before.
    pub accepted: bool,
    /// Its worker, until that was reaped.
    pub worker: Option<WorkerId>,
    /// When its worker last said anything, or was woken.
    pub heard: Nanos,
    /// Whether the worker was ordered killed.
    pub killed: bool,
    /// Set once the job is to stop.
    pub stopping: Option<Stopping>,
    /// Set once the job has failed.
    pub failure: Option<Failure>,
    /// Set once the node wants it gone by no fault of the order: why, and when its worker is killed at the latest.
    pub eviction: Option<(Failure, Nanos)>,
    /// Its worker can't be given the limits that are in force, a new one can.
    pub outdated: bool,
    /// All records are answered.
    pub exhausted: bool,
    /// More answers are not durable yet than its last report can carry.
    pub unsaved: bool,
    /// A chunk of answers is on its way.
    pub saving: bool,
    /// Its fence has passed since the last renewal that was granted to it.
    pub fenced: bool,
    /// Seen in the API, same session, not stopped, after the contact that followed the fence.
    pub confirmed: bool,
}

impl Job {
    /// Just claimed.
    pub fn new(now: Nanos) -> Self {
        Self {
            phase: Phase::Claimed,
            since: now,
            accepted: false,
            worker: None,
            heard: now,
            killed: false,
            stopping: None,
            failure: None,
            eviction: None,
            outdated: false,
            exhausted: false,
            unsaved: false,
            saving: false,
            fenced: false,
            confirmed: false,
        }
    }
}

/// What holds for the whole node.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// CLOCK_BOOTTIME.
    pub now: Nanos,
    /// This agent's session.
    pub session: &'a str,
    /// What the lease says.
    pub standing: Standing,
    /// Whether the pool is connected.
    pub pool: bool,
    /// Whether devices, profiles and the Node's labels are known.
    pub ready: bool,
    /// Devices that pods hold and the node's written status still offers. A job that is handed back before that is said
    /// would be placed on them once more.
    pub unsaid: &'a [String],
    /// Whether the agent is ending, and how far that is.
    pub shutdown: Option<Shutdown>,
}

/// The agent was told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// Whether the node's status says so. An operator that does not know it would place a job that is handed back here
    /// once more.
    pub said: bool,
    /// Until when jobs wait for that, CLOCK_BOOTTIME.
    pub say_by: Nanos,
    /// Until when workers may drain, CLOCK_BOOTTIME.
    pub drain_by: Nanos,
}

impl Shutdown {
    /// Whether jobs are handed back by now.
    pub fn hands_back(&self, now: Nanos) -> bool {
        self.said || now >= self.say_by
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All records answered.
    Succeeded,
    /// Told to.
    Stopped,
    /// Handed back because the node wanted it gone.
    Evicted(Failure),
    /// By a failure.
    Failed(Failure),
}

impl Ending {
    /// The state to report.
    pub fn state(&self) -> State {
        match self {
            Ending::Succeeded => State::Succeeded,
            Ending::Stopped | Ending::Evicted(_) => State::Stopped,
            Ending::Failed(_) => State::Failed,
        }
    }
}

/// One thing to do; carried out without choosing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read the leader Lease's term for this order.
    ReadTerm(String),
    /// Read the model's header and report facts.
    Inspect(String),
    /// Bytes are reserved: make the job and report Claimed.
    Claim(String),
    /// Report an end without ever having begun.
    Refuse(String, Ending),
    /// Fetch and verify the model.
    Fetch(String),
    /// Ask the pool for a worker.
    Spawn(String),
    /// Send Load with the verified model.
    Load(String),
    /// Begin to replace the worker: it drains.
    Renew(String),
    /// Begin to stop: the worker drains if it runs, until the deadline.
    Stop(String, Nanos),
    /// It can't go on: keep the failure, so that the next plan ends it.
    Fail(String, Failure),
    /// Kill its worker.
    Kill(String),
    /// Make answers durable.
    Save(String),
    /// Look the assignment up after a contact that followed a fence.
    Confirm(String),
    /// Grant, then wake the worker.
    Continue(String),
    /// Report the end; bytes go back.
    Finish(String, Ending),
    /// Nobody asks for it any more: drop it; bytes go back.
    Forget(String),
}

/// What to do now. Reserves bytes for the claims it returns: a check and its effect are one.
///
/// `orders` are the assignments for this node; those for other sessions are left alone (the operator raises the
/// epoch), unless they are deleted. `complete` says that `orders` is a whole list and not the beginning of one.
pub fn plan(
    context: &Context<'_>,
    orders: &BTreeMap<String, Order>,
    complete: bool,
    jobs: &BTreeMap<String, Job>,
    ledger: &mut Ledger,
) -> Vec<Step> {
    let mut steps = vec![];
    for (name, order) in orders {
        if !jobs.contains_key(name)
            && let Some(step) = consider(context, name, order, ledger)
        {
            steps.push(step);
        }
    }
    for (name, job) in jobs {
        let order = orders.get(name);
        let step = if order.is_none() && complete {
            abandon(name, job)
        } else {
            advance(context, name, job, order)
        };
        steps.extend(match step {
            Some(Step::Load(name)) => begin_load(name, order, ledger),
            other => other,
        });
    }
    steps
}

/// Looks at the device once more before anything is put on it: others may have grown since the claim.
fn begin_load(name: String, order: Option<&Order>, ledger: &mut Ledger) -> Option<Step> {
    let device = &order?.assignment.spec.stages.first()?.gpu_uuid;
    match ledger.load(device, &name) {
        Ok(()) => Some(Step::Load(name)),
        Err(Shortage::Leaving { .. }) => None,
        Err(shortage) => {
            let failure = Failure {
                reason: "InsufficientVRAM".to_owned(),
                message: shortage.to_string(),
                retryable: true,
            };
            Some(Step::Fail(name, failure))
        }
    }
}

fn consider(context: &Context<'_>, name: &str, order: &Order, ledger: &mut Ledger) -> Option<Step> {
    let Order {
        assignment,
        leader_term,
        obstacle,
    } = order;
    let spec = &assignment.spec;
    let over = assignment
        .status
        .as_ref()
        .and_then(|s| s.state)
        .is_some_and(State::is_over);
    let able = context.ready && context.shutdown.is_none() && context.standing == Standing::Held;
    if over || !able || spec.session != context.session {
        return None;
    }
    let name = name.to_owned();
    if spec.stop.is_some() || assignment.metadata.deletion_timestamp.is_some() {
        return Some(Step::Refuse(name, Ending::Stopped));
    }
    let Some(current) = leader_term else {
        return Some(Step::ReadTerm(name));
    };
    let refuse = |reason: &str, message: String, retryable| {
        Some(Step::Refuse(
            name.clone(),
            Ending::Failed(Failure {
                reason: reason.to_owned(),
                message,
                retryable,
            }),
        ))
    };
    if let Err(stale) = check_term(spec.term, *current) {
        return refuse("StaleTerm", stale.to_string(), true);
    }
    if spec.kind == Kind::Inspect {
        return Some(Step::Inspect(name));
    }
    if let Some(obstacle) = obstacle {
        return (!keeps_silent(context, order, obstacle)).then(|| Step::Refuse(name, obstacle.clone()));
    }
    let [stage] = spec.stages.as_slice() else {
        let message = format!(
            "the order names {} devices: this version runs a model on exactly one",
            spec.stages.len()
        );
        return refuse("UnsupportedPlacement", message, false);
    };
    let bytes = match stage.vram.bytes() {
        Ok(Bytes(0)) => {
            return refuse(
                "InvalidOrder",
                "the order reserves no device memory".into(),
                false,
            );
        }
        Ok(bytes) => bytes,
        Err(error) => return refuse("InvalidOrder", format!("stages[0].vram: {error}"), false),
    };
    match ledger.reserve(&stage.gpu_uuid, &name, bytes) {
        Ok(()) => Some(Step::Claim(name)),
        // What ended workers held comes back in a moment: the order waits.
        Err(Shortage::Held(_) | Shortage::Leaving { .. }) => None,
        Err(shortage @ (Shortage::NoDevice(_) | Shortage::NotHeld(_))) => {
            refuse("NoSuchDevice", shortage.to_string(), true)
        }
        Err(shortage @ (Shortage::TooLittle { .. } | Shortage::NotClean { .. })) => {
            refuse("InsufficientVRAM", shortage.to_string(), true)
        }
    }
}

/// Whether the end of that order is not reported yet.
fn keeps_silent(context: &Context<'_>, order: &Order, ending: &Ending) -> bool {
    let mut devices = order.assignment.spec.stages.iter().map(|stage| &stage.gpu_uuid);
    matches!(ending, Ending::Evicted(_)) && devices.any(|device| context.unsaid.contains(device))
}

/// The assignment is gone from the API: its worker goes at once, then the bytes.
fn abandon(name: &str, job: &Job) -> Option<Step> {
    match job.worker {
        Some(_) if job.killed => None,
        Some(_) => Some(Step::Kill(name.to_owned())),
        None => Some(Step::Forget(name.to_owned())),
    }
}

fn advance(context: &Context<'_>, name: &str, job: &Job, order: Option<&Order>) -> Option<Step> {
    if job.phase == Phase::Over {
        return None;
    }
    let name = name.to_owned();
    let now = context.now;
    let kill = |name: String| (!job.killed).then_some(Step::Kill(name));
    // An end in whatever way: the worker first, then what it has answered, then the report, which carries the rest of that.
    let end = |name: String, ending: Ending| match job.worker {
        Some(_) => kill(name),
        None if job.saving => None,
        None if job.unsaved => Some(Step::Save(name)),
        None if order.is_some_and(|order| keeps_silent(context, order, &ending)) => None,
        None => Some(Step::Finish(name, ending)),
    };
    if let Some(failure) = &job.failure {
        return end(name, Ending::Failed(failure.clone()));
    }
    let Some(stopping) = job.stopping else {
        let spec = order.map(|o| &o.assignment);
        let grace = spec.and_then(|a| a.spec.stop.as_ref()).map(|s| s.grace_seconds);
        let deleted = spec.is_some_and(|a| a.metadata.deletion_timestamp.is_some());
        let grace = grace.map(|s| nanos(Millis(u64::try_from(s).unwrap_or(0).saturating_mul(1000))));
        // Stopped for too long: handed back without a grace, and no failure of the job's.
        if context.standing == Standing::Expired && job.worker.is_some() {
            return Some(Step::Stop(name, now));
        }
        let leaving = context.shutdown.filter(|s| s.hands_back(now));
        let causes = [
            grace.map(|grace| now.saturating_add(grace)),
            leaving.map(|s| s.drain_by),
            job.eviction.as_ref().map(|(_, deadline)| *deadline),
        ];
        let deadline = causes.into_iter().flatten().min();
        return match deadline.or(deleted.then_some(now)) {
            Some(deadline) => Some(Step::Stop(name, deadline)),
            None => run(context, name, job),
        };
    };
    // The agent's own end tightens every deadline, and so does what the node wants meanwhile.
    let deadline = context
        .shutdown
        .map_or(stopping.deadline, |s| s.drain_by.min(stopping.deadline));
    let deadline = job
        .eviction
        .as_ref()
        .map_or(deadline, |(_, by)| deadline.min(*by));
    // A fenced worker can't drain: it stands still.
    let draining = job.phase == Phase::Draining && !job.exhausted && !job.fenced && job.worker.is_some();
    if draining && now < deadline {
        return None;
    }
    // Who was asked for by the operator is told so, whatever the node wanted.
    let asked = order.is_none_or(|o| o.assignment.spec.stop.is_some());
    match &job.eviction {
        Some((why, _)) if !asked => end(name, Ending::Evicted(why.clone())),
        Some(_) | None => end(name, Ending::Stopped),
    }
}

/// A job that nothing ends: its next step forward.
fn run(context: &Context<'_>, name: String, job: &Job) -> Option<Step> {
    if job.fenced && job.worker.is_some() {
        return match (context.standing, job.confirmed) {
            (Standing::Held, true) => Some(Step::Continue(name)),
            (Standing::Held, false) => Some(Step::Confirm(name)),
            (Standing::Unproven | Standing::Fenced | Standing::Expired, _) => None,
        };
    }
    // In any phase: where an earlier epoch has answered all, no worker is needed, and one that fails is none to wait for.
    if job.exhausted && job.phase != Phase::Inspecting {
        return match (job.worker, job.unsaved, job.saving) {
            (_, _, true) => None,
            (_, true, false) => Some(Step::Save(name)),
            (Some(_), false, false) => (!job.killed).then_some(Step::Kill(name)),
            (None, false, false) => Some(Step::Finish(name, Ending::Succeeded)),
        };
    }
    match job.phase {
        Phase::Claimed if job.accepted => Some(Step::Fetch(name)),
        Phase::Verified if context.pool && context.standing == Standing::Held => Some(Step::Spawn(name)),
        Phase::Connected => Some(Step::Load(name)),
        Phase::Running if job.outdated && context.pool => Some(Step::Renew(name)),
        Phase::Renewed if job.worker.is_some() => (!job.killed).then_some(Step::Kill(name)),
        Phase::Starting if context.now >= job.since.saturating_add(nanos(START_DEADLINE)) => {
            (!job.killed).then_some(Step::Kill(name))
        }
        Phase::Loading if context.now >= job.since.max(job.heard).saturating_add(nanos(LOAD_SILENCE)) => {
            let message = format!(
                "the worker said nothing for {} s while it loaded the model",
                LOAD_SILENCE.0 / 1000
            );
            let failure = Failure {
                reason: "WorkerSilent".to_owned(),
                message,
                retryable: true,
            };
            Some(Step::Fail(name, failure))
        }
        Phase::Claimed
        | Phase::Verified
        | Phase::Inspecting
        | Phase::Fetching
        | Phase::Starting
        | Phase::Loading
        | Phase::Running
        | Phase::Renewing
        | Phase::Renewed
        | Phase::Draining
        | Phase::Drained
        | Phase::Over => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vram::{Own, Reading};
    use gogrid_api::AssignmentSpec;
    use serde_json::json;

    const HELD: Context<'static> = Context {
        now: 100,
        session: "s",
        standing: Standing::Held,
        pool: true,
        ready: true,
        unsaid: &[],
        shutdown: None,
    };
    const SAID: Shutdown = Shutdown {
        said: true,
        say_by: 300,
        drain_by: 500,
    };

    fn order(extra: &serde_json::Value) -> Order {
        let mut spec = json!({
            "kind": "Run", "job": {"namespace": "n", "name": "j", "uid": "u"}, "epoch": 1, "term": 3,
            "nodeName": "node", "session": "s", "model": {"uri": "file:///m", "sha256": "00"},
            "stages": [{"gpuUUID": "cpu", "firstLayer": 0, "lastLayer": 1, "vram": "100"}],
            "contextTokens": 64, "parallelSequences": 1,
        });
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        let spec: AssignmentSpec = serde_json::from_value(spec).unwrap();
        Order {
            assignment: Assignment::new("a", spec),
            leader_term: Some(3),
            obstacle: None,
        }
    }

    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        let reading = Reading {
            at: 0,
            total: Bytes(150),
            reserved: Bytes(0),
            used: Bytes(0),
            own: Some(Own::default()),
            free_at_exit: true,
        };
        ledger.observe("cpu", reading);
        ledger.set_cap("cpu", Bytes(150));
        ledger
    }

    fn first(context: &Context<'_>, order: Order) -> Option<Step> {
        plan(
            context,
            &BTreeMap::from([("a".into(), order)]),
            true,
            &BTreeMap::new(),
            &mut ledger(),
        )
        .pop()
    }

    fn next(context: &Context<'_>, extra: &serde_json::Value, job: &Job) -> Option<Step> {
        let orders = BTreeMap::from([("a".to_owned(), order(extra))]);
        let mut ledger = ledger();
        ledger.reserve("cpu", "a", Bytes(100)).unwrap();
        plan(
            context,
            &orders,
            true,
            &BTreeMap::from([("a".into(), job.clone())]),
            &mut ledger,
        )
        .pop()
    }

    fn reason(step: Option<Step>) -> String {
        match step {
            Some(Step::Refuse(_, Ending::Failed(failure))) => failure.reason,
            other => panic!("{other:?}"),
        }
    }

    fn running(worker: Option<u64>) -> Job {
        Job {
            phase: Phase::Running,
            worker,
            ..Job::new(0)
        }
    }

    #[test]
    fn a_worker_that_falls_silent_while_it_loads_is_given_up_and_one_that_stands_at_the_fence_is_not() {
        let silence = nanos(LOAD_SILENCE);
        let loading = Job {
            phase: Phase::Loading,
            worker: Some(1),
            since: 100,
            heard: 500,
            ..Job::new(0)
        };
        let at = |now, job: &Job| next(&Context { now, ..HELD }, &json!({}), job);
        assert_eq!(at(499 + silence, &loading), None);
        match at(500 + silence, &loading) {
            Some(Step::Fail(_, failure)) => {
                assert_eq!(
                    (failure.reason.as_str(), failure.retryable),
                    ("WorkerSilent", true)
                );
            }
            other => panic!("{other:?}"),
        }
        let fenced = Job {
            fenced: true,
            ..loading
        };
        let standing = Context {
            now: 500 + silence,
            standing: Standing::Fenced,
            ..HELD
        };
        assert_eq!(next(&standing, &json!({}), &fenced), None);
    }

    #[test]
    fn two_claims_of_one_plan_share_one_ledger() {
        let orders = BTreeMap::from([("a".into(), order(&json!({}))), ("b".into(), order(&json!({})))]);
        let steps = plan(&HELD, &orders, true, &BTreeMap::new(), &mut ledger());
        assert_eq!(steps[0], Step::Claim("a".into()));
        assert_eq!(reason(steps.get(1).cloned()), "InsufficientVRAM");
    }

    #[test]
    fn orders_for_another_session_or_under_an_earlier_term_start_nothing() {
        assert_eq!(first(&HELD, order(&json!({"session": "old"}))), None);
        assert_eq!(reason(first(&HELD, order(&json!({"term": 2})))), "StaleTerm");
        let unknown = Order {
            leader_term: None,
            ..order(&json!({}))
        };
        assert_eq!(first(&HELD, unknown), Some(Step::ReadTerm("a".into())));
    }

    #[test]
    fn without_a_held_lease_nothing_is_claimed() {
        for standing in [Standing::Unproven, Standing::Fenced, Standing::Expired] {
            assert_eq!(first(&Context { standing, ..HELD }, order(&json!({}))), None);
        }
    }

    #[test]
    fn an_order_that_is_already_to_stop_is_answered_without_a_start() {
        let stop = json!({"stop": {"reason": "JobDeleted", "graceSeconds": 1}});
        assert_eq!(
            first(&HELD, order(&stop)),
            Some(Step::Refuse("a".into(), Ending::Stopped))
        );
    }

    #[test]
    fn more_than_one_device_is_refused_by_name() {
        assert_eq!(
            reason(first(&HELD, order(&json!({"stages": []})))),
            "UnsupportedPlacement"
        );
        let gpu = json!({"stages": [{"gpuUUID": "GPU-1", "firstLayer": 0, "lastLayer": 1, "vram": "1"}]});
        assert_eq!(reason(first(&HELD, order(&gpu))), "NoSuchDevice");
    }

    #[test]
    fn a_job_goes_from_claim_to_success_one_step_at_a_time() {
        let mut job = Job::new(0);
        let at = |job: &Job| next(&HELD, &json!({}), job);
        assert_eq!(at(&job), None, "the claim is not accepted yet");
        job.accepted = true;
        assert_eq!(at(&job), Some(Step::Fetch("a".into())));
        job.phase = Phase::Verified;
        assert_eq!(at(&job), Some(Step::Spawn("a".into())));
        job.worker = Some(1);
        job.phase = Phase::Connected;
        assert_eq!(at(&job), Some(Step::Load("a".into())));
        job.phase = Phase::Running;
        assert_eq!(at(&job), None);
        job.exhausted = true;
        job.unsaved = true;
        assert_eq!(at(&job), Some(Step::Save("a".into())));
        job.saving = true;
        assert_eq!(at(&job), None);
        (job.saving, job.unsaved) = (false, false);
        assert_eq!(at(&job), Some(Step::Kill("a".into())));
        job.killed = true;
        assert_eq!(at(&job), None);
        job.worker = None;
        assert_eq!(at(&job), Some(Step::Finish("a".into(), Ending::Succeeded)));
        job.phase = Phase::Over;
        assert_eq!(at(&job), None);
    }

    #[test]
    fn where_an_earlier_epoch_has_answered_all_records_no_worker_is_needed_nor_waited_for() {
        let phases = [
            Phase::Claimed,
            Phase::Fetching,
            Phase::Verified,
            Phase::Starting,
            Phase::Connected,
            Phase::Loading,
        ];
        for phase in phases {
            let mut job = Job {
                phase,
                exhausted: true,
                ..running(None)
            };
            let at = |job: &Job| next(&HELD, &json!({}), job);
            let finish = Some(Step::Finish("a".into(), Ending::Succeeded));
            assert_eq!(at(&job), finish, "{phase:?}");
            job.worker = Some(1);
            assert_eq!(at(&job), Some(Step::Kill("a".into())), "{phase:?}");
        }
    }

    #[test]
    fn a_stop_drains_then_kills_at_the_deadline_and_saves_before_it_reports() {
        let stop = json!({"stop": {"reason": "Suspended", "graceSeconds": 1}});
        let deadline = HELD.now + 1_000_000_000;
        let mut job = running(Some(1));
        assert_eq!(next(&HELD, &stop, &job), Some(Step::Stop("a".into(), deadline)));
        job.stopping = Some(Stopping { deadline });
        job.phase = Phase::Draining;
        assert_eq!(next(&HELD, &stop, &job), None);
        let late = Context {
            now: deadline,
            ..HELD
        };
        assert_eq!(next(&late, &stop, &job), Some(Step::Kill("a".into())));
        job.phase = Phase::Drained;
        assert_eq!(next(&HELD, &stop, &job), Some(Step::Kill("a".into())));
        job.worker = None;
        job.unsaved = true;
        assert_eq!(next(&HELD, &stop, &job), Some(Step::Save("a".into())));
        job.unsaved = false;
        assert_eq!(
            next(&HELD, &stop, &job),
            Some(Step::Finish("a".into(), Ending::Stopped))
        );
    }

    #[test]
    fn a_deleted_assignment_kills_at_once_and_gives_the_bytes_back_after_the_worker_is_gone() {
        let go = |job: Job| {
            plan(
                &HELD,
                &BTreeMap::new(),
                true,
                &BTreeMap::from([("a".into(), job)]),
                &mut ledger(),
            )
            .pop()
        };
        assert_eq!(go(running(Some(1))), Some(Step::Kill("a".into())));
        assert_eq!(
            go(Job {
                killed: true,
                ..running(Some(1))
            }),
            None
        );
        assert_eq!(go(running(None)), Some(Step::Forget("a".into())));
        assert_eq!(
            go(Job {
                phase: Phase::Over,
                ..running(None)
            }),
            Some(Step::Forget("a".into()))
        );
        let half = plan(
            &HELD,
            &BTreeMap::new(),
            false,
            &BTreeMap::from([("a".into(), running(Some(1)))]),
            &mut ledger(),
        );
        assert_eq!(half, [], "half a list proves nothing");
    }

    #[test]
    fn a_fenced_worker_is_continued_only_after_the_api_confirmed_its_order() {
        let mut job = Job {
            fenced: true,
            ..running(Some(1))
        };
        assert_eq!(
            next(
                &Context {
                    standing: Standing::Fenced,
                    ..HELD
                },
                &json!({}),
                &job
            ),
            None
        );
        assert_eq!(next(&HELD, &json!({}), &job), Some(Step::Confirm("a".into())));
        job.confirmed = true;
        assert_eq!(next(&HELD, &json!({}), &job), Some(Step::Continue("a".into())));
        let expired = Context {
            standing: Standing::Expired,
            ..HELD
        };
        assert_eq!(
            next(&expired, &json!({}), &job),
            Some(Step::Stop("a".into(), HELD.now))
        );
    }

    #[test]
    fn a_worker_that_was_fenced_for_too_long_is_killed_and_handed_back_as_stopped_not_as_failed() {
        let expired = Context {
            standing: Standing::Expired,
            ..HELD
        };
        let mut job = Job {
            fenced: true,
            phase: Phase::Draining,
            stopping: Some(Stopping { deadline: HELD.now }),
            unsaved: true,
            ..running(Some(1))
        };
        let at = |job: &Job| next(&expired, &json!({}), job);
        assert_eq!(at(&job), Some(Step::Kill("a".into())));
        (job.worker, job.killed) = (None, true);
        assert_eq!(at(&job), Some(Step::Save("a".into())));
        job.unsaved = false;
        assert_eq!(at(&job), Some(Step::Finish("a".into(), Ending::Stopped)));
    }

    #[test]
    fn a_failure_saves_what_was_answered_before_it_is_reported() {
        let failure = Failure {
            reason: "WorkerExited".into(),
            message: "signal 9".into(),
            retryable: true,
        };
        let mut job = Job {
            failure: Some(failure.clone()),
            unsaved: true,
            ..running(None)
        };
        assert_eq!(next(&HELD, &json!({}), &job), Some(Step::Save("a".into())));
        job.unsaved = false;
        assert_eq!(
            next(&HELD, &json!({}), &job),
            Some(Step::Finish("a".into(), Ending::Failed(failure)))
        );
    }

    #[test]
    fn a_shutdown_stops_everything_and_claims_nothing() {
        let ending = Context {
            shutdown: Some(SAID),
            ..HELD
        };
        assert_eq!(first(&ending, order(&json!({}))), None);
        assert_eq!(
            next(&ending, &json!({}), &running(Some(1))),
            Some(Step::Stop("a".into(), 500))
        );
    }

    #[test]
    fn an_ending_agent_hands_nothing_back_before_its_node_says_so_or_too_much_time_has_passed() {
        let at = |now, said| Context {
            now,
            shutdown: Some(Shutdown { said, ..SAID }),
            ..HELD
        };
        let job = running(Some(1));
        let stopped = Some(Step::Stop("a".into(), SAID.drain_by));
        assert_eq!(first(&at(100, false), order(&json!({}))), None);
        assert_eq!(next(&at(299, false), &json!({}), &job), None);
        assert_eq!(next(&at(100, true), &json!({}), &job), stopped);
        assert_eq!(next(&at(300, false), &json!({}), &job), stopped);
        // Who was asked for by the operator does not wait.
        let stop = json!({"stop": {"reason": "Suspended", "graceSeconds": 0}});
        assert_eq!(
            next(&at(100, false), &stop, &job),
            Some(Step::Stop("a".into(), 100))
        );
    }

    fn evicted(phase: Phase, worker: Option<u64>) -> Job {
        let why = Failure {
            reason: "VRAMExceeded".into(),
            message: "too much".into(),
            retryable: true,
        };
        Job {
            phase,
            eviction: Some((why, 500)),
            ..running(worker)
        }
    }

    #[test]
    fn an_evicted_job_drains_until_its_deadline_and_is_handed_back_with_the_reason() {
        let mut job = evicted(Phase::Running, Some(1));
        assert_eq!(next(&HELD, &json!({}), &job), Some(Step::Stop("a".into(), 500)));
        job.stopping = Some(Stopping { deadline: 500 });
        job.phase = Phase::Draining;
        assert_eq!(next(&HELD, &json!({}), &job), None);
        let late = Context { now: 500, ..HELD };
        assert_eq!(next(&late, &json!({}), &job), Some(Step::Kill("a".into())));
        job.worker = None;
        let (why, _) = job.eviction.clone().unwrap();
        let ending = Ending::Evicted(why);
        assert_eq!(ending.state(), State::Stopped);
        assert_eq!(
            next(&HELD, &json!({}), &job),
            Some(Step::Finish("a".into(), ending))
        );
        let stop = json!({"stop": {"reason": "Suspended", "graceSeconds": 1}});
        assert_eq!(
            next(&HELD, &stop, &job),
            Some(Step::Finish("a".into(), Ending::Stopped))
        );
    }

    #[test]
    fn a_job_whose_device_was_given_away_ends_at_once_and_is_handed_back_only_when_the_node_has_said_so() {
        let unsaid = ["cpu".to_owned()];
        let silent = Context {
            unsaid: &unsaid,
            ..HELD
        };
        let why = Failure {
            reason: crate::guest::DEVICE_CLAIMED.into(),
            message: "a pod holds it".into(),
            retryable: true,
        };
        let mut job = Job {
            eviction: Some((why.clone(), HELD.now)),
            unsaved: true,
            ..running(Some(1))
        };
        let at = |context: &Context<'_>, job: &Job| next(context, &json!({}), job);
        assert_eq!(at(&silent, &job), Some(Step::Stop("a".into(), HELD.now)));
        // As if it had been told to stop long before, with time to drain.
        job.stopping = Some(Stopping { deadline: 10_000 });
        job.phase = Phase::Draining;
        assert_eq!(at(&silent, &job), Some(Step::Kill("a".into())));
        (job.worker, job.killed) = (None, true);
        assert_eq!(at(&silent, &job), Some(Step::Save("a".into())));
        job.unsaved = false;
        assert_eq!(at(&silent, &job), None);
        let ending = Ending::Evicted(why);
        assert_eq!(at(&HELD, &job), Some(Step::Finish("a".into(), ending.clone())));
        // An order that was under way when the device was given away is no failed attempt either.
        let late = || Order {
            obstacle: Some(ending.clone()),
            ..order(&json!({}))
        };
        assert_eq!(first(&silent, late()), None);
        assert_eq!(
            first(&HELD, late()),
            Some(Step::Refuse("a".into(), ending.clone()))
        );
    }

    #[test]
    fn the_earliest_of_all_reasons_to_stop_is_the_deadline() {
        let stop = json!({"stop": {"reason": "Suspended", "graceSeconds": 1}});
        let job = evicted(Phase::Running, Some(1));
        assert_eq!(next(&HELD, &stop, &job), Some(Step::Stop("a".into(), 500)));
        let ending = Context {
            shutdown: Some(Shutdown {
                drain_by: 400,
                ..SAID
            }),
            ..HELD
        };
        assert_eq!(next(&ending, &stop, &job), Some(Step::Stop("a".into(), 400)));
    }

    #[test]
    fn a_device_that_others_have_filled_since_the_claim_is_not_loaded() {
        let orders = BTreeMap::from([("a".to_owned(), order(&json!({})))]);
        let job = Job {
            phase: Phase::Connected,
            ..running(Some(1))
        };
        let jobs = BTreeMap::from([("a".to_owned(), job)]);
        let mut ledger = ledger();
        ledger.reserve("cpu", "a", Bytes(100)).unwrap();
        let full = Reading {
            at: 1,
            total: Bytes(150),
            reserved: Bytes(0),
            used: Bytes(51),
            own: Some(Own::default()),
            free_at_exit: true,
        };
        ledger.observe("cpu", full);
        match plan(&HELD, &orders, true, &jobs, &mut ledger).as_slice() {
            [Step::Fail(name, failure)] => {
                assert_eq!(
                    (name.as_str(), failure.reason.as_str()),
                    ("a", "InsufficientVRAM")
                );
                assert!(failure.message.contains("51"), "{}", failure.message);
            }
            other => panic!("{other:?}"),
        }
        ledger.observe(
            "cpu",
            Reading {
                used: Bytes(50),
                ..full
            },
        );
        assert_eq!(
            plan(&HELD, &orders, true, &jobs, &mut ledger),
            [Step::Load("a".into())]
        );
    }

    #[test]
    fn an_order_waits_for_bytes_that_ended_workers_are_giving_back() {
        let mut ledger = ledger();
        let own = Own {
            live: Bytes(0),
            ended: Bytes(100),
        };
        ledger.observe(
            "cpu",
            Reading {
                at: 1,
                total: Bytes(150),
                reserved: Bytes(0),
                used: Bytes(100),
                own: Some(own),
                free_at_exit: false,
            },
        );
        let orders = BTreeMap::from([("a".to_owned(), order(&json!({})))]);
        assert_eq!(plan(&HELD, &orders, true, &BTreeMap::new(), &mut ledger), []);
    }

    #[test]
    fn a_worker_that_cannot_take_the_limits_drains_and_goes_before_another_one_comes() {
        let at = |job: &Job| next(&HELD, &json!({}), job);
        let mut job = Job {
            outdated: true,
            ..running(Some(1))
        };
        assert_eq!(at(&job), Some(Step::Renew("a".into())));
        job.phase = Phase::Renewing;
        assert_eq!(at(&job), None);
        job.phase = Phase::Renewed;
        assert_eq!(at(&job), Some(Step::Kill("a".into())));
        job.killed = true;
        assert_eq!(at(&job), None);
        let last = Job {
            phase: Phase::Renewing,
            exhausted: true,
            ..running(None)
        };
        assert_eq!(at(&last), Some(Step::Finish("a".into(), Ending::Succeeded)));
        let fenced = Job {
            fenced: true,
            outdated: true,
            ..running(Some(1))
        };
        assert_eq!(at(&fenced), Some(Step::Confirm("a".into())));
    }

    #[test]
    fn a_worker_that_never_says_hello_is_killed() {
        let job = Job {
            phase: Phase::Starting,
            ..running(Some(1))
        };
        assert_eq!(next(&HELD, &json!({}), &job), None);
        let late = Context {
            now: nanos(START_DEADLINE),
            ..HELD
        };
        assert_eq!(next(&late, &json!({}), &job), Some(Step::Kill("a".into())));
    }
}
