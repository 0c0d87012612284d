//! The kinds of object that GoGrid's programs touch, and the paths by which they name them.
//!
//! Owns: request paths and selectors in, names out. Must not store anything.

use serde_json::Value;

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// InferenceJob.
    Job,
    /// Assignment.
    Assignment,
    /// GpuNode.
    GpuNode,
    /// ResourceProfile.
    Profile,
    /// ConfigMap.
    ConfigMap,
    /// Node.
    Node,
    /// Lease.
    Lease,
    /// Event.
    Event,
    /// PriorityClass.
    Priority,
    /// CustomResourceDefinition.
    Definition,
}

const KINDS: [(Kind, &str, &str, &str, bool); 10] = [
    (
        Kind::Job,
        "apis/gogrid.dev/v1alpha1",
        "inferencejobs",
        "InferenceJob",
        true,
    ),
    (
        Kind::Assignment,
        "apis/gogrid.dev/v1alpha1",
        "assignments",
        "Assignment",
        true,
    ),
    (
        Kind::GpuNode,
        "apis/gogrid.dev/v1alpha1",
        "gpunodes",
        "GpuNode",
        false,
    ),
    (
        Kind::Profile,
        "apis/gogrid.dev/v1alpha1",
        "resourceprofiles",
        "ResourceProfile",
        false,
    ),
    (Kind::ConfigMap, "api/v1", "configmaps", "ConfigMap", true),
    (Kind::Node, "api/v1", "nodes", "Node", false),
    (
        Kind::Lease,
        "apis/coordination.k8s.io/v1",
        "leases",
        "Lease",
        true,
    ),
    (Kind::Event, "apis/events.k8s.io/v1", "events", "Event", true),
    (
        Kind::Priority,
        "apis/scheduling.k8s.io/v1",
        "priorityclasses",
        "PriorityClass",
        false,
    ),
    (
        Kind::Definition,
        "apis/apiextensions.k8s.io/v1",
        "customresourcedefinitions",
        "CustomResourceDefinition",
        false,
    ),
];

impl Kind {
    fn row(self) -> (&'static str, &'static str, &'static str) {
        let found = KINDS.iter().find(|(kind, ..)| *kind == self);
        found.map_or(("", "", ""), |(_, base, plural, name, _)| (*base, *plural, *name))
    }

    /// The kind of a path, and what is left of it; a namespace in it is passed over.
    fn of(path: &str) -> Option<(Self, Option<String>, Vec<String>)> {
        let path = path.trim_start_matches('/');
        for (kind, base, plural, ..) in KINDS {
            let Some(rest) = path.strip_prefix(base).and_then(|rest| rest.strip_prefix('/')) else {
                continue;
            };
            let mut parts = rest.split('/').map(str::to_owned);
            let mut first = parts.next()?;
            let mut namespace = None;
            // `namespaces/NAME/PLURAL…` names a namespace.
            if first == "namespaces" {
                namespace = parts.next();
                first = parts.next()?;
            }
            if first == plural {
                return Some((kind, namespace, parts.collect()));
            }
        }
        None
    }

    /// `group/version` as objects say it.
    pub fn api_version(self) -> &'static str {
        let (base, ..) = self.row();
        base.strip_prefix("apis/")
            .or(base.strip_prefix("api/"))
            .unwrap_or(base)
    }

    /// The kind's name.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Whether spec and status are written apart.
    pub fn has_status(self) -> bool {
        matches!(self, Self::Job | Self::Assignment | Self::GpuNode | Self::Profile)
    }
}

/// What a request's path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Kind.
    pub kind: Kind,
    /// Namespace; empty where there is none.
    pub namespace: String,
    /// One object, or all of them.
    pub name: Option<String>,
    /// Its status alone.
    pub status: bool,
}

impl Place {
    /// The path that names it.
    pub fn path(&self) -> String {
        let found = KINDS.iter().find(|(kind, ..)| *kind == self.kind);
        let (base, plural) = found.map_or(("", ""), |(_, base, plural, ..)| (*base, *plural));
        let namespace = if self.namespace.is_empty() {
            String::new()
        } else {
            format!("/namespaces/{}", self.namespace)
        };
        let name = self
            .name
            .as_ref()
            .map_or_else(String::new, |name| format!("/{name}"));
        let status = if self.status { "/status" } else { "" };
        format!("/{base}{namespace}/{plural}{name}{status}")
    }

    /// What a path names, if it is one that GoGrid uses.
    pub fn parse(path: &str) -> Option<Self> {
        let (kind, namespace, rest) = Kind::of(path)?;
        let mut rest = rest.into_iter();
        Some(Self {
            kind,
            namespace: namespace.unwrap_or_default(),
            name: rest.next(),
            status: rest.next().as_deref() == Some("status"),
        })
    }
}

/// Which objects of a kind a list or watch is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Namespace; empty = all.
    pub namespace: String,
    /// Ways into the object and the texts that must stand there.
    equal: Vec<(Vec<String>, String)>,
}

impl Selector {
    /// All in a namespace.
    pub fn within(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            equal: vec![],
        }
    }

    /// Adds `labelSelector` or `fieldSelector` of the form `a=b,c=d`.
    pub fn add(&mut self, labels: bool, text: &str) {
        for (key, value) in text.split(',').filter_map(|part| part.split_once('=')) {
            let value = value.trim_start_matches('=').to_owned();
            let way = if labels {
                vec!["metadata".into(), "labels".into(), key.into()]
            } else {
                key.split('.').map(str::to_owned).collect()
            };
            self.equal.push((way, value));
        }
    }

    /// Whether an object in that namespace is one of them.
    pub fn takes(&self, namespace: &str, object: &Value) -> bool {
        (self.namespace.is_empty() || self.namespace == namespace)
            && self.equal.iter().all(|(way, value)| {
                let found = way.iter().try_fold(object, |at, part| at.get(part));
                found.and_then(Value::as_str) == Some(value)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_path_names_a_kind_a_namespace_an_object_and_its_status() {
        let place = Place::parse("/apis/gogrid.dev/v1alpha1/namespaces/a/inferencejobs/b/status").unwrap();
        assert_eq!(
            (
                place.kind,
                place.namespace.as_str(),
                place.name.as_deref(),
                place.status
            ),
            (Kind::Job, "a", Some("b"), true)
        );
        let place = Place::parse("/api/v1/nodes").unwrap();
        assert_eq!((place.kind, place.name), (Kind::Node, None));
        assert_eq!(Place::parse("/api/v1/pods"), None);
    }

    #[test]
    fn a_selector_takes_what_carries_all_its_labels_and_fields() {
        let mut selector = Selector::default();
        selector.add(true, "gogrid.dev/role=input,x=y");
        selector.add(false, "spec.nodeName=n");
        let object = json!({"metadata": {"labels": {"gogrid.dev/role": "input", "x": "y"}}, "spec": {"nodeName": "n"}});
        assert!(selector.takes("any", &object));
        assert!(!selector.takes("any", &json!({"spec": {"nodeName": "n"}})));
    }
}
