//! promtool and Prometheus, built on first use.
//!
//! Owns: finding them and running them. Must not: know any rule or metric.

use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The directory with `promtool` and `prometheus`; the first call on a machine builds them, which takes minutes.
pub fn binaries() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("prometheus/build.sh");
    let built = Command::new(&script)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("running {}", script.display()))?;
    ensure!(built.status.success(), "building Prometheus failed; see above");
    let output = String::from_utf8(built.stdout)?;
    Ok(PathBuf::from(
        output.lines().last().context("the build printed no directory")?,
    ))
}

/// Runs promtool and returns what it said; an error with its words when it found fault.
pub fn promtool(args: &[&str]) -> Result<String> {
    let ended = Command::new(binaries()?.join("promtool"))
        .args(args)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .stdin(Stdio::null())
        .output()
        .context("running promtool")?;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr)
    );
    ensure!(ended.status.success(), "promtool {}: {said}", args.join(" "));
    Ok(said)
}
