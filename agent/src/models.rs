//! Models: obtaining verified ones, and reading headers of unverified ones, each in a child of its own kind.
//!
//! Owns: the header child and the scan of the roots. This process never parses, hashes or downloads a model. Must not
//! decide where a model runs.

use crate::config::Config;
use crate::event::{Event, Hub};
use crate::fetch;
use crate::fetcher::Fetcher;
use crate::header::{self, Answer};
use crate::idle::IdleGroup;
use crate::metrics::Metrics;
use futures::future::BoxFuture;
use gogrid_agent_core::fetch::Manners;
use gogrid_agent_core::results::clip;
use gogrid_api::assignment::{ModelFacts, ModelOrder};
use gogrid_api::job::Failure;
use gogrid_api::node::HeldModel;
use gogrid_store::{AddressPolicy, ModelUri, Roots, Sha256, StoreError};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Models in a GpuNode.
const MAX_LISTED: usize = 64;
/// Between two scans of the roots.
const SCAN_EVERY: Duration = Duration::from_secs(60);
/// Between two looks at the roots' own modification times.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Longest URI in a GpuNode.
const MAX_URI: usize = 2048;
/// Longest answer of the header child.
const MAX_ANSWER: u64 = 64 << 10;
/// Longest time of the header child.
const CHILD_DEADLINE: Duration = Duration::from_secs(60);
/// CAP_SETUID, in the bits of /proc/self/status.
const CAP_SETUID: u32 = 7;
/// Nobody.
const NOBODY: u32 = 65_534;

/// A verified model, ready to be handed to a worker.
pub struct Obtained {
    /// Read-only descriptor.
    pub file: Arc<OwnedFd>,
    /// Its facts; `None` where the header could not be read, which the worker will say better.
    pub facts: Option<ModelFacts>,
}

/// Where an agent gets its models from.
pub trait ModelSource: Send + Sync {
    /// Fetches a model, verifies it and reads its facts.
    fn obtain(&self, order: ModelOrder) -> BoxFuture<'static, Result<Obtained, Failure>>;

    /// Reads a model's header.
    fn inspect(&self, order: ModelOrder) -> BoxFuture<'static, Result<ModelFacts, Failure>>;

    /// Whether anything is being fetched now, which takes the CPU device as a worker does.
    fn is_busy(&self) -> bool;

    /// From now on fetching is to behave like this.
    fn behave(&self, manners: Manners);
}

impl ModelSource for Models {
    fn obtain(&self, order: ModelOrder) -> BoxFuture<'static, Result<Obtained, Failure>> {
        let models = self.clone();
        Box::pin(async move { models.obtained(&order).await })
    }

    fn inspect(&self, order: ModelOrder) -> BoxFuture<'static, Result<ModelFacts, Failure>> {
        let models = self.clone();
        Box::pin(async move { models.inspected(&order).await })
    }

    fn is_busy(&self) -> bool {
        self.fetcher.is_busy()
    }

    fn behave(&self, manners: Manners) {
        self.fetcher.behave(manners);
    }
}

/// Why models can't be had at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelsError {
    /// Roots or addresses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The thread of the fetching child.
    #[error("the thread of the fetching child: {0}")]
    Thread(#[from] std::io::Error),
}

/// Everything about models on this node.
#[derive(Clone)]
pub(crate) struct Models {
    roots: Roots,
    fetcher: Fetcher,
    children: Arc<Semaphore>,
    downloads: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

/// A model is being obtained for as long as this lives.
struct Obtaining(Arc<Metrics>);

impl Obtaining {
    fn begin(metrics: &Arc<Metrics>) -> Self {
        metrics.obtaining.inc();
        Self(Arc::clone(metrics))
    }
}

impl Drop for Obtaining {
    fn drop(&mut self) {
        self.0.obtaining.dec();
    }
}

fn failure(error: &StoreError) -> Failure {
    Failure {
        reason: error.reason().to_owned(),
        message: clip(&error.to_string(), 1024).to_owned(),
        retryable: error.is_transient(),
    }
}

fn io_failure(what: &str, error: &std::io::Error) -> Failure {
    Failure {
        reason: "StoreUnavailable".into(),
        message: format!("{what}: {error}"),
        retryable: true,
    }
}

impl Models {
    /// Checks what the fetching child will be started with. `manners` hold until others are told.
    pub(crate) fn open(
        config: &Config,
        api_servers: Vec<IpAddr>,
        manners: Manners,
        idle: Option<IdleGroup>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, ModelsError> {
        AddressPolicy::new(&config.allow, api_servers.clone())?;
        let flags = fetch::Flags {
            store: config.state_dir.join("models"),
            model_root: config.roots.clone(),
            allow_address: config.allow.clone(),
            api_server: api_servers,
        };
        let bytes = metrics.model_bytes.clone();
        Ok(Self {
            roots: Roots::new(config.roots.clone())?,
            fetcher: Fetcher::start(flags, manners, idle, move |more| bytes.inc_by(more))?,
            children: Arc::new(Semaphore::new(2)),
            downloads: Arc::new(Semaphore::new(2)),
            metrics,
        })
    }

    /// Fetches a model, verifies it and reads its facts.
    async fn obtained(&self, order: &ModelOrder) -> Result<Obtained, Failure> {
        let obtained = self.try_obtain(order).await;
        if let Err(Failure { reason, .. }) = &obtained {
            self.metrics.model_failures.with_label_values(&[reason]).inc();
        }
        obtained
    }

    async fn try_obtain(&self, order: &ModelOrder) -> Result<Obtained, Failure> {
        ModelUri::parse(&order.uri).map_err(|e| failure(&e))?;
        Sha256::parse(&order.sha256).map_err(|e| failure(&e))?;
        let _turn = self.downloads.acquire().await;
        let _obtaining = Obtaining::begin(&self.metrics);
        let (file, bytes) = self
            .fetcher
            .obtain(order.uri.clone(), order.sha256.clone())
            .await?;
        let copy = file.try_clone().map_err(|e| io_failure("model descriptor", &e))?;
        let facts = self.read_header(copy, bytes).await.ok();
        Ok(Obtained {
            file: Arc::new(OwnedFd::from(file)),
            facts,
        })
    }

    /// Reads a model's header. A file beneath a root is looked at where it lies; any other model is fetched first, so
    /// that a run on this node finds it in the store.
    async fn inspected(&self, order: &ModelOrder) -> Result<ModelFacts, Failure> {
        match ModelUri::parse(&order.uri).map_err(|e| failure(&e))? {
            ModelUri::File(path) => {
                let (file, bytes) = self.open_beneath(path).await?;
                self.read_header(file, bytes).await
            }
            ModelUri::Http(_) => {
                let obtained = self.obtained(order).await?;
                let copy = obtained
                    .file
                    .try_clone()
                    .map_err(|e| io_failure("model descriptor", &e))?;
                let file = File::from(copy);
                let bytes = file.metadata().map_err(|e| io_failure("model", &e))?.len();
                self.read_header(file, bytes).await
            }
        }
    }

    async fn open_beneath(&self, path: PathBuf) -> Result<(File, u64), Failure> {
        let roots = self.roots.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let file = roots.open(&path).map_err(|e| failure(&e))?;
            let bytes = file.metadata().map_err(|e| io_failure("model", &e))?.len();
            Ok((file, bytes))
        });
        opened
            .await
            .map_err(|e| io_failure("opening the model", &std::io::Error::other(e)))?
    }

    /// Has a child read the header: other user where possible, no environment, bounded in time, memory and answer.
    async fn read_header(&self, file: File, bytes: u64) -> Result<ModelFacts, Failure> {
        let _turn = self.children.acquire().await;
        let broken = |message: String| Failure {
            reason: "HeaderUnreadable".into(),
            message,
            retryable: true,
        };
        let answer = tokio::task::spawn_blocking(move || ask_child(&file, bytes));
        match answer
            .await
            .map_err(|e| broken(e.to_string()))?
            .map_err(|e| broken(e.to_string()))?
        {
            Answer::Facts(facts) => Ok(facts),
            Answer::Refused { reason, message } => Err(Failure {
                reason,
                message,
                retryable: false,
            }),
        }
    }

    /// Scans the roots whenever they seem to have changed, and every minute; for ever.
    pub(crate) async fn scan(self, hub: Hub) {
        let mut known: BTreeMap<String, (Stamp, HeldModel)> = BTreeMap::new();
        let mut published: Option<Vec<HeldModel>> = None;
        loop {
            let roots = self.roots.clone();
            let stamps = root_stamps(roots.paths());
            let listing = tokio::task::spawn_blocking(move || roots.list(MAX_LISTED)).await;
            let listed = match listing {
                Ok(Ok(listing)) => listing.models,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "could not list the model roots");
                    vec![]
                }
                Err(error) => {
                    tracing::warn!(%error, "listing of the model roots ended");
                    vec![]
                }
            };
            let mut now = BTreeMap::new();
            for model in listed {
                let uri = format!("file://{}", model.path.display());
                if uri.len() > MAX_URI {
                    continue;
                }
                let (file, bytes) = match self.open_beneath(model.path).await {
                    Ok(opened) => opened,
                    Err(failure) => {
                        now.insert(uri.clone(), (Stamp::default(), held(&uri, 0, Err(failure))));
                        continue;
                    }
                };
                let stamp = file.metadata().map(|m| stamp(&m)).unwrap_or_default();
                let held = match known.remove(&uri) {
                    Some((old, held)) if old == stamp => held,
                    _ => self.look(&uri, file, bytes).await,
                };
                now.insert(uri, (stamp, held));
            }
            known = now;
            let models: Vec<HeldModel> = known.values().map(|(_, held)| held.clone()).collect();
            if published.as_ref() != Some(&models) {
                hub.send(Event::Models(models.clone())).await;
                published = Some(models);
            }
            let mut waited = Duration::ZERO;
            while waited < SCAN_EVERY && root_stamps(self.roots.paths()) == stamps {
                tokio::time::sleep(LOOK_EVERY).await;
                waited += LOOK_EVERY;
            }
        }
    }

    async fn look(&self, uri: &str, file: File, bytes: u64) -> HeldModel {
        held(uri, bytes, self.read_header(file, bytes).await)
    }
}

fn held(uri: &str, bytes: u64, facts: Result<ModelFacts, Failure>) -> HeldModel {
    let (facts, failure) = match facts {
        Ok(facts) => (Some(facts), None),
        Err(failure) => (None, Some(failure)),
    };
    HeldModel {
        uri: uri.to_owned(),
        bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
        facts,
        error: failure.as_ref().map(|f| clip(&f.message, 256).to_owned()),
        reason: failure.map(|f| f.reason),
    }
}

/// What changes when a file is replaced or written to.
type Stamp = (u64, u64, u64, i64, i64);

fn stamp(meta: &std::fs::Metadata) -> Stamp {
    (
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
    )
}

fn root_stamps(roots: &[PathBuf]) -> Vec<Option<Stamp>> {
    roots
        .iter()
        .map(|root| std::fs::metadata(root).ok().map(|m| stamp(&m)))
        .collect()
}

/// Whether this process may run a child as another user.
fn may_change_user() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let bits = line
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    bits >> CAP_SETUID & 1 == 1
}

fn ask_child(file: &File, bytes: u64) -> std::io::Result<Answer> {
    let program = Path::new("/proc/self/exe");
    let start = |nobody: bool| {
        let mut command = Command::new(program);
        command
            .arg0("gogrid-agent")
            .arg("inspect-headers")
            .arg("--bytes")
            .arg(bytes.to_string());
        command
            .env_clear()
            .current_dir("/")
            .stdin(file.try_clone()?)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        if nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        command.spawn()
    };
    // The program may lie where nobody else may look: then the child keeps the user, and still loses the rest.
    let mut child = match may_change_user().then(|| start(true)) {
        Some(Ok(child)) => child,
        Some(Err(_)) | None => start(false)?,
    };
    let output = child.stdout.take();
    let reader = std::thread::Builder::new().name("header".into()).spawn(move || {
        let mut answer = vec![];
        let read = output.map(|o| o.take(MAX_ANSWER).read_to_end(&mut answer));
        read.transpose().map(|_| answer)
    })?;
    let ended = header::wait(&mut child, CHILD_DEADLINE);
    let answer = reader
        .join()
        .map_err(|_| std::io::Error::other("reader of the header child ended"))??;
    let status = ended?;
    if !status.success() {
        return Err(std::io::Error::other(format!(
            "the header child ended with {status}"
        )));
    }
    serde_json::from_slice(&answer)
        .map(header::bounded)
        .map_err(std::io::Error::other)
}
