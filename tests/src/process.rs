//! Child processes that never outlive the test that started them.
//!
//! Every child leads a process group of its own, writes to a log file and is killed by the kernel when this process
//! dies, even by SIGKILL. The kernel ties that to the *thread* that spawned the child, and test threads come and go, so
//! one thread that lives as long as the process does all the spawning.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, pidfd_send_signal, waitid,
};

use crate::sys;

struct Request {
    command: Command,
    reply: mpsc::Sender<io::Result<Child>>,
}

/// Spawns from the thread that never ends.
fn spawn(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for Request { mut command, reply } in requests {
                // A caller that no longer listens has its child killed and reaped here.
                if let Err(mpsc::SendError(Ok(mut orphan))) = reply.send(command.spawn()) {
                    let _ = orphan.kill();
                    let _ = orphan.wait();
                }
            }
        });
        sender
    });
    let (reply, answer) = mpsc::channel();
    spawner
        .send(Request { command, reply })
        .map_err(|_closed| anyhow!("the spawning thread has ended"))?;
    Ok(answer.recv().context("the spawning thread has ended")??)
}

/// Bytes of a file that are in the page cache; looking brings none in. True only of files that this user may write.
pub fn cached_bytes(file: &File) -> io::Result<u64> {
    sys::cached_bytes(file)
}

/// A process of whomever that can't end, however it is killed, as one whose driver doesn't let go of it: it keeps its
/// memory and its number until this value is dropped.
#[derive(Debug)]
pub struct Undying {
    _release: mpsc::Sender<()>,
}

impl Undying {
    /// Makes the process with that number one.
    pub fn hold(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid)?;
        let (release, released) = mpsc::channel::<()>();
        let (ready, held) = mpsc::channel();
        // The kernel ties it to the thread: when that ends, the process goes on to end.
        std::thread::Builder::new().name("holder".into()).spawn(move || {
            let _ = ready.send(sys::hold_at_its_end(pid));
            let _ = released.recv();
        })?;
        held.recv()?.with_context(|| format!("holding process {pid}"))?;
        Ok(Self { _release: release })
    }
}

/// A means of courtesy that can be broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// Nice values of threads.
    Setpriority,
    /// The scheduling policy of threads.
    Setscheduler,
    /// I/O priorities of threads.
    Ioprio,
    /// What is told by writing a file beneath /proc: the autogroup's nice value, whom to kill first for want of memory.
    ProcWrites,
    /// The right to lower a nice value.
    Lowering,
}

impl Means {
    /// Each of them.
    pub const ALL: [Self; 5] = [
        Self::Setpriority,
        Self::Setscheduler,
        Self::Ioprio,
        Self::ProcWrites,
        Self::Lowering,
    ];

    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Setpriority => "setpriority",
            Self::Setscheduler => "setscheduler",
            Self::Ioprio => "ioprio",
            Self::ProcWrites => "proc-writes",
            Self::Lowering => "lowering",
        }
    }

    /// From now on it has no effect in this process and its children: calls "succeed" and do nothing, files can't be
    /// opened for writing, the right is gone.
    pub fn break_it(self) -> Result<()> {
        let feign = |call, third, errno| Ok(sys::feign(&[sys::Feint { call, third, errno }])?);
        match self {
            Self::Setpriority => feign(libc::SYS_setpriority, None, 0),
            Self::Setscheduler => feign(libc::SYS_sched_setscheduler, None, 0),
            Self::Ioprio => feign(libc::SYS_ioprio_set, None, 0),
            Self::ProcWrites => {
                let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_CLOEXEC;
                feign(libc::SYS_openat, Some(u32::try_from(flags)?), libc::EACCES)
            }
            Self::Lowering => {
                use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
                // The next program started by root gets what is left in the bounding set.
                Ok(remove_capability_from_bounding_set(CapabilitySet::SYS_NICE)?)
            }
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// A running child, killed with its whole process group when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    group: Pid,
    pidfd: OwnedFd,
    /// `None` once reaped; until then neither the pid nor the group's number can be given to another process.
    child: Mutex<Option<Child>>,
}

impl Process {
    /// Starts `command`, its output appended to the file `log` and nothing on its standard input.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        command.process_group(0);
        Self::start_with(name, command, Stdio::null(), log)
    }

    /// Starts one that begins a session, and with it a group, by itself; `input` is its standard input.
    pub fn start_session(name: &str, command: Command, input: impl Into<Stdio>, log: &Path) -> Result<Self> {
        Self::start_with(name, command, input.into(), log)
    }

    fn start_with(name: &str, mut command: Command, input: Stdio, log: &Path) -> Result<Self> {
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        command.stdin(input).stdout(output.try_clone()?).stderr(output);
        sys::die_with_spawner(&mut command);
        let child = spawn(command).with_context(|| format!("starting {name}"))?;
        let group = Pid::from_child(&child);
        let pidfd = pidfd_open(group, PidfdFlags::empty()).context("opening the child's pidfd")?;
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            group,
            pidfd,
            child: Mutex::new(Some(child)),
        })
    }

    /// What it was called when it was started.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process's number, which is also its group's.
    pub fn pid(&self) -> i32 {
        self.group.as_raw_nonzero().get()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&self) -> bool {
        !self.ended_within(Duration::ZERO)
    }

    /// How it ended, or `None` while it runs or after it was stopped from here.
    pub fn exit(&self) -> Option<Exit> {
        let child = self.child();
        child.as_ref()?;
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(self.group), look).ok()??;
        status
            .exit_status()
            .map(Exit::Code)
            .or_else(|| status.terminating_signal().map(Exit::Signal))
    }

    /// Sends `signal` to the process itself; not an error when it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("signalling {}", self.name)),
        }
    }

    /// Asks it to end, waits up to `grace`, then kills what is left of its group. Blocks; safe to call twice.
    pub fn stop(&self, grace: Duration) {
        if self.child().is_some() && self.signal(Signal::TERM).is_ok() {
            self.ended_within(grace);
        }
        self.kill();
    }

    /// Kills its whole group at once and reaps it. Blocks for the moment that takes; safe to call twice.
    pub fn kill(&self) {
        let Some(mut child) = self.child().take() else {
            return;
        };
        // Fails only when nobody is left in the group.
        let _ = kill_process_group(self.group, Signal::KILL);
        let _ = child.wait();
    }

    /// Everything it has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map_or_else(
            |error| format!("no log: {error}"),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// The last `count` lines of its log.
    pub fn log_tail(&self, count: usize) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines
            .get(lines.len().saturating_sub(count)..)
            .unwrap_or_default()
            .join("\n")
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended_within(&self, limit: Duration) -> bool {
        let mut watched = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let limit = Timespec::try_from(limit).ok();
        // Interrupted: the time starts anew, which only a stopped debugger makes longer.
        matches!(
            rustix::io::retry_on_intr(|| poll(&mut watched, limit.as_ref())),
            Ok(1..)
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, dir: &Path) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start("sh", command, &dir.join("log")).unwrap()
    }

    #[test]
    fn a_process_that_ignores_being_asked_is_killed_after_the_grace_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let process = shell("trap '' TERM; sleep 1000 & echo $!; wait; wait", dir.path());
        let sleeper = loop {
            let log = process.log();
            if let Some(line) = log.lines().next() {
                break pidfd_open(Pid::from_raw(line.parse().unwrap()).unwrap(), PidfdFlags::empty())
                    .unwrap();
            }
            std::thread::yield_now();
        };
        process.stop(Duration::from_millis(100));
        assert!(!process.is_running());
        // A kill is an order: the kernel carries it out a moment later.
        let limit = Timespec::try_from(Duration::from_secs(10)).unwrap();
        let ended = poll(&mut [PollFd::new(&sleeper, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ended, 1, "the grandchild lives on");
    }

    #[test]
    fn a_process_outlives_the_thread_that_asked_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let process = std::thread::spawn(move || shell("sleep 1000", &path))
            .join()
            .unwrap();
        assert!(!process.ended_within(Duration::from_millis(200)));
    }

    #[test]
    fn an_undying_process_is_there_after_it_was_killed_and_gone_once_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let process = shell("sleep 1000", dir.path());
        let held = Undying::hold(u32::try_from(process.pid()).unwrap()).unwrap();
        process.signal(Signal::KILL).unwrap();
        assert!(!process.ended_within(Duration::from_millis(200)));
        drop(held);
        assert!(process.ended_within(Duration::from_secs(10)));
    }

    #[test]
    fn an_ended_process_tells_how_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let process = shell("exit 7", dir.path());
        assert!(process.ended_within(Duration::from_secs(10)));
        assert_eq!(process.exit(), Some(Exit::Code(7)));
        assert_eq!(process.exit(), Some(Exit::Code(7)), "looking does not reap");
    }
}
