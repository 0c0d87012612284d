//! Faults on a real API server: work is never done twice and never lost, whatever part of GoGrid fails or stands still.
//!
//! Every figure is taken from outside: the API server's audit log says what was written when and by which token, and
//! workers stamp each of their steps on disk. Measures time, so it needs the machine to itself.

#![allow(
    clippy::disallowed_methods,
    reason = "the tests measure real time from outside"
)]

mod agents;
mod leaders;
mod partition;
mod renewals;
mod world;
