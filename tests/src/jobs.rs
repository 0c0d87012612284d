//! Jobs over the demo model whose answers are known: made, awaited and judged.

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{Assignment, InferenceJob, condition, names};
use gogrid_testmodels::demo;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cluster::{answer, lease_seconds, record};
use crate::wait::eventually;

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

    /// The same with ids of 240 letters: a few dozen are too long for an order, and their answers for its status.
    #[must_use]
    pub fn wordy(mut self) -> Self {
        for (id, _, _) in &mut self.asked {
            id.push_str(&"-".repeat(240));
        }
        self
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

/// That many records where a node lease takes 4 s, as many more as it takes longer: work that has to outlast leases.
pub fn lasting(records: usize) -> usize {
    records * usize::try_from(lease_seconds()).unwrap_or(1) / 4
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

/// Creates a job from its spec.
pub async fn create(client: &Client, namespace: &str, name: &str, spec: Value) -> Result<InferenceJob> {
    let job = serde_json::from_value(json!({
        "apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    }))?;
    Api::namespaced(client.clone(), namespace)
        .create(&PostParams::default(), &job)
        .await
        .with_context(|| format!("creating job {name}"))
}

/// Waits until `accept` is content with the stored job, and returns it.
pub async fn until(
    client: &Client,
    job: &InferenceJob,
    what: &str,
    within: Duration,
    accept: impl Fn(&InferenceJob) -> Result<()>,
) -> Result<InferenceJob> {
    let jobs: Api<InferenceJob> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let name = job.name_any();
    eventually(within, what, || async {
        let job = jobs.get(&name).await?;
        accept(&job).map(|()| job)
    })
    .await
}

/// Waits until the job's order of that epoch, in GoGrid's own namespace, says that some answers are durable; returns their
/// texts, wherever they lie.
pub async fn until_kept(
    client: &Client,
    own: &str,
    uid: &str,
    epoch: i64,
    within: Duration,
) -> Result<Vec<String>> {
    let orders: Api<Assignment> = Api::namespaced(client.clone(), own);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), own);
    let name = names::assignment(uid, epoch);
    eventually(within, "answers of that epoch to be kept", || async {
        let order = orders.get(&name).await?;
        let checkpoint = order.status.and_then(|s| s.checkpoint).context("no checkpoint")?;
        let mut texts: Vec<String> = checkpoint.text.into_iter().collect();
        for n in 0..u32::try_from(checkpoint.chunks)? {
            let chunk = names::result_chunk(&name, &order.spec.node_name, n);
            let data = maps.get(&chunk).await?.data;
            texts.extend(data.and_then(|mut data| data.remove(names::RESULTS_KEY)));
        }
        ensure!(!texts.is_empty(), "a checkpoint without answers");
        Ok(texts)
    })
    .await
}

/// Refuses a job that did not succeed.
pub fn succeeded(job: &InferenceJob) -> Result<()> {
    let conditions = job.status.as_ref().map_or(&[][..], |s| &s.conditions);
    let (name, said) = (job.name_any(), short(conditions));
    ensure!(condition::is_true(conditions, "Succeeded"), "{name}: {said}");
    Ok(())
}

/// Waits until a job is Finished, either way, and returns it.
pub async fn until_finished(client: &Client, job: &InferenceJob, within: Duration) -> Result<InferenceJob> {
    let what = format!("{} to be Finished", job.name_any());
    until(client, job, &what, within, |job| {
        let status = job.status.clone().unwrap_or_default();
        ensure!(
            condition::is_true(&status.conditions, "Finished"),
            "progress {:?}, conditions: {}",
            status.progress.map(|p| p.display),
            short(&status.conditions)
        );
        Ok(())
    })
    .await
}

/// The published results of a finished job, one JSON value a record.
pub async fn results(client: &Client, job: &InferenceJob) -> Result<Vec<Value>> {
    let name = job.spec.output.config_map.clone();
    let name = name.context("the job has no output ConfigMap")?;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let data = maps.get(&name).await?.data.unwrap_or_default();
    let text = data
        .get(gogrid_api::names::RESULTS_KEY)
        .context("no results.jsonl in it")?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}

/// Conditions on one line.
pub fn short(conditions: &[gogrid_api::Condition]) -> String {
    conditions
        .iter()
        .map(|c| format!("{}={:?}/{} ({}); ", c.type_, c.status, c.reason, c.message))
        .collect()
}
