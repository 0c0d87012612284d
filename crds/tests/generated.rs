//! The CRDs beside this crate are what the types say, and every field in them is bounded.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use std::path::{Path, PathBuf};

fn schema(crd: &CustomResourceDefinition) -> JSONSchemaProps {
    crd.spec.versions[0]
        .schema
        .clone()
        .unwrap()
        .open_api_v3_schema
        .unwrap()
}

/// Compares a generated file with what it should hold; `UPDATE=1` writes it instead.
fn compare(path: &Path, wanted: &str) {
    #[allow(
        clippy::disallowed_methods,
        reason = "UPDATE=1 is this project's switch to rewrite generated files"
    )]
    if std::env::var("UPDATE").is_ok_and(|v| v == "1") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, wanted).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        found,
        wanted,
        "{} differs: run UPDATE=1 cargo test -p gogrid-api",
        path.display()
    );
}

fn chart_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../charts/gogrid/files")
        .join(name)
}

#[test]
fn the_yaml_beside_the_crate_and_in_the_chart_is_what_the_types_say() {
    for crd in gogrid_api::crds() {
        let name = format!("{}.yaml", crd.spec.names.plural);
        let wanted = serde_yaml::to_string(&crd).unwrap();
        compare(&Path::new(env!("CARGO_MANIFEST_DIR")).join(&name), &wanted);
        compare(&chart_file("crds").join(&name), &wanted);
    }
}

#[test]
fn the_presets_in_the_chart_are_those_that_the_operator_creates() {
    let documents = gogrid_api::profile::presets().map(|(name, spec)| {
        let mut profile = serde_json::to_value(gogrid_api::ResourceProfile::new(name, spec)).unwrap();
        profile["metadata"] = serde_json::json!({ "name": name });
        serde_yaml::to_string(&profile).unwrap()
    });
    compare(&chart_file("presets.yaml"), &documents.join("---\n"));
}

fn unbounded(path: &str, schema: &JSONSchemaProps, found: &mut Vec<String>) {
    match schema.type_.as_deref() {
        Some("string") => {
            let bounded = schema.max_length.is_some() || schema.enum_.is_some();
            if !bounded {
                found.push(format!("{path}: string without maxLength or enum"));
            }
        }
        Some("integer" | "number") if schema.minimum.is_none() || schema.maximum.is_none() => {
            found.push(format!("{path}: number without minimum and maximum"));
        }
        Some("array") if schema.max_items.is_none() || schema.x_kubernetes_list_type.is_none() => {
            found.push(format!("{path}: list without maxItems and list type"));
        }
        Some("object") if schema.additional_properties.is_some() && schema.max_properties.is_none() => {
            found.push(format!("{path}: map without maxProperties"));
        }
        None if schema.x_kubernetes_int_or_string != Some(true) => found.push(format!("{path}: no type")),
        _ => {}
    }
    for (name, property) in schema.properties.iter().flatten() {
        let known_to_kubernetes =
            path.is_empty() && ["metadata", "apiVersion", "kind"].contains(&name.as_str());
        if !known_to_kubernetes {
            unbounded(&format!("{path}.{name}"), property, found);
        }
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        unbounded(&format!("{path}[]"), items, found);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
        unbounded(&format!("{path}{{}}"), values, found);
    }
}

#[test]
fn every_string_list_map_and_number_is_bounded_and_every_list_has_a_type() {
    for crd in gogrid_api::crds() {
        let mut found = vec![];
        unbounded("", &schema(&crd), &mut found);
        assert!(found.is_empty(), "{}: {found:#?}", crd.spec.names.kind);
    }
}

fn enum_values(schema: &JSONSchemaProps, into: &mut Vec<String>) {
    into.extend(
        schema
            .enum_
            .iter()
            .flatten()
            .filter_map(|v| v.0.as_str().map(str::to_owned)),
    );
    for property in schema.properties.iter().flat_map(|p| p.values()) {
        enum_values(property, into);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        enum_values(items, into);
    }
}

#[test]
fn no_enum_value_but_a_conditions_status_is_a_boolean_to_a_yaml_1_1_reader() {
    for crd in gogrid_api::crds() {
        let mut found = vec![];
        enum_values(&schema(&crd), &mut found);
        let words = ["y", "n", "yes", "no", "on", "off", "null", "~"];
        found.retain(|v| words.contains(&v.to_ascii_lowercase().as_str()));
        assert!(
            found.is_empty(),
            "{}: kubectl reads these unquoted as something else: {found:?}",
            crd.spec.names.kind
        );
    }
}

fn defaults_break(path: &str, schema: &JSONSchemaProps, found: &mut Vec<String>) {
    for (name, property) in schema.properties.iter().flatten() {
        let at = format!("{path}.{name}");
        if let Some(default) = schema.default.as_ref().and_then(|d| d.0.get(name)) {
            let below = default
                .as_f64()
                .zip(property.minimum)
                .is_some_and(|(v, min)| v < min);
            let other = property.default.as_ref().is_some_and(|own| own.0 != *default);
            if below || other {
                found.push(format!("{at}: the object's default says {default}"));
            }
        }
        defaults_break(&at, property, found);
    }
}

#[test]
fn an_absent_object_gets_the_same_values_as_an_empty_one() {
    for crd in gogrid_api::crds() {
        let mut found = vec![];
        defaults_break("", &schema(&crd), &mut found);
        assert!(found.is_empty(), "{}: {found:#?}", crd.spec.names.kind);
    }
}

fn rules<'a>(schema: &'a JSONSchemaProps, into: &mut Vec<(&'a str, &'a str)>) {
    for rule in schema.x_kubernetes_validations.iter().flatten() {
        into.push((&rule.rule, rule.message.as_deref().unwrap_or_default()));
    }
    for property in schema.properties.iter().flat_map(|p| p.values()) {
        rules(property, into);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        rules(items, into);
    }
}

#[test]
fn every_cel_rule_has_a_message_that_says_must() {
    for crd in gogrid_api::crds() {
        let schema = schema(&crd);
        let mut all = vec![];
        rules(&schema, &mut all);
        for (rule, message) in all {
            assert!(
                message.contains("must"),
                "{}: {rule}: {message:?}",
                crd.spec.names.kind
            );
        }
    }
}
