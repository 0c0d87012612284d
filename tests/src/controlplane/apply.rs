//! Server-side apply of YAML as a chart or a generator writes it.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::discovery::{ApiCapabilities, Scope, pinned_kind};
use kube::{Client, ResourceExt as _};
use serde::Deserialize as _;

use crate::wait::eventually;

const FIELD_MANAGER: &str = "gogrid-tests";
const SERVED_WITHIN: Duration = Duration::from_secs(30);

/// Applies every document of `yaml`: CRDs first, waiting until they are served, then namespaces, then the rest in the
/// order given. Objects without a namespace go to `default`. Empty documents are skipped.
pub async fn apply_yaml_documents(client: &Client, yaml: &str) -> Result<()> {
    let mut objects = parse(yaml)?;
    // Stable: within a rank the given order stays.
    objects.sort_by_key(|(kind, _object)| match kind.kind.as_str() {
        "CustomResourceDefinition" => 0_u8,
        "Namespace" => 1,
        _ => 2,
    });
    let mut known: HashMap<GroupVersionKind, (ApiResource, ApiCapabilities)> = HashMap::new();
    let crds: Vec<String> = objects
        .iter()
        .take_while(|(kind, _object)| kind.kind == "CustomResourceDefinition")
        .map(|(_kind, object)| object.name_any())
        .collect();
    for (index, (kind, object)) in objects.iter().enumerate() {
        if index == crds.len() {
            until_established(client, &crds).await?;
        }
        if !known.contains_key(kind) {
            // A group that was established a moment ago may be missing from discovery for another.
            let found = eventually(SERVED_WITHIN, &format!("the API to serve {kind:?}"), || async {
                Ok(pinned_kind(client, kind).await?)
            })
            .await?;
            known.insert(kind.clone(), found);
        }
        let (resource, capabilities) = known.get(kind).context("looked up above")?;
        apply(client, object, resource, capabilities).await?;
    }
    if objects.len() == crds.len() {
        until_established(client, &crds).await?;
    }
    Ok(())
}

fn parse(yaml: &str) -> Result<Vec<(GroupVersionKind, DynamicObject)>> {
    let mut objects = Vec::new();
    for (index, document) in serde_yaml::Deserializer::from_str(yaml).enumerate() {
        let place = || format!("YAML document {}", index + 1);
        let value = serde_json::Value::deserialize(document).with_context(place)?;
        if value.is_null() {
            continue;
        }
        let object: DynamicObject = serde_json::from_value(value).with_context(place)?;
        let types = object
            .types
            .as_ref()
            .with_context(place)
            .context("a document has no apiVersion and kind")?;
        objects.push((GroupVersionKind::try_from(types)?, object));
    }
    Ok(objects)
}

async fn apply(
    client: &Client,
    object: &DynamicObject,
    resource: &ApiResource,
    capabilities: &ApiCapabilities,
) -> Result<()> {
    let api: Api<DynamicObject> = match capabilities.scope {
        Scope::Cluster => Api::all_with(client.clone(), resource),
        Scope::Namespaced => {
            let namespace = object.namespace().unwrap_or_else(|| "default".to_owned());
            Api::namespaced_with(client.clone(), &namespace, resource)
        }
    };
    let name = object
        .metadata
        .name
        .as_deref()
        .with_context(|| format!("a {} has no name", resource.kind))?;
    api.patch(
        name,
        &PatchParams::apply(FIELD_MANAGER).force(),
        &Patch::Apply(object),
    )
    .await
    .with_context(|| format!("applying {} {name}", resource.kind))?;
    Ok(())
}

async fn until_established(client: &Client, names: &[String]) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for name in names {
        eventually(
            SERVED_WITHIN,
            &format!("CRD {name} to be established"),
            || async {
                let conditions = api
                    .get(name)
                    .await?
                    .status
                    .and_then(|status| status.conditions)
                    .unwrap_or_default();
                let established = conditions
                    .iter()
                    .any(|found| found.type_ == "Established" && found.status == "True");
                if established {
                    Ok(())
                } else {
                    Err(anyhow!("conditions: {conditions:?}"))
                }
            },
        )
        .await?;
    }
    Ok(())
}
