//! The fetching child: downloads, hashes and keeps models, at the priority and inside the share that the agent tells.
//!
//! Owns: the store, its own courtesy, and the billing of its work. Runs without token and without the agent's
//! environment, in a session of its own. Must not parse a model or decide which one is needed.

use crate::clock::{Host as _, Machine};
use crate::frames::{self, Receiver};
use crate::sys;
use clap::Args;
use gogrid_agent_core::fetch::{FromFetcher, Manners, ToFetcher};
use gogrid_agent_core::results::clip;
use gogrid_agent_core::throttle::{Grant, ShareMeter};
use gogrid_store::{AddressPolicy, HttpLimits, ModelUri, Roots, Sha256, Store, StoreConfig, StoreError};
use rustix::process::Pid;
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of the file system that downloads leave free.
const DISK_RESERVE: u64 = 1 << 30;
/// Threads that fetch and hash at once.
const WORKS: usize = 2;

/// What the child is started with.
#[derive(Debug, Args)]
pub struct Flags {
    /// Directory of the store.
    #[arg(long)]
    pub store: PathBuf,
    /// Directory beneath which `file:` models may lie; may be repeated.
    #[arg(long)]
    pub model_root: Vec<PathBuf>,
    /// Host name or CIDR that http model sources may resolve to although it is private; may be repeated.
    #[arg(long)]
    pub allow_address: Vec<String>,
    /// Address that no download may contact; may be repeated.
    #[arg(long)]
    pub api_server: Vec<IpAddr>,
}

/// Why the child ends by itself.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// A call of the system.
    #[error("fetching child: {0}")]
    System(#[from] io::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The agent's first message was another one.
    #[error("the first message does not say how to behave; this program is started by the agent")]
    NoManners,
}

/// The child's whole life: until the socket on its standard input is closed.
///
/// # Errors
/// [`FetchError`].
pub fn child(flags: Flags) -> Result<(), FetchError> {
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut receiver = Receiver::new(stream.try_clone()?);
    rustix::process::setsid().map_err(io::Error::from)?;
    rustix::thread::set_no_new_privs(true).map_err(io::Error::from)?;
    let throttle = Arc::new(Throttle::default());
    // The first message, before any thread starts, so that all inherit what it says.
    let ToFetcher::Manners(manners) = receiver.receive()? else {
        return Err(FetchError::NoManners);
    };
    behave(manners)?;
    throttle.allow(manners.share_permille);
    let store = Store::open(StoreConfig {
        dir: flags.store,
        roots: Roots::new(flags.model_root)?,
        policy: AddressPolicy::new(&flags.allow_address, flags.api_server)?,
        http: HttpLimits::default(),
        reserve_bytes: DISK_RESERVE,
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(WORKS)
        .enable_all()
        .build()?;
    let stream = Arc::new(Mutex::new(stream));
    let mut running: BTreeMap<u64, tokio::task::JoinHandle<()>> = BTreeMap::new();
    while let Ok(message) = receiver.receive::<ToFetcher>() {
        running.retain(|_, task| !task.is_finished());
        match message {
            ToFetcher::Manners(manners) => {
                behave(manners)?;
                throttle.allow(manners.share_permille);
            }
            ToFetcher::Obtain { id, uri, sha256 } => {
                let (store, throttle) = (store.clone(), Arc::clone(&throttle));
                let stream = Arc::clone(&stream);
                let task = runtime.spawn(async move {
                    let progress = Progress::new(Arc::clone(&stream));
                    let found = obtain(&store, &uri, &sha256, throttle, progress).await;
                    let sent = answer(&stream, id, found);
                    if let Err(error) = sent {
                        tracing::warn!(%error, "the agent takes no answer");
                    }
                });
                running.insert(id, task);
            }
            ToFetcher::Cancel { id } => {
                if let Some(task) = running.remove(&id) {
                    task.abort();
                }
            }
        }
    }
    // The agent is gone; so is whoever would use what is under way.
    runtime.shutdown_background();
    Ok(())
}

async fn obtain(
    store: &Store,
    uri: &str,
    sha256: &str,
    throttle: Arc<Throttle>,
    progress: Progress,
) -> Result<gogrid_store::VerifiedModel, StoreError> {
    let uri = ModelUri::parse(uri)?;
    let digest = Sha256::parse(sha256)?;
    store
        .obtain(&uri, digest, move |done, _| {
            progress.read(done, Machine.boottime());
            throttle.pay();
        })
        .await
}

/// Between two messages of one model's progress.
const TELL_NANOS: u64 = 1_000_000_000;

/// Tells the agent how much of a model was read. What the store says is bytes done so far; a fall is a fresh start.
struct Progress {
    stream: Arc<Mutex<UnixStream>>,
    /// Bytes done, bytes not told yet, and when some were told last.
    state: Mutex<(u64, u64, u64)>,
}

impl Progress {
    fn new(stream: Arc<Mutex<UnixStream>>) -> Self {
        Self {
            stream,
            state: Mutex::new((0, 0, 0)),
        }
    }

    fn read(&self, done: u64, now: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, untold, told_at) = *state;
        let more = if done < before { done } else { done - before };
        let untold = untold.saturating_add(more);
        *state = if now >= told_at.saturating_add(TELL_NANOS) {
            self.tell(untold);
            (done, 0, now)
        } else {
            (done, untold, told_at)
        };
    }

    fn tell(&self, bytes: u64) {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = frames::send(&stream, &FromFetcher::Read { bytes }, None) {
            tracing::debug!(%error, "the agent takes no progress");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let (_, untold, _) = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if untold > 0 {
            self.tell(untold);
        }
    }
}

fn answer(
    stream: &Mutex<UnixStream>,
    id: u64,
    found: Result<gogrid_store::VerifiedModel, StoreError>,
) -> io::Result<()> {
    let stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
    match found {
        Ok(model) => frames::send(
            &stream,
            &FromFetcher::Obtained {
                id,
                bytes: model.bytes,
            },
            Some(model.file.as_fd()),
        ),
        Err(error) => frames::send(
            &stream,
            &FromFetcher::Failed {
                id,
                reason: error.reason().to_owned(),
                message: clip(&error.to_string(), 1024).to_owned(),
                retryable: error.is_transient(),
            },
            None,
        ),
    }
}

/// Priority of every thread there is, and of the autogroup that this session is.
fn behave(manners: Manners) -> io::Result<()> {
    // Absent where the kernel has no autogroups; refused when written too often by those without rights.
    let _ = std::fs::write("/proc/self/autogroup", manners.niceness.to_string());
    for entry in std::fs::read_dir("/proc/self/task")? {
        let thread = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(thread) = thread else { continue };
        // A thread may have ended; one that may not be raised stays kinder than asked.
        let _ = rustix::process::setpriority_process(Pid::from_raw(thread), i32::from(manners.niceness));
        let _ = sys::set_io_priority(thread, manners.io.number());
    }
    Ok(())
}

/// Holds the whole process inside its share: whoever has computed waits until that is paid for.
struct Throttle {
    meter: Mutex<Account>,
    changed: Condvar,
}

struct Account {
    meter: ShareMeter,
    seen: u64,
    cores: u64,
}

impl Default for Throttle {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            meter: Mutex::new(Account {
                meter: ShareMeter::default(),
                seen: process_cpu(),
                cores: u64::try_from(cores).unwrap_or(1),
            }),
            changed: Condvar::new(),
        }
    }
}

impl Throttle {
    /// From now on this share.
    fn allow(&self, share_permille: u16) {
        let mut account = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        let grant = Grant {
            share_permille,
            expires_at: u64::MAX,
            fence_at: u64::MAX,
        };
        account.meter.set_grant(Machine.boottime(), grant);
        self.changed.notify_all();
    }

    /// Bills what the process has computed since the last bill, and waits until its share allows more.
    fn pay(&self) {
        let mut account = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (now, cpu) = (Machine.boottime(), process_cpu());
            let time = cpu.saturating_sub(account.seen) / account.cores.max(1);
            account.seen = cpu;
            account.meter.bill(now, time);
            let wait = match account.meter.ready_at(now) {
                Some(at) if at <= now => return,
                Some(at) => Duration::from_nanos(at.saturating_sub(now)),
                // Until the share is no longer 0.
                None => Duration::from_secs(3600),
            };
            let waited = self.changed.wait_timeout(account, wait);
            account = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn process_cpu() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn without_a_share_work_waits_and_goes_on_with_the_next_share() {
        let throttle = Arc::new(Throttle::default());
        throttle.allow(0);
        let (sender, paid) = mpsc::channel();
        let payer = Arc::clone(&throttle);
        let thread = std::thread::spawn(move || {
            payer.pay();
            sender.send(()).unwrap();
        });
        assert!(paid.recv_timeout(Duration::from_millis(200)).is_err());
        throttle.allow(1000);
        paid.recv_timeout(Duration::from_secs(20)).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn what_was_computed_is_paid_for_before_more_is() {
        let (begun, before) = (Machine.boottime(), process_cpu());
        let throttle = Throttle::default();
        throttle.allow(100);
        throttle.pay();
        while process_cpu() < before + 20_000_000 {}
        throttle.pay();
        let cores = u64::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
        // A tenth of the device: ten times as long as was computed, whatever other tests compute besides.
        let least = 20_000_000 / cores * 10;
        assert!(Machine.boottime() - begun >= least);
    }
}
