//! Pure placement decisions: which node, why not, and what to write next.
//!
//! Owns: the world as placement sees it, fit and score, the queue's order, judgement of heartbeats, memory estimates
//! from a model's facts, a job's next steps, and an independent checker of plans.
//! Must not: read a clock, the environment or an API server; every function is (inputs, `now`) → value.

pub mod check;
pub mod estimate;
pub mod lifecycle;
pub mod liveness;
mod plan;
pub mod queue;
mod reason;
mod request;
mod world;

pub use plan::{Decision, Planned, PlannedStage, Unplaced, plan};
pub use reason::{NodeReason, Reason, Rejection};
pub use request::{Demand, JobRequest, must_leave, tolerates};
pub use world::{Device, Heartbeat, Node, Taint, World, WorldError};
