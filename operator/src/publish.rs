//! Handing the result over.
//!
//! Owns: collecting what every epoch answered and writing the merged text where the user wants it, only ever into an object
//! that is this job's. Safe to repeat from the start at any point. Must not: end the job.

use crate::apply::{Executor, StepError, apply_params, post_params};
use crate::results::{self, EpochChunks, OUTPUT_BYTES};
use gogrid_api::job::{Failure, ResultStatus};
use gogrid_api::names::{JOB_UID_LABEL, NODE_LABEL, RESULT_JOB_UID_ANNOTATION, RESULTS_KEY};
use gogrid_api::{Assignment, InferenceJob, names};
use gogrid_planner::lifecycle::Publication;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch};
use kube::{Resource, ResourceExt as _};
use serde_json::json;
use sha2::{Digest as _, Sha256};

fn refused(reason: &str, message: String) -> Publication {
    Publication::Refused(Failure {
        reason: reason.into(),
        message,
        retryable: false,
    })
}

/// Collects, merges and publishes.
pub(crate) async fn publish(
    executor: &Executor,
    job: &InferenceJob,
    runs: &[Assignment],
    expected: i64,
) -> Result<Publication, StepError> {
    let name = job.spec.output.config_map.clone().unwrap_or_default();
    let uid = job.uid().unwrap_or_default();
    let api: Api<ConfigMap> = Api::namespaced(executor.client.clone(), &job.namespace().unwrap_or_default());
    let there = api.get_opt(&name).await?;
    if let Some(conflict) = there.as_ref().and_then(|map| conflict(map, &uid)) {
        return Ok(conflict);
    }
    let (epochs, missing) = collect(executor, runs).await?;
    let merged = match results::merge(epochs, expected, executor.one_answer) {
        Ok(merged) => merged,
        Err(error) => {
            let missing = if missing.is_empty() {
                String::new()
            } else {
                format!("; missing or foreign: {}", missing.join(", "))
            };
            return Ok(refused("ResultsIncomplete", format!("{error}{missing}")));
        }
    };
    if merged.text.len() > OUTPUT_BYTES {
        let message = format!(
            "the result has {} bytes, a ConfigMap takes {OUTPUT_BYTES}: split the input over several jobs or lower spec.generation.maxTokens",
            merged.text.len()
        );
        return Ok(refused("OutputTooLarge", message));
    }
    let object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "labels": {JOB_UID_LABEL: uid},
            "annotations": {RESULT_JOB_UID_ANNOTATION: uid},
            "ownerReferences": [{
                "apiVersion": InferenceJob::api_version(&()), "kind": InferenceJob::kind(&()),
                "name": job.name_any(), "uid": uid, "controller": false, "blockOwnerDeletion": false,
            }],
        },
        "data": {RESULTS_KEY: merged.text},
    });
    if let Some(map) = there {
        if map.data.as_ref().and_then(|d| d.get(RESULTS_KEY)) != Some(&merged.text) {
            overwrite(&api, &map, object).await?;
        }
    } else {
        let map: ConfigMap = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
        // Made by someone in between: a conflict, and the next round looks whose it is.
        api.create(&post_params(), &map).await?;
    }
    Ok(Publication::Done(ResultStatus {
        location: format!("configmap/{name}"),
        sha256: hex(&Sha256::digest(merged.text.as_bytes())),
        bytes: i64::try_from(merged.text.len()).unwrap_or(i64::MAX),
        records: merged.records,
        failed_records: merged.failed,
        preview: results::preview(&merged.text),
    }))
}

/// Makes a ConfigMap what `object` says, unless somebody has changed it since it was `there`.
pub(crate) async fn overwrite(
    api: &Api<ConfigMap>,
    there: &ConfigMap,
    mut object: serde_json::Value,
) -> kube::Result<ConfigMap> {
    let metadata = object.get_mut("metadata").and_then(|m| m.as_object_mut());
    if let Some(metadata) = metadata {
        metadata.insert("resourceVersion".into(), json!(there.resource_version()));
    }
    api.patch(&there.name_any(), &apply_params(), &Patch::Apply(&object))
        .await
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, b| {
        // Writing to a String can't fail.
        let _ = write!(text, "{b:02x}");
        text
    })
}

fn conflict(map: &ConfigMap, uid: &str) -> Option<Publication> {
    let owner = map
        .annotations()
        .get(RESULT_JOB_UID_ANNOTATION)
        .map(String::as_str);
    if owner == Some(uid) {
        return None;
    }
    let whose = owner.map_or_else(
        || "was not made by GoGrid".to_owned(),
        |o| format!("belongs to the job with uid {o}"),
    );
    Some(refused(
        "OutputConflict",
        format!(
            "ConfigMap {} exists and {whose}: delete it or name another in spec.output.configMap",
            map.name_any()
        ),
    ))
}

/// What every run answered, in chunks that its own node wrote and in its status, and the names of objects that are not there
/// or not such. The status is read anew: the store keeps no answers.
async fn collect(
    executor: &Executor,
    runs: &[Assignment],
) -> Result<(Vec<EpochChunks>, Vec<String>), StepError> {
    let maps: Api<ConfigMap> = Api::namespaced(executor.client.clone(), &executor.namespace);
    let orders: Api<Assignment> = Api::namespaced(executor.client.clone(), &executor.namespace);
    let mut epochs = vec![];
    let mut missing = vec![];
    for run in runs {
        let mut epoch = EpochChunks {
            epoch: run.spec.epoch,
            skip: run.spec.skip.clone(),
            chunks: vec![],
        };
        if run.status.as_ref().is_some_and(|s| s.checkpoint.is_some()) {
            let there = orders.get_opt(&run.name_any()).await?;
            let there = there.filter(|now| now.uid() == run.uid());
            if there.is_none() {
                missing.push(run.name_any());
            }
            let checkpoint = there.and_then(|now| now.status?.checkpoint).unwrap_or_default();
            for n in 0..u32::try_from(checkpoint.chunks).unwrap_or(0) {
                let name = names::result_chunk(&run.name_any(), &run.spec.node_name, n);
                let map = maps.get_opt(&name).await?;
                let text = map
                    .filter(|m| written_by(m, run))
                    .and_then(|m| m.data?.remove(RESULTS_KEY));
                match text {
                    Some(text) => epoch.chunks.push(text),
                    None => missing.push(name),
                }
            }
            epoch.chunks.extend(checkpoint.text);
        }
        epochs.push(epoch);
    }
    Ok((epochs, missing))
}

fn written_by(map: &ConfigMap, run: &Assignment) -> bool {
    let node = map.labels().get(NODE_LABEL) == Some(&run.spec.node_name);
    node && map
        .owner_references()
        .iter()
        .any(|o| Some(&o.uid) == run.metadata.uid.as_ref())
}
