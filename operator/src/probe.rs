//! Whether the API server fences, and stores all that this operator writes.
//!
//! Owns: the check, before leading, that the installed CRDs know every field of this version (an unknown one is dropped in
//! silence) and refuse what would break fencing: rules read from the CRDs, and where a job exists, a dry-run write that must
//! be refused. Must not: write anything.

use gogrid_api::{InferenceJob, names};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceDefinitionVersion,
};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use std::sync::LazyLock;

/// The CRDs are not this version's, or that can't be found out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// A CRD is not there.
    #[error("CustomResourceDefinition {name} is not installed: {APPLY}")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A CRD is on its way out, with every object of it.
    #[error("CustomResourceDefinition {name} is being deleted: once it is gone, {APPLY}")]
    Leaving {
        /// Its name.
        name: String,
    },
    /// A CRD can't be read.
    #[error("CustomResourceDefinition {name} can't be read: let the operator get it")]
    Crd {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// A CRD is older than this operator.
    #[error("CustomResourceDefinition {name} is older than this operator: it lacks {what}; {APPLY}")]
    Older {
        /// Its name.
        name: String,
        /// A rule, a field or a value.
        what: String,
    },
    /// The server took what it had to refuse.
    #[error("the API server accepted a jump of status.epoch in a dry run on {job}: {APPLY}")]
    NotEnforced {
        /// The job.
        job: String,
    },
    /// The dry run failed otherwise.
    #[error("the dry run could not be tried")]
    DryRun(#[source] Box<kube::Error>),
}

impl ProbeError {
    /// Whether someone has to do something about it; else the API server only wasn't reached.
    pub(crate) fn stands(&self) -> bool {
        match self {
            ProbeError::Missing { .. }
            | ProbeError::Leaving { .. }
            | ProbeError::Older { .. }
            | ProbeError::NotEnforced { .. } => true,
            ProbeError::Crd { source, .. } | ProbeError::DryRun(source) => {
                matches!(&**source, kube::Error::Api(status) if status.code < 500 && status.code != 429)
            }
        }
    }
}

/// What to do about CRDs of another version.
const APPLY: &str = "apply the CRDs of this version (helm upgrade does, with crds.enabled: true; else helm template \
                     --show-only templates/crds.yaml, piped into kubectl apply --server-side -f -)";

/// The served version that this operator speaks.
fn spoken(crd: &CustomResourceDefinition) -> Option<&CustomResourceDefinitionVersion> {
    crd.spec
        .versions
        .iter()
        .find(|v| v.name == gogrid_api::VERSION && v.served)
}

fn schema(version: &CustomResourceDefinitionVersion) -> Value {
    let root = version
        .schema
        .as_ref()
        .and_then(|s| s.open_api_v3_schema.as_ref());
    // A schema is made of nothing that JSON can't say.
    serde_json::to_value(root).unwrap_or_default()
}

/// Rules at the root: rule and message.
fn rules(schema: &Value) -> impl Iterator<Item = (String, &str)> {
    let all = schema["x-kubernetes-validations"]
        .as_array()
        .into_iter()
        .flatten();
    all.map(|r| {
        let rule = r["rule"].as_str().unwrap_or_default();
        let message = r["message"].as_str().unwrap_or_default();
        (rule.split_whitespace().collect::<Vec<_>>().join(" "), message)
    })
}

/// The first field or value beneath `path` that `wanted` has and `installed` lacks.
fn missing_field(wanted: &Value, installed: &Value, path: &str) -> Option<String> {
    if installed["x-kubernetes-preserve-unknown-fields"] == true {
        return None;
    }
    let values = |schema: &Value| schema["enum"].as_array().cloned().unwrap_or_default();
    let known = values(installed);
    if let Some(value) = values(wanted)
        .iter()
        .find(|v| !known.is_empty() && !known.contains(v))
    {
        return Some(format!("the value {value} of {path}"));
    }
    for inner in ["items", "additionalProperties"] {
        if wanted[inner].is_object()
            && let Some(missing) = missing_field(&wanted[inner], &installed[inner], path)
        {
            return Some(missing);
        }
    }
    let fields = wanted["properties"].as_object().into_iter().flatten();
    fields.into_iter().find_map(|(name, wanted)| {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        match installed["properties"].get(name) {
            None => Some(format!("the field {path}")),
            Some(installed) => missing_field(wanted, installed, &path),
        }
    })
}

/// The first rule, field or value that `wanted` has and `installed` lacks.
fn missing(wanted: &CustomResourceDefinition, installed: &CustomResourceDefinition) -> Option<String> {
    let ours = spoken(wanted)?;
    let Some(theirs) = spoken(installed) else {
        return Some(format!("the version {}", gogrid_api::VERSION));
    };
    let (wanted, installed) = (schema(ours), schema(theirs));
    let there: Vec<String> = rules(&installed).map(|(rule, _)| rule).collect();
    let rule = rules(&wanted)
        .find(|(rule, _)| !there.contains(rule))
        .map(|(_, message)| format!("the rule {message:?}"));
    let selectable = || {
        let known = theirs.selectable_fields.iter().flatten();
        let known: Vec<&str> = known.map(|f| f.json_path.as_str()).collect();
        let wanted = ours.selectable_fields.iter().flatten();
        wanted
            .map(|f| f.json_path.as_str())
            .find(|path| !known.contains(path))
            .map(|path| format!("the selectable field {path}"))
    };
    rule.or_else(|| missing_field(&wanted, &installed, ""))
        .or_else(selectable)
}

/// The CRDs of this version. Made once: a server that can't be reached is asked again every other second.
static OURS: LazyLock<[CustomResourceDefinition; 4]> = LazyLock::new(gogrid_api::crds);

/// Checks that the installed CRDs are this version's or newer.
pub(crate) async fn crds(client: &Client) -> Result<(), ProbeError> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for wanted in OURS.iter() {
        let name = wanted.name_any();
        let installed = match api.get_opt(&name).await {
            Ok(Some(installed)) => installed,
            Ok(None) => return Err(ProbeError::Missing { name }),
            Err(e) => {
                return Err(ProbeError::Crd {
                    name,
                    source: Box::new(e),
                });
            }
        };
        if installed.metadata.deletion_timestamp.is_some() {
            return Err(ProbeError::Leaving { name });
        }
        if let Some(what) = missing(wanted, &installed) {
            return Err(ProbeError::Older { name, what });
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

    fn altered(crd: &CustomResourceDefinition, alter: impl Fn(&mut Value)) -> CustomResourceDefinition {
        let mut value = serde_json::to_value(crd).unwrap();
        alter(&mut value["spec"]["versions"][0]);
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_crd_is_as_new_as_itself_and_as_one_that_knows_less() {
        for crd in gogrid_api::crds() {
            assert_eq!(missing(&crd, &crd), None);
            let newer = altered(&crd, |v| {
                v["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["later"] =
                    json!({"type": "string"});
            });
            assert_eq!(missing(&crd, &newer), None);
            assert_eq!(missing(&newer, &crd).unwrap(), "the field spec.later");
        }
    }

    #[test]
    fn what_a_crd_lost_is_named_be_it_rule_field_value_selector_or_version() {
        let [job, .., assignment, _] = gogrid_api::crds();
        let lacks = |wanted: &CustomResourceDefinition, path: &str, gone: &str| {
            let installed = altered(wanted, |v| {
                let at = v.pointer_mut(path).unwrap();
                match at {
                    Value::Array(list) => drop(list.remove(0)),
                    other => drop(other.as_object_mut().unwrap().remove(gone).unwrap()),
                }
            });
            missing(wanted, &installed).unwrap()
        };
        let root = "/schema/openAPIV3Schema";
        let at = |path: &str| format!("{root}{path}");
        assert!(lacks(&job, &at("/x-kubernetes-validations"), "").starts_with("the rule \""));
        assert_eq!(
            lacks(&job, &at("/properties/status/properties"), "term"),
            "the field status.term"
        );
        let stage = "/properties/spec/properties/stages/items/properties";
        assert_eq!(
            lacks(&assignment, &at(stage), "vram"),
            "the field spec.stages.vram"
        );
        let state = lacks(&assignment, &at("/properties/status/properties/state/enum"), "");
        assert_eq!(state, "the value \"Claimed\" of status.state");
        assert_eq!(
            lacks(&assignment, "", "selectableFields"),
            "the selectable field .spec.nodeName"
        );
        let unserved = altered(&job, |v| v["served"] = json!(false));
        assert_eq!(missing(&job, &unserved).unwrap(), "the version v1alpha1");
    }
}
