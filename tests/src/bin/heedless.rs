//! `gogrid-worker` that computes whether its grant allows it or not.
//!
//! Proves that a share which is exceeded is noticed.

fn main() -> anyhow::Result<()> {
    Err(gogrid_tests::worker::become_one(&["--fault=heedless"]))
}
