//! Whether the API server fences.
//!
//! Owns: the check, before leading, that the installed CRDs refuse what would break fencing: rules read from the CRDs,
//! and where a job exists, a dry-run write that must be refused. Must not: write anything.

use gogrid_api::{InferenceJob, names};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, CustomResourceExt as _, ResourceExt as _};
use serde_json::json;

/// The CRDs don't fence, or that can't be found out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// A CRD is missing or can't be read.
    #[error(
        "CustomResourceDefinition {name} can't be read: install GoGrid's CRDs and let the operator get them"
    )]
    Crd {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// A CRD lacks a rule.
    #[error("CustomResourceDefinition {name} lacks the rule {message:?}: apply the CRDs of this version")]
    RuleMissing {
        /// Its name.
        name: String,
        /// What the rule says.
        message: String,
    },
    /// The server took what it had to refuse.
    #[error(
        "the API server accepted a jump of status.epoch in a dry run on {job}: apply the CRDs of this version"
    )]
    NotEnforced {
        /// The job.
        job: String,
    },
    /// The dry run failed otherwise.
    #[error("the dry run could not be tried")]
    DryRun(#[source] Box<kube::Error>),
}

/// Rules at the root of a CRD's served version: rule and message.
fn root_rules(crd: &CustomResourceDefinition) -> Vec<(String, String)> {
    let schemas = crd
        .spec
        .versions
        .iter()
        .filter(|v| v.name == gogrid_api::VERSION)
        .filter_map(|v| v.schema.as_ref());
    let roots = schemas.filter_map(|s| s.open_api_v3_schema.as_ref());
    roots
        .flat_map(|root| root.x_kubernetes_validations.iter().flatten())
        .map(|r| {
            (
                r.rule.split_whitespace().collect::<Vec<_>>().join(" "),
                r.message.clone().unwrap_or_default(),
            )
        })
        .collect()
}

/// The first rule that `wanted` has and `installed` lacks.
fn missing_rule(wanted: &CustomResourceDefinition, installed: &CustomResourceDefinition) -> Option<String> {
    let there = root_rules(installed);
    root_rules(wanted)
        .into_iter()
        .find(|(rule, _)| !there.iter().any(|(r, _)| r == rule))
        .map(|(_, message)| message)
}

/// Checks that the installed CRDs fence.
pub(crate) async fn fence_rules(client: &Client) -> Result<(), ProbeError> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let fenced = [InferenceJob::crd_name(), gogrid_api::Assignment::crd_name()];
    for wanted in gogrid_api::crds()
        .iter()
        .filter(|c| fenced.contains(&c.name_any().as_str()))
    {
        let name = wanted.name_any();
        let installed = api.get(&name).await.map_err(|e| ProbeError::Crd {
            name: name.clone(),
            source: Box::new(e),
        })?;
        if let Some(message) = missing_rule(wanted, &installed) {
            return Err(ProbeError::RuleMissing { name, message });
        }
    }
    dry_run(client).await
}

/// Where there is a job, tries to make its epoch jump.
async fn dry_run(client: &Client) -> Result<(), ProbeError> {
    let error = |e| ProbeError::DryRun(Box::new(e));
    let jobs: Api<InferenceJob> = Api::all(client.clone());
    let list = jobs
        .list_metadata(&ListParams::default().limit(1))
        .await
        .map_err(error)?;
    let Some(job) = list.items.first() else {
        return Ok(());
    };
    let api: Api<InferenceJob> = Api::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let jump = json!({"status": {"epoch": 9_007_199_254_740_991_i64}});
    let params = PatchParams {
        dry_run: true,
        field_manager: Some(names::OPERATOR_MANAGER.into()),
        ..PatchParams::default()
    };
    match api
        .patch_status(&job.name_any(), &params, &Patch::Merge(&jump))
        .await
    {
        Ok(_) => Err(ProbeError::NotEnforced {
            job: format!("{}/{}", job.namespace().unwrap_or_default(), job.name_any()),
        }),
        // Refused as it must be, or gone in the meantime.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 422) => Ok(()),
        Err(e) => Err(error(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crd_that_lost_one_rule_is_found_out_by_that_rule() {
        let [job, ..] = gogrid_api::crds();
        assert_eq!(missing_rule(&job, &job), None);
        let mut stripped = job.clone();
        let root = stripped.spec.versions[0]
            .schema
            .as_mut()
            .unwrap()
            .open_api_v3_schema
            .as_mut()
            .unwrap();
        let lost = root.x_kubernetes_validations.as_mut().unwrap().remove(0);
        assert_eq!(missing_rule(&job, &stripped), lost.message);
    }
}
