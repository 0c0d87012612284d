//! What an agent needs of the machine it runs on: clocks, waiting, tasks.
//!
//! Owns: the only way to them, so that whole agents can be run on a simulated machine. Must not decide anything.

use futures::future::BoxFuture;
use gogrid_agent_core::session::Nanos;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rustix::time::{ClockId, clock_gettime};
use std::hash::{BuildHasher as _, Hasher as _};
use std::time::Duration;
use tokio::task::JoinHandle;

/// The machine as executors see it.
pub trait Host: Send + Sync {
    /// Nanoseconds since boot, sleep included; no step of the wall clock moves it.
    fn boottime(&self) -> Nanos;

    /// The wall clock, for times that people read.
    fn wall(&self) -> Timestamp;

    /// Ends after that long by CLOCK_BOOTTIME.
    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()>;

    /// Begins a task of this process.
    fn spawn(&self, task: BoxFuture<'static, ()>) -> JoinHandle<()>;

    /// A number that nobody can guess, to spread what would happen at the same time.
    fn random(&self) -> u64;
}

/// The real machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine;

impl Host for Machine {
    fn boottime(&self) -> Nanos {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
    }

    fn wall(&self) -> Timestamp {
        wall_now()
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(time))
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) -> JoinHandle<()> {
        tokio::spawn(task)
    }

    fn random(&self) -> u64 {
        std::hash::RandomState::new().build_hasher().finish()
    }
}

/// What the wall clock is wrong by, in seconds: for tests that step it.
#[cfg(feature = "faults")]
pub static WALL_OFFSET: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(0);

/// The wall clock, as tests may have stepped it.
pub(crate) fn wall_now() -> Timestamp {
    let now = Timestamp::now();
    #[cfg(feature = "faults")]
    let now = {
        let offset = WALL_OFFSET.load(std::sync::atomic::Ordering::Relaxed);
        now.saturating_add(jiff::SignedDuration::from_secs(offset))
            .unwrap_or(now)
    };
    now
}

/// The wall clock to the second, for status fields.
pub(crate) fn wall_seconds(host: &dyn Host) -> Time {
    let now = host.wall();
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// Waits until an instant of CLOCK_BOOTTIME.
pub(crate) async fn until(host: &dyn Host, at: Nanos) {
    host.sleep(Duration::from_nanos(at.saturating_sub(host.boottime())))
        .await;
}

/// The answer, unless it takes longer than that.
pub(crate) async fn within<T>(host: &dyn Host, limit: Duration, call: impl Future<Output = T>) -> Option<T> {
    let over = host.sleep(limit);
    tokio::select! {
        biased;
        answer = call => Some(answer),
        () = over => None,
    }
}
