//! The probe: a child process that alone loads the driver's library, asked one question at a time.
//!
//! Owns: its start, the frames to and from it, the deadline of every answer, and its end. A child that the kernel can't
//! kill because it is stuck in the driver is waited for and never joined by a second one. Must not know what is asked.

use crate::clock::{Host as _, Machine};
use gogrid_agent_core::driver::watch::Silence;
use gogrid_agent_core::driver::{Answer, Ask, MAX_FRAME_BYTES};
use gogrid_agent_core::session::Nanos;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// How long a killed child is waited for before it counts as stuck.
const REAP_NANOS: Nanos = 100_000_000;

/// Starts the probe as needed and speaks with it.
pub(crate) struct Probe<F> {
    command: F,
    running: Option<Running>,
    stuck: Option<(Child, OwnedFd)>,
}

struct Running {
    child: Child,
    exit: OwnedFd,
    input: ChildStdin,
    output: ChildStdout,
}

impl<F: Fn() -> Command> Probe<F> {
    /// None started yet; `command` says how.
    pub(crate) fn new(command: F) -> Self {
        Self {
            command,
            running: None,
            stuck: None,
        }
    }

    /// Asks, and waits for the answer that many nanoseconds at most. After a silence no probe runs.
    pub(crate) fn ask(&mut self, ask: &Ask, limit: Nanos) -> Result<Answer, Silence> {
        let deadline = Machine.boottime().saturating_add(limit);
        let mut running = match self.running.take() {
            Some(running) => running,
            None => self.start().map_err(Silence::Ended)?,
        };
        match running.exchange(ask, deadline) {
            Ok(answer) => {
                self.running = Some(running);
                Ok(answer)
            }
            Err(Trouble::Late) => {
                self.finish(running);
                Err(Silence::Late)
            }
            Err(Trouble::Io(error)) => {
                let how = match self.finish(running) {
                    Some(status) if error.kind() == io::ErrorKind::UnexpectedEof => status.to_string(),
                    _ => error.to_string(),
                };
                Err(Silence::Ended(how))
            }
        }
    }

    /// Ends the probe, if one runs.
    pub(crate) fn end(&mut self) {
        if let Some(running) = self.running.take() {
            self.finish(running);
        }
    }

    fn start(&mut self) -> Result<Running, String> {
        if let Some((mut child, exit)) = self.stuck.take() {
            if !ended(&exit, 0) {
                let text = format!("the last probe, process {}, is stuck in the driver", child.id());
                self.stuck = Some((child, exit));
                return Err(text);
            }
            // It has ended: this only reaps.
            let _ = child.wait();
        }
        start((self.command)()).map_err(|error| format!("it could not be started: {error}"))
    }

    fn finish(&mut self, running: Running) -> Option<std::process::ExitStatus> {
        let Running {
            mut child,
            exit,
            input,
            output,
        } = running;
        drop((input, output));
        // One that ended by itself has its status kept; a killed one says so.
        let _ = child.kill();
        if ended(&exit, REAP_NANOS) {
            return child.wait().ok();
        }
        self.stuck = Some((child, exit));
        None
    }
}

enum Trouble {
    Late,
    Io(io::Error),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn start(mut command: Command) -> io::Result<Running> {
    let mut child = command
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let exit = pid
        .ok_or(io::ErrorKind::InvalidData.into())
        .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
    match (exit, child.stdin.take(), child.stdout.take()) {
        (Ok(exit), Some(input), Some(output)) => Ok(Running {
            child,
            exit,
            input,
            output,
        }),
        (exit, ..) => {
            child.kill()?;
            child.wait()?;
            Err(exit.err().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into()))
        }
    }
}

/// Whether the process of that pidfd ends within that many nanoseconds.
fn ended(exit: &OwnedFd, within: Nanos) -> bool {
    let mut watched = [PollFd::new(exit, PollFlags::IN)];
    matches!(poll(&mut watched, Some(&timespec(within))), Ok(1..))
}

fn timespec(nanos: Nanos) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(nanos % 1_000_000_000).unwrap_or(0),
    }
}

impl Running {
    fn exchange(&mut self, ask: &Ask, deadline: Nanos) -> Result<Answer, Trouble> {
        // The pipe is empty, as every question before was answered, and holds more than a frame.
        self.input.write_all(&frame(ask)?)?;
        let mut length = [0; 4];
        self.fill(&mut length, deadline)?;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > MAX_FRAME_BYTES {
            let text = format!("it said {length} bytes at once: more than {MAX_FRAME_BYTES}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text).into());
        }
        let mut body = vec![0; length];
        self.fill(&mut body, deadline)?;
        serde_json::from_slice(&body).map_err(|error| Trouble::Io(error.into()))
    }

    fn fill(&mut self, buffer: &mut [u8], deadline: Nanos) -> Result<(), Trouble> {
        let mut rest = buffer;
        while !rest.is_empty() {
            let left = deadline.saturating_sub(Machine.boottime());
            let mut watched = [PollFd::new(&self.output, PollFlags::IN)];
            match poll(&mut watched, Some(&timespec(left))) {
                Ok(0) => return Err(Trouble::Late),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(Trouble::Io(error.into())),
            }
            let read = self.output.read(rest)?;
            if read == 0 {
                return Err(Trouble::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            rest = rest.get_mut(read..).unwrap_or_default();
        }
        Ok(())
    }
}

/// A message with its length in front.
pub(crate) fn frame(message: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    if body.len() > MAX_FRAME_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend(body);
    Ok(frame)
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
