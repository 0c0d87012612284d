//! What ranks a worker behind everybody else, thread by thread, as /proc tells it; and that each check of it can fail.

#![allow(
    clippy::disallowed_methods,
    reason = "the test waits for real processes by a real clock"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use gogrid_agent_core::protocol::{IoPriority, WorkerLimits};
use gogrid_tests::cluster::program;
use gogrid_tests::driver::{Node, Worker};
use gogrid_tests::process::Means;
use gogrid_tests::procfs;
use rustix::process::{Pid, getpriority_process, setpriority_process};

const NICE: i8 = 15;
/// `ioprio_get` answers class << 13 | level.
const BEST_EFFORT: i64 = 2;
const IDLE: i64 = 3;

fn limits(niceness: i8, io: IoPriority) -> WorkerLimits {
    WorkerLimits {
        generation: 1,
        niceness,
        io,
        max_batch: 2,
        request_interval: 0,
        threads: 2,
    }
}

fn kind(node: &mut Node) -> Result<Worker> {
    let worker = node.spawn(limits(NICE, IoPriority::Idle))?;
    worker.until("its limits in force", |said| said.applied.is_some())?;
    Ok(worker)
}

/// Whether this process may lower nice values: what it can't take back it must not do to others.
fn may_lower() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    let sys_nice = 1 << 23;
    set.is_some_and(|set| set & sys_nice != 0)
}

#[test]
fn every_thread_of_a_worker_gives_way_and_its_session_does_as_a_whole() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut node = Node::start(dir.path())?;
    let own = procfs::autogroup(std::process::id())?;
    let worker = kind(&mut node)?;
    let threads = procfs::gives_way(worker.pid(), i64::from(NICE), IDLE)?;
    println!("{threads} threads give way");
    // The session that started all this must not be made to give way with it.
    assert_eq!(procfs::autogroup(std::process::id())?, own);
    Ok(())
}

/// A worker started by the program of that name.
fn broken(dir: &Path, means: Means) -> Result<(Node, Worker)> {
    let link = dir.join(format!("without-{}", means.name()));
    std::os::unix::fs::symlink(program("without-priority")?, &link)?;
    let mut node = Node::start_program(dir, &link)?;
    let worker = kind(&mut node)?;
    Ok((node, worker))
}

#[test]
fn a_worker_without_any_one_of_the_means_is_found_out() -> Result<()> {
    let all = [
        Means::Setpriority,
        Means::Setscheduler,
        Means::Ioprio,
        Means::ProcWrites,
    ];
    for means in all {
        let dir = tempfile::tempdir()?;
        let (_node, worker) = broken(dir.path(), means)?;
        match procfs::gives_way(worker.pid(), i64::from(NICE), IDLE) {
            Ok(_) => bail!("{means:?} did nothing and the check did not notice"),
            Err(found) => println!("{means:?}: {found:#}"),
        }
    }
    Ok(())
}

#[test]
fn a_thread_that_sees_to_its_own_priority_gives_way_again_within_two_seconds() -> Result<()> {
    if !may_lower() {
        println!("SKIPPED: only root may make a thread of a worker less kind");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut node = Node::start(dir.path())?;
    let worker = kind(&mut node)?;
    let thread = *procfs::threads(worker.pid())?.last().context("no thread")?;
    let thread = Pid::from_raw(i32::try_from(thread)?).context("thread 0")?;
    setpriority_process(Some(thread), 0)?;
    assert_eq!(getpriority_process(Some(thread))?, 0);
    let begun = Instant::now();
    while let Err(found) = procfs::gives_way(worker.pid(), i64::from(NICE), IDLE) {
        if begun.elapsed() > Duration::from_secs(2) {
            return Err(found.context("after two seconds"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("after {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_worker_with_the_right_is_less_kind_at_once_when_its_profile_is_and_kinder_again() -> Result<()> {
    if !may_lower() {
        println!("SKIPPED: only root may lower a nice value");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut node = Node::start(dir.path())?;
    let mut worker = kind(&mut node)?;
    for (niceness, io, class) in [
        (3, IoPriority::BestEffort(4), BEST_EFFORT),
        (19, IoPriority::Idle, IDLE),
    ] {
        node.rank(niceness)?;
        let took = worker.limit(limits(niceness, io))?;
        procfs::gives_way(worker.pid(), i64::from(niceness), class)?;
        println!("nice {niceness} after {took:?}");
    }
    Ok(())
}

#[test]
fn a_worker_without_the_right_says_that_it_is_kinder_than_asked() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (_node, mut worker) = broken(dir.path(), Means::Lowering)?;
    worker.limit(limits(3, IoPriority::Idle))?;
    let applied = worker.said().applied.clone().context("no readback")?;
    assert_eq!(applied.niceness, NICE);
    Ok(())
}

#[test]
fn no_more_threads_compute_than_allowed_also_after_that_changed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut node = Node::start(dir.path())?;
    let mut worker = kind(&mut node)?;
    let cores = std::thread::available_parallelism()?.get();
    // One that waits for the pool, one that reads the socket, and those that compute.
    let threads = |worker: &Worker| procfs::threads(worker.pid()).map(|threads| threads.len());
    assert_eq!(threads(&worker)?, 2 + cores.min(2));
    for allowed in [1, 2] {
        worker.limit(WorkerLimits {
            threads: allowed,
            ..limits(NICE, IoPriority::Idle)
        })?;
        let expected = 2 + cores.min(usize::from(allowed));
        let begun = Instant::now();
        while threads(&worker)? != expected {
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "{} threads",
                threads(&worker)?
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}
