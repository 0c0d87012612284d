//! The content-addressed store. Owns the directory `objects/sha256/<hex>` and `partial/`, single flight per digest, and
//! the promise that a [`VerifiedModel`] is only made from bytes whose digest was computed from that very file.

use crate::address::AddressPolicy;
use crate::digest::Sha256;
use crate::error::StoreError;
use crate::hash::{Cancel, Progress, hash_file};
use crate::http::{Downloader, HttpLimits};
use crate::partial::{Piece, Target, free_bytes, sync_directory, write};
use crate::roots::Roots;
use crate::uri::ModelUri;
use reqwest::Url;
use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::{Semaphore, mpsc};

/// Chunks on their way from the network to the disk.
const PIECES_IN_FLIGHT: usize = 16;

/// What a store is made of.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Directory of the store; made when missing, and locked against other processes.
    pub dir: PathBuf,
    /// Where `file:` models may come from.
    pub roots: Roots,
    /// Which addresses downloads may contact.
    pub policy: AddressPolicy,
    /// Limits of downloads.
    pub http: HttpLimits,
    /// Bytes of the file system that downloads leave free.
    pub reserve_bytes: u64,
}

/// A model whose digest was computed from `file` and is the one asked for.
#[derive(Debug)]
pub struct VerifiedModel {
    /// The file, read-only, positioned at 0.
    pub file: File,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its digest.
    pub digest: Sha256,
    /// Where it came from, without credentials and query.
    pub origin: String,
}

/// One object of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredObject {
    /// Its digest, by name; not verified.
    pub digest: Sha256,
    /// Its size in bytes.
    pub bytes: u64,
}

/// The store. Cheap to clone; clones share downloads.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    objects: PathBuf,
    partial: PathBuf,
    roots: Roots,
    downloader: Downloader,
    reserve_bytes: u64,
    attempts: AtomicU64,
    /// One turn per digest: whoever holds it looks for the object and, if need be, downloads it.
    turns: Mutex<HashMap<Sha256, Weak<Semaphore>>>,
    /// Held for as long as the store lives.
    _lock: File,
}

impl Store {
    /// Opens the store: makes its directories, takes its lock, removes what interrupted downloads left. Blocks.
    pub fn open(config: StoreConfig) -> Result<Self, StoreError> {
        let StoreConfig {
            dir,
            roots,
            policy,
            http,
            reserve_bytes,
        } = config;
        let downloader = Downloader::new(policy, http)?;
        let objects = dir.join("objects").join("sha256");
        let partial = dir.join("partial");
        for directory in [&objects, &partial] {
            std::fs::create_dir_all(directory).map_err(StoreError::io("making the store's directories"))?;
        }
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join("lock"))
            .map_err(StoreError::io("opening the store's lock"))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StoreError::Busy { dir: dir.clone() },
            TryLockError::Error(source) => StoreError::Io {
                what: "locking the store",
                source,
            },
        })?;
        let leftovers = std::fs::read_dir(&partial).map_err(StoreError::io("listing partial downloads"))?;
        for entry in leftovers {
            let entry = entry.map_err(StoreError::io("listing partial downloads"))?;
            std::fs::remove_file(entry.path()).map_err(StoreError::io("removing a partial download"))?;
        }
        Ok(Self {
            inner: Arc::new(Inner {
                objects,
                partial,
                roots,
                downloader,
                reserve_bytes,
                attempts: AtomicU64::new(0),
                turns: Mutex::default(),
                _lock: lock,
            }),
        })
    }

    /// The directories `file:` models may come from.
    pub fn roots(&self) -> &Roots {
        &self.inner.roots
    }

    /// Bytes that may still be written on the store's file system. Blocks.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        free_bytes(&self.inner.objects)
    }

    /// Hands out the model with digest `expected`. A `file:` model is hashed where it lies and never copied; a web model
    /// is taken from the store if it is there and intact, and downloaded otherwise.
    ///
    /// `progress` is called from another thread with bytes done and, where known, bytes in all. Dropping the future
    /// stops the work and removes what was downloaded. Several calls for one digest download once.
    ///
    /// The bytes of a `file:` model are as verified only while nobody with write access changes them in place: the
    /// store sees a change that happens while it hashes, not a later one.
    pub async fn obtain(
        &self,
        uri: &ModelUri,
        expected: Sha256,
        progress: impl Fn(u64, Option<u64>) + Send + Sync + 'static,
    ) -> Result<VerifiedModel, StoreError> {
        let progress: Progress = Arc::new(progress);
        let (file, bytes) = match uri {
            ModelUri::File(path) => self.verify_source(path.clone(), expected, progress).await?,
            ModelUri::Http(url) => self.web_model(url, expected, progress).await?,
        };
        Ok(VerifiedModel {
            file,
            bytes,
            digest: expected,
            origin: uri.origin(),
        })
    }

    /// Opens a stored object and hashes it; `None` when it is not there. One that no longer has its digest is removed
    /// and reported as [`StoreError::ObjectCorrupt`].
    pub async fn open_verified(&self, digest: Sha256) -> Result<Option<VerifiedModel>, StoreError> {
        let found = self.verify_object(digest, Arc::new(|_, _| ())).await?;
        let origin = format!("sha256:{digest}");
        Ok(found.map(|(file, bytes)| VerifiedModel {
            file,
            bytes,
            digest,
            origin,
        }))
    }

    /// The objects there are, by digest. Their content is not verified. Blocks.
    pub fn objects(&self) -> Result<Vec<StoredObject>, StoreError> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.inner.objects).map_err(StoreError::io("listing the store"))? {
            let entry = entry.map_err(StoreError::io("listing the store"))?;
            let digest = entry
                .file_name()
                .to_str()
                .and_then(|name| Sha256::parse(name).ok());
            if let (Some(digest), Ok(metadata)) = (digest, entry.metadata()) {
                found.push(StoredObject {
                    digest,
                    bytes: metadata.len(),
                });
            }
        }
        found.sort_unstable_by_key(|object| object.digest);
        Ok(found)
    }

    /// Removes an object; whoever has it open keeps it. Returns whether it was there. Blocks.
    pub fn remove(&self, digest: Sha256) -> Result<bool, StoreError> {
        remove_object(&self.inner.object(digest))
    }

    async fn verify_source(
        &self,
        path: PathBuf,
        expected: Sha256,
        progress: Progress,
    ) -> Result<(File, u64), StoreError> {
        let inner = Arc::clone(&self.inner);
        let cancel = Cancel::default();
        let _guard = cancel.guard();
        blocking(move || {
            let file = inner.roots.open(&path)?;
            let before = identity(&file)?;
            let hashed = hash_file(&file, &progress, &cancel)?;
            let after = identity(&file)?;
            if before != after || after.bytes != hashed.bytes {
                return Err(StoreError::SourceChanged { path });
            }
            if hashed.digest != expected {
                let (actual, bytes) = (hashed.digest, hashed.bytes);
                return Err(StoreError::DigestMismatch {
                    expected,
                    actual,
                    bytes,
                });
            }
            Ok((file, hashed.bytes))
        })
        .await
    }

    async fn web_model(
        &self,
        url: &Url,
        expected: Sha256,
        progress: Progress,
    ) -> Result<(File, u64), StoreError> {
        let turn = self.turn(expected);
        let _permit = turn.acquire().await.map_err(|_| StoreError::Cancelled)?;
        match self.verify_object(expected, Arc::clone(&progress)).await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(corrupt @ StoreError::ObjectCorrupt { .. }) => {
                tracing::warn!(%corrupt, "downloading it again");
            }
            Err(error) => return Err(error),
        }
        self.download(url, expected, progress).await
    }

    /// Moves bytes from the network to the writer thread. The writer ends the moment this future is dropped: the
    /// channel closes without [`Piece::End`], and the partial file goes.
    async fn download(
        &self,
        url: &Url,
        expected: Sha256,
        progress: Progress,
    ) -> Result<(File, u64), StoreError> {
        let mut download = self.inner.downloader.open(url).await?;
        let attempt = self.inner.attempts.fetch_add(1, Ordering::Relaxed);
        let target = Target {
            partial: self.inner.partial.join(format!("{expected}.{attempt}")),
            object: self.inner.object(expected),
            expected,
            announced: download.length,
            max_bytes: self.inner.downloader.max_bytes(),
            reserve_bytes: self.inner.reserve_bytes,
        };
        let (pieces, received) = mpsc::channel(PIECES_IN_FLIGHT);
        // The writer keeps the store, and with it the lock on the directory, until the partial file is dealt with.
        let inner = Arc::clone(&self.inner);
        let writer = tokio::task::spawn_blocking(move || {
            let written = write(&target, received, &progress);
            drop(inner);
            written
        });
        let mut bytes = 0_u64;
        let failure = loop {
            // A writer that gave up (no room, too large) must not wait for a server that is silent.
            let next = tokio::select! {
                next = download.response.chunk() => next,
                () = pieces.closed() => break None,
            };
            match next {
                Ok(Some(piece)) => {
                    bytes = bytes.saturating_add(u64::try_from(piece.len()).unwrap_or(0));
                    if pieces.send(Piece::Data(piece)).await.is_err() {
                        break None;
                    }
                }
                Ok(None) => {
                    // A writer that is gone has an error of its own to tell.
                    let _gone = pieces.send(Piece::End).await;
                    break None;
                }
                Err(error) => {
                    let source = error.without_url();
                    break Some(StoreError::Transfer {
                        host: download.host,
                        bytes,
                        source,
                    });
                }
            }
        };
        drop(pieces);
        let written = joined(writer.await)?;
        match (written, failure) {
            // The writer stopped only because no more came.
            (Err(StoreError::Cancelled), Some(failure)) => Err(failure),
            (written, _) => written,
        }
    }

    async fn verify_object(
        &self,
        digest: Sha256,
        progress: Progress,
    ) -> Result<Option<(File, u64)>, StoreError> {
        let object = self.inner.object(digest);
        let cancel = Cancel::default();
        let _guard = cancel.guard();
        blocking(move || {
            let file = match File::open(&object) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(source) => {
                    return Err(StoreError::Io {
                        what: "opening the stored model",
                        source,
                    });
                }
            };
            let hashed = hash_file(&file, &progress, &cancel)?;
            if hashed.digest == digest {
                return Ok(Some((file, hashed.bytes)));
            }
            remove_object(&object)?;
            let (actual, bytes) = (hashed.digest, hashed.bytes);
            Err(StoreError::ObjectCorrupt {
                expected: digest,
                actual,
                bytes,
            })
        })
        .await
    }

    fn turn(&self, digest: Sha256) -> Arc<Semaphore> {
        let mut turns = self.inner.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(&digest).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(Semaphore::new(1));
        turns.insert(digest, Arc::downgrade(&turn));
        turn
    }
}

impl Inner {
    fn object(&self, digest: Sha256) -> PathBuf {
        self.objects.join(digest.to_string())
    }
}

/// What must not change while a file is hashed.
#[derive(PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

fn identity(file: &File) -> Result<Identity, StoreError> {
    let metadata = file.metadata().map_err(StoreError::io("inspecting the model"))?;
    Ok(Identity {
        device: metadata.dev(),
        inode: metadata.ino(),
        bytes: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    })
}

fn remove_object(object: &Path) -> Result<bool, StoreError> {
    match std::fs::remove_file(object) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(source) => {
            return Err(StoreError::Io {
                what: "removing a stored model",
                source,
            });
        }
    }
    object.parent().map_or(Ok(()), sync_directory)?;
    Ok(true)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    joined(tokio::task::spawn_blocking(work).await)?
}

/// A blocking task that was aborted with its runtime, or that panicked, did not finish its work.
fn joined<T>(outcome: Result<T, tokio::task::JoinError>) -> Result<T, StoreError> {
    outcome.map_err(|error| {
        tracing::error!(%error, "work of the store ended early");
        StoreError::Cancelled
    })
}
