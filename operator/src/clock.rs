//! The operator's two clocks.
//!
//! Owns: reading them, for executors only. Decisions take `now` as an argument.

use gogrid_api::Millis;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since boot, also while the machine slept: what leases are judged by.
pub(crate) fn mono() -> Millis {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let millis = u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000;
    Millis(seconds.saturating_mul(1000).saturating_add(millis))
}

/// The wall clock in whole seconds, for times that people read.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place where the operator reads the wall clock"
)]
pub(crate) fn wall() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since
        .ok()
        .and_then(|d| i64::try_from(d.as_secs()).ok())
        .unwrap_or(0)
}

/// That many seconds since 1970, as the API writes it.
pub(crate) fn time(seconds: i64) -> Time {
    Time(Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH))
}

/// The wall clock with microseconds, for Leases and events.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place where the operator reads the wall clock"
)]
pub(crate) fn micro() -> Timestamp {
    Timestamp::try_from(std::time::SystemTime::now()).unwrap_or(Timestamp::UNIX_EPOCH)
}
