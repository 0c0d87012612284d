//! How much others want of this machine's processors, and what memory ours hold.
//!
//! Owns: reading the kernel's counters of the machine, of our own threads and processes, and telling the owner every half
//! second while anything of ours may work, seldom else. Ours are this process, its children and theirs, and an external
//! pool with its workers. Must not judge figures.

use crate::clock::Host;
use crate::event::{Event, Hub};
use gogrid_agent_core::adaptive::SAMPLE_EVERY;
use gogrid_agent_core::adaptive::cpu::{Counters, Thread, sample};
use gogrid_api::Bytes;
use gogrid_api::names::CPU_DEVICE;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

/// `/proc/stat` counts in hundredths of a second.
const TICK_NANOS: u64 = 10_000_000;

/// Between two looks while there is neither a worker nor a child that fetches: the law knows how loaded the machine is when
/// the next worker comes.
const IDLE_EVERY: Duration = Duration::from_secs(2);
/// Processes of ours that only wait: this one and the pool.
const WAITING: usize = 2;

/// The pool of workers, for those who look at processes.
#[derive(Clone, Debug, Default)]
pub(crate) struct PoolProcess(Arc<Looked>);

#[derive(Debug, Default)]
struct Looked {
    /// 0 = no pool yet, below 0 = one that can't be seen from here.
    pid: AtomicI32,
    /// A worker has come.
    worker: Notify,
}

impl PoolProcess {
    /// A pool has connected; `None`: it lives where its processes can't be seen.
    pub(crate) fn set(&self, pid: Option<i32>) {
        let pid = pid.filter(|pid| *pid > 0).unwrap_or(-1);
        self.0.pid.store(pid, Ordering::Relaxed);
    }

    /// A worker has connected.
    pub(crate) fn has_a_worker(&self) {
        self.0.worker.notify_one();
    }

    fn get(&self) -> i32 {
        self.0.pid.load(Ordering::Relaxed)
    }
}

/// Tells samples of the CPU device for ever.
pub(crate) async fn sense(host: Arc<dyn Host>, pool: PoolProcess, hub: Hub) {
    let mut last: Option<Counters> = None;
    loop {
        let (clock, pid) = (Arc::clone(&host), pool.get());
        let mut pause = IDLE_EVERY;
        match tokio::task::spawn_blocking(move || look(Path::new("/proc"), &*clock, pid)).await {
            Ok((counters, resident)) => {
                if resident.len() > WAITING {
                    pause = Duration::from_millis(SAMPLE_EVERY.0);
                }
                let sample = last.as_ref().and_then(|last| sample(last, &counters));
                last = Some(counters);
                if let Some(sample) = sample {
                    hub.send(Event::Sensed(CPU_DEVICE.into(), sample)).await;
                }
                hub.send(Event::Resident(resident)).await;
            }
            Err(error) => tracing::error!(%error, "reading the machine's counters ended"),
        }
        tokio::select! {
            () = host.sleep(pause) => {}
            () = pool.0.worker.notified() => {}
        }
    }
}

fn look(proc: &Path, host: &dyn Host, pool: i32) -> (Counters, BTreeMap<i32, Bytes>) {
    let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
    let (threads, resident) = ours(proc, pool);
    let at = host.boottime();
    let (busy, processors) = machine(&stat);
    let counters = Counters {
        at,
        processors,
        busy,
        cpu_pressure: pressure(&proc.join("pressure/cpu")),
        memory_pressure: pressure(&proc.join("pressure/memory")),
        own: (pool >= 0).then_some(threads),
    };
    (counters, resident)
}

/// Time in which processors ran anything, and how many there are.
fn machine(stat: &str) -> (u64, u64) {
    let all = stat
        .lines()
        .find_map(|line| line.strip_prefix("cpu "))
        .unwrap_or_default();
    let ticks: Vec<u64> = all
        .split_ascii_whitespace()
        .filter_map(|field| field.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, …: stolen time is no load of this machine, guests' is in user.
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|field| ticks.get(*field)).sum();
    let processors = stat
        .lines()
        .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "))
        .count();
    (
        busy.saturating_mul(TICK_NANOS),
        u64::try_from(processors).unwrap_or(1).max(1),
    )
}

/// The `some` total of a pressure file in nanoseconds.
fn pressure(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let micros = some
        .split_ascii_whitespace()
        .find_map(|field| field.strip_prefix("total="))?;
    Some(micros.parse::<u64>().ok()?.saturating_mul(1000))
}

/// Bytes of a process's memory that no file stands behind.
fn resident(process: &Path) -> Option<Bytes> {
    let text = fs::read_to_string(process.join("status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib = line.split_ascii_whitespace().next()?.parse::<u64>().ok()?;
    Some(Bytes(kib.saturating_mul(1024)))
}

/// All of our threads that there are just now, and what our processes hold.
fn ours(proc: &Path, pool: i32) -> (BTreeMap<i32, Thread>, BTreeMap<i32, Bytes>) {
    let own = fs::read_link(proc.join("self"))
        .ok()
        .and_then(|link| link.to_str()?.parse::<i32>().ok());
    let mut waiting: Vec<i32> = own.into_iter().chain((pool > 0).then_some(pool)).collect();
    let mut seen = BTreeSet::new();
    let (mut threads, mut held) = (BTreeMap::new(), BTreeMap::new());
    while let Some(process) = waiting.pop() {
        if !seen.insert(process) {
            continue;
        }
        let directory = proc.join(process.to_string());
        held.extend(resident(&directory).map(|bytes| (process, bytes)));
        let Ok(tasks) = fs::read_dir(directory.join("task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let name = task.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let text = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let schedstat = text("schedstat");
            let mut figures = schedstat.split_ascii_whitespace().filter_map(|f| f.parse().ok());
            if let (Some(ran), Some(waited)) = (figures.next(), figures.next()) {
                threads.insert(id, Thread { ran, waited });
            }
            waiting.extend(
                text("children")
                    .split_ascii_whitespace()
                    .filter_map(|c| c.parse::<i32>().ok()),
            );
        }
    }
    (threads, held)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Machine;
    use futures::future::BoxFuture;
    use gogrid_agent_core::session::Nanos;
    use jiff::Timestamp;
    use tokio::task::JoinHandle;

    #[test]
    fn busy_time_is_what_processors_ran_without_idling_and_without_what_was_stolen() {
        let stat = "cpu  10 20 30 4000 500 6 7 80 90 100\ncpu0 1 2\ncpu1 1 2\nintr 5\n";
        assert_eq!(machine(stat), (73 * TICK_NANOS, 2));
        assert_eq!(machine(""), (0, 1));
    }

    #[test]
    fn a_pressure_file_is_read_to_the_microsecond_and_a_missing_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cpu");
        assert_eq!(pressure(&file), None);
        fs::write(
            &file,
            "some avg10=5.00 avg60=1.00 total=2096\nfull avg10=0.00 total=7\n",
        )
        .unwrap();
        assert_eq!(pressure(&file), Some(2_096_000));
    }

    #[test]
    fn our_threads_and_our_childrens_are_seen_with_what_they_ran() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let (counters, held) = look(Path::new("/proc"), &Machine, 0);
        let own = counters.own.unwrap();
        let this = i32::try_from(std::process::id()).unwrap();
        assert!(own.contains_key(&pid) && own.contains_key(&this), "{own:?}");
        assert!(own.values().any(|thread| thread.ran > 0));
        assert!(counters.busy > 0 && counters.processors > 0);
        assert!(held[&this] > held[&pid] && held[&pid] > Bytes(0), "{held:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// A machine on which no time passes.
    struct Still;

    impl Host for Still {
        fn boottime(&self) -> Nanos {
            0
        }

        fn wall(&self) -> Timestamp {
            Timestamp::UNIX_EPOCH
        }

        fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
            Box::pin(std::future::pending())
        }

        fn spawn(&self, task: BoxFuture<'static, ()>) -> JoinHandle<()> {
            tokio::spawn(task)
        }

        fn random(&self) -> u64 {
            0
        }
    }

    #[tokio::test]
    async fn a_worker_that_connects_has_the_machine_looked_at_at_once() {
        let (hub, mut events) = Hub::new();
        let pool = PoolProcess::default();
        let sensing = tokio::spawn(sense(Arc::new(Still), pool.clone(), hub));
        assert!(matches!(events.recv().await, Some(Event::Resident(_))));
        pool.has_a_worker();
        assert!(matches!(events.recv().await, Some(Event::Resident(_))));
        sensing.abort();
    }

    #[test]
    fn a_pool_that_can_not_be_seen_leaves_our_own_use_unknown() {
        let pool = PoolProcess::default();
        assert_eq!(pool.get(), 0);
        for unseen in [None, Some(0), Some(-3)] {
            pool.set(unseen);
            assert_eq!(look(Path::new("/proc"), &Machine, pool.get()).0.own, None);
        }
        pool.set(Some(7));
        assert_eq!(pool.get(), 7);
    }
}
