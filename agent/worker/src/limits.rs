//! CPU and I/O courtesy of this process, set on every thread and read back.
//!
//! Owns: the order (before any other thread starts), the sweep over all threads, and telling honestly what is in force:
//! lowering a nice value needs a right that a worker hasn't got. Must not know about models or grants.

use crate::sys;
use gogrid_agent_core::protocol::{IoPriority, Readback, WorkerLimits};
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit};
use std::io;

/// First steps of a worker, while it has one thread: everything that can't be set later or is inherited by threads.
pub(crate) fn settle(limits: &WorkerLimits, memory: u64) -> io::Result<()> {
    // First in line when memory is short; raising it needs no right. Some containers mount /proc read-only.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    apply_to(0, limits)?;
    // A nice value ranks only inside an autogroup (notes, E2c). The file is missing where autogroups are.
    let _ = std::fs::write("/proc/self/autogroup", limits.niceness.to_string());
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

/// Applies limits to every thread there is and reads them back. Threads that start later inherit from their starter.
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
    sys::set_io_priority(thread, number(limits.io))
}

const CLASS_SHIFT: u32 = 13;

/// The kernel's number of a priority: class << 13 | level.
fn number(priority: IoPriority) -> i32 {
    match priority {
        IoPriority::None => 0,
        IoPriority::BestEffort(level) => (2 << CLASS_SHIFT) | i32::from(level.min(7)),
        IoPriority::Idle => 3 << CLASS_SHIFT,
    }
}

fn priority(number: i32) -> IoPriority {
    match number >> CLASS_SHIFT {
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
            assert_eq!(priority(number(wanted)), wanted);
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
