//! One kind of the API as a page.

use gogrid_reference::{cell, heading};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

/// Every field of the spec and of the status, with its type and bounds.
pub(crate) fn page(crd: &CustomResourceDefinition) -> String {
    let names = &crd.spec.names;
    let version = &crd.spec.versions[0];
    let root = version
        .schema
        .as_ref()
        .unwrap()
        .open_api_v3_schema
        .as_ref()
        .unwrap();
    let mut page = heading(&names.kind, "crds/src");
    page += &format!(
        "{}\n\n`{}/{}`, {}, `kubectl get {}`{}.\n",
        root.description.as_deref().unwrap_or_default(),
        crd.spec.group,
        version.name,
        crd.spec.scope.to_lowercase(),
        names.plural,
        short(names.short_names.as_deref().unwrap_or_default()),
    );
    rules(root, &mut page);
    for part in ["spec", "status"] {
        let schema = &root.properties.as_ref().unwrap()[part];
        page += &format!("\n## {part}\n\n| field | type | what |\n| --- | --- | --- |\n");
        rows(part, "", schema, &mut page);
    }
    page
}

fn short(names: &[String]) -> String {
    names.iter().map(|name| format!(" or `{name}`")).collect()
}

fn rules(root: &JSONSchemaProps, page: &mut String) {
    let all = messages(root);
    if !all.is_empty() {
        *page += "\nRules over several fields:\n\n";
        for message in all {
            *page += &format!("- {message}\n");
        }
    }
}

fn messages(schema: &JSONSchemaProps) -> Vec<String> {
    let mut found: Vec<String> = schema
        .x_kubernetes_validations
        .iter()
        .flatten()
        .filter_map(|rule| rule.message.clone())
        .collect();
    let nested = schema.properties.iter().flat_map(|all| all.values());
    found.extend(nested.flat_map(messages));
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        found.extend(messages(items));
    }
    found
}

fn rows(top: &str, path: &str, schema: &JSONSchemaProps, page: &mut String) {
    let required = schema.required.clone().unwrap_or_default();
    for (name, property) in schema.properties.iter().flatten() {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        let needed = if top == "spec" && required.contains(name) {
            ", required"
        } else {
            ""
        };
        let default = property
            .default
            .as_ref()
            .filter(|_| property.properties.is_none())
            .map_or(String::new(), |value| {
                format!(" Default `{}`.", cell(&value.0.to_string()))
            });
        *page += &format!(
            "| `{path}` | {}{needed} | {}{default} |\n",
            type_of(property),
            cell(property.description.as_deref().unwrap_or_default())
        );
        rows(top, &path, property, page);
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &property.items {
            rows(top, &format!("{path}[]"), items, page);
        }
        if let Some(JSONSchemaPropsOrBool::Schema(values)) = &property.additional_properties {
            rows(top, &format!("{path}.<key>"), values, page);
        }
    }
}

fn type_of(schema: &JSONSchemaProps) -> String {
    if schema.x_kubernetes_int_or_string == Some(true) {
        return "quantity".into();
    }
    if let Some(values) = &schema.enum_ {
        let values: Vec<String> = values
            .iter()
            .filter_map(|value| value.0.as_str())
            .map(|value| format!("`{value}`"))
            .collect();
        return values.join(", ");
    }
    let bounds = |least: Option<i64>, most: Option<i64>, unit: &str| match (least, most) {
        (Some(least), Some(most)) => format!(", {least} to {most}{unit}"),
        (None, Some(most)) => format!(", at most {most}{unit}"),
        (Some(least), None) => format!(", at least {least}{unit}"),
        (None, None) => String::new(),
    };
    match schema.type_.as_deref().unwrap_or("any") {
        "string" => match &schema.format {
            Some(format) if format == "date-time" => "time".into(),
            _ => format!(
                "string{}",
                bounds(schema.min_length, schema.max_length, " characters")
            ),
        },
        "integer" => {
            let whole = |bound: Option<f64>| bound.map(|value| format!("{value:.0}").parse().unwrap());
            format!(
                "integer{}",
                bounds(whole(schema.minimum), whole(schema.maximum), "")
            )
        }
        "array" => {
            let items = match &schema.items {
                Some(JSONSchemaPropsOrArray::Schema(items)) => type_of(items),
                _ => "any".into(),
            };
            format!(
                "list of {items}{}",
                bounds(schema.min_items, schema.max_items, " items")
            )
        }
        "object" if schema.additional_properties.is_some() => {
            format!("map{}", bounds(None, schema.max_properties, " entries"))
        }
        other => other.into(),
    }
}
