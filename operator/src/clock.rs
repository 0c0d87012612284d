//! What an operator needs of the machine it runs on: clocks, waiting, tasks.
//!
//! Owns: the only way to them, so that whole operators can be run on a simulated machine. Decisions take `now` as an
//! argument.

use futures::future::BoxFuture;
use gogrid_api::Millis;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use std::hash::{BuildHasher as _, Hasher as _};
use std::time::Duration;
use tokio::task::JoinHandle;

/// The machine as executors see it.
pub trait Host: Send + Sync {
    /// Milliseconds since boot, also while the machine slept: what leases are judged by.
    fn mono(&self) -> Millis;

    /// The wall clock, for times that people read.
    fn wall(&self) -> Timestamp;

    /// Ends after that long on the monotonic clock.
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
    fn mono(&self) -> Millis {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let millis = u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000;
        Millis(seconds.saturating_mul(1000).saturating_add(millis))
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where the operator reads the wall clock"
    )]
    fn wall(&self) -> Timestamp {
        Timestamp::try_from(std::time::SystemTime::now()).unwrap_or(Timestamp::UNIX_EPOCH)
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

/// The answer, unless it takes longer than that.
pub(crate) async fn within<T>(host: &dyn Host, limit: Duration, call: impl Future<Output = T>) -> Option<T> {
    let over = host.sleep(limit);
    tokio::select! {
        biased;
        answer = call => Some(answer),
        () = over => None,
    }
}

/// That many seconds since 1970, as the API writes it.
pub(crate) fn time(seconds: i64) -> Time {
    Time(Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH))
}
