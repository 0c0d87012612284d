//! Processes of this agent, written down so that the next session can make sure they are gone.
//!
//! Owns: the record in the state directory, and ending what it names and what that leads: a pool leads its workers, and one
//! that it has started a moment ago may not be in the record yet. A process id alone proves nothing: its start time must
//! match. Must not end anything else.

use gogrid_agent_core::session::Session;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Most earlier sessions that are remembered.
const MOST_FORMER: usize = 256;
/// How long a killed process may take to go.
const GONE_SECONDS: i64 = 10;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Listed {
    boot: String,
    #[serde(default)]
    session: String,
    /// Sessions of this boot before it. The Lease may be one's of which several have begun since and never held it.
    #[serde(default)]
    former: Vec<String>,
    processes: Vec<Process>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Process {
    pid: i32,
    start: u64,
}

/// The record of one session.
#[derive(Debug)]
pub(crate) struct Processes {
    path: PathBuf,
    listed: Listed,
}

/// Why it is not certain that the old session's processes are gone.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PreviousError {
    /// The record.
    #[error("record of processes {path:?}: {source}")]
    Record {
        /// Where.
        path: PathBuf,
        /// What.
        source: io::Error,
    },
    /// A process outlived its SIGKILL.
    #[error("process {0} of an earlier session is still there {GONE_SECONDS} s after SIGKILL")]
    StillThere(i32),
    /// A call failed.
    #[error("process {pid} of an earlier session: {source}")]
    Call {
        /// Which.
        pid: i32,
        /// What.
        source: io::Error,
    },
}

/// A process's leader, and its start time in clock ticks since boot, if it is there and no zombie.
fn led_since(pid: i32) -> Option<(i32, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let leader = fields.get(3)?.parse().ok()?;
    let start = fields.get(19)?.parse().ok()?;
    (fields.first() != Some(&"Z")).then_some((leader, start))
}

fn start_time(pid: i32) -> Option<u64> {
    led_since(pid).map(|(_, start)| start)
}

/// The others of the session that it leads or led.
fn led_by(leader: Process) -> io::Result<Vec<Process>> {
    // Its number is given to nobody else as long as one of them is there.
    if start_time(leader.pid).is_some_and(|start| start != leader.start) {
        return Ok(vec![]);
    }
    let mut led = vec![];
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.filter(|pid| *pid != leader.pid) else {
            continue;
        };
        if let Some((by, start)) = led_since(pid)
            && by == leader.pid
            && start >= leader.start
        {
            led.push(Process { pid, start });
        }
    }
    Ok(led)
}

/// Waits until no other agent uses the state directory, and keeps others out for as long as the file is open: an agent
/// that lives can't be taken over, because what it starts next is in no record yet.
pub(crate) fn lock(state_dir: &Path) -> Result<fs::File, PreviousError> {
    let path = state_dir.join("lock");
    let failed = |source: io::Error| PreviousError::Record {
        path: path.clone(),
        source,
    };
    let file = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {}
        Err(error) => return Err(failed(error.into())),
    }
    tracing::warn!(path = %path.display(), "another agent uses this state directory: waiting for it to end");
    rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
        .map_err(|e| failed(e.into()))?;
    Ok(file)
}

impl Processes {
    /// Ends what an earlier session left behind and begins an empty record. Returns how many were ended, and the sessions
    /// of this boot of which nothing is left.
    pub(crate) fn take_over(
        state_dir: &Path,
        session: &Session,
    ) -> Result<(Self, usize, Vec<String>), PreviousError> {
        let boot = session.boot();
        let path = state_dir.join("processes.json");
        let failed = |source| PreviousError::Record {
            path: path.clone(),
            source,
        };
        let old: Listed = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Listed::default(),
            Err(error) => return Err(failed(error)),
        };
        let (mut ended, mut former) = (0, vec![]);
        if old.boot == boot {
            former = old.former;
            former.extend(Some(old.session).filter(|session| !session.is_empty()));
            former.drain(..former.len().saturating_sub(MOST_FORMER));
            for process in old.processes {
                ended += end_with_led(process)?;
            }
        }
        let record = Self {
            path: path.clone(),
            listed: Listed {
                boot: boot.to_owned(),
                session: session.to_string(),
                former: former.clone(),
                processes: vec![],
            },
        };
        record.write().map_err(failed)?;
        Ok((record, ended, former))
    }

    /// Adds a process; it must be running.
    pub(crate) fn add(&mut self, pid: u32) -> io::Result<()> {
        let Some((pid, start)) = i32::try_from(pid)
            .ok()
            .and_then(|pid| Some((pid, start_time(pid)?)))
        else {
            return Ok(());
        };
        self.listed
            .processes
            .retain(|p| start_time(p.pid) == Some(p.start));
        self.listed.processes.push(Process { pid, start });
        self.write()
    }

    /// Ends all of this session's processes: the pool is gone, so must its workers be. Those that don't end stay in the
    /// record.
    pub(crate) fn end_all(&mut self) -> Result<(), PreviousError> {
        for process in &self.listed.processes {
            end_with_led(*process)?;
        }
        self.listed.processes.clear();
        self.write().map_err(|source| PreviousError::Record {
            path: self.path.clone(),
            source,
        })
    }

    fn write(&self) -> io::Result<()> {
        let next = self.path.with_extension("next");
        let mut file = fs::File::create(&next)?;
        file.write_all(&serde_json::to_vec(&self.listed)?)?;
        file.sync_all()?;
        fs::rename(next, &self.path)
    }
}

/// Returns how many there were.
fn end_with_led(process: Process) -> Result<usize, PreviousError> {
    let mut ended = usize::from(end(process)?);
    let pid = process.pid;
    let led = led_by(process).map_err(|source| PreviousError::Call { pid, source })?;
    for process in led {
        ended += usize::from(end(process)?);
    }
    Ok(ended)
}

fn end(Process { pid, start }: Process) -> Result<bool, PreviousError> {
    let failed = |error: rustix::io::Errno| PreviousError::Call {
        pid,
        source: error.into(),
    };
    let Some(id) = Pid::from_raw(pid) else {
        return Ok(false);
    };
    let fd = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    // Looked at only after the descriptor is held: the id can't be reused any more.
    if start_time(pid) != Some(start) {
        return Ok(false);
    }
    match pidfd_send_signal(&fd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(failed(error)),
    }
    let mut waiting = [PollFd::new(&fd, PollFlags::IN)];
    match poll(
        &mut waiting,
        Some(&Timespec {
            tv_sec: GONE_SECONDS,
            tv_nsec: 0,
        }),
    )
    .map_err(failed)?
    {
        0 => Err(PreviousError::StillThere(pid)),
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_the_old_session_is_gone_before_the_new_record_begins() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let old = Session::new("boot", "old");
        let (mut record, ended, former) = Processes::take_over(dir.path(), &old).unwrap();
        assert_eq!((ended, former), (0, vec![]));
        record.add(child.id()).unwrap();
        let (_, ended, former) = Processes::take_over(dir.path(), &Session::new("boot", "new")).unwrap();
        assert_eq!((ended, former), (1, vec!["boot/old".to_owned()]));
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn what_a_recorded_process_had_started_is_ended_though_it_is_in_no_record_and_its_leader_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut leader = std::process::Command::new("setsid")
            .args(["sh", "-c", "sleep 600 & echo; exec sleep 600"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        io::Read::read_exact(leader.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let (mut record, ..) = Processes::take_over(dir.path(), &Session::new("boot", "old")).unwrap();
        record.add(leader.id()).unwrap();
        leader.kill().unwrap();
        leader.wait().unwrap();
        let next = |instance| Processes::take_over(dir.path(), &Session::new("boot", instance));
        assert_eq!(next("next").unwrap().1, 1);
        assert_eq!(next("last").unwrap().1, 0);
    }

    #[test]
    fn sessions_that_began_and_never_held_the_lease_hide_none_before_them_until_the_machine_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let former = |boot, instance: &str| {
            Processes::take_over(dir.path(), &Session::new(boot, instance))
                .unwrap()
                .2
        };
        assert!(former("boot", "0").is_empty());
        for n in 1..=300 {
            assert!(former("boot", &n.to_string()).contains(&format!("boot/{}", n - 1)));
        }
        let known = former("boot", "last");
        assert_eq!((known.len(), known[0].as_str()), (256, "boot/45"));
        assert!(former("next", "0").is_empty());
    }

    #[test]
    fn a_second_agent_waits_for_the_state_directory_until_the_first_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        let path = dir.path().to_owned();
        let (sender, receiver) = std::sync::mpsc::channel();
        let second = std::thread::spawn(move || {
            let lock = lock(&path).unwrap();
            sender.send(()).unwrap();
            lock
        });
        let waited = receiver.recv_timeout(std::time::Duration::from_millis(200));
        assert!(waited.is_err(), "two agents hold the same directory");
        drop(first);
        receiver.recv().unwrap();
        second.join().unwrap();
    }

    #[test]
    fn a_reused_process_id_and_an_earlier_boot_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        for (boot, start) in [("boot", 1), ("earlier", start_time(pid).unwrap())] {
            let listed = Listed {
                boot: boot.into(),
                session: String::new(),
                former: vec![],
                processes: vec![Process { pid, start }],
            };
            fs::write(
                dir.path().join("processes.json"),
                serde_json::to_vec(&listed).unwrap(),
            )
            .unwrap();
            let taken = Processes::take_over(dir.path(), &Session::new("boot", "new"));
            assert_eq!(taken.unwrap().1, 0);
        }
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
