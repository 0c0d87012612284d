//! What a write makes of an object: preconditions, merge patches, the fields that an apply owns.
//!
//! Owns: the translation of one object and one write into another object. Must not store anything.

use super::kind::Place;
use super::store::{Refusal, refuse};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// Whether a write names no version.
pub(super) fn unconditional(object: &Value) -> bool {
    object
        .pointer("/metadata/resourceVersion")
        .and_then(Value::as_str)
        .is_none_or(str::is_empty)
}

/// Whether a write names the object that is there.
pub(super) fn same_object(old: &Value, new: &Value) -> Result<(), Refusal> {
    for pointer in ["/metadata/uid", "/metadata/resourceVersion"] {
        let wanted = new
            .pointer(pointer)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty());
        if wanted.is_some_and(|wanted| old.pointer(pointer).and_then(Value::as_str) != Some(wanted)) {
            return Err(refuse(409, "Conflict", "the object has been modified"));
        }
    }
    Ok(())
}

/// Keeps what the other half of an object says: a write of the status leaves the spec alone, and the other way round.
pub(super) fn halves(place: &Place, old: &Value, new: &mut Value) {
    if !place.kind.has_status() {
        return;
    }
    let (Some(old), Some(new)) = (old.as_object(), new.as_object_mut()) else {
        return;
    };
    let kept: &[&str] = if place.status {
        &["spec", "metadata"]
    } else {
        &["status"]
    };
    for field in kept {
        match old.get(*field) {
            Some(value) => new.insert((*field).to_owned(), value.clone()),
            None => new.remove(*field),
        };
    }
}

/// What the server keeps whatever a write says.
const KEPT: [&str; 6] = [
    "uid",
    "creationTimestamp",
    "resourceVersion",
    "generation",
    "name",
    "namespace",
];

pub(super) fn keep_metadata(old: &Value, new: &mut Value) {
    for field in KEPT {
        match old.pointer(&format!("/metadata/{field}")) {
            Some(value) => new["metadata"][field] = value.clone(),
            None => {
                if let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) {
                    metadata.remove(field);
                }
            }
        }
    }
    for field in ["apiVersion", "kind"] {
        new[field] = old[field].clone();
    }
}

pub(super) fn replaced(place: &Place, old: &Value, mut new: Value) -> Result<Value, Refusal> {
    same_object(old, &new)?;
    halves(place, old, &mut new);
    keep_metadata(old, &mut new);
    Ok(new)
}

pub(super) fn merged(place: &Place, old: &Value, patch: &Value) -> Result<Value, Refusal> {
    same_object(old, patch)?;
    let mut new = old.clone();
    merge(&mut new, patch);
    halves(place, old, &mut new);
    keep_metadata(old, &mut new);
    Ok(new)
}

/// RFC 7396.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    if let Some(target) = target.as_object_mut() {
        for (field, value) in fields {
            if value.is_null() {
                target.remove(field);
            } else {
                merge(target.entry(field.clone()).or_insert(Value::Null), value);
            }
        }
    }
}

/// Nothing is stored as null.
pub(super) fn prune(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(prune);
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        _ => {}
    }
}

/// Fields of metadata that nobody owns.
const NAMES: [&str; 4] = ["name", "namespace", "uid", "resourceVersion"];

/// Whether a field can be owned by who applies the half of an object that it is in.
fn ownable(at: &str, field: &str, status: bool) -> bool {
    match at {
        "" => !matches!(field, "apiVersion" | "kind") && (field == "status") == status,
        "/metadata" => !NAMES.contains(&field),
        _ => true,
    }
}

/// Pointers to everything that an applied object says, lists being one thing each.
pub(super) fn leaves(wanted: &Value, status: bool) -> BTreeSet<String> {
    fn walk(fields: &Map<String, Value>, at: &str, status: bool, found: &mut BTreeSet<String>) {
        let said = fields.iter().filter(|(_, value)| !value.is_null());
        for (field, value) in said.filter(|(field, _)| ownable(at, field, status)) {
            let at = format!("{at}/{}", escaped(field));
            match value {
                Value::Object(inner) if !inner.is_empty() => walk(inner, &at, status, found),
                _ => {
                    found.insert(at);
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    if let Some(fields) = wanted.as_object() {
        walk(fields, "", status, &mut found);
    }
    found
}

fn escaped(field: &str) -> Cow<'_, str> {
    if field.contains(['~', '/']) {
        field.replace('~', "~0").replace('/', "~1").into()
    } else {
        field.into()
    }
}

fn parts(pointer: &str) -> impl Iterator<Item = Cow<'_, str>> {
    pointer.split('/').skip(1).map(|part| {
        if part.contains('~') {
            part.replace("~1", "/").replace("~0", "~").into()
        } else {
            part.into()
        }
    })
}

pub(super) fn put_in(object: &mut Value, pointer: &str, value: Value) {
    let mut at = object;
    for part in parts(pointer) {
        if !at.is_object() {
            *at = json!({});
        }
        at = &mut at[&*part];
    }
    *at = value;
}

/// Removes a field, and whatever is left empty by that.
pub(super) fn take_out(object: &mut Value, pointer: &str) {
    fn descend(at: &mut Value, path: &[Cow<'_, str>]) {
        let (Some(fields), Some((first, rest))) = (at.as_object_mut(), path.split_first()) else {
            return;
        };
        if rest.is_empty() {
            fields.remove(&**first);
        } else if let Some(inner) = fields.get_mut(&**first) {
            descend(inner, rest);
            if inner.as_object().is_some_and(Map::is_empty) {
                fields.remove(&**first);
            }
        }
    }
    descend(object, &parts(pointer).collect::<Vec<_>>());
}
