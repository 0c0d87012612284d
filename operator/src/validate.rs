//! Whether a spec can be carried out by this version.
//!
//! Owns: every field and value that is not enforced yet, refused by name, and where `file:` models may lie.
//! Must not: look at the cluster.

use gogrid_api::InferenceJobSpec;
use gogrid_api::job::{Mode, Task};
use gogrid_planner::lifecycle::Refusal;

fn unsupported(field: &str, value: &str) -> Refusal {
    let message = format!(
        "{field} = {value} is not supported by this version of GoGrid: it must be left out or changed"
    );
    Refusal {
        word: "Unsupported",
        message,
    }
}

/// Why the spec is refused, if it is.
pub(crate) fn refusal(spec: &InferenceJobSpec, model_roots: &[String]) -> Option<Refusal> {
    let InferenceJobSpec {
        task,
        mode,
        model,
        profile_name: _,
        input,
        output,
        generation: _,
        context_tokens: _,
        parallel_sequences: _,
        memory,
        placement: _,
        priority_class_name: _,
        suspend: _,
        backoff_limit: _,
        active_deadline_seconds: _,
        ttl_seconds_after_finished: _,
        failure_policy: _,
        managed_by: _,
    } = spec;
    if *task != Task::TextGeneration {
        return Some(unsupported("spec.task", &format!("{task:?}")));
    }
    if *mode != Mode::Batch {
        return Some(unsupported("spec.mode", &format!("{mode:?}")));
    }
    if let Some(trust) = &model.trust {
        return Some(unsupported("spec.model.trust", &trust.repository));
    }
    if let Some(uri) = &input.uri {
        return Some(unsupported("spec.input.uri", uri));
    }
    if let Some(uri) = &output.uri {
        return Some(unsupported("spec.output.uri", uri));
    }
    if let Some(Err(error)) = memory.as_ref().map(|m| m.vram.bytes()) {
        return Some(Refusal {
            word: "InvalidMemory",
            message: format!("spec.memory.vram: {error}"),
        });
    }
    let (scheme, _) = model.uri.split_once(':').unwrap_or(("", ""));
    match scheme {
        "http" | "https" => None,
        "file" => outside(&model.uri, model_roots),
        _ => Some(unsupported("spec.model.uri", &model.uri)),
    }
}

/// Path of a `file:` URI, in either of its two forms.
pub(crate) fn file_path(uri: &str) -> Option<&str> {
    let rest = uri.strip_prefix("file:")?;
    let path = rest.strip_prefix("//").unwrap_or(rest);
    path.starts_with('/').then_some(path)
}

/// One form for URIs that mean the same.
pub(crate) fn canonical(uri: &str) -> String {
    file_path(uri).map_or_else(|| uri.to_owned(), |path| format!("file:{path}"))
}

fn outside(uri: &str, roots: &[String]) -> Option<Refusal> {
    let refuse = |why: String| {
        Some(Refusal {
            word: "OutsideModelRoots",
            message: format!("spec.model.uri = {uri} {why}"),
        })
    };
    let Some(path) = file_path(uri) else {
        return refuse("must be file: and an absolute path".into());
    };
    if path.split('/').any(|part| part == ".." || part == ".") {
        return refuse("must not contain '.' or '..'".into());
    }
    let beneath = |root: &String| {
        path.strip_prefix(root.as_str())
            .is_some_and(|rest| rest.len() > 1 && rest.starts_with('/'))
    };
    if roots.is_empty() || roots.iter().any(beneath) {
        return None;
    }
    refuse(format!(
        "must lie beneath one of the model roots {}",
        roots.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(patch: &serde_json::Value) -> InferenceJobSpec {
        let mut spec = json!({
            "model": {"uri": "file:/models/a.gguf", "sha256": "0".repeat(64)},
            "input": {"inline": ["{}"]},
            "output": {"configMap": "out"},
        });
        for (key, value) in patch.as_object().unwrap() {
            spec[key] = value.clone();
        }
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn what_is_not_enforced_is_refused_by_field_and_value() {
        let roots = ["/models".to_owned()];
        assert_eq!(refusal(&spec(&json!({})), &roots), None);
        for (patch, field) in [
            (json!({"task": "Embedding"}), "spec.task = Embedding"),
            (json!({"mode": "Service"}), "spec.mode = Service"),
            (
                json!({"model": {"uri": "https://h/a", "trust": {"repository": "r", "target": "t"}}}),
                "spec.model.trust = r",
            ),
            (json!({"input": {"uri": "s3://b/k"}}), "spec.input.uri = s3://b/k"),
            (
                json!({"output": {"uri": "s3://b/k"}}),
                "spec.output.uri = s3://b/k",
            ),
            (
                json!({"model": {"uri": "hf:a/b", "sha256": "0".repeat(64)}}),
                "spec.model.uri = hf:a/b",
            ),
        ] {
            let refusal = refusal(&spec(&patch), &roots).unwrap();
            assert_eq!(refusal.word, "Unsupported");
            assert!(refusal.message.starts_with(field), "{}", refusal.message);
        }
    }

    #[test]
    fn a_file_outside_the_roots_is_refused_however_it_is_spelt() {
        let roots = ["/models".to_owned()];
        for uri in [
            "file:/etc/passwd",
            "file:///etc/passwd",
            "file:/models",
            "file:/modelsx/a",
            "file:/models/../etc/a",
            "file:models/a",
            "file://host/models/a",
        ] {
            assert!(outside(uri, &roots).is_some(), "{uri}");
        }
        for uri in ["file:/models/a.gguf", "file:///models/b/c.gguf"] {
            assert!(outside(uri, &roots).is_none(), "{uri}");
        }
        assert_eq!(canonical("file:///models/a"), canonical("file:/models/a"));
    }
}
