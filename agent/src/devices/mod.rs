//! The node's devices as they are measured.
//!
//! Owns: nothing itself. Must not hold policy: what figures mean is in `gogrid_agent_core` and the owner.

pub(crate) mod cpu;
pub(crate) mod driver;
pub(crate) mod kubelet;
pub(crate) mod nvml;
mod probe;
