//! Jobs over the demo model whose answers are known.

use anyhow::{Context as _, Result, ensure};
use gogrid_testmodels::demo;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::path::{Path, PathBuf};

use crate::cluster::{answer, record};

/// Prompts and the answers that are right, by `custom_id`.
#[derive(Clone, Debug)]
pub struct Questions {
    asked: Vec<(String, String, String)>,
}

impl Questions {
    /// That many held-out questions; another seed, other questions.
    pub fn new(seed: u64, count: usize) -> Self {
        let prompts = demo::prompts(seed, count, demo::Split::HeldOut);
        let asked = prompts
            .into_iter()
            .enumerate()
            .map(|(n, (prompt, right))| (format!("q{n}"), prompt, right))
            .collect();
        Self { asked }
    }

    /// `custom_id`, prompt and right answer of each.
    pub fn asked(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        self.asked
            .iter()
            .map(|(id, prompt, right)| (id.as_str(), prompt.as_str(), right.as_str()))
    }

    /// The records, one JSON line each.
    pub fn lines(&self) -> Vec<String> {
        self.asked
            .iter()
            .map(|(id, prompt, _)| record(id, prompt, 32))
            .collect()
    }

    /// How many results carry the right answer; every record must be there exactly once.
    ///
    /// # Errors
    /// A record is missing, comes twice or is none of these.
    pub fn right(&self, results: &[Value]) -> Result<usize> {
        ensure!(
            results.len() == self.asked.len(),
            "{} results for {} records",
            results.len(),
            self.asked.len()
        );
        let mut right = 0;
        for (id, _, wanted) in &self.asked {
            let mut of_this = results.iter().filter(|r| r["custom_id"] == json!(id));
            let found = of_this.next().with_context(|| format!("no result for {id}"))?;
            ensure!(of_this.next().is_none(), "two results for {id}");
            right += usize::from(answer(found).is_some_and(|text| text.trim() == wanted));
        }
        Ok(right)
    }
}

/// The folder of the committed models.
pub fn model_root() -> PathBuf {
    demo::demo_model_path(demo::Quant::Q8_0)
        .parent()
        .map(Path::to_owned)
        .unwrap_or_default()
}

/// SHA-256 of a file, in hexadecimal digits.
pub fn sha256(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect())
}

/// A job's spec over inline records with the committed Q8_0 model.
pub fn spec(lines: &[String], output: &str) -> Result<Value> {
    let path = demo::demo_model_path(demo::Quant::Q8_0);
    Ok(json!({
        "model": {"uri": format!("file://{}", path.display()), "sha256": sha256(&path)?},
        "input": {"inline": lines},
        "output": {"configMap": output},
        "contextTokens": 128,
        "parallelSequences": 16,
        "generation": {"maxTokens": 32},
    }))
}
