//! The fetching child as the agent sees it: requests out, verified models in.
//!
//! Owns: one permanent thread that starts the child when it is first needed and again when it ends. Must not open or
//! read a model itself.

use crate::fetch::Flags;
use crate::frames::{self, Receiver};
use crate::idle::IdleGroup;
use crate::sys;
use gogrid_agent_core::fetch::{FromFetcher, Manners, ToFetcher};
use gogrid_api::job::Failure;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// Between an end of the child and its next start.
const PAUSE: Duration = Duration::from_secs(1);

type Answer = Result<(File, u64), Failure>;

struct State {
    manners: Manners,
    child: Option<UnixStream>,
    next: u64,
    waiting: BTreeMap<u64, (ToFetcher, oneshot::Sender<Answer>)>,
}

struct Shared {
    state: Mutex<State>,
    wanted: Condvar,
    /// Told of bytes that were read.
    count: Box<dyn Fn(u64) + Send + Sync>,
}

/// The way to the child. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Fetcher(Arc<Shared>);

/// Tells the child that nobody waits any more.
struct Waiting {
    fetcher: Fetcher,
    id: u64,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.fetcher.state();
        if state.waiting.remove(&self.id).is_some() {
            state.say(&ToFetcher::Cancel { id: self.id });
        }
    }
}

impl State {
    /// A child that does not listen is about to be found dead by its thread.
    fn say(&self, message: &ToFetcher) {
        if let Some(child) = &self.child
            && let Err(error) = frames::send(child, message, None)
        {
            tracing::debug!(%error, "the fetching child does not listen");
        }
    }
}

impl Fetcher {
    /// Starts the thread; the child comes with the first request, and is moved to `idle` where there is one.
    pub(crate) fn start(
        flags: Flags,
        manners: Manners,
        idle: Option<IdleGroup>,
        count: impl Fn(u64) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                manners,
                child: None,
                next: 1,
                waiting: BTreeMap::new(),
            }),
            wanted: Condvar::new(),
            count: Box::new(count),
        });
        let fetcher = Self(shared);
        let keeper = fetcher.clone();
        // Permanent: the kernel kills the child when the thread that started it ends.
        std::thread::Builder::new()
            .name("fetcher".into())
            .spawn(move || {
                loop {
                    keeper.until_wanted();
                    if let Err(error) = keeper.run(&flags, idle.as_ref()) {
                        tracing::error!(%error, "the fetching child could not be started");
                    }
                    keeper.fail_all();
                    std::thread::park_timeout(PAUSE);
                }
            })?;
        Ok(fetcher)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the child behaves like this.
    pub(crate) fn behave(&self, manners: Manners) {
        let mut state = self.state();
        if state.manners != manners {
            state.manners = manners;
            state.say(&ToFetcher::Manners(manners));
        }
    }

    /// Whether anything is being fetched.
    pub(crate) fn is_busy(&self) -> bool {
        !self.state().waiting.is_empty()
    }

    /// Fetches and verifies a model. Dropping the future cancels it.
    pub(crate) async fn obtain(&self, uri: String, sha256: String) -> Answer {
        let (sender, answer) = oneshot::channel();
        let waiting = {
            let mut state = self.state();
            let id = state.next;
            state.next += 1;
            let order = ToFetcher::Obtain { id, uri, sha256 };
            state.say(&order);
            state.waiting.insert(id, (order, sender));
            Waiting {
                fetcher: self.clone(),
                id,
            }
        };
        self.0.wanted.notify_all();
        let answer = answer.await;
        drop(waiting);
        answer.unwrap_or_else(|_| Err(lost()))
    }

    fn until_wanted(&self) {
        let mut state = self.state();
        while state.waiting.is_empty() {
            state = self.0.wanted.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One child's life.
    fn run(&self, flags: &Flags, idle: Option<&IdleGroup>) -> io::Result<()> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("gogrid-agent").arg("fetch").args(arguments(flags));
        command.env_clear().current_dir("/").stdin(OwnedFd::from(theirs));
        let mut child = sys::spawn_bound(&mut command)?;
        // This end's copy of theirs went with the command; without it the end of the child is the end of the socket.
        drop(command);
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        if let Some(Err(error)) = idle.map(|group| group.take(pid)) {
            tracing::error!(%error, "could not move the fetching child to the idle cgroup");
        }
        let mut receiver = Receiver::new(ours.try_clone()?);
        {
            let mut state = self.state();
            state.child = Some(ours);
            state.say(&ToFetcher::Manners(state.manners));
            for (order, _) in state.waiting.values() {
                state.say(order);
            }
        }
        loop {
            match receiver.receive::<FromFetcher>() {
                Ok(message) => self.take(message, &mut receiver),
                Err(error) => {
                    tracing::warn!(%error, "the fetching child ended");
                    break;
                }
            }
        }
        self.state().child = None;
        let _ = child.kill();
        child.wait().map(drop)
    }

    fn take(&self, message: FromFetcher, receiver: &mut Receiver) {
        let (id, answer) = match message {
            FromFetcher::Read { bytes } => return (self.0.count)(bytes),
            FromFetcher::Obtained { id, bytes } => {
                let file = receiver.descriptor().map(File::from);
                (id, file.map(|file| (file, bytes)).ok_or_else(lost))
            }
            FromFetcher::Failed {
                id,
                reason,
                message,
                retryable,
            } => {
                let failure = Failure {
                    reason,
                    message,
                    retryable,
                };
                (id, Err(failure))
            }
        };
        let waiting = self.state().waiting.remove(&id);
        if let Some((_, sender)) = waiting {
            // Nobody waits: the descriptor is closed here.
            let _ = sender.send(answer);
        }
    }

    fn fail_all(&self) {
        let waiting = std::mem::take(&mut self.state().waiting);
        for (_, sender) in waiting.into_values() {
            let _ = sender.send(Err(lost()));
        }
    }
}

fn lost() -> Failure {
    Failure {
        reason: "StoreUnavailable".into(),
        message: "the process that fetches models ended; its message is in the agent's log".into(),
        retryable: true,
    }
}

fn arguments(flags: &Flags) -> Vec<std::ffi::OsString> {
    let Flags {
        store,
        model_root,
        allow_address,
        api_server,
    } = flags;
    let mut arguments = vec!["--store".into(), store.into()];
    for root in model_root {
        arguments.extend(["--model-root".into(), root.into()]);
    }
    for address in allow_address {
        arguments.extend(["--allow-address".into(), address.into()]);
    }
    for address in api_server {
        arguments.extend(["--api-server".into(), address.to_string().into()]);
    }
    arguments
}
