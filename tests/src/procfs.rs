//! What /proc says of our processes, read by the test itself and not asked of them.

use std::path::Path;

use anyhow::{Context as _, Result};

/// One process as /proc shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its number.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Its command line, arguments joined by a space.
    pub command: String,
}

/// All processes that can be read now, neither zombies nor kernel threads among them.
pub fn processes() -> Result<Vec<Seen>> {
    let mut seen = vec![];
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end while it is looked at.
        let Ok(command) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let Some(parent) = stat_field(&entry.path(), 4) else {
            continue;
        };
        // A zombie runs nothing any more; whether it is reaped is its parent's business.
        if command.is_empty() {
            continue;
        }
        let command = String::from_utf8_lossy(&command)
            .trim_end_matches('\0')
            .replace('\0', " ");
        seen.push(Seen {
            pid,
            parent: u32::try_from(parent)?,
            command,
        });
    }
    Ok(seen)
}

/// Field `number` (from 1, as in proc(5)) of a `stat` file, for fields after the command's name.
fn stat_field(dir: &Path, number: usize) -> Option<i64> {
    let stat = std::fs::read_to_string(dir.join("stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

/// Workers (not pools) below that process, however deep.
pub fn workers_of(ancestor: u32) -> Result<Vec<Seen>> {
    let all = processes()?;
    let parent_of = |pid: u32| all.iter().find(|p| p.pid == pid).map(|p| p.parent);
    let below = |pid: u32| {
        std::iter::successors(Some(pid), |p| parent_of(*p))
            .take(32)
            .any(|p| p == ancestor)
    };
    Ok(all
        .iter()
        .filter(|p| p.command.contains("gogrid-worker worker") && below(p.pid))
        .cloned()
        .collect())
}

/// The pool of the agent with that number.
pub fn pool_of(agent: u32) -> Result<u32> {
    let all = processes()?;
    let mut pools = all
        .iter()
        .filter(|p| p.parent == agent && p.command.contains("gogrid-worker pool"));
    Ok(pools.next().context("the agent has no pool")?.pid)
}

/// What a process is doing, by one letter of proc(5): `T` stands still, `t` is held by a tracer.
pub fn state(pid: u32) -> Result<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    rest.chars().next().with_context(|| format!("stat {stat:?}"))
}

/// Numbers of a process's threads.
pub fn threads(pid: u32) -> Result<Vec<u32>> {
    let tasks =
        std::fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} is gone"))?;
    tasks
        .map(|task| Ok(task?.file_name().to_string_lossy().parse()?))
        .collect()
}

/// Nice value of one thread.
pub fn niceness(pid: u32, thread: u32) -> Result<i64> {
    stat_field(Path::new(&format!("/proc/{pid}/task/{thread}")), 19)
        .with_context(|| format!("thread {thread} is gone"))
}

/// The kernel's number of SCHED_BATCH: what wakes up under it takes no processor away from others.
const BATCH: i64 = 3;

/// Scheduling policy of one thread.
fn policy(pid: u32, thread: u32) -> Result<i64> {
    stat_field(Path::new(&format!("/proc/{pid}/task/{thread}")), 41)
        .with_context(|| format!("thread {thread} is gone"))
}

/// Nanoseconds that a thread has run, and that it was runnable and waited for a CPU.
pub fn schedule(pid: u32, thread: u32) -> Result<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat"))?;
    let mut fields = text.split_ascii_whitespace().map(str::parse);
    match (fields.next(), fields.next()) {
        (Some(ran), Some(waited)) => Ok((ran?, waited?)),
        _ => anyhow::bail!("schedstat of thread {thread} is {text:?}"),
    }
}

/// CPU time that a process has used in clock ticks (100 a second), user and system.
pub fn cpu_ticks(pid: u32) -> Result<i64> {
    let dir = format!("/proc/{pid}");
    let field =
        |number| stat_field(Path::new(&dir), number).with_context(|| format!("process {pid} is gone"));
    Ok(field(14)? + field(15)?)
}

/// Memory of a process that is in RAM, in KiB.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line
        .and_then(|line| line.split_whitespace().next())
        .context("no VmRSS")?;
    Ok(number.parse()?)
}

/// `oom_score_adj` of a process.
pub fn oom_score_adj(pid: u32) -> Result<i64> {
    Ok(std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?
        .trim()
        .parse()?)
}

/// Session of a process: the number of the process that began it.
pub fn session(pid: u32) -> Result<i64> {
    stat_field(Path::new(&format!("/proc/{pid}")), 6).with_context(|| format!("process {pid} is gone"))
}

/// Nice value of a process's autogroup; `None` where the kernel has no autogroups.
pub fn autogroup(pid: u32) -> Result<Option<i64>> {
    match std::fs::read_to_string(format!("/proc/{pid}/autogroup")) {
        Ok(text) => {
            let nice = text.trim().rsplit_once(" nice ").map(|(_, nice)| nice.parse());
            Ok(nice.transpose()?)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Fails unless a process gives way as asked: every thread at that nice value and I/O class (class << 13), none that takes a
/// processor away by waking up where it is to be nice at all, another session than this process's, whose autogroup is at least as nice, and first to be killed when memory runs out. Returns the number of threads.
pub fn gives_way(pid: u32, nice: i64, io_class: i64) -> Result<usize> {
    let threads = threads(pid)?;
    for thread in &threads {
        let found = niceness(pid, *thread)?;
        anyhow::ensure!(
            found == nice,
            "thread {thread} of {}: nice {found}, not {nice}",
            threads.len()
        );
        let (found, wanted) = (policy(pid, *thread)?, if nice > 0 { BATCH } else { 0 });
        anyhow::ensure!(
            found == wanted,
            "thread {thread} of {}: scheduling policy {found}, not {wanted}",
            threads.len()
        );
        let found = io_priority(*thread)? >> 13;
        anyhow::ensure!(
            found == io_class,
            "thread {thread} of {}: I/O class {found}, not {io_class}",
            threads.len()
        );
    }
    let own = session(std::process::id())?;
    anyhow::ensure!(session(pid)? != own, "in this process's session");
    let found = autogroup(pid)?;
    anyhow::ensure!(
        found.is_none_or(|found| found == nice || nice > 0 && found > nice),
        "autogroup at nice {found:?}, not {nice}"
    );
    let found = oom_score_adj(pid)?;
    anyhow::ensure!(found == 1000, "oom_score_adj {found}, not 1000");
    Ok(threads.len())
}

/// I/O priority of a thread: class << 13 | level.
pub fn io_priority(thread: u32) -> Result<i64> {
    Ok(crate::sys::io_priority(thread)?)
}
