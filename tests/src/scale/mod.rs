//! The scale soak: a thousand real agents and the real operator on a real API server, and many jobs.
//!
//! Owns: nothing but the list of parts. `fleet` runs the agents over the simulator's modelled machines, `load` makes jobs,
//! `board`, `tally` and `meter` measure from outside the programs, `report` judges. Must not: hold a rule of GoGrid.

mod board;
mod fleet;
mod load;
mod meter;
pub mod report;
pub mod run;
mod tally;

/// A count as a number to calculate with.
fn number(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
