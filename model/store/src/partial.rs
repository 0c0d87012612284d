//! One download on its way to the disk: a writer thread's view. Owns the file under `partial/` until it is either renamed
//! to its digest or removed; no path ends with bytes under `objects/` that were not hashed.

use crate::digest::Sha256;
use crate::error::StoreError;
use crate::hash::{Progress, advise};
use rustix::fs::{Advice, statvfs};
use sha2::Digest as _;
use std::fs::{File, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// What the network side sends.
pub(crate) enum Piece<B> {
    /// Bytes of the file, in order.
    Data(B),
    /// The body ended as announced. Without it the download counts as abandoned.
    End,
}

/// Where a download goes and what it must turn out to be.
pub(crate) struct Target {
    pub(crate) partial: PathBuf,
    pub(crate) object: PathBuf,
    pub(crate) expected: Sha256,
    pub(crate) announced: Option<u64>,
    pub(crate) max_bytes: u64,
    pub(crate) reserve_bytes: u64,
}

/// Bytes of a download that may lie in the page cache before they are on the disk: as many as make a disk busy, too few
/// to push out what others have cached.
const UNSYNCED: u64 = 32 << 20;

/// Removes the partial file unless it was renamed.
struct Cleanup<'a>(&'a Path);

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        match std::fs::remove_file(self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%error, "a partial download could not be removed; the next start will");
            }
            _ => {}
        }
    }
}

/// Writes, hashes, syncs and renames. Blocks; returns the object opened for reading.
pub(crate) fn write<B: AsRef<[u8]>>(
    target: &Target,
    mut pieces: tokio::sync::mpsc::Receiver<Piece<B>>,
    progress: &Progress,
) -> Result<(File, u64), StoreError> {
    let directory = target.partial.parent().unwrap_or(Path::new("/"));
    require_room(directory, target.announced.unwrap_or(0), target.reserve_bytes)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&target.partial)
        .map_err(StoreError::io("creating a partial download"))?;
    let cleanup = Cleanup(&target.partial);
    let mut hasher = sha2::Sha256::new();
    let mut bytes = 0_u64;
    let mut synced = 0_u64;
    loop {
        let piece = match pieces.blocking_recv() {
            Some(Piece::Data(piece)) => piece,
            Some(Piece::End) => break,
            None => return Err(StoreError::Cancelled),
        };
        let piece = piece.as_ref();
        bytes = bytes.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
        if bytes > target.max_bytes {
            return Err(StoreError::TooLarge {
                bytes,
                limit: target.max_bytes,
            });
        }
        file.write_all(piece)
            .map_err(|source| disk_error(source, directory, target, bytes))?;
        hasher.update(piece);
        if bytes.saturating_sub(synced) >= UNSYNCED {
            file.sync_data()
                .map_err(|source| disk_error(source, directory, target, bytes))?;
            advise(&file, 0, None, Advice::DontNeed);
            synced = bytes;
        }
        progress(bytes, target.announced);
    }
    let actual = Sha256::finish(hasher);
    if actual != target.expected {
        return Err(StoreError::DigestMismatch {
            expected: target.expected,
            actual,
            bytes,
        });
    }
    file.set_permissions(Permissions::from_mode(0o444))
        .map_err(StoreError::io("protecting the model"))?;
    file.sync_all()
        .map_err(|source| disk_error(source, directory, target, bytes))?;
    // Clean now, so the pages can go: nothing of this download was cached before.
    advise(&file, 0, None, Advice::DontNeed);
    let object = publish(&file, target)?;
    drop(cleanup);
    Ok((object, bytes))
}

fn publish(written: &File, target: &Target) -> Result<File, StoreError> {
    std::fs::rename(&target.partial, &target.object).map_err(StoreError::io("storing the model"))?;
    if let Some(directory) = target.object.parent() {
        sync_directory(directory)?;
    }
    let object = File::open(&target.object).map_err(StoreError::io("opening the stored model"))?;
    let identity = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
    let same = identity(written).map_err(StoreError::io("inspecting the model"))?
        == identity(&object).map_err(StoreError::io("inspecting the stored model"))?;
    if same {
        Ok(object)
    } else {
        Err(StoreError::SourceChanged {
            path: target.object.clone(),
        })
    }
}

/// Makes a rename or removal in `directory` durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), StoreError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(StoreError::io("syncing a directory of the store"))
}

fn require_room(directory: &Path, bytes: u64, reserve: u64) -> Result<(), StoreError> {
    let free = free_bytes(directory)?;
    let needed = bytes.saturating_add(reserve);
    if needed > free {
        Err(StoreError::InsufficientDisk { needed, free })
    } else {
        Ok(())
    }
}

/// Bytes this process may still write on the file system of `directory`.
pub(crate) fn free_bytes(directory: &Path) -> Result<u64, StoreError> {
    let stat = statvfs(directory).map_err(|errno| StoreError::io("asking for free space")(errno.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn disk_error(source: std::io::Error, directory: &Path, target: &Target, bytes: u64) -> StoreError {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    if matches!(source.kind(), StorageFull | QuotaExceeded) {
        let needed = target
            .announced
            .unwrap_or(bytes)
            .max(bytes)
            .saturating_add(target.reserve_bytes);
        return StoreError::InsufficientDisk {
            needed,
            free: free_bytes(directory).unwrap_or(0),
        };
    }
    StoreError::Io {
        what: "writing the model",
        source,
    }
}
