//! The idle cgroup that this node offers for workers.
//!
//! Owns: the check that it is one, and moving processes there. A group beneath a pod's would be ranked with the pod: only
//! one at the top gives way to everything on the node, and making it is the admin's decision.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An idle cgroup. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct IdleGroup(Arc<PathBuf>);

/// Why a directory can't serve as one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdleGroupError {
    /// No cgroup, or one without the CPU controller.
    #[error("--idle-cgroup {path:?}: no cgroup with the CPU controller: {source}")]
    Missing {
        /// Which.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Not idle.
    #[error("--idle-cgroup {path:?}: cpu.idle is {found:?}: write 1 to it, or leave the flag out")]
    NotIdle {
        /// Which.
        path: PathBuf,
        /// What it says.
        found: String,
    },
}

impl IdleGroup {
    /// Checks that the directory is an idle cgroup.
    pub(crate) fn open(path: &Path) -> Result<Self, IdleGroupError> {
        let path = path.to_owned();
        let found = match std::fs::read_to_string(path.join("cpu.idle")) {
            Ok(text) => text.trim().to_owned(),
            Err(source) => return Err(IdleGroupError::Missing { path, source }),
        };
        if found == "1" {
            Ok(Self(Arc::new(path)))
        } else {
            Err(IdleGroupError::NotIdle { path, found })
        }
    }

    /// Moves a process there, all its threads included, and reads back that it is there. Blocks.
    pub(crate) fn take(&self, pid: i32) -> io::Result<()> {
        let members = self.0.join("cgroup.procs");
        std::fs::write(&members, pid.to_string())?;
        let pid = pid.to_string();
        let here = std::fs::read_to_string(&members)?;
        if here.lines().any(|line| line == pid) {
            Ok(())
        } else {
            Err(io::Error::other(
                "the kernel took the process and does not list it",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_idle_cgroup_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let missing = IdleGroup::open(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("no cgroup with the CPU controller"), "{missing}");
        std::fs::write(dir.path().join("cpu.idle"), "0\n").unwrap();
        let busy = IdleGroup::open(dir.path()).unwrap_err().to_string();
        assert!(busy.contains("cpu.idle is \"0\": write 1 to it"), "{busy}");
        std::fs::write(dir.path().join("cpu.idle"), "1\n").unwrap();
        let group = IdleGroup::open(dir.path()).unwrap();
        group.take(7).unwrap();
    }
}
