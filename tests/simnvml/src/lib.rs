//! A simulated NVML: what the agent's probe loads instead of the driver's library in tests.
//!
//! Owns: the C symbols that nvml-wrapper calls for what GoGrid uses, answering from a scenario file that may change at
//! any time. Must not know GoGrid.

mod abi;
mod scenario;
mod state;

pub use scenario::{Chaos, Device, Lost, Part, Process, Scenario};

/// Environment variable that names the scenario file.
pub const SCENARIO_VARIABLE: &str = "GOGRID_SIMNVML_SCENARIO";
