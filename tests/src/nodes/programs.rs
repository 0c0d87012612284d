//! Where the nodes' programs are, built on first use.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::controlplane::find_set;

/// Names a directory that holds all of them; nothing is looked for or built elsewhere then.
const DIR_VARIABLE: &str = "GOGRID_NODES_BIN";
const NAMES: [&str; 11] = [
    "kube-scheduler",
    "kubelet",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "bridge",
    "host-local",
    "loopback",
    "pause",
    "fakegpu",
];

/// The directory with the nodes' programs.
#[derive(Clone, Debug)]
pub struct Programs {
    dir: PathBuf,
}

impl Programs {
    /// Finds them, or builds them with `tests/controlplane/build.sh nodes`, whose progress goes to standard error.
    pub async fn find() -> Result<Self> {
        let dir = find_set("nodes", DIR_VARIABLE, &NAMES).await?;
        Ok(Self { dir })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// One of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}
