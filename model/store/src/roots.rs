//! Directories of the node from which models may be opened. Owns the guarantee that nothing outside them is opened,
//! whatever links lie beneath them and however they change meanwhile; the kernel enforces it (`openat2`).

use crate::error::StoreError;
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// Bounds of one listing.
const MAX_DEPTH: usize = 8;
const MAX_ENTRIES: usize = 10_000;
/// `openat2` gives EAGAIN when a rename elsewhere keeps it from being sure.
const RACE_RETRIES: u32 = 16;

/// The allowed directories.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    paths: Vec<PathBuf>,
}

/// Model files found beneath the roots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Files ending in `.gguf`, by path.
    pub models: Vec<ListedModel>,
    /// Whether a bound (number, depth, entries) cut the listing short.
    pub truncated: bool,
}

/// One model file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListedModel {
    /// Absolute path.
    pub path: PathBuf,
    /// Size in bytes; 0 for a link that leads out of the roots and can't be opened.
    pub bytes: u64,
}

impl Roots {
    /// Takes absolute paths without `..`. A root that does not exist (yet) is allowed and holds no model.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Result<Self, StoreError> {
        let paths: Vec<PathBuf> = paths.into_iter().collect();
        for path in &paths {
            let up = path
                .components()
                .any(|part| part == std::path::Component::ParentDir);
            if !path.is_absolute() || up {
                let why = format!("{} is not an absolute path without ..", path.display());
                return Err(StoreError::InvalidConfiguration {
                    what: "model root",
                    why,
                });
            }
        }
        Ok(Self { paths })
    }

    /// The directories.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Opens a regular file for reading. Relative links that stay beneath the root are followed, all others refused.
    /// Blocks on the file system.
    pub fn open(&self, path: &Path) -> Result<File, StoreError> {
        let outside = || StoreError::OutsideRoots {
            path: path.to_owned(),
            roots: self.paths.clone(),
        };
        let missing = || StoreError::NotFound {
            origin: format!("file://{}", path.display()),
        };
        let (root, relative) = self
            .paths
            .iter()
            .find_map(|root| Some((root, path.strip_prefix(root).ok()?)))
            .filter(|(_, relative)| !relative.as_os_str().is_empty())
            .ok_or_else(outside)?;
        let directory = open_root(root)?.ok_or_else(missing)?;
        // NONBLOCK: opening a FIFO must not wait for its writer.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match beneath(&directory, relative, flags, ResolveFlags::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::XDEV | Errno::LOOP) => return Err(outside()),
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(missing()),
            Err(Errno::NXIO) => {
                return Err(StoreError::NotRegular {
                    path: path.to_owned(),
                });
            }
            Err(Errno::NOSYS) => return Err(StoreError::KernelTooOld { root: root.clone() }),
            Err(errno) => return Err(StoreError::io("opening the model")(errno.into())),
        };
        let stat = fstat(&file).map_err(|errno| StoreError::io("inspecting the model")(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            Ok(file)
        } else {
            Err(StoreError::NotRegular {
                path: path.to_owned(),
            })
        }
    }

    /// Lists at most `limit` files ending in `.gguf`, at most 8 directories deep, looking at no more than 10,000
    /// entries. Directories are not entered through links. Blocks on the file system.
    pub fn list(&self, limit: usize) -> Result<Listing, StoreError> {
        let mut listing = Listing::default();
        let mut entries = 0;
        for root in &self.paths {
            if let Some(directory) = open_root(root)? {
                self.list_root(root, &directory, limit, &mut entries, &mut listing)?;
            }
        }
        listing.models.sort();
        listing.models.dedup();
        Ok(listing)
    }

    fn list_root(
        &self,
        root: &Path,
        directory: &OwnedFd,
        limit: usize,
        entries: &mut usize,
        listing: &mut Listing,
    ) -> Result<(), StoreError> {
        let mut pending = vec![(PathBuf::from("."), 0_usize)];
        while let Some((relative, depth)) = pending.pop() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let Some(children) = beneath(directory, &relative, flags, ResolveFlags::NO_SYMLINKS)
                .and_then(Dir::new)
                .map(Some)
                .or_else(|errno| match errno {
                    Errno::NOSYS => Err(StoreError::KernelTooOld {
                        root: root.to_owned(),
                    }),
                    // Gone or unreadable since it was seen: nothing to list.
                    _ => Ok(None),
                })?
            else {
                continue;
            };
            for entry in children {
                let Ok(entry) = entry else { break };
                let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes());
                if name == "." || name == ".." {
                    continue;
                }
                *entries += 1;
                if *entries > MAX_ENTRIES {
                    listing.truncated = true;
                    return Ok(());
                }
                let child = relative.join(name);
                if entry.file_type() == FileType::Directory {
                    if depth < MAX_DEPTH {
                        pending.push((child, depth + 1));
                    } else {
                        listing.truncated = true;
                    }
                    continue;
                }
                if !Path::new(name)
                    .extension()
                    .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
                {
                    continue;
                }
                let path = root.join(child.strip_prefix(".").unwrap_or(&child));
                let bytes = match self.open(&path) {
                    Ok(file) => file.metadata().map(|metadata| metadata.len()),
                    // Listed all the same: whoever asks for it must be told why it can't be had.
                    Err(StoreError::OutsideRoots { .. }) => Ok(0),
                    Err(_) => continue,
                };
                if listing.models.len() >= limit {
                    listing.truncated = true;
                    return Ok(());
                }
                if let Ok(bytes) = bytes {
                    listing.models.push(ListedModel { path, bytes });
                }
            }
        }
        Ok(())
    }
}

/// Opens a root itself; it is the administrator's word and may be a link. `None` when it does not exist.
fn open_root(root: &Path) -> Result<Option<OwnedFd>, StoreError> {
    match openat(
        CWD,
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(StoreError::io("opening a model root")(errno.into())),
    }
}

fn beneath(directory: &OwnedFd, path: &Path, flags: OFlags, extra: ResolveFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | extra;
    let mut tries = 0;
    loop {
        match openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) if tries < RACE_RETRIES => tries += 1,
            result => return result,
        }
    }
}
