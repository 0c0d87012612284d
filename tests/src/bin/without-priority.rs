//! `gogrid-worker` on a machine where a means of courtesy has no effect: called `without-NAME`, without that one, and
//! `without-priority`, without nice values and I/O priorities.
//!
//! Proves that the checks of courtesy can fail.

use std::path::Path;

use gogrid_tests::process::Means;

fn main() -> anyhow::Result<()> {
    let called = std::env::args_os().next().unwrap_or_default();
    let called = Path::new(&called)
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let named = Means::ALL
        .into_iter()
        .find(|means| called.strip_prefix("without-") == Some(means.name()));
    if let Some(means) = named {
        means.break_it()?;
    } else {
        Means::Setpriority.break_it()?;
        Means::Ioprio.break_it()?;
    }
    Err(gogrid_tests::worker::become_one(&[]))
}
