//! Pieces of OpenAPI schema that a derive can't say, and the last touch on generated CRDs.
//!
//! Owns: formats (byte quantities, times, DNS names), list-map markers. Must not hold a bound that a field can carry itself.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use schemars::{Schema, SchemaGenerator, json_schema};
use std::borrow::Cow;

impl schemars::JsonSchema for crate::ByteQuantity {
    fn schema_name() -> Cow<'static, str> {
        "ByteQuantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": true,
            "pattern": "^[0-9]{1,16}(k|M|G|T|Ki|Mi|Gi|Ti)?$",
            "maxLength": 18,
            // For the integer form: a negative one would make the object unreadable to every watcher.
            "minimum": 0,
            "maximum": 9_007_199_254_740_991_i64,
        })
    }
}

/// An RFC 3339 time, as Kubernetes writes it.
pub(crate) fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time", "maxLength": 64})
}

/// A label map: at most 16 pairs.
pub(crate) fn label_map(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {"type": "string", "maxLength": 63},
    })
}

/// Names used in root rules, and the CEL they stand for: `status` may be absent before the operator's first visit.
const TERMS: [(&str, &str); 5] = [
    ("EPOCH_NEW", "self.?status.?epoch.orValue(0)"),
    ("EPOCH_OLD", "oldSelf.?status.?epoch.orValue(0)"),
    ("TERM_NEW", "self.?status.?term.orValue(0)"),
    ("TERM_OLD", "oldSelf.?status.?term.orValue(0)"),
    (
        "PLACEMENT_STAYS",
        "(has(self.status) && has(self.status.placement)) == (has(oldSelf.status) && has(oldSelf.status.placement)) && \
         (!(has(self.status) && has(self.status.placement)) || self.status.placement == oldSelf.status.placement)",
    ),
];

/// Spells out `STAYS(path)`: an optional field is absent on both sides, or the same. Not `self.?a == oldSelf.?a`: the
/// API server knows no bound of a value behind `.?` and refuses the rule as too costly.
fn spell_out_stays(rule: &str) -> String {
    let mut spelt: Vec<String> = rule.split("STAYS(").map(str::to_owned).collect();
    for part in spelt.iter_mut().skip(1) {
        let (path, rest) = part.split_once(')').unwrap_or((part, ""));
        *part = format!(
            "has(self.{path}) == has(oldSelf.{path}) && (!has(self.{path}) || self.{path} == oldSelf.{path}){rest}"
        );
    }
    spelt.concat()
}

/// The last touch on a derived CRD: kept on uninstall, terms of root rules spelt out, no `null` values, only formats
/// that the API server knows.
pub(crate) fn finish(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    crd.metadata
        .annotations
        .get_or_insert_default()
        .insert("helm.sh/resource-policy".into(), "keep".into());
    for version in &mut crd.spec.versions {
        if let Some(root) = version
            .schema
            .as_mut()
            .and_then(|s| s.open_api_v3_schema.as_mut())
        {
            finish_schema(root);
        }
    }
    crd
}

fn finish_schema(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    schema.format = schema
        .format
        .take()
        .filter(|f| matches!(f.as_str(), "int32" | "int64" | "date-time"));
    for rule in schema.x_kubernetes_validations.iter_mut().flatten() {
        for (term, cel) in TERMS {
            rule.rule = rule.rule.replace(term, cel);
        }
        rule.rule = spell_out_stays(&rule.rule);
    }
    for property in schema.properties.iter_mut().flat_map(|p| p.values_mut()) {
        finish_schema(property);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        finish_schema(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        finish_schema(values);
    }
}
