//! The agent's end of the fetching child's socket, in a test.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use gogrid_agent_core::fetch::{FromFetcher, Manners, ToFetcher};

use crate::cluster::program;
use crate::driver::{PATIENCE, readable, receive, send};
use crate::process::Process;

/// The fetching child.
pub struct Fetcher {
    stream: UnixStream,
    process: Process,
    next: u64,
}

impl Fetcher {
    /// Starts it on the store and log in `dir`; it may download from this machine.
    pub fn start(dir: &Path, manners: Manners) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        let mut command = Command::new(program("gogrid-agent")?);
        command
            .arg("fetch")
            .arg("--store")
            .arg(dir.join("store"))
            .args(["--allow-address", "127.0.0.1/32"]);
        let process =
            Process::start_session("fetch", command, OwnedFd::from(theirs), &dir.join("fetch.log"))?;
        send(&ours, &ToFetcher::Manners(manners))?;
        Ok(Self {
            stream: ours,
            process,
            next: 1,
        })
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// From now on it behaves like this.
    pub fn behave(&self, manners: Manners) -> Result<()> {
        send(&self.stream, &ToFetcher::Manners(manners))
    }

    /// Asks for a model; [`Fetcher::obtained`] says when it is there.
    pub fn obtain(&mut self, uri: &str, sha256: &str) -> Result<()> {
        let id = self.next;
        self.next += 1;
        let (uri, sha256) = (uri.to_owned(), sha256.to_owned());
        send(&self.stream, &ToFetcher::Obtain { id, uri, sha256 })
    }

    /// Waits that long for the model asked for; its length once it is there.
    pub fn obtained(&self, within: Duration) -> Result<Option<u64>> {
        while readable(&self.stream, within)? {
            match receive(&self.stream)? {
                FromFetcher::Read { .. } => {}
                FromFetcher::Obtained { bytes, .. } => return Ok(Some(bytes)),
                FromFetcher::Failed { reason, message, .. } => bail!("fetching: {reason}: {message}"),
            }
        }
        Ok(None)
    }
}
