//! The modelled store: what the real API server does with a write, as far as GoGrid's programs can tell.
//!
//! Owns: objects, versions, preconditions, server-side apply, the log that watches read. Every write is one step: there
//! is nothing between its check and its effect. `tests/store_model.rs` proves it against the real server.

use super::change::{leaves, merged, prune, put_in, replaced, same_object, take_out, unconditional};
use super::kind::{Kind, Place, Selector};
use super::rules;
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// Changes that a watch can still read.
const LOG: usize = 4096;

/// One version of one object.
#[derive(Debug)]
pub struct Stored {
    /// Its namespace.
    pub namespace: String,
    /// The object.
    pub value: Value,
    /// The same as JSON text.
    pub text: Bytes,
    /// Its version.
    pub version: u64,
}

impl Stored {
    fn new(namespace: &str, value: Value, version: u64) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.to_owned(),
            // What is JSON can be written as such.
            text: Bytes::from(serde_json::to_vec(&value).unwrap_or_default()),
            value,
            version,
        })
    }

    /// A text in it.
    pub fn text_at(&self, pointer: &str) -> &str {
        self.value.pointer(pointer).and_then(Value::as_str).unwrap_or("")
    }
}

/// What a write did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A new object.
    Added,
    /// A new version.
    Modified,
    /// The end of one.
    Deleted,
}

/// One entry of the log.
#[derive(Clone, Debug)]
pub struct Change {
    /// Its number.
    pub version: u64,
    /// The kind it is about.
    pub kind: Kind,
    /// What was done.
    pub what: What,
    /// The object as it is, or was last.
    pub object: Arc<Stored>,
}

/// What to do with one object.
#[derive(Clone, Debug, PartialEq)]
pub enum Verb {
    /// Read it.
    Get,
    /// Make it.
    Create(Value),
    /// Put another version in its place.
    Replace(Value),
    /// Merge patch.
    Merge(Value),
    /// Server-side apply.
    Apply {
        /// What this manager wants.
        wanted: Value,
        /// Who it is.
        manager: String,
        /// Whether other managers' fields are taken over.
        force: bool,
    },
    /// Remove it, if it is that one.
    Delete {
        /// Only of that uid.
        uid: Option<String>,
        /// Only of that version.
        version: Option<String>,
    },
}

/// A refusal, as the server words it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub code: u16,
    /// One word.
    pub reason: &'static str,
    /// A sentence.
    pub message: String,
}

pub(super) fn refuse(code: u16, reason: &'static str, message: impl Into<String>) -> Refusal {
    Refusal {
        code,
        reason,
        message: message.into(),
    }
}

type Key = (Kind, String, String);
/// Leaves that a manager has applied, as pointers.
type Owned = BTreeMap<String, BTreeSet<String>>;

/// Everything stored.
pub struct Store {
    objects: BTreeMap<Key, Arc<Stored>>,
    owned: BTreeMap<Key, Owned>,
    version: u64,
    compacted: u64,
    log: VecDeque<Change>,
    made: u64,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            owned: BTreeMap::new(),
            version: 1,
            compacted: 0,
            log: VecDeque::new(),
            made: 0,
        }
    }
}

impl Store {
    /// The newest version.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Versions up to this one can't be read any more.
    pub fn compacted(&self) -> u64 {
        self.compacted
    }

    /// Forgets what came before now: watches from before must begin anew.
    pub fn compact(&mut self) {
        self.compacted = self.version;
        self.log.clear();
    }

    /// Changes after that version, oldest first.
    pub fn after(&self, version: u64) -> impl Iterator<Item = &Change> {
        let from = self.log.partition_point(|change| change.version <= version);
        self.log.iter().skip(from)
    }

    /// One object.
    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Arc<Stored>> {
        self.objects.get(&(kind, namespace.to_owned(), name.to_owned()))
    }

    /// All objects of a kind that are selected.
    pub fn list(&self, kind: Kind, selector: &Selector) -> Vec<&Arc<Stored>> {
        self.objects
            .range((kind, String::new(), String::new())..)
            .take_while(|((k, ..), _)| *k == kind)
            .map(|(_, object)| object)
            .filter(|object| selector.takes(&object.namespace, &object.value))
            .collect()
    }

    /// The same as it was at an earlier version that is still in the log.
    pub fn list_at(&self, kind: Kind, selector: &Selector, version: u64) -> Vec<Arc<Stored>> {
        let mut then: BTreeMap<(String, String), Arc<Stored>> = BTreeMap::new();
        let place = |object: &Arc<Stored>| {
            (
                object.namespace.clone(),
                object.text_at("/metadata/name").to_owned(),
            )
        };
        for object in self.list(kind, selector) {
            then.insert(place(object), Arc::clone(object));
        }
        let later: Vec<&Change> = self.after(version).filter(|c| c.kind == kind).collect();
        for change in later {
            then.remove(&place(&change.object));
        }
        for change in self.log.iter().filter(|c| c.kind == kind && c.version <= version) {
            let touched = self
                .after(version)
                .any(|c| c.kind == kind && place(&c.object) == place(&change.object));
            if touched && change.what == What::Deleted {
                then.remove(&place(&change.object));
            } else if touched && selector.takes(&change.object.namespace, &change.object.value) {
                then.insert(place(&change.object), Arc::clone(&change.object));
            }
        }
        then.into_values().collect()
    }

    fn note(&mut self, kind: Kind, what: What, object: Arc<Stored>) {
        self.log.push_back(Change {
            version: object.version,
            kind,
            what,
            object,
        });
        if self.log.len() > LOG
            && let Some(oldest) = self.log.pop_front()
        {
            self.compacted = oldest.version;
        }
    }

    /// Does it; `now` is the time that a new object gets.
    pub fn act(&mut self, place: &Place, verb: Verb, now: &str) -> Result<Arc<Stored>, Refusal> {
        let missing = |name: &str| {
            refuse(
                404,
                "NotFound",
                format!("{} \"{name}\" not found", place.kind.name()),
            )
        };
        let name = match (&place.name, &verb) {
            (Some(name), _) => name.clone(),
            (None, Verb::Create(object)) => self.name_of(object),
            (None, _) => return Err(refuse(405, "MethodNotAllowed", "no name")),
        };
        let key = (place.kind, place.namespace.clone(), name.clone());
        let old = self.objects.get(&key).cloned();
        let old = match (verb, old) {
            (Verb::Create(_), Some(_)) => {
                return Err(refuse(409, "AlreadyExists", format!("{name} already exists")));
            }
            (Verb::Create(object), None) => return Ok(self.create(key, object, now)),
            (Verb::Get, Some(old)) => return Ok(old),
            (Verb::Apply { wanted, manager, .. }, None) if !place.status => {
                if wanted.pointer("/metadata/resourceVersion").is_some()
                    || wanted.pointer("/metadata/uid").is_some()
                {
                    return Err(refuse(409, "Conflict", format!("{name} is not there any more")));
                }
                self.owned
                    .entry(key.clone())
                    .or_default()
                    .insert(manager, leaves(&wanted, false));
                return Ok(self.create(key, wanted, now));
            }
            // Of the kinds here, only a Lease may be made by putting it.
            (Verb::Replace(object), None) if place.kind == Kind::Lease => {
                return Ok(self.create(key, object, now));
            }
            (_, None) => return Err(missing(&name)),
            (verb, Some(old)) => (verb, old),
        };
        let (verb, old) = old;
        match verb {
            Verb::Delete { uid, version } => {
                let differs = |pointer: &str, wanted: Option<String>| {
                    wanted.is_some_and(|wanted| old.text_at(pointer) != wanted)
                };
                if differs("/metadata/uid", uid) || differs("/metadata/resourceVersion", version) {
                    return Err(refuse(409, "Conflict", format!("{name} is another one now")));
                }
                Ok(self.remove(&key, &old))
            }
            Verb::Replace(object) => {
                if unconditional(&object) && place.kind != Kind::ConfigMap {
                    return Err(refuse(
                        422,
                        "Invalid",
                        "metadata.resourceVersion must be specified for an update",
                    ));
                }
                let new = replaced(place, &old.value, object)?;
                self.update(place.kind, key, &old, new)
            }
            Verb::Merge(patch) => {
                let new = merged(place, &old.value, &patch)?;
                self.update(place.kind, key, &old, new)
            }
            Verb::Apply {
                wanted,
                manager,
                force,
            } => {
                let mut owned = self.owned.get(&key).cloned().unwrap_or_default();
                let new = applied(place, &mut owned, &old.value, &wanted, &manager, force)?;
                let done = self.update(place.kind, key.clone(), &old, new)?;
                // A refused write makes nobody the owner of anything.
                self.owned.insert(key, owned);
                Ok(done)
            }
            Verb::Get | Verb::Create(_) => Ok(old),
        }
    }

    fn name_of(&mut self, object: &Value) -> String {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        match (text("/metadata/name"), text("/metadata/generateName")) {
            (Some(name), _) => name.to_owned(),
            (None, prefix) => {
                self.made += 1;
                format!("{}{:05x}", prefix.unwrap_or("x-"), self.made)
            }
        }
    }

    fn create(&mut self, key: Key, mut object: Value, now: &str) -> Arc<Stored> {
        self.version += 1;
        self.made += 1;
        let (kind, namespace, name) = &key;
        if let Some(fields) = object.as_object_mut() {
            if kind.has_status() {
                fields.remove("status");
            }
            fields.insert("apiVersion".into(), json!(kind.api_version()));
            fields.insert("kind".into(), json!(kind.name()));
            let metadata = fields.entry("metadata").or_insert_with(|| json!({}));
            if let Some(metadata) = metadata.as_object_mut() {
                metadata.insert("name".into(), json!(name));
                if !namespace.is_empty() {
                    metadata.insert("namespace".into(), json!(namespace));
                }
                metadata.insert(
                    "uid".into(),
                    json!(format!("00000000-0000-4000-8000-{:012x}", self.made)),
                );
                metadata.insert("creationTimestamp".into(), json!(now));
                metadata.insert("resourceVersion".into(), json!(self.version.to_string()));
                if kind.has_status() {
                    metadata.insert("generation".into(), json!(1));
                }
            }
        }
        prune(&mut object);
        let stored = Stored::new(namespace, object, self.version);
        let kind = *kind;
        self.objects.insert(key, Arc::clone(&stored));
        self.note(kind, What::Added, Arc::clone(&stored));
        stored
    }

    fn remove(&mut self, key: &Key, old: &Arc<Stored>) -> Arc<Stored> {
        self.version += 1;
        self.objects.remove(key);
        self.owned.remove(key);
        let mut last = old.value.clone();
        last["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let last = Stored::new(&old.namespace, last, self.version);
        self.note(key.0, What::Deleted, last);
        Arc::clone(old)
    }

    fn update(
        &mut self,
        kind: Kind,
        key: Key,
        old: &Arc<Stored>,
        mut new: Value,
    ) -> Result<Arc<Stored>, Refusal> {
        prune(&mut new);
        if let Some(rule) = rules::broken(kind, &old.value, &new) {
            return Err(refuse(422, "Invalid", rule));
        }
        if new == old.value {
            return Ok(Arc::clone(old));
        }
        self.version += 1;
        if kind.has_status() && new.get("spec") != old.value.get("spec") {
            let generation = new
                .pointer("/metadata/generation")
                .and_then(Value::as_i64)
                .unwrap_or(1);
            new["metadata"]["generation"] = json!(generation + 1);
        }
        new["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let stored = Stored::new(&old.namespace, new, self.version);
        self.objects.insert(key, Arc::clone(&stored));
        self.note(kind, What::Modified, Arc::clone(&stored));
        Ok(stored)
    }
}

/// What an apply makes of an object, and of who owns what of it.
fn applied(
    place: &Place,
    owned: &mut Owned,
    old: &Value,
    wanted: &Value,
    manager: &str,
    force: bool,
) -> Result<Value, Refusal> {
    same_object(old, wanted)?;
    let mut new = old.clone();
    let now = leaves(wanted, place.status);
    // Spec and status are owned apart.
    let manager = format!("{manager}{}", if place.status { "/status" } else { "" });
    let before = owned.remove(&manager).unwrap_or_default();
    for (other, theirs) in owned.iter() {
        let taken = theirs
            .iter()
            .find(|leaf| now.contains(*leaf) && wanted.pointer(leaf) != old.pointer(leaf));
        if let Some(leaf) = taken.filter(|_| !force) {
            return Err(refuse(409, "Conflict", format!("{leaf} belongs to {other}")));
        }
    }
    if force {
        for theirs in owned.values_mut() {
            theirs.retain(|leaf| !now.contains(leaf) || wanted.pointer(leaf) == old.pointer(leaf));
        }
    }
    for leaf in before.difference(&now) {
        if !owned.values().any(|theirs| theirs.contains(leaf)) {
            take_out(&mut new, leaf);
        }
    }
    for leaf in &now {
        if let Some(value) = wanted.pointer(leaf) {
            put_in(&mut new, leaf, value.clone());
        }
    }
    owned.insert(manager, now);
    Ok(new)
}
