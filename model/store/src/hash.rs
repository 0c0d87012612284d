//! Hashes a file through its descriptor and leaves the page cache as it found it. Owns nothing else; the caller knows
//! what digest it wants.

use crate::digest::Sha256;
use crate::error::StoreError;
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use sha2::Digest as _;
use std::fs::File;
use std::io::IoSliceMut;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const CHUNK: usize = 1 << 20;

/// Called with bytes done and bytes in all, where known.
pub(crate) type Progress = Arc<dyn Fn(u64, Option<u64>) + Send + Sync>;

/// Tells blocking work that nobody waits for it. Set when the guard is dropped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub(crate) fn guard(&self) -> CancelGuard {
        CancelGuard(self.clone())
    }

    pub(crate) fn check(&self) -> Result<(), StoreError> {
        if self.0.load(Ordering::Relaxed) {
            Err(StoreError::Cancelled)
        } else {
            Ok(())
        }
    }
}

/// Cancels on drop.
pub(crate) struct CancelGuard(Cancel);

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Digest and length of a file.
pub(crate) struct Hashed {
    pub(crate) digest: Sha256,
    pub(crate) bytes: u64,
}

/// Hashes the whole file. Pages that were cached before stay, pages this read brought in are dropped again. Blocks.
pub(crate) fn hash_file(file: &File, progress: &Progress, cancel: &Cancel) -> Result<Hashed, StoreError> {
    let total = file
        .metadata()
        .map_err(StoreError::io("inspecting the model"))?
        .len();
    // No readahead: it would make pages appear cached that only this read wanted.
    advise(file, 0, None, Advice::Random);
    let mut hasher = sha2::Sha256::new();
    let mut buffer = vec![0_u8; CHUNK];
    let mut bytes = 0_u64;
    let outcome = loop {
        if let Err(cancelled) = cancel.check() {
            break Err(cancelled);
        }
        match read_chunk(file, &mut buffer, bytes) {
            Ok([]) => break Ok(()),
            Ok(chunk) => {
                hasher.update(chunk);
                bytes = bytes.saturating_add(u64::try_from(chunk.len()).unwrap_or(0));
                progress(bytes, Some(total.max(bytes)));
            }
            Err(source) => {
                break Err(StoreError::Io {
                    what: "reading the model",
                    source,
                });
            }
        }
    };
    advise(file, 0, None, Advice::Normal);
    outcome.map(|()| Hashed {
        digest: Sha256::finish(hasher),
        bytes,
    })
}

/// Reads up to a buffer full at `offset`; empty at the end of the file.
fn read_chunk<'a>(file: &File, buffer: &'a mut [u8], offset: u64) -> std::io::Result<&'a [u8]> {
    // What this gives without waiting was in the cache already. File systems without it (EOPNOTSUPP) give nothing.
    let cached = match preadv2(
        file,
        &mut [IoSliceMut::new(buffer)],
        offset,
        ReadWriteFlags::NOWAIT,
    ) {
        Ok(count) => Some(count),
        Err(Errno::AGAIN) => Some(0),
        Err(_) => None,
    };
    if let Some(count) = cached.filter(|count| *count > 0) {
        return Ok(buffer.get(..count).unwrap_or_default());
    }
    let count = loop {
        match file.read_at(buffer, offset) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    if cached.is_some() {
        let length = u64::try_from(count).ok().and_then(NonZeroU64::new);
        if length.is_some() {
            advise(file, offset, length, Advice::DontNeed);
        }
    }
    Ok(buffer.get(..count).unwrap_or_default())
}

/// Advice is only advice: a file system that does not take it is no error.
pub(crate) fn advise(file: &File, offset: u64, length: Option<NonZeroU64>, advice: Advice) {
    if let Err(errno) = fadvise(file, offset, length, advice) {
        tracing::trace!(%errno, "page cache advice not taken");
    }
}
