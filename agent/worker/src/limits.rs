//! CPU and I/O courtesy of this process, set on every thread and read back.
//!
//! Owns: the order (before any other thread starts), the sweep over all threads, and telling honestly what is in force:
//! lowering a nice value needs a right that a worker hasn't got. A nice value ranks only inside an autogroup; that of all
//! workers together is the pool's to rank. Must not know about models or grants.

use crate::sys;
use gogrid_agent_core::protocol::{IoPriority, Readback, WorkerLimits};
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit};
use std::io;

/// First steps of a worker, while it has one thread: everything that can't be set later or is inherited by threads.
pub(crate) fn settle(limits: &WorkerLimits, memory: u64) -> io::Result<()> {
    // First in line when memory is short; raising it needs no right. Some containers mount /proc read-only.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    apply_to(0, limits)?;
    let set = |resource, most| {
        rustix::process::setrlimit(
            resource,
            Rlimit {
                current: Some(most),
                maximum: Some(most),
            },
        )
    };
    set(Resource::Core, 0)?;
    if memory > 0 {
        set(Resource::Data, memory)?;
    }
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

const AUTOGROUP: &str = "/proc/self/autogroup";

/// The nice value of this process's autogroup, if there is one and no cgroup takes its place.
fn autogroup() -> Option<i8> {
    let text = |path: &str| std::fs::read_to_string(path).ok();
    let enabled = text("/proc/sys/kernel/sched_autogroup_enabled")?;
    let group = text(AUTOGROUP)?;
    let namespace = std::fs::read_link("/proc/self/ns/cgroup").ok()?;
    let acts = enabled.trim() == "1"
        && namespace.to_str() == Some(FIRST_NAMESPACE)
        && in_root_group(
            &text("/proc/self/cgroup")?,
            text("/sys/fs/cgroup/cgroup.subtree_control").as_deref(),
        );
    let (_, nice) = group.trim().rsplit_once(" nice ")?;
    nice.parse().ok().filter(|_| acts)
}

/// The machine's own cgroup namespace; in any other one a path says nothing about the whole tree.
const FIRST_NAMESPACE: &str = "cgroup:[4026531835]";

/// Whether the CPU controller leaves a process with this `/proc/self/cgroup` in the machine's root group, where autogroups
/// act. `controlled`: what cgroup v2's root gives to its children.
fn in_root_group(own: &str, controlled: Option<&str>) -> bool {
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        if controllers.split(',').any(|name| name == "cpu") {
            return path == "/";
        }
        if controllers.is_empty() && path != "/" {
            let controlled = controlled.unwrap_or_default();
            if controlled.split_whitespace().any(|name| name == "cpu") {
                return false;
            }
        }
    }
    true
}

/// Applies limits to every thread there is and reads them back. Threads that start later inherit from their starter,
/// unless a library sees to their priority itself: the sweep is repeated while the worker lives.
pub(crate) fn sweep(limits: &WorkerLimits) -> io::Result<Readback> {
    let mut seen = Vec::new();
    // A thread may start while others are set; a second look finds it.
    for _ in 0..3 {
        let threads = threads()?;
        if threads.iter().all(|thread| seen.contains(thread)) {
            break;
        }
        for thread in &threads {
            match apply_to(*thread, limits) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                result => result?,
            }
        }
        seen = threads;
    }
    read_back(limits)
}

fn read_back(limits: &WorkerLimits) -> io::Result<Readback> {
    let mut lowest = i8::MAX;
    let mut io = IoPriority::Idle;
    let mut count = 0_u32;
    for thread in threads()? {
        let Some(pid) = Pid::from_raw(thread) else {
            continue;
        };
        let (Ok(nice), Ok(number)) = (
            rustix::process::getpriority_process(Some(pid)),
            sys::io_priority(thread),
        ) else {
            continue;
        };
        lowest = lowest.min(i8::try_from(nice).unwrap_or(i8::MAX));
        io = less_courteous(io, priority(number));
        count = count.saturating_add(1);
    }
    Ok(Readback {
        generation: limits.generation,
        threads: count,
        niceness: lowest,
        io,
        autogroup: autogroup(),
        max_batch: limits.max_batch.max(1),
        request_interval: limits.request_interval,
    })
}

fn threads() -> io::Result<Vec<i32>> {
    let mut threads = Vec::new();
    for entry in std::fs::read_dir("/proc/self/task")? {
        threads.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok()),
        );
    }
    Ok(threads)
}

/// One thread; 0 is the calling one.
fn apply_to(thread: i32, limits: &WorkerLimits) -> io::Result<()> {
    let pid = Pid::from_raw(thread);
    match rustix::process::setpriority_process(pid, i32::from(limits.niceness)) {
        // Only raising is free. What stays in force is read back and reported.
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => {}
        result => result?,
    }
    match sys::set_batch(thread, limits.niceness > 0) {
        // Somebody has made it kinder still: only ranking before it needs a right.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
        result => result?,
    }
    sys::set_io_priority(thread, limits.io.number())
}

/// What a number of the kernel's means.
fn priority(number: i32) -> IoPriority {
    match number >> 13 {
        2 => IoPriority::BestEffort(u8::try_from(number & 7).unwrap_or(7)),
        3 => IoPriority::Idle,
        _ => IoPriority::None,
    }
}

fn less_courteous(a: IoPriority, b: IoPriority) -> IoPriority {
    let rank = |priority| match priority {
        IoPriority::None => 0,
        IoPriority::BestEffort(level) => u16::from(level) + 1,
        IoPriority::Idle => u16::MAX,
    };
    if rank(b) < rank(a) { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_read_back_as_they_were_set() {
        for wanted in [
            IoPriority::None,
            IoPriority::BestEffort(0),
            IoPriority::BestEffort(7),
            IoPriority::Idle,
        ] {
            assert_eq!(priority(wanted.number()), wanted);
        }
    }

    #[test]
    fn an_autogroup_counts_only_where_no_cgroup_ranks_the_process() {
        let all = "cpuset cpu io memory pids";
        for (own, controlled, expected) in [
            ("1:cpu,cpuacct:/\n0::/\n", None, true),
            ("1:cpu,cpuacct:/user.slice\n0::/user.slice\n", None, false),
            ("2:cpuset:/a\n1:cpu:/\n0::/\n", None, true),
            ("0::/\n", Some(all), true),
            ("0::/user.slice/session-1.scope\n", Some(all), false),
            ("0::/user.slice/session-1.scope\n", Some("memory pids"), true),
        ] {
            assert_eq!(in_root_group(own, controlled), expected, "{own:?}");
        }
    }

    #[test]
    fn every_thread_of_this_process_is_swept_and_read_back() {
        let (ready, wait) = (std::sync::Barrier::new(3), std::sync::Barrier::new(3));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    ready.wait();
                    wait.wait();
                });
            }
            ready.wait();
            let limits = WorkerLimits {
                generation: 9,
                niceness: 5,
                io: IoPriority::Idle,
                max_batch: 4,
                request_interval: 7,
                threads: 1,
            };
            let found = sweep(&limits).unwrap();
            assert!(found.threads >= 3, "{found:?}");
            assert!(found.niceness >= 5, "{found:?}");
            assert_eq!(
                (found.io, found.generation, found.max_batch),
                (IoPriority::Idle, 9, 4)
            );
            wait.wait();
        });
    }
}
