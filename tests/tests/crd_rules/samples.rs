//! Valid objects of every kind, which together have every field.

use serde_json::{Value, json};

/// A kind with its valid specs and statuses.
pub(crate) struct Sample {
    pub(crate) kind: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) namespaced: bool,
    /// The first holds the most; the others hold what excludes something in it.
    pub(crate) specs: Vec<Value>,
    pub(crate) statuses: Vec<Value>,
}

/// All four kinds.
pub(crate) fn all() -> [Sample; 4] {
    [job(), profile(), assignment(), gpu_node()]
}

/// The sample of one kind.
pub(crate) fn of(kind: &str) -> Sample {
    all()
        .into_iter()
        .find(|sample| sample.kind == kind)
        .unwrap_or_else(|| panic!("no sample of {kind}"))
}

const TIME: &str = "2026-11-23T10:00:00Z";

fn digest() -> String {
    "0123456789abcdef".repeat(4)
}

fn condition() -> Value {
    json!({"type": "Accepted", "status": "True", "reason": "Accepted", "message": "fine", "observedGeneration": 1, "lastTransitionTime": TIME})
}

fn generation() -> Value {
    json!({"maxTokens": 64, "temperatureMilli": 700, "topPMilli": 900, "topK": 40, "seed": 7, "stop": ["\n"]})
}

fn stages() -> Value {
    json!([{"gpuUUID": "GPU-1", "firstLayer": 0, "lastLayer": 31, "vram": "4Gi"}])
}

fn progress() -> Value {
    json!({"done": 1, "failed": 0, "total": 2, "tokens": 30, "tokensPerSecond": "12.0", "display": "1/2"})
}

fn facts() -> Value {
    json!({
        "architecture": "llama", "name": "tiny", "quantization": "Q4_K", "fileBytes": 1, "weightBytes": 1, "parameters": 1, "layers": 1,
        "embedding": 1, "feedForward": 1, "vocabulary": 1, "contextLength": 1, "kvBytesPerToken": 1,
    })
}

fn failure() -> Value {
    json!({"reason": "OutOfMemory", "message": "4 GiB missing", "retryable": true})
}

fn download() -> Value {
    json!({"doneBytes": 1, "totalBytes": 2})
}

fn job() -> Sample {
    let most = json!({
        "task": "TextGeneration", "mode": "Batch", "model": {"uri": "file:/srv/m.gguf", "sha256": digest()}, "profileName": "default",
        "input": {"inline": ["{}"]}, "output": {"configMap": "out"}, "generation": generation(), "contextTokens": 2048,
        "parallelSequences": 4, "memory": {"vram": "4Gi"},
        "placement": {
            "split": "Auto", "cpuFallback": "IfNeeded", "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
        },
        "priorityClassName": "low", "suspend": false, "backoffLimit": 3, "activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 60,
        "failurePolicy": {"maxFailedRecords": 1, "rules": [{"onReason": "OutOfMemory", "action": "Retry"}]}, "managedBy": "someone",
    });
    let model = json!({"uri": "oci:x", "trust": {"repository": "repo", "target": "m.gguf"}});
    let referring = json!({"model": model, "input": {"configMapRef": {"name": "in", "key": "input.jsonl"}}, "output": {"uri": "s3:b/o"}});
    let fetching = json!({"model": {"uri": "hf:x", "sha256": digest()}, "input": {"uri": "s3:b/i"}, "output": {"configMap": "out"}});
    let status = json!({
        "conditions": [condition()], "epoch": 1, "term": 1, "placement": {"nodeName": "node-a", "stages": stages()}, "startTime": TIME,
        "completionTime": TIME, "suspendedSeconds": 0, "progress": progress(), "download": download(),
        "lease": {"name": "node-node-a", "holder": "boot/instance", "lastHeartbeat": TIME},
        "estimate": {"weights": "1Gi", "kvCache": "1Gi", "compute": "1Gi", "overhead": "1Gi", "total": "4Gi"},
        "measured": {"peakVRAM": "3Gi"}, "candidates": [{"node": "node-b", "free": "1Gi", "missing": "3Gi", "reason": "InsufficientVRAM"}],
        "queuePosition": 1, "attempts": 0, "lastFailure": failure(),
        "result": {"location": "configmap/out", "sha256": digest(), "bytes": 1, "records": 1, "failedRecords": 0, "preview": "{"},
        "modelName": "tiny", "profileName": "default",
    });
    Sample {
        kind: "InferenceJob",
        plural: "inferencejobs",
        namespaced: true,
        specs: vec![most, referring, fetching],
        statuses: vec![status],
    }
}

fn profile() -> Sample {
    let spec = json!({
        "vram": {"maxPercent": 50, "max": "8Gi", "reserve": "1Gi"}, "compute": {"maxPercent": 100, "minRequestIntervalMillis": 100},
        "cpu": {"niceness": 15, "weight": 100}, "io": {"class": "Idle", "level": 7}, "maxBatchSize": 2,
        "adaptive": {"mode": "ForeignLoad", "foreignLoadPercent": 20, "floorPercent": 1}, "nodeSelector": {"a": "b"}, "precedence": 0,
    });
    let status = json!({"conditions": [condition()], "nodesMatched": 1, "nodesApplied": 1, "jobs": 1});
    Sample {
        kind: "ResourceProfile",
        plural: "resourceprofiles",
        namespaced: false,
        specs: vec![spec],
        statuses: vec![status],
    }
}

fn assignment() -> Sample {
    let most = json!({
        "kind": "Run", "job": {"namespace": "default", "name": "a-job", "uid": "0-1"}, "epoch": 1, "term": 1, "nodeName": "node-a",
        "session": "boot/instance", "model": {"uri": "file:/srv/m.gguf", "sha256": digest()}, "profileName": "default", "stages": stages(),
        "generation": generation(), "contextTokens": 2048, "parallelSequences": 4,
        "inputs": [{"configMap": "input-0-1-0", "firstLine": 1, "records": 2}], "skip": [{"first": 1, "last": 1}], "maxFailedRecords": 1,
        "stop": {"reason": "Suspended", "graceSeconds": 30},
    });
    let mut carrying = most.clone();
    carrying["inputs"] = json!([{"text": "{}\n{}\n", "firstLine": 1, "records": 2}]);
    let status = json!({
        "state": "Running", "session": "boot/instance", "renewedAt": TIME, "progress": progress(), "download": download(), "measured": {"peakVRAM": "3Gi"},
        "limits": {
            "profiles": ["default@1"], "vram": "4Gi", "computePercent": 50, "minRequestIntervalMillis": 100, "niceness": 15, "io": "Idle",
            "maxBatchSize": 2,
        },
        "checkpoint": {"chunks": 1, "text": "{}\n", "lines": [{"first": 1, "last": 2}], "failed": 0, "bytes": 5}, "failure": failure(), "facts": facts(),
        "throttled": {"reason": "ForeignLoad", "message": "others work"}, "vramExceeded": {"reason": "Shed", "message": "too much"},
    });
    Sample {
        kind: "Assignment",
        plural: "assignments",
        namespaced: true,
        specs: vec![most, carrying],
        statuses: vec![status],
    }
}

fn gpu_node() -> Sample {
    let device = json!({
        "uuid": "GPU-1", "name": "Some GPU", "backend": "CUDA", "memoryTotal": "24Gi", "memoryReserved": "1Gi", "memoryForeign": "0",
        "memoryFree": "23Gi", "computeCapability": "8.6", "health": "Healthy", "message": "fine", "holder": "lab/train",
    });
    let status = json!({
        "conditions": [condition()], "session": "boot/instance", "agentVersion": "0.1.0", "devices": [device],
        "enforcement": [{"device": "GPU-1", "limit": "vram", "requested": "50%", "effective": "50%", "mechanism": "arena"}],
        "profiles": [{"name": "default", "generation": 1, "effectiveAt": TIME}],
        "models": [{"uri": "file:/srv/m.gguf", "bytes": 1, "facts": facts(), "reason": "NotAModel", "error": "none"}], "modelCount": "1",
        "heartbeat": {"lease": "node-node-a", "renewedAt": TIME, "running": [{"assignment": "0-1", "progress": progress()}]},
    });
    Sample {
        kind: "GpuNode",
        plural: "gpunodes",
        namespaced: false,
        specs: vec![json!({"nodeName": "node-a"})],
        statuses: vec![status],
    }
}
