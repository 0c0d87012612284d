//! Where the person and the guest live on the machine.
//!
//! Owns: the arrangement, and the cgroups made for it, which go when this goes. Must not start anything.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use gogrid_tests::cgroups::{self, Tree};

/// How the foreground is placed beside GoGrid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arrangement {
    /// In GoGrid's own session: somebody started both in one terminal.
    Same,
    /// In another session: a desktop beside a service.
    OtherSession,
    /// In a slice of the host beside GoGrid in a pod; needs root.
    HostSlice,
    /// In another pod of the same node; needs root.
    OtherPod,
}

impl Arrangement {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::OtherSession => "other-session",
            Self::HostSlice => "host-slice",
            Self::OtherPod => "other-pod",
        }
    }
}

/// CPU requests in the unit of cgroup v1: 1024 a core.
const CORE: u64 = 1024;
/// What the agent's pod asks for: a tenth of a core.
const GUEST: u64 = 102;

/// The cgroups of an arrangement; none where it needs none.
#[derive(Debug, Default)]
pub(crate) struct Place {
    /// Where the foreground goes.
    pub(crate) foreground: Option<PathBuf>,
    /// GoGrid's pod.
    pub(crate) pod: Option<PathBuf>,
    /// The idle group at the top that GoGrid's workers are moved to.
    pub(crate) idle: Option<PathBuf>,
    made: Vec<PathBuf>,
}

impl Place {
    /// Makes them.
    pub(crate) fn make(arrangement: Arrangement, cores: u64) -> Result<Self> {
        let mut place = Self::default();
        if matches!(arrangement, Arrangement::Same | Arrangement::OtherSession) {
            return Ok(place);
        }
        let tree = Tree::find()?;
        let name = |part: &str| format!("gogrid-courtesy-{part}-{}", std::process::id());
        let pods = place.group(&tree, &tree.root.join(name("kubepods")), cores * CORE)?;
        let burstable = place.group(&tree, &pods.join("burstable"), GUEST)?;
        place.pod = Some(place.group(&tree, &burstable.join("pod-gogrid"), GUEST)?);
        place.foreground = Some(match arrangement {
            Arrangement::OtherPod => place.group(&tree, &pods.join("pod-foreground"), CORE)?,
            _ => place.group(&tree, &tree.root.join(name("user")), CORE)?,
        });
        let idle = place.group(&tree, &tree.root.join(name("idle")), CORE)?;
        cgroups::make_idle(&idle)?;
        place.idle = Some(idle);
        Ok(place)
    }

    fn group(&mut self, tree: &Tree, path: &Path, shares: u64) -> Result<PathBuf> {
        tree.make(path, shares)?;
        self.made.push(path.to_owned());
        Ok(path.to_owned())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        while let Some(group) = self.made.pop() {
            if let Err(error) = std::fs::remove_dir(&group) {
                eprintln!("{} stays: {error}", group.display());
            }
        }
    }
}
