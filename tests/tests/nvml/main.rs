//! GPU drivers that are good, lost, old, slow, missing or hang, simulated by our own NVML library. There is no GPU
//! here: what a real driver does beyond its documentation is not tested.

#![allow(
    clippy::disallowed_methods,
    reason = "the test measures real time from outside"
)]

mod agent;
mod chaos;
mod probe;

use std::path::{Path, PathBuf};

use anyhow::Result;
use gogrid_simnvml::LIBRARY_FILE;
use gogrid_tests::cluster::program;

/// The simulated driver's library, built beside the running test.
fn library() -> Result<PathBuf> {
    program(LIBRARY_FILE)
}

/// A copy of the library in which no symbol of that name can be found: what an older driver looks like.
fn library_without(symbol: &str, dir: &Path) -> Result<PathBuf> {
    let mut bytes = std::fs::read(library()?)?;
    let name = symbol.as_bytes();
    let mut places = vec![];
    for at in 0..bytes.len().saturating_sub(name.len()) {
        if bytes[at..].starts_with(name) {
            places.push(at);
        }
    }
    anyhow::ensure!(!places.is_empty(), "no {symbol} in the library");
    for at in places {
        // The loader finds names by hash and compares them in full.
        bytes[at] = b'X';
    }
    let path = dir.join(format!("without-{symbol}.so"));
    std::fs::write(&path, bytes)?;
    Ok(path)
}
