//! Starts, wakes, kills and reaps workers for the agent.
//!
//! Owns: the processes. One permanent thread spawns, because a worker's parent-death signal follows the thread that
//! spawned it. When the agent's connection ends, every worker is killed and reaped before the next hello. Nothing that it
//! starts can open an internet socket. Must not touch models, and decides nothing.

use crate::wire::{self, Receiver, Sender, WireError};
use crate::{clock, sandbox, sys};
use gogrid_agent_core::protocol::{FromPool, Role, ToPool, WorkerId, WorkerLimits};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};

/// What a worker reads from its standard input before anything else.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Start {
    pub(crate) nonce: String,
    pub(crate) limits: WorkerLimits,
    pub(crate) fence_at: u64,
    pub(crate) memory_limit: u64,
}

enum Event {
    /// Of this connection.
    Message(u64, ToPool),
    Lost(u64, WireError),
    /// A worker ended and waits to be reaped.
    Ended(WorkerId),
    /// The process was asked to end.
    Terminate,
}

/// The kernel takes one change of an autogroup in a tenth of a second from all who have no rights.
const RANK_PAUSE: u64 = 110_000_000;
const RANK_ATTEMPTS: u32 = 5;
const FIRST_PAUSE: u64 = 100_000_000;
const LONGEST_PAUSE: u64 = 5_000_000_000;

/// Serves agents one after the other, until asked to end: then the one that is connected is served to its end, because
/// in a pod both containers are asked at the same moment, and the agent has work to hand back. Every worker gets `flags`
/// besides its own.
pub(crate) fn serve(socket: &Path, die_with_parent: bool, flags: Vec<OsString>) -> io::Result<()> {
    if die_with_parent {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    sandbox::deny_internet()?;
    let (events, inbox) = mpsc::channel();
    if !die_with_parent {
        let events = events.clone();
        sys::on_termination(move || {
            let _ = events.send(Event::Terminate);
        })?;
    }
    let mut pool = Pool {
        own_session: own_session(),
        socket: socket.to_owned(),
        flags,
        workers: BTreeMap::new(),
        events,
        terminate: false,
    };
    let mut pause = FIRST_PAUSE;
    for connection in 0_u64.. {
        pool.terminate |= inbox.try_iter().any(|event| matches!(event, Event::Terminate));
        if pool.terminate {
            break;
        }
        match wire::connect(socket, Role::Pool { alive: Vec::new() }) {
            Ok((mut sender, receiver)) => {
                pause = FIRST_PAUSE;
                pool.listen(connection, receiver)?;
                let error = pool.serve_one(connection, &mut sender, &inbox);
                tracing::warn!(%error, "lost the agent; killing all workers");
                pool.kill_all(&inbox);
            }
            Err(error) => tracing::warn!(%error, socket = %socket.display(), "no agent"),
        }
        clock::wait_until(clock::boottime().saturating_add(pause));
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
    Ok(())
}

/// Whether this process leads a session, from now on if it did not before: an autogroup of its own, so that ranking it
/// takes nobody else along. Refused where a shell has made it the leader of a group in its own session.
fn own_session() -> bool {
    rustix::process::setsid().is_ok()
        || rustix::process::getsid(None).is_ok_and(|it| it == rustix::process::getpid())
}

struct Pool {
    own_session: bool,
    socket: PathBuf,
    flags: Vec<OsString>,
    workers: BTreeMap<WorkerId, Child>,
    events: mpsc::Sender<Event>,
    terminate: bool,
}

impl Pool {
    fn listen(&self, connection: u64, mut receiver: Receiver) -> io::Result<()> {
        let events = self.events.clone();
        std::thread::Builder::new().name("agent".into()).spawn(move || {
            loop {
                let (event, over) = match receiver.receive() {
                    Ok(message) => (Event::Message(connection, message), false),
                    Err(error) => (Event::Lost(connection, error), true),
                };
                if events.send(event).is_err() || over {
                    return;
                }
            }
        })?;
        Ok(())
    }

    /// Until the connection ends.
    fn serve_one(
        &mut self,
        connection: u64,
        sender: &mut Sender,
        inbox: &mpsc::Receiver<Event>,
    ) -> WireError {
        loop {
            let Ok(event) = inbox.recv() else {
                return WireError::Closed;
            };
            let reply = match event {
                Event::Message(of, message) if of == connection => self.act(message),
                Event::Lost(of, error) if of == connection => return error,
                // Of an agent that is gone.
                Event::Message(..) | Event::Lost(..) => None,
                Event::Ended(worker) => self.reap(worker),
                Event::Terminate => {
                    self.terminate = true;
                    None
                }
            };
            if let Some(reply) = reply
                && let Err(error) = sender.send(&reply)
            {
                return error;
            }
        }
    }

    fn act(&mut self, message: ToPool) -> Option<FromPool> {
        match message {
            ToPool::Spawn {
                worker,
                nonce,
                limits,
                fence_at,
                memory_limit,
            } => {
                let start = Start {
                    nonce,
                    limits,
                    fence_at,
                    memory_limit,
                };
                Some(match self.spawn(worker, &start) {
                    Ok(pid) => FromPool::Spawned { worker, pid },
                    Err(error) => FromPool::SpawnFailed {
                        worker,
                        message: error.to_string(),
                    },
                })
            }
            ToPool::Rank { niceness } => {
                self.rank(niceness);
                None
            }
            ToPool::Kill { worker } => {
                if let Some(child) = self.workers.get_mut(&worker) {
                    // Fails only for one that has ended, and that is reported anyway.
                    let _ = child.kill();
                }
                None
            }
            ToPool::Continue { worker } => {
                if let Some(pid) = self.workers.get(&worker).map(Pid::from_child) {
                    let _ = kill_process(pid, Signal::CONT);
                }
                None
            }
        }
    }

    /// Ranks this session, which all workers share: each with one of its own would count as often as there are workers. The
    /// file is missing where the kernel has no autogroups; what is in force is read back by the workers.
    fn rank(&self, niceness: i8) {
        if !self.own_session {
            tracing::warn!(
                "the pool shares its session with others: only nice values of threads rank the workers"
            );
            return;
        }
        for _ in 0..RANK_ATTEMPTS {
            match std::fs::write("/proc/self/autogroup", niceness.to_string()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    clock::wait_until(clock::boottime().saturating_add(RANK_PAUSE));
                }
                _ => return,
            }
        }
    }

    fn spawn(&mut self, worker: WorkerId, start: &Start) -> io::Result<u32> {
        if self.workers.contains_key(&worker) {
            return Err(io::Error::other(format!("worker {worker} runs already")));
        }
        // Our own program, also after its file was replaced.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("gogrid-worker")
            .arg("worker")
            .arg("--socket")
            .arg(&self.socket)
            .arg("--worker")
            .arg(worker.to_string())
            .args(&self.flags)
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        sys::tie_to_this_thread(&mut command);
        let mut child = command.spawn()?;
        let pid = child.id();
        let ready = self.greet(&mut child, worker, start);
        if let Err(error) = ready {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        self.workers.insert(worker, child);
        Ok(pid)
    }

    /// Tells the worker its first limits, and watches for its end.
    fn greet(&self, child: &mut Child, worker: WorkerId, start: &Start) -> io::Result<()> {
        let descriptor = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(&serde_json::to_vec(start)?)?;
        }
        let events = self.events.clone();
        std::thread::Builder::new()
            .name("reaper".into())
            .stack_size(64 << 10)
            .spawn(move || {
                // Waits without reaping, so that its number stays taken until the owner has seen this.
                let what = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
                while let Err(rustix::io::Errno::INTR) = waitid(WaitId::PidFd(descriptor.as_fd()), what) {}
                let _ = events.send(Event::Ended(worker));
            })?;
        Ok(())
    }

    fn reap(&mut self, worker: WorkerId) -> Option<FromPool> {
        let mut child = self.workers.remove(&worker)?;
        let status = child.wait().ok();
        let code = status.and_then(|status| status.code());
        let signal = status.and_then(|status| status.signal());
        Some(FromPool::Exited { worker, code, signal })
    }

    /// Kills and reaps every worker. What their watchers still say is read off, so that a later worker of the same name
    /// is not taken for one of these.
    fn kill_all(&mut self, inbox: &mpsc::Receiver<Event>) {
        for child in self.workers.values_mut() {
            let _ = child.kill();
        }
        while !self.workers.is_empty() {
            match inbox.recv_timeout(std::time::Duration::from_secs(60)) {
                Ok(Event::Ended(worker)) => {
                    self.reap(worker);
                }
                Ok(Event::Message(..) | Event::Lost(..)) => {}
                Ok(Event::Terminate) => self.terminate = true,
                Err(RecvTimeoutError::Timeout) => {
                    tracing::error!(
                        workers = self.workers.len(),
                        "killed workers do not end; the driver may hang"
                    );
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}
