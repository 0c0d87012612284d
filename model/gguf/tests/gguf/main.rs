//! Behaviour of the GGUF parser, the facts and the estimate.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper of a test fails the test"
)]

mod builder;
mod estimate;
mod facts;
mod format;
mod hostile;
mod properties;
