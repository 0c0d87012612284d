//! Pure decisions of the agent and its workers.
//!
//! Owns: the worker protocol, the throttle, the VRAM ledger and its watchdog, the adaptive law, session and fencing, and
//! what to do next with each assignment. Must not: read a clock, environment or file, spawn anything, or know kube,
//! tokio or candle. Time comes in as nanoseconds of CLOCK_BOOTTIME.

pub mod adaptive;
pub mod driver;
pub mod feed;
pub mod fetch;
pub mod guest;
pub mod plan;
pub mod protocol;
pub mod rank;
pub mod report;
pub mod results;
pub mod session;
pub mod shares;
pub mod skew;
pub mod throttle;
pub mod vram;
pub mod watchdog;
