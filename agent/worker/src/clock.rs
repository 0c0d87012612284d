//! The one place of this binary that reads clocks. Owns nothing else; decisions take its numbers as arguments.

use rustix::time::{ClockId, clock_gettime};

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// CLOCK_BOOTTIME: the time of grants, fences and records.
pub(crate) fn boottime() -> u64 {
    nanoseconds(ClockId::Boottime)
}

/// CPU time of all threads of this process.
pub(crate) fn process_cpu() -> u64 {
    nanoseconds(ClockId::ProcessCPUTime)
}

/// Sleeps until CLOCK_BOOTTIME reaches `at`; may return early.
pub(crate) fn wait_until(at: u64) {
    let left = at.saturating_sub(boottime());
    std::thread::park_timeout(std::time::Duration::from_nanos(left));
}
