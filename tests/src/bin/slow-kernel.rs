//! `gogrid-worker` whose every step of a batch is one kernel of ten seconds, which looks at nothing meanwhile.
//!
//! Proves that an agent's workers end with it whatever they are doing.

fn main() -> anyhow::Result<()> {
    Err(gogrid_tests::worker::become_one(&["--fault=kernel-millis=10000"]))
}
