//! A modelled pool of workers, and the models of its node.
//!
//! Owns: starting, waking, killing and reaping workers for whichever agent lives, as `gogrid-worker pool` does; fetching
//! models over a disk that may be slow or full. Must not decide anything.

use super::rng::Rng;
use super::time::{MILLI, Machine, Nanos, Process, lock};
use super::truth::Truth;
use super::worker::{Place, Start, Worker};
use futures::future::BoxFuture;
use gogrid_agent::event::{Event, Hub};
use gogrid_agent::link::Link;
use gogrid_agent::models::{ModelSource, Obtained};
use gogrid_agent_core::fetch::Manners;
use gogrid_agent_core::protocol::{FromPool, ToPool, WorkerId, decode};
use gogrid_api::assignment::{ModelFacts, ModelOrder};
use gogrid_api::job::Failure;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;

/// User that workers run as.
pub const USER: u32 = 65_532;

/// What is wrong with a node's disk and workers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ailments {
    /// Extra time of every fetch.
    pub slow_disk: Nanos,
    /// No fetch succeeds.
    pub full_disk: bool,
    /// How long a killed worker takes to go.
    pub stuck: Nanos,
}

/// What pools and models of a node share.
#[derive(Clone)]
pub struct Yard {
    /// Name of the node.
    pub node: String,
    /// Machine.
    pub machine: Machine,
    /// The record.
    pub truth: Truth,
    /// Bytes that all workers of the node's device may hold.
    pub cap: u64,
    /// What is wrong.
    pub ailments: Arc<Mutex<Ailments>>,
    /// Workers that live, for faults to choose from.
    pub alive: Arc<Mutex<BTreeMap<u64, Arc<Notify>>>>,
    /// What every file descriptor of a model is.
    pub file: Arc<OwnedFd>,
    /// Facts of every model.
    pub facts: ModelFacts,
    /// The longest that getting a model takes, and loading one.
    pub longest: (Nanos, Nanos),
    /// Since when the whole machine stands still, and when it stood still before.
    pub stood: Arc<Mutex<Stood>>,
}

/// When a whole machine stood still.
#[derive(Clone, Debug, Default)]
pub struct Stood {
    since: Option<Nanos>,
    before: Vec<(Nanos, Nanos)>,
}

impl Yard {
    /// The machine stands still from now on, or goes on.
    pub fn frozen(&self, frozen: bool) {
        let now = self.machine.time().now();
        let mut stood = lock(&self.stood);
        match (frozen, stood.since.take()) {
            (true, since) => stood.since = since.or(Some(now)),
            (false, Some(since)) => stood.before.push((since, now)),
            (false, None) => {}
        }
    }

    /// The parts of a stretch of time in which the machine did not stand still.
    pub fn awake(&self, from: Nanos, until: Nanos) -> Vec<(Nanos, Nanos)> {
        let stood = lock(&self.stood);
        let now = stood.since.map(|since| (since, Nanos::MAX));
        let mut parts = vec![(from, until)];
        for (begin, end) in stood.before.iter().copied().chain(now) {
            let cut = |(from, until): (Nanos, Nanos)| [(from, until.min(begin)), (from.max(end), until)];
            parts = parts
                .into_iter()
                .flat_map(cut)
                .filter(|(from, until)| from < until)
                .collect();
        }
        parts
    }
}

struct Living {
    number: u64,
    task: JoinHandle<()>,
    wake: Arc<Notify>,
}

/// A pool that serves one agent after the other; it ends when nobody can name a new one any more.
pub async fn serve(yard: Yard, kernel: Process, mut agents: watch::Receiver<Option<Hub>>, mut rng: Rng) {
    loop {
        let hub = loop {
            let found = agents.borrow_and_update().clone();
            if let Some(hub) = found {
                break hub;
            }
            if agents.changed().await.is_err() {
                return;
            }
        };
        yard.machine.sleep(rng.between(20 * MILLI, 120 * MILLI)).await;
        let mut pool = Pool {
            yard: yard.clone(),
            kernel: kernel.clone(),
            hub: hub.clone(),
            workers: BTreeMap::new(),
            rng: rng.split(),
        };
        let alive = pool.serve_one().await;
        pool.kill_all().await;
        if alive && agents.has_changed().is_err() {
            return;
        }
        yard.machine.sleep(rng.between(100 * MILLI, 600 * MILLI)).await;
        // The old agent's door is closed: wait for another.
        while agents.borrow().as_ref().is_some_and(|now| now.same(&hub)) {
            if agents.changed().await.is_err() {
                return;
            }
        }
    }
}

struct Pool {
    yard: Yard,
    kernel: Process,
    hub: Hub,
    workers: BTreeMap<WorkerId, Living>,
    rng: Rng,
}

impl Drop for Pool {
    /// Workers die with the thread that started them.
    fn drop(&mut self) {
        for living in std::mem::take(&mut self.workers).into_values() {
            living.task.abort();
            self.reaped(&living);
        }
    }
}

impl Pool {
    /// Until its agent is gone.
    async fn serve_one(&mut self) -> bool {
        let (link, mut frames) = Link::pair();
        let hello = Event::PoolHello {
            alive: vec![],
            user: USER,
            link,
        };
        self.hub.send(hello).await;
        let (ended, mut ends) = mpsc::unbounded_channel::<(WorkerId, Option<i32>, Option<i32>)>();
        loop {
            tokio::select! {
                biased;
                Some((worker, code, signal)) = ends.recv() => {
                    if let Some(living) = self.workers.remove(&worker) {
                        self.reaped(&living);
                        self.hub.send(Event::FromPool(FromPool::Exited { worker, code, signal })).await;
                    }
                }
                frame = frames.next() => match frame.map(|bytes| decode::<ToPool>(&bytes)) {
                    Some(Ok(message)) => self.act(message, &ended).await,
                    Some(Err(_)) | None => return true,
                },
            }
        }
    }

    fn reaped(&self, living: &Living) {
        lock(&self.yard.alive).remove(&living.number);
        self.yard.truth.gone(&self.yard.node, living.number);
    }

    async fn act(
        &mut self,
        message: ToPool,
        ended: &mpsc::UnboundedSender<(WorkerId, Option<i32>, Option<i32>)>,
    ) {
        match message {
            ToPool::Spawn {
                worker,
                nonce,
                limits,
                fence_at,
                memory_limit: _,
            } => {
                let number = self.yard.truth.worker();
                let (wake, crash) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
                let place = Place {
                    yard: self.yard.clone(),
                    hub: self.hub.clone(),
                    user: USER,
                    number,
                    wake: Arc::clone(&wake),
                    rng: self.rng.split(),
                };
                let start = Start {
                    worker,
                    nonce,
                    limits,
                    fence_at,
                };
                let (ended, crashed) = (ended.clone(), Arc::clone(&crash));
                let task = self.kernel.begin(Box::pin(async move {
                    let code = tokio::select! {
                        biased;
                        () = crashed.notified() => 101,
                        () = Worker::live(place, start) => 0,
                    };
                    // A pool that is gone reaps nothing.
                    let _ = ended.send((worker, Some(code), None));
                }));
                lock(&self.yard.alive).insert(number, crash);
                self.workers.insert(worker, Living { number, task, wake });
                let pid = u32::try_from(number).unwrap_or(1);
                self.hub
                    .send(Event::FromPool(FromPool::Spawned { worker, pid }))
                    .await;
            }
            // Nothing else runs on a modelled machine.
            ToPool::Rank { .. } => {}
            ToPool::Kill { worker } => {
                if let Some(living) = self.workers.get(&worker) {
                    living.task.abort();
                    let (ended, machine) = (ended.clone(), self.yard.machine.clone());
                    let long = self.teardown();
                    tokio::spawn(async move {
                        machine.sleep(long).await;
                        let _ = ended.send((worker, None, Some(9)));
                    });
                }
            }
            ToPool::Continue { worker } => {
                if let Some(living) = self.workers.get(&worker) {
                    // Waking one that runs does nothing: a stop that is yet to come must not eat this.
                    living.wake.notify_waiters();
                }
            }
        }
    }

    fn teardown(&mut self) -> Nanos {
        let stuck = lock(&self.yard.ailments).stuck;
        self.rng.between(5 * MILLI, 80 * MILLI) + stuck
    }

    /// Kills and reaps every worker before the next agent hears of this pool.
    async fn kill_all(&mut self) {
        let workers = std::mem::take(&mut self.workers);
        for living in workers.values() {
            living.task.abort();
        }
        if !workers.is_empty() {
            let long = self.teardown();
            self.yard.machine.sleep(long).await;
        }
        for living in workers.values() {
            self.reaped(living);
        }
    }
}

/// Models as a node's agent gets them.
pub struct SimulatedModels {
    yard: Yard,
    rng: Mutex<Rng>,
}

impl SimulatedModels {
    /// Those of a node.
    pub fn new(yard: Yard, rng: Rng) -> Self {
        Self {
            yard,
            rng: Mutex::new(rng),
        }
    }

    fn fetch(&self) -> BoxFuture<'static, Result<(), Failure>> {
        let (yard, extra) = (
            self.yard.clone(),
            lock(&self.rng).mostly_short(5 * MILLI, self.yard.longest.0),
        );
        Box::pin(async move {
            let Ailments {
                slow_disk, full_disk, ..
            } = *lock(&yard.ailments);
            yard.machine.sleep(extra + slow_disk).await;
            if full_disk {
                return Err(Failure {
                    reason: "InsufficientDisk".into(),
                    message: "the simulated disk is full".into(),
                    retryable: true,
                });
            }
            Ok(())
        })
    }
}

impl ModelSource for SimulatedModels {
    fn obtain(&self, _order: ModelOrder) -> BoxFuture<'static, Result<Obtained, Failure>> {
        let (fetch, yard) = (self.fetch(), self.yard.clone());
        Box::pin(async move {
            fetch.await?;
            Ok(Obtained {
                file: yard.file,
                facts: Some(yard.facts),
            })
        })
    }

    fn inspect(&self, _order: ModelOrder) -> BoxFuture<'static, Result<ModelFacts, Failure>> {
        let (fetch, facts) = (self.fetch(), self.yard.facts.clone());
        Box::pin(async move {
            fetch.await?;
            Ok(facts)
        })
    }

    /// Fetching takes nothing of a modelled machine.
    fn is_busy(&self) -> bool {
        false
    }

    fn behave(&self, _manners: Manners) {}
}
