//! The one task that holds the agent's state.
//!
//! Owns: orders, jobs, ledger, profiles, workers, and the loop: take an event, plan, carry the steps out, feed the
//! workers, write what changed. Everything that waits runs elsewhere and comes back as an event. Must not wait itself.

mod devices;
mod enforcement;
mod events;
mod feeding;
mod limits;
mod memory;
mod node;
mod steps;
mod telemetry;
mod work;
mod workers;
mod yielding;

pub(crate) use limits::first_manners;

use crate::api::Calls;
use crate::clock::Host;
use crate::config::Config;
use crate::devices::driver::Driver;
use crate::event::{Event, Hub};
use crate::kube_client::ServerClock;
use crate::link::Link;
use crate::metrics::Metrics;
use crate::models::ModelSource;
use crate::previous::Processes;
use gogrid_agent_core::driver::View;
use gogrid_agent_core::guest::{Guest, Holder};
use gogrid_agent_core::plan::{Context, Job, Order, Phase, Shutdown, plan};
use gogrid_agent_core::protocol::WorkerId;
use gogrid_agent_core::report::Pace;
use gogrid_agent_core::session::{Nanos, Renewals, Standing};
use gogrid_agent_core::shares::Outstanding;
use gogrid_agent_core::skew::Skew;
use gogrid_agent_core::vram::Ledger;
use gogrid_api::GpuNodeStatus;
use gogrid_api::effective::{EffectiveProfile, NamedProfile};
use gogrid_api::node::{Device, ProfileInForce};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use work::Work;

/// How often the loop comes round by itself: shares expire after four of these.
const TICK_NANOS: Nanos = 250_000_000;
/// The same while nothing lives here: whatever comes in wakes the loop anyway.
const IDLE_TICK_NANOS: Nanos = 1_000_000_000;
/// Events taken before the next plan.
const BATCH: usize = 256;
/// Rounds of planning after one batch of events.
const ROUNDS: usize = 16;
/// How long jobs wait for the node's status to say that the agent ends.
const SAY_NANOS: Nanos = 1_000_000_000;
/// How long workers may drain when the agent is told to end.
const SHUTDOWN_NANOS: Nanos = 3_000_000_000;
/// How long last reports may take after that.
const REPORT_NANOS: Nanos = 4_000_000_000;

/// Why the agent ends.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// It was told to, and everything is reported.
    #[error("told to end")]
    Told,
    /// Another session has taken the node's Lease.
    #[error("session {0} has taken the node's Lease")]
    Superseded(String),
}

/// The pool as connected.
struct Pool {
    link: Link,
    user: u32,
}

/// What the owner works with.
pub(crate) struct Tools {
    /// Clocks and tasks.
    pub(crate) host: Arc<dyn Host>,
    /// Settings.
    pub(crate) config: Config,
    /// This session.
    pub(crate) session: String,
    /// The way back.
    pub(crate) hub: Hub,
    /// The API server.
    pub(crate) calls: Calls,
    /// What renewals tell of the clock.
    pub(crate) server_clock: ServerClock,
    /// Models.
    pub(crate) models: Arc<dyn ModelSource>,
    /// The thread that asks the GPU driver, where there is one.
    pub(crate) driver: Option<Driver>,
    /// Metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// Record of processes, where the agent starts the pool itself.
    pub(crate) processes: Option<Arc<Mutex<Processes>>>,
    /// Logical processors.
    pub(crate) threads: u16,
    /// Lets the Lease be taken, once an external pool holds nothing of an old session.
    pub(crate) clear: Option<oneshot::Sender<()>>,
    /// Begins all watches anew.
    pub(crate) watch_again: Arc<Notify>,
}

/// The state.
pub(crate) struct Owner {
    tools: Tools,
    renewals: Renewals,
    renewed_at: Option<Time>,
    shutdown: Option<Shutdown>,
    orders: BTreeMap<String, Order>,
    asked: BTreeSet<String>,
    listing: Option<BTreeSet<String>>,
    complete: bool,
    jobs: BTreeMap<String, Job>,
    work: BTreeMap<String, Work>,
    ledger: Ledger,
    profiles: Option<Vec<NamedProfile>>,
    labels: Option<BTreeMap<String, String>>,
    /// The node's own ceiling, kept because it is asked for many times a second.
    ceiling: Option<Arc<EffectiveProfile>>,
    node_uid: Option<String>,
    in_force: Vec<ProfileInForce>,
    cpu: Vec<Device>,
    driver: Option<View>,
    /// What other pods hold of the driver's devices.
    guest: Guest,
    /// The same by device.
    holders: BTreeMap<String, Holder>,
    /// The driver's devices as they may be used.
    lent: Vec<Device>,
    /// Those that are held and not yet said to be.
    unsaid: Vec<String>,
    skew: Skew,
    pool: Option<Pool>,
    strangers: BTreeSet<WorkerId>,
    workers: BTreeMap<WorkerId, String>,
    pids: BTreeMap<WorkerId, u32>,
    next_worker: WorkerId,
    last_start: BTreeMap<String, Nanos>,
    wake: Option<Nanos>,
    granted_at: Nanos,
    /// Share of the CPU device that the fetching child has, in permille.
    fetching: u16,
    /// Nice value that the pool was last told to rank its session with.
    ranked: Option<i8>,
    watched_at: Nanos,
    told_at: Nanos,
    memory_at: Nanos,
    laws: BTreeMap<String, Option<yielding::Yield>>,
    out: BTreeMap<String, Outstanding>,
    pace: Pace,
    status: GpuNodeStatus,
    node_writing: bool,
    node_look_at: Nanos,
    node_ensure: bool,
    node_retry_at: Nanos,
    end: Option<End>,
}

impl Owner {
    /// Nothing known yet.
    pub(crate) fn new(tools: Tools) -> Self {
        let renewals = Renewals::new(tools.config.timing);
        let Config {
            pod_resources,
            own_pod,
            gpu_resources,
            ..
        } = &tools.config;
        let guest = Guest::new(pod_resources.is_some(), own_pod.clone(), gpu_resources.clone());
        Self {
            tools,
            renewals,
            renewed_at: None,
            shutdown: None,
            orders: BTreeMap::new(),
            asked: BTreeSet::new(),
            listing: None,
            complete: false,
            jobs: BTreeMap::new(),
            work: BTreeMap::new(),
            ledger: Ledger::default(),
            profiles: None,
            labels: None,
            ceiling: limits::built_in(),
            node_uid: None,
            in_force: vec![],
            cpu: vec![],
            driver: None,
            guest,
            holders: BTreeMap::new(),
            lent: vec![],
            unsaid: vec![],
            skew: Skew::default(),
            pool: None,
            strangers: BTreeSet::new(),
            workers: BTreeMap::new(),
            pids: BTreeMap::new(),
            next_worker: 1,
            last_start: BTreeMap::new(),
            wake: None,
            granted_at: 0,
            fetching: 0,
            ranked: None,
            watched_at: 0,
            told_at: 0,
            memory_at: 0,
            laws: BTreeMap::new(),
            out: BTreeMap::new(),
            pace: Pace::default(),
            status: GpuNodeStatus::default(),
            node_writing: false,
            node_look_at: 0,
            node_ensure: true,
            node_retry_at: 0,
            end: None,
        }
    }

    /// Runs until the agent ends.
    pub(crate) async fn run(mut self, mut events: mpsc::Receiver<Event>) -> End {
        let mut tick: Nanos = 0;
        loop {
            let now = self.tools.host.boottime();
            let period = self.period();
            tick = tick.min(now.saturating_add(period));
            let wake = self.wake.take().map_or(tick, |wake| wake.min(tick));
            let sleep = self
                .tools
                .host
                .sleep(Duration::from_nanos(wake.saturating_sub(now)));
            let first = tokio::select! {
                biased;
                () = sleep => None,
                event = events.recv() => event,
            };
            self.tools.metrics.looped();
            let now = self.tools.host.boottime();
            if now >= tick {
                tick = now.saturating_add(period);
            }
            self.notice_fence(now);
            if let Some(event) = first {
                self.take(event, now);
            }
            for _ in 0..BATCH {
                let Ok(event) = events.try_recv() else { break };
                self.take(event, now);
            }
            self.settle();
            let now = self.tools.host.boottime();
            self.breathe(now);
            self.watch_memory(now);
            self.grant(now);
            self.feed(now);
            self.settle();
            self.tell_driver();
            self.say_throttled(now);
            self.flush(now);
            self.flush_node(now);
            self.tell(now);
            if let Some(end) = self.ended(now) {
                return end;
            }
        }
    }

    /// How long the loop may wait for something to come in.
    fn period(&self) -> Nanos {
        let waits = |name: &String| self.jobs.get(name).is_none_or(|job| job.phase != Phase::Over);
        let idle = self.shutdown.is_none() && !self.jobs.keys().chain(self.orders.keys()).any(waits);
        if idle { IDLE_TICK_NANOS } else { TICK_NANOS }
    }

    fn context(&self, now: Nanos) -> Context<'_> {
        Context {
            now,
            session: &self.tools.session,
            standing: self.renewals.standing(now),
            // Beside workers of an old session nothing starts: their bytes are not ours to give yet.
            pool: self.pool.is_some() && self.strangers.is_empty(),
            ready: self.profiles.is_some() && self.labels.is_some() && !self.cpu.is_empty(),
            unsaid: &self.unsaid,
            shutdown: self.shutdown,
        }
    }

    /// Plans and carries out until nothing is left to do for now.
    fn settle(&mut self) {
        for _ in 0..ROUNDS {
            let now = self.tools.host.boottime();
            self.observe(now);
            self.note_unsaid();
            let mut ledger = std::mem::take(&mut self.ledger);
            ledger.keep_only(now, |name| {
                self.jobs.get(name).is_some_and(|job| job.phase != Phase::Over)
            });
            let steps = plan(
                &self.context(now),
                &self.orders,
                self.complete,
                &self.jobs,
                &mut ledger,
            );
            self.ledger = ledger;
            let mut moved = false;
            for step in steps {
                moved |= self.carry_out(step, now);
            }
            if !moved {
                return;
            }
        }
    }

    /// Marks every worker whose fence has passed.
    fn notice_fence(&mut self, now: Nanos) {
        if matches!(self.renewals.standing(now), Standing::Fenced | Standing::Expired) {
            for job in self.jobs.values_mut().filter(|j| j.worker.is_some() && !j.fenced) {
                job.fenced = true;
                job.confirmed = false;
            }
        }
    }

    fn ended(&mut self, now: Nanos) -> Option<End> {
        if let Some(end) = self.end.take() {
            return Some(end);
        }
        let shutdown = self.shutdown?;
        let quiet = shutdown.hands_back(now)
            && self.jobs.values().all(|j| j.phase == Phase::Over)
            && self.work.values().all(Work::reported);
        (quiet || now >= shutdown.drain_by.saturating_add(REPORT_NANOS)).then_some(End::Told)
    }
}
