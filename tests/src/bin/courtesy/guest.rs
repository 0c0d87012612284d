//! One GoGrid at work on the CPU: a job that generates, and a newcomer that is pulled, hashed, loaded and generates, over
//! and over.
//!
//! Owns: its processes, and the division of the device among them as the agent divides it. Outside [`Guest::work`] all of
//! them have a share of nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use gogrid_agent_core::fetch::Manners;
use gogrid_agent_core::protocol::WorkerLimits;
use gogrid_agent_core::shares::{Claim, batch_each, divide, permille};
use gogrid_api::effective::Limits;
use gogrid_api::profile::IoClass;
use gogrid_tests::cgroups;
use gogrid_tests::driver::{Feed, Node, Worker};
use gogrid_tests::fetching::Fetcher;
use gogrid_tests::procfs;

use crate::place::Place;

/// How long a newcomer generates before the next one comes.
const STAY: Duration = Duration::from_secs(3);
const CONTEXT: u32 = 1024;
const SEQUENCES: u16 = 4;
/// Answers long enough that a worker never waits for its next record.
const LONG: u32 = 400;
/// Answers so short that only the request interval holds the next one back.
const SHORT: u32 = 4;

/// With the whole of the profile's batch.
fn worker_limits(limits: &Limits, generation: u64, threads: u16) -> WorkerLimits {
    WorkerLimits::under(limits, generation, limits.max_batch, threads)
}

fn enter(group: Option<&PathBuf>, pid: impl std::fmt::Display) -> Result<()> {
    group.map_or(Ok(()), |group| cgroups::enter(group, pid))
}

/// A model as file and as download.
pub(crate) struct Model {
    pub(crate) path: PathBuf,
    pub(crate) uri: String,
    pub(crate) sha256: String,
}

enum Newcomer {
    Pulled,
    Loading(Worker),
    Generating(Worker, Duration),
}

/// Threads looked at, and those found as kind as asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Threads {
    pub(crate) total: u64,
    pub(crate) nice_ok: u64,
    pub(crate) ioprio_ok: u64,
}

/// One GoGrid.
pub(crate) struct Guest {
    node: Node,
    dir: PathBuf,
    limits: Limits,
    cores: u16,
    idle: Option<PathBuf>,
    model: File,
    uri: String,
    sha256: String,
    resident: Worker,
    fetcher: Fetcher,
    newcomer: Newcomer,
    /// Newcomers that came as far as generating.
    pub(crate) newcomers: u64,
    /// Shortest time between two starts of one worker, in nanoseconds.
    pub(crate) gap: Option<u64>,
}

impl Guest {
    /// Starts one with its files in `dir`; returns once its first job is loaded.
    pub(crate) fn start(
        dir: &Path,
        limits: Limits,
        cores: u16,
        place: &Place,
        idle: bool,
        model: &Model,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let idle = place.idle.clone().filter(|_| idle);
        let mut node = Node::start(dir)?;
        enter(place.pod.as_ref(), node.pid())?;
        let file = File::open(&model.path)?;
        let resident = node.spawn(worker_limits(&limits, 1, cores))?;
        enter(idle.as_ref(), resident.pid())?;
        resident.load(&file, CONTEXT, SEQUENCES)?;
        resident.share(1000);
        resident.until("the first model to be loaded", |said| said.loaded.is_some())?;
        resident.share(0);
        resident.feed(Some(Feed {
            tokens: LONG,
            window: u64::from(SEQUENCES) * 2,
        }));
        let mut fetcher = Fetcher::start(dir, Manners::under(&limits, 0))?;
        enter(idle.as_ref().or(place.pod.as_ref()), fetcher.pid())?;
        fetcher.obtain(&model.uri, &model.sha256)?;
        Ok(Self {
            node,
            dir: dir.to_owned(),
            limits,
            cores,
            idle,
            model: file,
            uri: model.uri.clone(),
            sha256: model.sha256.clone(),
            resident,
            fetcher,
            newcomer: Newcomer::Pulled,
            newcomers: 0,
            gap: None,
        })
    }

    /// Processes that take the device now.
    pub(crate) fn pids(&self) -> Result<Vec<u32>> {
        let mut pids = vec![self.resident.pid(), u32::try_from(self.fetcher.pid())?];
        if let Newcomer::Loading(worker) | Newcomer::Generating(worker, _) = &self.newcomer {
            pids.push(worker.pid());
        }
        Ok(pids)
    }

    /// The first job alone, for as long as `during` takes.
    pub(crate) fn generate<R>(&mut self, during: impl FnOnce(u32) -> Result<R>) -> Result<R> {
        let limits = worker_limits(&self.limits, 0, self.cores);
        self.resident.limit(limits)?;
        self.resident.share(permille(self.limits.compute_percent));
        let result = during(self.resident.pid());
        self.resident.share(0);
        result
    }

    /// Everything, for that long.
    pub(crate) fn work(&mut self, span: Duration) -> Result<()> {
        let begun = Instant::now();
        self.divide(true)?;
        while begun.elapsed() < span {
            let left = span.saturating_sub(begun.elapsed());
            self.advance(left.min(Duration::from_millis(50)))?;
        }
        self.divide(false)
    }

    fn divide(&mut self, active: bool) -> Result<()> {
        let claim = |worker| Claim {
            worker,
            most: 1000,
            active,
        };
        let shares = divide(permille(self.limits.compute_percent), &[claim(1), claim(2)]);
        let share = |name| shares.iter().find(|(w, _)| *w == name).map_or(0, |(_, s)| *s);
        self.resident.share(share(1));
        match &self.newcomer {
            Newcomer::Pulled => self.fetcher.behave(Manners::under(&self.limits, share(2)))?,
            Newcomer::Loading(worker) | Newcomer::Generating(worker, _) => {
                worker.share(share(2));
                self.fetcher.behave(Manners::under(&self.limits, 0))?;
            }
        }
        Ok(())
    }

    /// Waits that long, then sees how far the newcomer has come.
    fn advance(&mut self, pause: Duration) -> Result<()> {
        let threads = batch_each(self.cores, 2);
        match std::mem::replace(&mut self.newcomer, Newcomer::Pulled) {
            Newcomer::Pulled => {
                if self.fetcher.obtained(pause)?.is_none() {
                    return Ok(());
                }
                self.resident.limit(worker_limits(&self.limits, 0, threads))?;
                let worker = self.node.spawn(worker_limits(&self.limits, 1, threads))?;
                enter(self.idle.as_ref(), worker.pid())?;
                worker.load(&self.model, CONTEXT, SEQUENCES)?;
                self.newcomer = Newcomer::Loading(worker);
                self.divide(true)
            }
            Newcomer::Loading(worker) => {
                std::thread::sleep(pause);
                if worker.is_loaded()? {
                    worker.feed(Some(Feed {
                        tokens: SHORT,
                        window: u64::from(SEQUENCES) * 2,
                    }));
                    self.newcomers += 1;
                    self.newcomer = Newcomer::Generating(worker, Duration::ZERO);
                } else {
                    self.newcomer = Newcomer::Loading(worker);
                }
                Ok(())
            }
            Newcomer::Generating(worker, so_far) if so_far < STAY => {
                std::thread::sleep(pause);
                self.newcomer = Newcomer::Generating(worker, so_far + pause);
                Ok(())
            }
            Newcomer::Generating(worker, _) => {
                let starts = worker.said().starts.clone();
                let gaps = starts.windows(2).filter_map(|w| match w {
                    [a, b] => b.checked_sub(*a),
                    _ => None,
                });
                self.gap = gaps.chain(self.gap).min();
                self.node.kill(worker)?;
                self.resident.limit(worker_limits(&self.limits, 0, self.cores))?;
                // So that the next one is pulled again.
                std::fs::remove_file(self.dir.join("store/objects/sha256").join(&self.sha256))?;
                self.fetcher.obtain(&self.uri, &self.sha256)?;
                self.divide(true)
            }
        }
    }

    /// How kind every thread is that could take the machine from somebody.
    pub(crate) fn threads(&self) -> Result<Threads> {
        let mut threads = Threads::default();
        let class = match self.limits.io_class {
            IoClass::None => 0,
            IoClass::BestEffort => 2,
            IoClass::Idle => 3,
        };
        for pid in self.pids()? {
            for thread in procfs::threads(pid)? {
                let (Ok(nice), Ok(io)) = (procfs::niceness(pid, thread), procfs::io_priority(thread)) else {
                    // It has ended since the listing.
                    continue;
                };
                threads.total += 1;
                threads.nice_ok += u64::from(nice >= i64::from(self.limits.niceness.0));
                threads.ioprio_ok += u64::from(io >> 13 == class);
            }
        }
        Ok(threads)
    }
}
