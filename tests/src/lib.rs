//! Scenarios, fault sweeps and end-to-end tests of GoGrid.
