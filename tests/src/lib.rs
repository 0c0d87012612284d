//! Scenarios, fault sweeps and end-to-end tests of GoGrid.
//!
//! Owns: what more than one test needs: a real control plane, child processes that never outlive the test, and the one
//! way of waiting. Must not: hold a rule of GoGrid itself; the programs under test have those.

pub mod branches;
pub mod cgroups;
pub mod chart;
pub mod cluster;
pub mod confinement;
pub mod controlplane;
pub mod driver;
pub mod fetching;
pub mod images;
pub mod installed;
pub mod jobs;
pub mod netns;
pub mod nodes;
pub mod ports;
pub mod process;
pub mod procfs;
pub mod prometheus;
pub mod rbac;
pub mod scale;
pub mod schemas;
pub mod server;
pub mod share;
pub mod sim;
pub mod steps;
mod sys;
pub mod values;
pub mod wait;
pub mod worker;
