//! The values as a schema, as a commented file and as a page.

use super::Values;
use anyhow::{Context as _, Result};
use gogrid_reference::{cell, heading};
use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value};

const SOURCE: &str = "tests/src/values.rs";
/// Columns of a comment.
const WIDTH: usize = 116;

/// A boolean that may be left out, but not be null.
pub(super) fn boolean(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "boolean"})
}

/// A number of nodes or a share of them.
pub(super) fn count_or_percent(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^([1-9][0-9]?|100)%$"}]
    })
}

/// When images are pulled.
pub(super) fn pull_policy(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"enum": ["Always", "IfNotPresent", "Never"]})
}

/// Objects as they are, or the text of a template that makes one.
pub(super) fn objects_or_templates(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "array", "items": {"type": ["object", "string"]}, "maxItems": 64})
}

fn generated() -> Result<Value> {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = serde_json::to_value(settings.into_generator().into_root_schema_for::<Values>())?;
    tidy(&mut schema);
    Ok(schema)
}

/// Takes out what says nothing to helm: defaults, which `values.yaml` has, and widths of integers.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("default");
            map.remove("format");
            map.values_mut().for_each(tidy);
        }
        Value::Array(list) => list.iter_mut().for_each(tidy),
        _ => {}
    }
}

/// `values.schema.json`.
pub fn schema() -> Result<String> {
    Ok(serde_json::to_string_pretty(&generated()?)? + "\n")
}

/// `values.yaml`: every key with its meaning and its default.
pub fn yaml() -> Result<String> {
    let mut text = format!(
        "# Values of the GoGrid chart, generated from {SOURCE}. Every key is checked against values.schema.json: a\n\
         # misspelt one is refused.\n"
    );
    let defaults = serde_json::to_value(Values::default())?;
    block(&generated()?, &defaults, 0, &mut text)?;
    Ok(text)
}

fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    schema.get("properties").and_then(Value::as_object)
}

fn described(schema: &Value) -> String {
    schema
        .get("description")
        .and_then(Value::as_str)
        .map(cell)
        .unwrap_or_default()
}

fn block(schema: &Value, defaults: &Value, depth: usize, text: &mut String) -> Result<()> {
    let indent = "  ".repeat(depth);
    for (key, property) in properties(schema).context("a block of values has properties")? {
        let Some(default) = defaults.get(key) else {
            continue;
        };
        if depth == 0 {
            text.push('\n');
        }
        for line in wrapped(&described(property).replace("\\|", "|"), WIDTH - indent.len()) {
            *text += &format!("{indent}# {line}\n");
        }
        let nested = properties(property).is_some_and(|known| !known.is_empty());
        if nested && default.as_object().is_some_and(|map| !map.is_empty()) {
            *text += &format!("{indent}{key}:\n");
            block(property, default, depth + 1, text)?;
        } else {
            *text += &value(&indent, key, default)?;
        }
    }
    Ok(())
}

fn value(indent: &str, key: &str, default: &Value) -> Result<String> {
    let yaml = serde_yaml::to_string(default)?;
    let one_line = yaml.trim_end();
    let empty =
        default.as_array().is_some_and(Vec::is_empty) || default.as_object().is_some_and(Map::is_empty);
    if empty || !(default.is_array() || default.is_object()) {
        return Ok(format!("{indent}{key}: {one_line}\n"));
    }
    let lines: Vec<String> = one_line
        .lines()
        .map(|line| format!("{indent}  {line}\n"))
        .collect();
    Ok(format!("{indent}{key}:\n{}", lines.concat()))
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// The reference page.
pub fn page() -> Result<String> {
    let mut text = heading("Values of the chart", SOURCE);
    text += "A key that is not here is refused. The chart's `values.yaml` shows the same as a file.\n\n\
             | value | default | what |\n| --- | --- | --- |\n";
    let defaults = serde_json::to_value(Values::default())?;
    rows(&generated()?, Some(&defaults), "", &mut text)?;
    Ok(text)
}

fn rows(schema: &Value, defaults: Option<&Value>, path: &str, text: &mut String) -> Result<()> {
    for (key, property) in properties(schema).into_iter().flatten() {
        let path = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        let default = defaults.and_then(|values| values.get(key));
        let nested = properties(property).is_some();
        let shown = match default {
            Some(default) if !nested => format!("`{}`", cell(&serde_json::to_string(default)?)),
            _ => String::new(),
        };
        let meaning = described(property);
        if !(nested && meaning.is_empty()) {
            *text += &format!("| `{path}` | {shown} | {meaning} |\n");
        }
        rows(property, default, &path, text)?;
        let each = property
            .get("additionalProperties")
            .filter(|each| each.is_object());
        if let Some(each) = each {
            rows(each, None, &format!("{path}.<name>"), text)?;
        }
    }
    Ok(())
}
