//! What every CEL rule refuses and what it lets through, keyed by the rule's own text: a rule that is new or changed
//! has no row until somebody has thought about it again.

#![allow(clippy::needless_pass_by_value, reason = "rows are built of literals")]

mod others;

use serde_json::{Value, json};

use crate::samples;

/// One object, or one change of a stored object, for a rule to judge.
#[derive(Clone, Debug)]
pub(crate) enum Try {
    /// A new object: its spec.
    Create(Value),
    /// A new object under a name that is not its node's.
    CreateNamed(&'static str, Value),
    /// A stored spec and status, and what is merged into the object.
    Change {
        spec: Value,
        status: Value,
        patch: Value,
    },
    /// As above, through the status subresource.
    ChangeStatus {
        spec: Value,
        status: Value,
        patch: Value,
    },
}

/// A rule with what it refuses and what it lets through.
pub(crate) struct Row {
    pub(crate) kind: &'static str,
    pub(crate) rule: &'static str,
    /// Where the API server says the fault is; empty at the root.
    pub(crate) field: &'static str,
    pub(crate) bad: Vec<Try>,
    pub(crate) good: Vec<Try>,
}

/// The `n`-th valid spec with fields merged into it; null takes one away.
fn spec(kind: &str, n: usize, changes: Value) -> Value {
    let mut spec = samples::of(kind).specs.swap_remove(n);
    merge(&mut spec, changes);
    spec
}

fn merge(into: &mut Value, changes: Value) {
    let Value::Object(changes) = changes else {
        *into = changes;
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in changes {
        if value.is_null() {
            drop(into.as_object_mut().and_then(|map| map.remove(&key)));
        } else {
            merge(&mut into[&key], value);
        }
    }
}

fn placement(node: &str) -> Value {
    json!({"nodeName": node, "stages": [{"gpuUUID": "GPU-1", "firstLayer": 0, "lastLayer": 3, "vram": "1Gi"}]})
}

/// A placed job's spec is changed.
fn placed(base: Value, change: Value) -> Try {
    let status = json!({"epoch": 1, "term": 1, "placement": placement("node-a")});
    Try::Change {
        spec: base,
        status,
        patch: json!({"spec": change}),
    }
}

/// An unplaced job's spec is changed.
fn unplaced(change: Value) -> Try {
    Try::Change {
        spec: spec("InferenceJob", 0, json!({})),
        status: json!({"queuePosition": 1}),
        patch: json!({"spec": change}),
    }
}

/// A job's status goes from one to another.
fn turns(status: Value, patch: Value) -> Try {
    Try::ChangeStatus {
        spec: spec("InferenceJob", 0, json!({})),
        status,
        patch: json!({"status": patch}),
    }
}

/// One row a rule.
pub(crate) fn rows() -> Vec<Row> {
    [
        of_jobs(),
        of_a_jobs_parts(),
        others::of_assignments(),
        others::of_the_rest(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn of_jobs() -> Vec<Row> {
    let first = json!({"epoch": 1, "term": 1, "placement": placement("node-a")});
    let third = json!({"epoch": 1, "term": 3, "placement": placement("node-a")});
    let base = || spec("InferenceJob", 0, json!({}));
    let suspended = || spec("InferenceJob", 0, json!({"suspend": true}));
    vec![
        Row {
            kind: "InferenceJob",
            rule: "self.?status.?epoch.orValue(0) == oldSelf.?status.?epoch.orValue(0) || self.?status.?epoch.orValue(0) == oldSelf.?status.?epoch.orValue(0) + 1",
            field: "",
            bad: vec![
                turns(first.clone(), json!({"epoch": 3, "placement": null})),
                turns(first.clone(), json!({"epoch": 0})),
                turns(first.clone(), json!({"epoch": null})),
                turns(json!({"queuePosition": 1}), json!({"epoch": 2})),
                turns(
                    json!({"queuePosition": 1}),
                    json!({"epoch": 9_007_199_254_740_991_i64}),
                ),
            ]
            .into_iter()
            .map(without_placement)
            .collect(),
            good: vec![
                turns(first.clone(), json!({"epoch": 2})),
                turns(first.clone(), json!({"epoch": 1, "queuePosition": 1})),
                turns(
                    json!({"queuePosition": 1}),
                    json!({"epoch": 1, "placement": placement("node-a")}),
                ),
            ],
        },
        Row {
            kind: "InferenceJob",
            rule: concat!(
                "self.?status.?epoch.orValue(0) == oldSelf.?status.?epoch.orValue(0) + 1",
                " || (has(self.status) && has(self.status.placement)) == (has(oldSelf.status) && has(oldSelf.status.placement))",
                " && (!(has(self.status) && has(self.status.placement)) || self.status.placement == oldSelf.status.placement)",
            ),
            field: "",
            bad: vec![
                turns(first.clone(), json!({"placement": {"nodeName": "node-b"}})),
                turns(
                    first.clone(),
                    json!({"placement": placement("node-b"), "epoch": 1, "term": 9}),
                ),
                turns(first.clone(), json!({"placement": null})),
                turns(json!({"epoch": 1}), json!({"placement": placement("node-a")})),
                turns(
                    json!({"queuePosition": 1}),
                    json!({"placement": placement("node-a")}),
                ),
            ],
            good: vec![
                turns(
                    first.clone(),
                    json!({"epoch": 2, "placement": {"nodeName": "node-b"}}),
                ),
                turns(first.clone(), json!({"epoch": 2, "placement": null})),
                turns(
                    first.clone(),
                    json!({"attempts": 1, "placement": placement("node-a")}),
                ),
            ],
        },
        Row {
            kind: "InferenceJob",
            rule: "self.?status.?term.orValue(0) >= oldSelf.?status.?term.orValue(0)",
            field: "",
            bad: vec![
                turns(third.clone(), json!({"term": 2})),
                turns(third.clone(), json!({"term": null})),
                turns(third.clone(), json!({"term": 2, "epoch": 2})),
            ],
            good: vec![
                turns(third.clone(), json!({"term": 3})),
                turns(third, json!({"term": 9, "epoch": 2})),
            ],
        },
        Row {
            kind: "InferenceJob",
            rule: concat!(
                "oldSelf.?status.?epoch.orValue(0) == 0 || (self.spec.task == oldSelf.spec.task && self.spec.mode == oldSelf.spec.mode",
                " && self.spec.model == oldSelf.spec.model && has(self.spec.profileName) == has(oldSelf.spec.profileName) && (!has(self.spec.profileName) || self.spec.profileName == oldSelf.spec.profileName)",
                " && self.spec.input == oldSelf.spec.input && self.spec.output == oldSelf.spec.output",
                " && self.spec.generation == oldSelf.spec.generation && self.spec.contextTokens == oldSelf.spec.contextTokens",
                " && self.spec.parallelSequences == oldSelf.spec.parallelSequences && has(self.spec.memory) == has(oldSelf.spec.memory) && (!has(self.spec.memory) || self.spec.memory == oldSelf.spec.memory)",
                " && self.spec.backoffLimit == oldSelf.spec.backoffLimit",
                " && has(self.spec.activeDeadlineSeconds) == has(oldSelf.spec.activeDeadlineSeconds) && (!has(self.spec.activeDeadlineSeconds) || self.spec.activeDeadlineSeconds == oldSelf.spec.activeDeadlineSeconds)",
                " && self.spec.failurePolicy == oldSelf.spec.failurePolicy && has(self.spec.managedBy) == has(oldSelf.spec.managedBy) && (!has(self.spec.managedBy) || self.spec.managedBy == oldSelf.spec.managedBy)",
                " && self.spec.placement.split == oldSelf.spec.placement.split",
                " && self.spec.placement.cpuFallback == oldSelf.spec.placement.cpuFallback)",
            ),
            field: "",
            bad: job_changes()
                .into_iter()
                .map(|change| placed(base(), change))
                .collect(),
            good: job_changes()
                .into_iter()
                .map(unplaced)
                .chain([
                    placed(base(), json!({"suspend": true})),
                    // As much as a job can hold: comparing it must stay within what a rule may cost.
                    placed(
                        spec(
                            "InferenceJob",
                            0,
                            json!({"input": {"inline": vec!["x".repeat(4096); 256]}}),
                        ),
                        json!({"suspend": true}),
                    ),
                    placed(base(), json!({"priorityClassName": "high"})),
                    placed(base(), json!({"priorityClassName": null})),
                    placed(base(), json!({"ttlSecondsAfterFinished": 5})),
                ])
                .collect(),
        },
        Row {
            kind: "InferenceJob",
            rule: concat!(
                "oldSelf.?status.?epoch.orValue(0) == 0 || oldSelf.spec.suspend",
                " || (has(self.spec.placement.nodeSelector) == has(oldSelf.spec.placement.nodeSelector) && (!has(self.spec.placement.nodeSelector) || self.spec.placement.nodeSelector == oldSelf.spec.placement.nodeSelector)",
                " && has(self.spec.placement.tolerations) == has(oldSelf.spec.placement.tolerations) && (!has(self.spec.placement.tolerations) || self.spec.placement.tolerations == oldSelf.spec.placement.tolerations))",
            ),
            field: "",
            bad: place_changes()
                .into_iter()
                .map(|change| placed(base(), change))
                .collect(),
            good: place_changes()
                .into_iter()
                .map(|change| placed(suspended(), change))
                .chain(place_changes().into_iter().map(unplaced))
                .collect(),
        },
    ]
}

/// The second rule would refuse as well where a placement stays behind: the first is judged alone.
fn without_placement(attempt: Try) -> Try {
    let Try::ChangeStatus {
        spec,
        mut status,
        mut patch,
    } = attempt
    else {
        return attempt;
    };
    merge(&mut status, json!({"placement": null}));
    drop(
        patch["status"]
            .as_object_mut()
            .and_then(|map| map.remove("placement")),
    );
    Try::ChangeStatus { spec, status, patch }
}

/// One change for every field of a job's spec that stays as it is once the job was placed.
fn job_changes() -> Vec<Value> {
    vec![
        json!({"task": "Embedding"}),
        json!({"mode": "Service"}),
        json!({"model": {"uri": "file:/srv/other.gguf"}}),
        json!({"model": {"sha256": "f".repeat(64)}}),
        json!({"profileName": "other"}),
        json!({"profileName": null}),
        json!({"input": {"inline": ["{}", "{}"]}}),
        json!({"output": {"configMap": "other"}}),
        json!({"generation": {"maxTokens": 65}}),
        json!({"contextTokens": 4096}),
        json!({"parallelSequences": 5}),
        json!({"memory": {"vram": "5Gi"}}),
        json!({"memory": null}),
        json!({"backoffLimit": 4}),
        json!({"activeDeadlineSeconds": 61}),
        json!({"activeDeadlineSeconds": null}),
        json!({"failurePolicy": {"maxFailedRecords": 2}}),
        json!({"managedBy": "other"}),
        json!({"placement": {"split": "SingleNode"}}),
        json!({"placement": {"cpuFallback": "Never"}}),
    ]
}

fn place_changes() -> Vec<Value> {
    vec![
        json!({"placement": {"nodeSelector": {"disk": "slow"}}}),
        json!({"placement": {"nodeSelector": null}}),
        json!({"placement": {"tolerations": [{"operator": "Exists"}]}}),
        json!({"placement": {"tolerations": null}}),
    ]
}

fn of_a_jobs_parts() -> Vec<Row> {
    let job = |n, change| Try::Create(spec("InferenceJob", n, change));
    let bearing = |toleration: Value| job(0, json!({"placement": {"tolerations": [toleration]}}));
    let reference = json!({"name": "in", "key": "k"});
    vec![
        Row {
            kind: "InferenceJob",
            rule: "has(self.sha256) != has(self.trust)",
            field: "spec.model",
            bad: vec![
                job(0, json!({"model": {"sha256": null}})),
                job(0, json!({"model": {"trust": {"repository": "r", "target": "t"}}})),
            ],
            good: vec![job(0, json!({})), job(1, json!({}))],
        },
        Row {
            kind: "InferenceJob",
            rule: "(has(self.inline) ? 1 : 0) + (has(self.configMapRef) ? 1 : 0) + (has(self.uri) ? 1 : 0) == 1",
            field: "spec.input",
            bad: vec![
                job(0, json!({"input": {"inline": null}})),
                job(0, json!({"input": {"configMapRef": reference}})),
                job(0, json!({"input": {"uri": "s3:b/i"}})),
                job(1, json!({"input": {"uri": "s3:b/i"}})),
                job(0, json!({"input": {"configMapRef": reference, "uri": "s3:b/i"}})),
            ],
            good: vec![job(0, json!({})), job(1, json!({})), job(2, json!({}))],
        },
        Row {
            kind: "InferenceJob",
            rule: "has(self.configMap) != has(self.uri)",
            field: "spec.output",
            bad: vec![
                job(0, json!({"output": {"configMap": null}})),
                job(0, json!({"output": {"uri": "s3:b/o"}})),
            ],
            good: vec![job(0, json!({})), job(1, json!({}))],
        },
        Row {
            kind: "InferenceJob",
            rule: "has(self.operator) && self.operator == 'Exists' ? !has(self.value) : has(self.key)",
            field: "spec.placement.tolerations[0]",
            bad: vec![
                bearing(json!({"operator": "Exists", "value": "v"})),
                bearing(json!({"operator": "Equal", "value": "v"})),
                bearing(json!({"value": "v"})),
                bearing(json!({"effect": "NoSchedule"})),
            ],
            good: vec![
                bearing(json!({"operator": "Exists"})),
                bearing(json!({"key": "k", "operator": "Exists"})),
                bearing(json!({"key": "k", "value": "v"})),
            ],
        },
        Row {
            kind: "InferenceJob",
            rule: "!self.startsWith('system-')",
            field: "spec.priorityClassName",
            bad: vec![
                job(0, json!({"priorityClassName": "system-node-critical"})),
                job(0, json!({"priorityClassName": "system-x"})),
            ],
            good: vec![
                job(0, json!({"priorityClassName": "systemic"})),
                job(0, json!({"priorityClassName": null})),
            ],
        },
    ]
}
