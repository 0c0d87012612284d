//! A cgroup root for each node in every hierarchy, so that all its pods' cgroups can be removed with it.
//!
//! Owns: making, removing and sweeping those roots, on cgroup v1 and v2. Must not: set limits; the kubelet does.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::pause;

const MOUNT: &str = "/sys/fs/cgroup";
const PREFIX: &str = "gogrid-node-";
/// Looks at a cgroup that the kernel has not let go of yet.
const ATTEMPTS: u32 = 200;

/// The name of a node's cgroup root; it carries this process's number, so that what a killed test left can be told.
pub(super) fn name(number: usize) -> String {
    format!("{PREFIX}{}-{number}", std::process::id())
}

/// Makes the root in every hierarchy.
pub(super) fn create(name: &str) -> Result<()> {
    let mount = Path::new(MOUNT);
    if mount.join("cgroup.controllers").exists() {
        enable_controllers(mount)?;
        let root = mount.join(name);
        fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
        return enable_controllers(&root);
    }
    for hierarchy in hierarchies_v1(mount)? {
        let root = hierarchy.join(name);
        fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
        // A new cpuset is empty and lets nothing in.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(all) = fs::read(hierarchy.join(file)) {
                fs::write(root.join(file), all).with_context(|| format!("{file} of {}", root.display()))?;
            }
        }
    }
    Ok(())
}

/// Gives the children of a v2 cgroup all the controllers that it has itself.
fn enable_controllers(directory: &Path) -> Result<()> {
    let available = fs::read_to_string(directory.join("cgroup.controllers"))?;
    let wanted: Vec<String> = available.split_whitespace().map(|c| format!("+{c}")).collect();
    fs::write(directory.join("cgroup.subtree_control"), wanted.join(" "))
        .with_context(|| format!("enabling controllers below {}", directory.display()))
}

fn hierarchies_v1(mount: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    for entry in fs::read_dir(mount).with_context(|| format!("no cgroups at {MOUNT}"))? {
        let path = entry?.path();
        // A hybrid machine has a v2 hierarchy here that holds no controller of use.
        let v2 = path.join("cgroup.controllers").exists();
        if path.join("cgroup.procs").exists() && !v2 && !path.is_symlink() {
            found.push(path);
        }
    }
    Ok(found)
}

/// Removes the root of that name from every hierarchy, once all processes in it have ended.
pub(super) fn remove(name: &str) -> Result<()> {
    for place in places(Path::new(MOUNT))? {
        let root = place.join(name);
        let mut attempt = 0;
        while root.exists() {
            match remove_tree(&root) {
                Err(error) if attempt == ATTEMPTS => {
                    return Err(error).with_context(|| format!("removing {}", root.display()));
                }
                Err(_) => pause(),
                Ok(()) => {}
            }
            attempt += 1;
        }
    }
    Ok(())
}

/// Children first; a cgroup's files go with it.
fn remove_tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// Removes what test programs left that were killed before they could; their processes have ended with them.
pub(super) fn sweep() -> Result<()> {
    for place in places(Path::new(MOUNT))? {
        for entry in fs::read_dir(&place)? {
            let name = entry?.file_name();
            let Some(name) = name.to_str() else { continue };
            let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                remove(name)?;
            }
        }
    }
    Ok(())
}

/// The directory of the cgroup that bounds a process's memory.
pub(super) fn of_memory(pid: u32) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let mut lines = text
        .lines()
        .filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let v1 = lines.find(|(controllers, _)| controllers.split(',').any(|c| c == "memory"));
    let (place, path) = match v1 {
        Some((_, path)) => (Path::new(MOUNT).join("memory"), path),
        None => (
            PathBuf::from(MOUNT),
            text.lines()
                .find_map(|line| line.strip_prefix("0::"))
                .context("no cgroup")?,
        ),
    };
    Ok(place.join(path.trim_start_matches('/')))
}

/// The roots that this process made and that are still there.
pub(super) fn of_this_process() -> Result<Vec<PathBuf>> {
    let mount = Path::new(MOUNT);
    let own = format!("{PREFIX}{}-", std::process::id());
    let mut found = vec![];
    for place in places(mount)? {
        for entry in fs::read_dir(&place)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&own) {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// Every directory that may hold roots.
fn places(mount: &Path) -> Result<Vec<PathBuf>> {
    let mut places = vec![mount.to_owned()];
    places.extend(hierarchies_v1(mount)?);
    Ok(places)
}
