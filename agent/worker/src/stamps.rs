//! When this worker computed, for tests that look for two workers computing one job.
//!
//! Owns: one file of CLOCK_BOOTTIME nanoseconds (begin and end of each step in turn, little-endian), which outlives a kill:
//! the kernel holds what was written. Must not slow a worker down that was not asked for it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// The stamps of one worker.
pub(crate) struct Stamps(File);

impl Stamps {
    /// A new file in that directory, named by this process's number.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let path = directory.join(std::process::id().to_string());
        Ok(Self(File::options().append(true).create(true).open(path)?))
    }

    /// A step begins or ends now. The test that asked for stamps sees what is missing.
    pub(crate) fn mark(&mut self, now: u64) {
        let _ = self.0.write_all(&now.to_le_bytes());
    }
}
