//! A simulated NVML: what the agent's probe loads instead of the driver's library in tests.
//!
//! Owns: the C symbols that nvml-wrapper calls for what GoGrid uses, answering from a scenario file that may change at
//! any time. Must not know GoGrid.

mod abi;
mod scenario;
mod state;

pub use scenario::{Chaos, Device, Lost, Part, Process, Scenario};

/// What this library is called where it was built.
pub const LIBRARY_FILE: &str = "libgogrid_simnvml.so";
/// What the scenario file beside the library is called, which is read where the variable names none.
pub const SCENARIO_FILE: &str = "scenario.json";
/// Environment variable that names the scenario file.
pub const SCENARIO_VARIABLE: &str = "GOGRID_SIMNVML_SCENARIO";
