//! Upgrade, rollback, uninstall: what admins do, with jobs running.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{GpuNode, InferenceJob, ResourceProfile, condition};
use gogrid_tests::chart;
use gogrid_tests::cluster::NAMESPACE;
use gogrid_tests::installed::{Installed, spec};
use gogrid_tests::jobs::{self, Questions};
use gogrid_tests::wait::eventually;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};

use crate::{LONG, on_real_nodes, submit, until_answering, until_right, values};

/// Answers of a job's records as they lie in checkpoints, by the checkpoint's name.
pub(crate) async fn checkpoints(
    installed: &Installed,
    job: &InferenceJob,
) -> Result<BTreeMap<String, Vec<String>>> {
    let maps: Api<ConfigMap> = Api::namespaced(installed.client.clone(), NAMESPACE);
    let of_job = format!(
        "gogrid.dev/job-uid={},gogrid.dev/role=result",
        job.uid().unwrap_or_default()
    );
    let found = maps.list(&ListParams::default().labels(&of_job)).await?;
    Ok(found
        .items
        .into_iter()
        .map(|map| {
            let name = map.name_any();
            let text = map
                .data
                .unwrap_or_default()
                .into_values()
                .collect::<Vec<_>>()
                .join("\n");
            let id = |line: &str| {
                let line: Value = serde_json::from_str(line).unwrap_or_default();
                line["custom_id"].as_str().map(str::to_owned)
            };
            (name, text.lines().filter_map(id).collect())
        })
        .collect())
}

/// The record that lies in two checkpoints, if one does: it was run again though it was finished.
pub(crate) fn run_again(checkpoints: &BTreeMap<String, Vec<String>>) -> Option<&String> {
    let mut seen = std::collections::BTreeSet::new();
    checkpoints.values().flatten().find(|id| !seen.insert(*id))
}

/// Follows a job's checkpoints until it is over.
pub(crate) async fn last_checkpoints(
    installed: &Installed,
    job: &InferenceJob,
) -> Result<BTreeMap<String, Vec<String>>> {
    let jobs: Api<InferenceJob> = Api::namespaced(installed.client.clone(), "default");
    let last = std::sync::Mutex::new(BTreeMap::new());
    eventually(LONG, "the job's end", || async {
        let found = checkpoints(installed, job).await?;
        let status = jobs.get(&job.name_any()).await?.status.unwrap_or_default();
        let over = condition::is_true(&status.conditions, "Finished");
        let mut last = last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !found.is_empty() {
            *last = found;
        }
        ensure!(over, "{:?}", status.progress.map(|p| p.display));
        Ok(())
    })
    .await?;
    Ok(last.into_inner().unwrap_or_default())
}

/// Waits until every agent is of that version and works, and checks whether a job has the next version's field.
async fn in_force(installed: &Installed, version: &str, field: bool) -> Result<()> {
    let nodes: Api<GpuNode> = Api::all(installed.client.clone());
    eventually(
        LONG,
        &format!("every node to be of version {version}"),
        || async {
            for node in nodes.list(&ListParams::default()).await?.items {
                let status = node.status.clone().unwrap_or_default();
                ensure!(
                    status.agent_version == version && condition::is_true(&status.conditions, "Ready"),
                    "{}: {} {}",
                    node.name_any(),
                    status.agent_version,
                    jobs::short(&status.conditions)
                );
            }
            Ok(())
        },
    )
    .await?;
    let crds: Api<CustomResourceDefinition> = Api::all(installed.client.clone());
    let crd = serde_json::to_value(crds.get("inferencejobs.gogrid.dev").await?)?;
    let later = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/later";
    ensure!(
        crd.pointer(later).is_some() == field,
        "version {version} with the field {field}"
    );
    Ok(())
}

#[test]
fn an_upgrade_to_the_next_version_and_a_rollback_under_four_running_jobs_run_no_finished_record_again_and_lose_none()
-> Result<()> {
    on_real_nodes(|installed| async move {
        let mut jobs = vec![];
        for n in 0..4 {
            let questions = Questions::new(40 + n, 150);
            let job = submit(&installed, &format!("upgraded-{n}"), &questions, None, true).await?;
            jobs.push((job, questions));
        }
        for (job, _) in &jobs {
            until_answering(&installed, job).await?;
        }
        in_force(&installed, env!("CARGO_PKG_VERSION"), false).await?;
        let next = tempfile::tempdir()?;
        chart::next(next.path())?;
        let mut changed = values();
        for component in ["agent", "operator"] {
            let told = json!(format!("--reported-version={}", chart::NEXT));
            match changed[component]["extraArgs"].as_array_mut() {
                Some(arguments) => arguments.push(told),
                None => changed[component]["extraArgs"] = json!([told]),
            }
        }
        installed.helm_chart("upgrade", next.path(), &changed).await?;
        in_force(&installed, chart::NEXT, true).await?;
        installed
            .nodes
            .control
            .helm(&[
                "rollback",
                chart::RELEASE,
                "--namespace",
                NAMESPACE,
                "--wait",
                "--timeout",
                "120s",
            ])
            .await?;
        in_force(&installed, env!("CARGO_PKG_VERSION"), false).await?;
        let mut epochs = 0;
        for (job, questions) in &jobs {
            let checkpoints = last_checkpoints(&installed, job).await?;
            let again = run_again(&checkpoints);
            ensure!(again.is_none(), "{}: {again:?} was run again", job.name_any());
            let job = until_right(&installed, job, questions).await?;
            epochs += job.status.map_or(0, |s| s.epoch);
        }
        ensure!(epochs > 4, "no job was interrupted: the test saw nothing");
        println!("4 jobs, {epochs} placements");
        Ok(())
    })
}

/// Named so that it comes last of all: what it does to the install is not undone entirely.
#[test]
fn z_uninstalling_under_four_running_jobs_leaves_nothing_that_holds_a_namespace_and_installing_again_goes_on()
-> Result<()> {
    on_real_nodes(|installed| async move {
        let control = &installed.nodes.control;
        control.kubectl(&["create", "namespace", "doomed"]).await?;
        let mut running = vec![];
        for (n, namespace) in ["default", "doomed", "doomed", "doomed"].into_iter().enumerate() {
            let questions = Questions::new(77, 100);
            let name = format!("kept-{n}");
            let mut spec = spec(&questions.lines(), &name)?;
            spec["profileName"] = json!("conservative");
            running.push(jobs::create(&installed.client, namespace, &name, spec).await?);
        }
        for job in &running {
            until_answering(&installed, job).await?;
        }
        control
            .helm(&[
                "uninstall",
                chart::RELEASE,
                "--namespace",
                NAMESPACE,
                "--wait",
                "--timeout",
                "100s",
            ])
            .await?;
        let delete = ["delete", "namespace", "doomed", NAMESPACE, "--timeout=60s"];
        control.kubectl(&delete).await?;
        let jobs: Api<InferenceJob> = Api::namespaced(installed.client.clone(), "default");
        let profiles: Api<ResourceProfile> = Api::all(installed.client.clone());
        let kept = running.first().context("no job")?;
        ensure!(
            jobs.get("kept-0").await?.uid() == kept.uid(),
            "the job is another one"
        );
        ensure!(
            profiles.list(&ListParams::default()).await?.items.len() == 3,
            "a profile is gone"
        );
        installed.helm("install", &values()).await?;
        until_right(&installed, kept, &Questions::new(77, 100)).await?;
        Ok(())
    })
}
