//! Behaviour of the model store: addresses, roots, downloads, stored objects.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper of a test fails the test"
)]

mod addresses;
mod downloads;
mod names;
mod objects;
mod roots;
mod server;
