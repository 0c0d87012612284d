//! Simulated machines: true time, clocks that drift and step, processes that stop and die.
//!
//! Owns: true time in nanoseconds, who waits for what moment, and the two programs' view of the machine they run on.
//! Real time plays no part: time moves to the next moment that somebody waits for once nobody has anything left to do.

use super::rng::Rng;
use futures::future::BoxFuture;
use gogrid_api::Millis;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Nanoseconds of true time since the run began.
pub type Nanos = u64;

/// A second.
pub const SECOND: Nanos = 1_000_000_000;
/// A millisecond.
pub const MILLI: Nanos = 1_000_000;
/// Seconds since 1970 at which runs begin.
const EPOCH: i64 = 1_700_000_000;

/// A lock whose holder never panics half-way.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Timers {
    now: Nanos,
    next: u64,
    waiting: BTreeMap<(Nanos, u64), Waker>,
    moments: u64,
}

/// True time.
#[derive(Clone, Default)]
pub struct Time(Arc<Mutex<Timers>>);

impl Time {
    /// Now.
    pub fn now(&self) -> Nanos {
        lock(&self.0).now
    }

    /// Moments that somebody waited for and that came.
    pub fn moments(&self) -> u64 {
        lock(&self.0).moments
    }

    /// Ends at that moment.
    pub fn until(&self, at: Nanos) -> Sleep {
        Sleep {
            time: self.clone(),
            at,
            id: None,
        }
    }

    /// Moves on to the next moment that somebody waits for, but not beyond `end`; whether there was one.
    pub fn advance(&self, end: Nanos) -> bool {
        let waker = {
            let mut timers = lock(&self.0);
            match timers.waiting.first_key_value() {
                Some((&(at, _), _)) if at <= end => {
                    timers.now = timers.now.max(at);
                    timers.moments += 1;
                    timers.waiting.pop_first().map(|(_, waker)| waker)
                }
                _ => {
                    timers.now = timers.now.max(end);
                    None
                }
            }
        };
        let moved = waker.is_some();
        if let Some(waker) = waker {
            waker.wake();
        }
        moved
    }
}

/// Waits for a moment of true time.
pub struct Sleep {
    time: Time,
    at: Nanos,
    id: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let time = self.time.clone();
        let mut timers = lock(&time.0);
        if timers.now >= self.at {
            if let Some(id) = self.id.take() {
                timers.waiting.remove(&(self.at, id));
            }
            return Poll::Ready(());
        }
        let id = self.id.unwrap_or_else(|| {
            timers.next += 1;
            timers.next
        });
        self.id = Some(id);
        timers.waiting.insert((self.at, id), cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            lock(&self.time.0).waiting.remove(&(self.at, id));
        }
    }
}

/// How a machine's clocks go.
#[derive(Clone, Copy, Debug)]
struct Rate {
    /// True time from which on this holds.
    since: Nanos,
    /// What the monotonic clock showed then.
    shown: Nanos,
    /// Parts per million that it is too fast.
    drift: i64,
    /// Nanoseconds that the wall clock is ahead.
    wall: i64,
}

/// One machine.
#[derive(Clone)]
pub struct Machine {
    time: Time,
    rate: Arc<Mutex<Rate>>,
}

impl Machine {
    /// A machine that was booted a while ago, with clocks that are that many parts per million too fast.
    pub fn new(time: Time, booted: Nanos, drift: i64) -> Self {
        let rate = Rate {
            since: time.now(),
            shown: booted,
            drift,
            wall: 0,
        };
        Self {
            time,
            rate: Arc::new(Mutex::new(rate)),
        }
    }

    fn stretched(span: Nanos, drift: i64) -> Nanos {
        let span = i128::from(span);
        let long = span + span * i128::from(drift) / 1_000_000;
        u64::try_from(long).unwrap_or(0)
    }

    /// What CLOCK_BOOTTIME shows.
    pub fn boottime(&self) -> Nanos {
        let rate = *lock(&self.rate);
        rate.shown + Self::stretched(self.time.now().saturating_sub(rate.since), rate.drift)
    }

    /// The true moment at which it will show that.
    pub fn true_time(&self, shown: Nanos) -> Nanos {
        let rate = *lock(&self.rate);
        let span = i128::from(shown.saturating_sub(rate.shown)) * 1_000_000;
        let per = i128::from(1_000_000 + rate.drift).max(1);
        // Rounded up: a timer never fires early.
        let true_span = (span + per - 1) / per;
        rate.since
            .saturating_add(u64::try_from(true_span).unwrap_or(u64::MAX))
    }

    /// From now on that many parts per million too fast.
    pub fn set_drift(&self, drift: i64) {
        let shown = self.boottime();
        let mut rate = lock(&self.rate);
        (rate.since, rate.shown, rate.drift) = (self.time.now(), shown, drift);
    }

    /// Steps the wall clock.
    pub fn step_wall(&self, nanos: i64) {
        lock(&self.rate).wall += nanos;
    }

    /// The machine stood still for that long, its clock too.
    pub fn lose(&self, span: Nanos) {
        let shown = self.boottime().saturating_sub(span);
        let mut rate = lock(&self.rate);
        (rate.since, rate.shown) = (self.time.now(), shown);
    }

    /// The wall clock.
    pub fn wall(&self) -> Timestamp {
        let ahead = lock(&self.rate).wall;
        let nanos = i128::from(EPOCH) * 1_000_000_000 + i128::from(self.time.now()) + i128::from(ahead);
        Timestamp::from_nanosecond(nanos).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// Ends that long after now by CLOCK_BOOTTIME.
    pub fn sleep(&self, span: Nanos) -> Sleep {
        self.time
            .until(self.true_time(self.boottime().saturating_add(span)))
    }

    /// True time.
    pub fn time(&self) -> &Time {
        &self.time
    }
}

/// Why a process does nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    stopped: bool,
    frozen: bool,
    dead: bool,
}

struct Tasks {
    state: State,
    next: u64,
    wakers: BTreeMap<u64, Waker>,
    rng: Rng,
}

/// One process on a machine.
#[derive(Clone)]
pub struct Process {
    machine: Machine,
    tasks: Arc<Mutex<Tasks>>,
}

impl Process {
    /// One that runs.
    pub fn new(machine: Machine, rng: Rng) -> Self {
        let tasks = Tasks {
            state: State::default(),
            next: 0,
            wakers: BTreeMap::new(),
            rng,
        };
        Self {
            machine,
            tasks: Arc::new(Mutex::new(tasks)),
        }
    }

    /// The machine it runs on.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    fn turn(&self, turn: impl FnOnce(&mut State)) {
        let wakers: Vec<Waker> = {
            let mut tasks = lock(&self.tasks);
            turn(&mut tasks.state);
            tasks.wakers.values().cloned().collect()
        };
        for waker in wakers {
            waker.wake();
        }
    }

    /// SIGSTOP.
    pub fn stop(&self) {
        self.turn(|state| state.stopped = true);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.turn(|state| state.stopped = false);
    }

    /// Its machine stands still, or goes on.
    pub fn freeze(&self, frozen: bool) {
        self.turn(|state| state.frozen = frozen);
    }

    /// SIGKILL: every task is dropped before it does anything more.
    pub fn kill(&self) {
        self.turn(|state| state.dead = true);
    }

    /// Whether it lives.
    pub fn lives(&self) -> bool {
        !lock(&self.tasks).state.dead
    }

    /// Begins a task that lives and stands still with the process.
    pub fn begin(&self, task: BoxFuture<'static, ()>) -> JoinHandle<()> {
        let id = {
            let mut tasks = lock(&self.tasks);
            tasks.next += 1;
            tasks.next
        };
        tokio::spawn(Bound {
            process: self.clone(),
            id,
            task: Some(task),
        })
    }
}

/// A task of a process.
struct Bound {
    process: Process,
    id: u64,
    task: Option<BoxFuture<'static, ()>>,
}

impl Future for Bound {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let state = {
            let id = self.id;
            let mut tasks = lock(&self.process.tasks);
            tasks.wakers.entry(id).or_insert_with(|| cx.waker().clone());
            tasks.state
        };
        if let Some(task) = self.task.as_mut().filter(|_| !state.dead)
            && (state.stopped || state.frozen || task.as_mut().poll(cx).is_pending())
        {
            return Poll::Pending;
        }
        self.task = None;
        Poll::Ready(())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // What the task holds may itself take the lock.
        self.task = None;
        lock(&self.process.tasks).wakers.remove(&self.id);
    }
}

impl gogrid_operator::clock::Host for Process {
    fn mono(&self) -> Millis {
        Millis(self.machine.boottime() / MILLI)
    }

    fn wall(&self) -> Timestamp {
        self.machine.wall()
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(self.machine.sleep(nanos(time)))
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) -> JoinHandle<()> {
        self.begin(task)
    }

    fn random(&self) -> u64 {
        lock(&self.tasks).rng.number()
    }
}

impl gogrid_agent::clock::Host for Process {
    fn boottime(&self) -> Nanos {
        self.machine.boottime()
    }

    fn wall(&self) -> Timestamp {
        self.machine.wall()
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(self.machine.sleep(nanos(time)))
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) -> JoinHandle<()> {
        self.begin(task)
    }

    fn random(&self) -> u64 {
        lock(&self.tasks).rng.number()
    }
}

fn nanos(time: Duration) -> Nanos {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
