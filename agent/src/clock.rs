//! The clocks of the agent: the only place that reads them.
//!
//! Owns: CLOCK_BOOTTIME for every decision, and the wall clock for times that people read. Must not decide anything.

use gogrid_agent_core::session::Nanos;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since boot, sleep included; no step of the wall clock moves it.
pub(crate) fn boottime() -> Nanos {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// What the wall clock is wrong by, in seconds: for tests that step it.
#[cfg(feature = "faults")]
pub(crate) static WALL_OFFSET: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(0);

fn wall_now() -> jiff::Timestamp {
    let now = jiff::Timestamp::now();
    #[cfg(feature = "faults")]
    let now = {
        let offset = WALL_OFFSET.load(std::sync::atomic::Ordering::Relaxed);
        now.saturating_add(jiff::SignedDuration::from_secs(offset))
            .unwrap_or(now)
    };
    now
}

/// The wall clock to the second, for status fields.
pub(crate) fn wall() -> Time {
    let now = wall_now();
    Time(jiff::Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// The wall clock to the microsecond, for Leases.
pub(crate) fn wall_micros() -> MicroTime {
    MicroTime(wall_now())
}

/// Waits until an instant of CLOCK_BOOTTIME.
pub(crate) async fn until(at: Nanos) {
    let wait = at.saturating_sub(boottime());
    tokio::time::sleep(std::time::Duration::from_nanos(wait)).await;
}
