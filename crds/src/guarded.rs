//! Objects of which one may be malformed without hiding the others.
//!
//! Owns: the reading of one object out of a list or watch, like kube's `DeserializeGuard`, but without the copy that that
//! one makes of every good object. Must not: log or drop anything.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::error_boundary::InvalidObject;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::borrow::Cow;

/// An object, or what is wrong with it.
#[derive(Clone, Debug)]
pub struct Guarded<K>(pub Result<K, InvalidObject>);

impl<'de, K: DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Value::deserialize(deserializer)?;
        let read = K::deserialize(&object).map_err(|error| InvalidObject {
            error: error.to_string(),
            metadata: object
                .get("metadata")
                .and_then(|metadata| ObjectMeta::deserialize(metadata).ok())
                .unwrap_or_default(),
        });
        Ok(Self(read))
    }
}

impl<K: Resource> Resource for Guarded<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(of: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(of)
    }

    fn group(of: &Self::DynamicType) -> Cow<'_, str> {
        K::group(of)
    }

    fn version(of: &Self::DynamicType) -> Cow<'_, str> {
        K::version(of)
    }

    fn plural(of: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(of)
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|invalid| &invalid.metadata, K::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0
            .as_mut()
            .map_or_else(|invalid| &mut invalid.metadata, K::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    fn read(object: &Value) -> Guarded<ConfigMap> {
        serde_json::from_str(&object.to_string()).unwrap()
    }

    #[test]
    fn a_malformed_object_keeps_its_name_and_says_what_is_wrong() {
        let good = read(&json!({"metadata": {"name": "a"}, "data": {"k": "v"}}));
        assert_eq!(good.meta().name.as_deref(), Some("a"));
        assert_eq!(good.0.unwrap().data.unwrap()["k"], "v");
        let bad = read(&json!({"metadata": {"name": "b"}, "data": 7}));
        assert_eq!(bad.meta().name.as_deref(), Some("b"));
        assert!(bad.0.unwrap_err().error.contains('7'));
        assert!(read(&json!({"metadata": 7})).0.is_err());
    }
}
