//! Cgroups made for a test, where root may make some.
//!
//! Owns: which hierarchy has the CPU controller, and both of its dialects. Whoever makes a group removes it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// The hierarchy that has the CPU controller.
#[derive(Clone, Debug)]
pub struct Tree {
    /// Its root.
    pub root: PathBuf,
    unified: bool,
}

impl Tree {
    /// Finds it.
    ///
    /// # Errors
    /// This machine has none.
    pub fn find() -> Result<Self> {
        let root = PathBuf::from("/sys/fs/cgroup");
        for name in ["cpu", "cpu,cpuacct"] {
            if root.join(name).join("cpu.shares").is_file() {
                return Ok(Self {
                    root: root.join(name),
                    unified: false,
                });
            }
        }
        let controllers = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        ensure!(
            controllers.split_whitespace().any(|name| name == "cpu"),
            "no cgroup tree with the CPU controller in {}",
            root.display()
        );
        Ok(Self { root, unified: true })
    }

    /// Makes a group with that much CPU when the machine is full; 1024 a core, as cgroup v1 counts.
    ///
    /// # Errors
    /// Mostly that only root may.
    pub fn make(&self, path: &Path, shares: u64) -> Result<()> {
        if self.unified
            && let Some(parent) = path.parent()
        {
            std::fs::write(parent.join("cgroup.subtree_control"), "+cpu")
                .with_context(|| format!("giving the children of {} the CPU controller", parent.display()))?;
        }
        std::fs::create_dir(path).with_context(|| format!("making {}: needs root", path.display()))?;
        let (file, value) = if self.unified {
            // The kubelet's translation.
            ("cpu.weight", 1 + shares.saturating_sub(2) * 9999 / 262_142)
        } else {
            ("cpu.shares", shares)
        };
        std::fs::write(path.join(file), value.to_string())?;
        Ok(())
    }
}

/// Makes a group give way to everything beside it.
pub fn make_idle(group: &Path) -> Result<()> {
    std::fs::write(group.join("cpu.idle"), "1").with_context(|| format!("making {} idle", group.display()))
}

/// Moves a process there, all its threads included.
pub fn enter(group: &Path, pid: impl std::fmt::Display) -> Result<()> {
    std::fs::write(group.join("cgroup.procs"), pid.to_string())
        .with_context(|| format!("moving process {pid} to {}", group.display()))
}

/// Whether a process is in the group of that name, in whatever hierarchy.
pub fn is_in(pid: u32, name: &str) -> Result<bool> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    Ok(text.lines().any(|line| line.ends_with(&format!("/{name}"))))
}
