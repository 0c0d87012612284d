//! Whether Kubernetes of a certain minor version knows an object, by that version's own API types, which decode strictly.
//!
//! Owns: running the checkers of `tests/schemas`. Must not: know any object.

use crate::prometheus::{built_by, with_input};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Command;

/// Checks objects against every minor version there is a checker for; returns what each said.
///
/// # Errors
/// What a version does not know, or knows differently.
pub fn check(objects: &[Value]) -> Result<BTreeMap<String, String>> {
    let lines: String = objects.iter().map(|object| format!("{object}\n")).collect();
    let mut said = BTreeMap::new();
    for entry in std::fs::read_dir(built_by("schemas/build.sh")?)? {
        let path = entry?.path();
        let minor = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if minor.starts_with('.') {
            continue;
        }
        let ended = with_input(Command::new(&path), &lines).with_context(|| format!("Kubernetes {minor}"))?;
        let text = String::from_utf8_lossy(&ended.stdout).trim().to_owned();
        ensure!(
            ended.status.success(),
            "Kubernetes {minor}: {text} {}",
            String::from_utf8_lossy(&ended.stderr)
        );
        said.insert(minor, text);
    }
    Ok(said)
}
