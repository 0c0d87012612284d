//! The bill of materials of a program, from the dependency list that `cargo auditable` put into the program itself.
//!
//! Owns: its form, CycloneDX 1.5 in JSON. Must not: guess; what the program doesn't say isn't in it.

use std::path::Path;

use anyhow::{Context as _, Result};
use auditable_info::{Limits, audit_info_from_file};
use auditable_serde::{DependencyKind, VersionInfo};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The dependency list that is in a program. Fails for one that was built without `cargo auditable`.
pub(super) fn listed(program: &Path) -> Result<VersionInfo> {
    audit_info_from_file(program, Limits::default()).with_context(|| {
        format!(
            "{}: no dependency list; build it by `cargo auditable`",
            program.display()
        )
    })
}

/// The bill of materials: crates from `listed` and what of the build machine's libraries comes along, path and content.
pub(super) fn bill(listed: &VersionInfo, libraries: &[(String, Vec<u8>)]) -> Value {
    let reference = |index: usize| {
        let package = listed.packages.get(index)?;
        Some(format!("pkg:cargo/{}@{}", package.name, package.version))
    };
    let (mut program, mut components, mut dependencies) = (Value::Null, vec![], vec![]);
    for (index, package) in listed.packages.iter().enumerate() {
        let purl = reference(index);
        let component = json!({
            "type": if package.root { "application" } else { "library" },
            "bom-ref": purl, "purl": purl, "name": package.name, "version": package.version.to_string(),
            // What only ran during the build is listed too, and marked.
            "scope": if package.kind == DependencyKind::Build { "excluded" } else { "required" },
        });
        let needs: Vec<_> = package
            .dependencies
            .iter()
            .filter_map(|i| reference(*i))
            .collect();
        dependencies.push(json!({"ref": purl, "dependsOn": needs}));
        if package.root {
            program = component;
        } else {
            components.push(component);
        }
    }
    components.extend(libraries.iter().map(|(path, content)| {
        let digest: String = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
        json!({"type": "file", "bom-ref": path, "name": path, "hashes": [{"alg": "SHA-256", "content": digest}]})
    }));
    json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": program}, "components": components, "dependencies": dependencies,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bill_names_the_program_every_crate_once_what_needs_what_and_libraries_by_digest() {
        let listed: VersionInfo = serde_json::from_str(
            r#"{"packages": [
                {"name": "bytes", "version": "1.0.0", "source": "crates.io"},
                {"name": "cc", "version": "1.2.0", "source": "crates.io", "kind": "build"},
                {"name": "gogrid-agent", "version": "0.1.0", "source": "local", "dependencies": [0, 1], "root": true}
            ]}"#,
        )
        .unwrap();
        let bill = bill(&listed, &[("/lib/libc.so.6".into(), b"c".to_vec())]);
        assert_eq!(bill["metadata"]["component"]["name"], "gogrid-agent");
        let of = |key: &str| -> Vec<&str> {
            let components = bill["components"].as_array().unwrap();
            components.iter().filter_map(|c| c[key].as_str()).collect()
        };
        assert_eq!(
            of("bom-ref"),
            ["pkg:cargo/bytes@1.0.0", "pkg:cargo/cc@1.2.0", "/lib/libc.so.6"]
        );
        assert_eq!(of("scope"), ["required", "excluded"]);
        assert_eq!(
            bill["dependencies"][2],
            json!({"ref": "pkg:cargo/gogrid-agent@0.1.0", "dependsOn": ["pkg:cargo/bytes@1.0.0", "pkg:cargo/cc@1.2.0"]})
        );
    }

    #[test]
    fn a_program_without_a_list_is_refused_by_name() {
        let error = listed(Path::new("/proc/self/exe")).unwrap_err();
        assert!(format!("{error:#}").contains("cargo auditable"), "{error:#}");
    }
}
