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
    let mut hasher = sha2::Sha256::new();
    let mut buffer = vec![0_u8; CHUNK];
    let mut bytes = 0_u64;
    let mut way = Way::DropBehind;
    let outcome = loop {
        if let Err(cancelled) = cancel.check() {
            break Err(cancelled);
        }
        match read_chunk(file, &mut buffer, bytes, &mut way) {
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
    if way == Way::Probe {
        advise(file, 0, None, Advice::Normal);
    }
    outcome.map(|()| Hashed {
        digest: Sha256::finish(hasher),
        bytes,
    })
}

/// How to leave the page cache alone, best first. A file system that refuses one way is read the next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `RWF_DONTCACHE` (Linux 6.14): the kernel drops what this read, readahead included, brought in.
    DropBehind,
    /// Ask what is there without waiting, and drop the rest after reading it. Without readahead, which would make pages
    /// appear cached that only this read wanted; still, a file cached in part may stay cached beyond that part.
    Probe,
    /// Neither is known: an ordinary read.
    Plain,
}

/// `RWF_DONTCACHE`, which rustix does not name.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// Reads up to a buffer full at `offset`; empty at the end of the file.
fn read_chunk<'a>(
    file: &File,
    buffer: &'a mut [u8],
    offset: u64,
    way: &mut Way,
) -> std::io::Result<&'a [u8]> {
    let count = loop {
        let flags = match *way {
            Way::DropBehind => DONTCACHE,
            Way::Probe => ReadWriteFlags::NOWAIT,
            Way::Plain => ReadWriteFlags::empty(),
        };
        match (preadv2(file, &mut [IoSliceMut::new(buffer)], offset, flags), *way) {
            (Ok(count), _) => break count,
            (Err(Errno::INTR), _) => {}
            (Err(Errno::AGAIN), Way::Probe) => break read_and_drop(file, buffer, offset)?,
            (Err(_), Way::DropBehind) => {
                advise(file, 0, None, Advice::Random);
                *way = Way::Probe;
            }
            (Err(_), Way::Probe) => {
                advise(file, 0, None, Advice::Normal);
                *way = Way::Plain;
            }
            (Err(errno), Way::Plain) => return Err(errno.into()),
        }
    };
    Ok(buffer.get(..count).unwrap_or_default())
}

fn read_and_drop(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let count = loop {
        match file.read_at(buffer, offset) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    if let Some(length) = u64::try_from(count).ok().and_then(NonZeroU64::new) {
        advise(file, offset, Some(length), Advice::DontNeed);
    }
    Ok(count)
}

/// Advice is only advice: a file system that does not take it is no error.
pub(crate) fn advise(file: &File, offset: u64, length: Option<NonZeroU64>, advice: Advice) {
    if let Err(errno) = fadvise(file, offset, length, advice) {
        tracing::trace!(%errno, "page cache advice not taken");
    }
}
