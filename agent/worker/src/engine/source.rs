//! Reads parts of a model file and leaves the page cache as it found it.
//!
//! Owns: which way of reading this file system knows. What was cached before stays cached; what only this read brought
//! in is dropped again, so that loading a model never pushes out files that others work with. Must not know tensors.

use crate::num::wide;
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt as _;

/// A file that is read in parts, each once.
pub(crate) struct Source {
    file: File,
    way: Way,
}

/// How to leave the page cache alone, best first. A file system that refuses one way is read the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `RWF_DONTCACHE` (Linux 6.14): the kernel drops what this read brought in.
    DropBehind,
    /// Ask what is there without waiting, and drop what had to be read. Without readahead, which would make pages appear
    /// cached that only this read wanted.
    Probe,
    /// Neither is known: an ordinary read.
    Plain,
}

/// `RWF_DONTCACHE`, which rustix does not name.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);
/// Bytes asked for at once.
const CHUNK: usize = 1 << 20;

impl Source {
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            way: Way::DropBehind,
        }
    }

    /// Fills the buffer from that place of the file.
    pub(crate) fn read_exact(&mut self, buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        for chunk in buffer.chunks_mut(CHUNK) {
            let mut rest = chunk;
            while !rest.is_empty() {
                let count = self.read(rest, offset)?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                offset = offset.saturating_add(wide(count));
                rest = rest.get_mut(count..).unwrap_or_default();
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            let flags = match self.way {
                Way::DropBehind => DONTCACHE,
                Way::Probe => ReadWriteFlags::NOWAIT,
                Way::Plain => ReadWriteFlags::empty(),
            };
            let read = preadv2(&self.file, &mut [IoSliceMut::new(buffer)], offset, flags);
            match (read, self.way) {
                (Ok(count), _) => return Ok(count),
                (Err(Errno::INTR), _) => {}
                (Err(Errno::AGAIN), Way::Probe) => return self.read_and_drop(buffer, offset),
                (Err(_), Way::DropBehind) => self.go_on(Way::Probe),
                (Err(_), Way::Probe) => self.go_on(Way::Plain),
                (Err(errno), Way::Plain) => return Err(errno.into()),
            }
        }
    }

    /// From now on reads this way.
    fn go_on(&mut self, way: Way) {
        let advice = match way {
            Way::Probe => Advice::Random,
            Way::DropBehind | Way::Plain => Advice::Normal,
        };
        self.advise(0, None, advice);
        self.way = way;
    }

    fn read_and_drop(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let count = loop {
            match self.file.read_at(buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        if let Some(length) = NonZeroU64::new(wide(count)) {
            self.advise(offset, Some(length), Advice::DontNeed);
        }
        Ok(count)
    }

    /// Advice is only advice: a file system that does not take it is no error.
    fn advise(&self, offset: u64, length: Option<NonZeroU64>, advice: Advice) {
        let _ = fadvise(&self.file, offset, length, advice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::cached;
    use std::io::Write as _;

    fn file(length: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; length]).unwrap();
        file.sync_all().unwrap();
        file
    }

    #[test]
    fn what_was_not_cached_is_not_cached_after_it_was_read() {
        let length = 4 << 20;
        let file = file(length);
        for way in [Way::DropBehind, Way::Probe] {
            fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            let before = cached(&file, length).unwrap();
            if before > 0 {
                println!("SKIPPED: this file system keeps all pages, like one in memory");
                return;
            }
            let mut source = Source::new(file.try_clone().unwrap());
            source.go_on(way);
            let mut buffer = vec![0; length];
            source.read_exact(&mut buffer, 0).unwrap();
            assert!(buffer.iter().all(|byte| *byte == 7));
            let left = cached(&file, length).unwrap();
            assert!(left <= length / 20, "{left} bytes stay after {way:?}");
        }
    }

    #[test]
    fn what_was_cached_stays_cached() {
        let length = 4 << 20;
        let file = file(length);
        let mut buffer = vec![0; length];
        file.read_exact_at(&mut buffer, 0).unwrap();
        for way in [Way::DropBehind, Way::Probe] {
            let mut source = Source::new(file.try_clone().unwrap());
            source.go_on(way);
            source.read_exact(&mut buffer, 0).unwrap();
            let left = cached(&file, length).unwrap();
            assert!(left >= length / 100 * 95, "{left} bytes stay after {way:?}");
        }
    }

    #[test]
    fn the_end_of_the_file_is_an_error() {
        let mut source = Source::new(file(100));
        assert!(source.read_exact(&mut [0; 101], 0).is_err());
        source.read_exact(&mut [0; 60], 40).unwrap();
    }
}
