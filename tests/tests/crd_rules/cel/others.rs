//! The rows of every kind but InferenceJob.

#![allow(clippy::needless_pass_by_value, reason = "rows are built of literals")]

use serde_json::{Value, json};

use super::{Row, Try, spec};

fn ordered(change: Value) -> Try {
    let base = spec("Assignment", 0, json!({"stop": null}));
    Try::Change {
        spec: base,
        status: json!({"state": "Running"}),
        patch: json!({"spec": change}),
    }
}

fn stopped(change: Value) -> Try {
    Try::Change {
        spec: spec("Assignment", 0, json!({})),
        status: json!({"state": "Running"}),
        patch: json!({"spec": change}),
    }
}

fn reported(from: Value, to: Value) -> Try {
    Try::ChangeStatus {
        spec: spec("Assignment", 0, json!({})),
        status: from,
        patch: json!({"status": to}),
    }
}

/// One change for every field of an order but `stop`.
fn order_changes() -> Vec<Value> {
    vec![
        json!({"kind": "Inspect"}),
        json!({"job": {"uid": "other"}}),
        json!({"epoch": 2}),
        json!({"term": 2}),
        json!({"nodeName": "node-b"}),
        json!({"session": "boot/next"}),
        json!({"model": {"sha256": "f".repeat(64)}}),
        json!({"model": {"uri": "file:/srv/other.gguf"}}),
        json!({"profileName": null}),
        json!({"profileName": "other"}),
        json!({"stages": null}),
        json!({"generation": null}),
        json!({"generation": {"seed": 8}}),
        json!({"contextTokens": 4096}),
        json!({"parallelSequences": 5}),
        json!({"inputs": []}),
        json!({"inputs": [{"text": "{}\n{}\n", "firstLine": 1, "records": 2}]}),
        json!({"skip": null}),
        json!({"maxFailedRecords": null}),
    ]
}

/// An order with these inputs.
fn fed(n: usize, input: Value) -> Try {
    let mut spec = spec("Assignment", n, json!({}));
    let input = input.as_object().cloned().unwrap_or_default();
    for (key, value) in input {
        spec["inputs"][0][key] = value;
    }
    Try::Create(spec)
}

pub(super) fn of_assignments() -> Vec<Row> {
    let order = json!({"reason": "Preempted", "graceSeconds": 5});
    let over = |state: &str| json!({"state": state});
    vec![
        Row {
            kind: "Assignment",
            rule: "has(self.configMap) != has(self.text)",
            field: "spec.inputs[0]",
            bad: vec![
                fed(0, json!({"text": "{}\n"})),
                fed(1, json!({"configMap": "input-0-1-0"})),
                fed(0, json!({"configMap": null})),
            ],
            good: vec![fed(0, json!({})), fed(1, json!({}))],
        },
        Row {
            kind: "Assignment",
            rule: concat!(
                "self.spec.kind == oldSelf.spec.kind && self.spec.job == oldSelf.spec.job && self.spec.epoch == oldSelf.spec.epoch",
                " && self.spec.term == oldSelf.spec.term && self.spec.nodeName == oldSelf.spec.nodeName",
                " && self.spec.session == oldSelf.spec.session && self.spec.model == oldSelf.spec.model",
                " && has(self.spec.profileName) == has(oldSelf.spec.profileName) && (!has(self.spec.profileName) || self.spec.profileName == oldSelf.spec.profileName) && has(self.spec.stages) == has(oldSelf.spec.stages) && (!has(self.spec.stages) || self.spec.stages == oldSelf.spec.stages)",
                " && has(self.spec.generation) == has(oldSelf.spec.generation) && (!has(self.spec.generation) || self.spec.generation == oldSelf.spec.generation) && self.spec.contextTokens == oldSelf.spec.contextTokens",
                " && self.spec.parallelSequences == oldSelf.spec.parallelSequences && has(self.spec.inputs) == has(oldSelf.spec.inputs) && (!has(self.spec.inputs) || self.spec.inputs == oldSelf.spec.inputs)",
                " && has(self.spec.skip) == has(oldSelf.spec.skip) && (!has(self.spec.skip) || self.spec.skip == oldSelf.spec.skip) && has(self.spec.maxFailedRecords) == has(oldSelf.spec.maxFailedRecords) && (!has(self.spec.maxFailedRecords) || self.spec.maxFailedRecords == oldSelf.spec.maxFailedRecords)",
            ),
            field: "",
            bad: order_changes().into_iter().map(ordered).collect(),
            good: vec![ordered(json!({"stop": order})), ordered(json!({"epoch": 1}))],
        },
        Row {
            kind: "Assignment",
            rule: "!has(oldSelf.spec.stop) || (has(self.spec.stop) && self.spec.stop == oldSelf.spec.stop)",
            field: "",
            bad: vec![
                stopped(json!({"stop": null})),
                stopped(json!({"stop": {"graceSeconds": 31}})),
                stopped(json!({"stop": {"reason": "JobDeleted"}})),
            ],
            good: vec![
                ordered(json!({"stop": order})),
                stopped(json!({"stop": {"graceSeconds": 30}})),
            ],
        },
        Row {
            kind: "Assignment",
            rule: "!has(oldSelf.status) || !has(oldSelf.status.state) || !(oldSelf.status.state in ['Stopped', 'Succeeded', 'Failed']) || (has(self.status) && has(self.status.state) && self.status.state == oldSelf.status.state)",
            field: "",
            bad: vec![
                reported(over("Stopped"), json!({"state": "Running"})),
                reported(over("Succeeded"), json!({"state": "Failed"})),
                reported(over("Failed"), json!({"state": null})),
                reported(over("Succeeded"), Value::Null),
            ],
            good: vec![
                reported(over("Succeeded"), json!({"session": "boot/next"})),
                reported(over("Running"), json!({"state": "Stopped"})),
                reported(over("Stopping"), json!({"state": "Running"})),
                reported(json!({"session": "boot/next"}), json!({"state": "Failed"})),
            ],
        },
    ]
}

pub(super) fn of_the_rest() -> Vec<Row> {
    let shares = |floor: i32, most: i32| {
        Try::Create(spec(
            "ResourceProfile",
            0,
            json!({"adaptive": {"floorPercent": floor}, "compute": {"maxPercent": most}}),
        ))
    };
    let node = || json!({"nodeName": "node-x"});
    vec![
        Row {
            kind: "ResourceProfile",
            rule: "self.spec.adaptive.floorPercent <= self.spec.compute.maxPercent",
            field: "",
            bad: vec![
                shares(51, 50),
                shares(100, 99),
                Try::Create(spec(
                    "ResourceProfile",
                    0,
                    json!({"adaptive": null, "compute": {"maxPercent": 4}}),
                )),
            ],
            good: vec![
                shares(50, 50),
                shares(1, 100),
                Try::Create(spec(
                    "ResourceProfile",
                    0,
                    json!({"adaptive": null, "io": null, "compute": {"maxPercent": 5}}),
                )),
            ],
        },
        Row {
            kind: "GpuNode",
            rule: "self.metadata.name == self.spec.nodeName",
            field: "",
            bad: vec![Try::CreateNamed("node-y", node())],
            good: vec![Try::Create(node())],
        },
        Row {
            kind: "GpuNode",
            rule: "self.spec.nodeName == oldSelf.spec.nodeName",
            field: "",
            bad: vec![Try::Change {
                spec: json!({"nodeName": "node-z"}),
                status: json!({"agentVersion": "1"}),
                patch: json!({"spec": {"nodeName": "node-y"}}),
            }],
            good: vec![Try::Change {
                spec: json!({"nodeName": "node-z"}),
                status: json!({"agentVersion": "1"}),
                patch: json!({"spec": {"nodeName": "node-z"}}),
            }],
        },
    ]
}
