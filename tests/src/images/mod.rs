//! GoGrid's container images, put together from programs that are already built, without Docker.
//!
//! Owns: what is in each image and how it is run; the Containerfiles in `charts/gogrid/images/` say the same for people who
//! build with a container tool. Must not: compile anything.

mod oci;
mod sbom;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use gogrid_testmodels::demo;
use serde_json::{Value, json};

pub use oci::{Image, Layer, image};

/// Where the agent's image holds the demo model: a root of the chart's, so that a first job needs no file on any node.
pub const MODELS: &str = "/usr/share/gogrid/models";
/// Numeric user of everything that isn't the agent.
const NOBODY: &str = "65532:65532";

/// The three programs that images are made of.
#[derive(Clone, Debug)]
pub struct Built {
    /// The operator; static, or its libraries come along.
    pub operator: PathBuf,
    /// The agent.
    pub agent: PathBuf,
    /// The worker, for the CPU.
    pub worker: PathBuf,
}

/// What a program's image is called in the chart's default values, in full.
pub fn reference(program: &str, tag: &str) -> String {
    format!("docker.io/gogrid/{program}:{tag}")
}

impl Built {
    /// Bills of materials by short name, CycloneDX; fails for programs that were built without `cargo auditable`.
    pub fn bills(&self) -> Result<BTreeMap<&'static str, Value>> {
        let programs = [
            ("operator", &self.operator),
            ("agent", &self.agent),
            ("worker", &self.worker),
        ];
        programs
            .into_iter()
            .map(|(name, program)| Ok((name, sbom::bill(&sbom::listed(program)?, &libraries(program)?))))
            .collect()
    }

    /// Images by short name (`operator`, `agent`, `worker`), under that tag.
    pub fn images(&self, tag: &str) -> Result<BTreeMap<&'static str, Image>> {
        let model = std::fs::read(demo::demo_model_path(demo::Quant::Q4K)).context("the demo model")?;
        let operator = with_program(&self.operator, "gogrid-operator")?;
        let agent = with_program(&self.agent, "gogrid-agent")?
            .directory("/tmp", 0o1777)
            .file(&format!("{MODELS}/gogrid-demo-q4_k.gguf"), model, false);
        let worker = with_program(&self.worker, "gogrid-worker")?;
        let made = [
            ("operator", NOBODY, operator),
            // Root for its files on the node; the pod takes every capability away.
            ("agent", "0:0", agent),
            ("worker", NOBODY, worker),
        ];
        made.into_iter()
            .map(|(name, user, layer)| {
                let config = json!({
                    "Entrypoint": [format!("/usr/bin/gogrid-{name}")], "User": user, "WorkingDir": "/",
                    "Env": ["PATH=/usr/bin"],
                    "Labels": {"org.opencontainers.image.title": format!("gogrid-{name}"),
                        "org.opencontainers.image.version": tag, "org.opencontainers.image.licenses": "Apache-2.0"},
                });
                Ok((name, image(&reference(name, tag), &config, &layer)?))
            })
            .collect()
    }
}

/// The image of the first process of every pod on test nodes.
pub fn pause(program: &Path) -> Result<Vec<u8>> {
    let layer = Layer::default().file("/pause", read(program)?, true);
    let made = image(
        "gogrid.test/pause:1",
        &json!({"Entrypoint": ["/pause"], "User": NOBODY}),
        &layer,
    )?;
    Ok(made.archive)
}

/// A layer with the program in `/usr/bin`, stripped, and the shared libraries it needs, if any.
fn with_program(program: &Path, name: &str) -> Result<Layer> {
    let mut layer = Layer::default().file(&format!("/usr/bin/{name}"), stripped(program)?, true);
    for (path, content) in libraries(program)? {
        layer = layer.file(&path, content, true);
    }
    Ok(layer)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// The program without symbols and debug sections: a panic still names file and line.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let output = tempfile::NamedTempFile::new()?;
    let ended = Command::new("strip")
        .arg("--strip-all")
        .arg("-o")
        .arg(output.path())
        .arg(program)
        .output()
        .context("running strip (of binutils)")?;
    ensure!(
        ended.status.success(),
        "strip {}: {}",
        program.display(),
        String::from_utf8_lossy(&ended.stderr)
    );
    read(output.path())
}

/// Path and content of the shared libraries and the loader that a program needs; none when it is static.
fn libraries(program: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let ended = Command::new("ldd")
        .arg(program)
        .stdin(Stdio::null())
        .output()
        .context("running ldd")?;
    let text = String::from_utf8_lossy(&ended.stdout).into_owned() + &String::from_utf8_lossy(&ended.stderr);
    if text.contains("statically linked") || text.contains("not a dynamic executable") {
        return Ok(vec![]);
    }
    ensure!(
        ended.status.success() && !text.contains("not found"),
        "ldd {}: {text}",
        program.display()
    );
    let with_content = |path: String| Ok((path.clone(), read(Path::new(&path))?));
    needed(&text).into_iter().map(with_content).collect()
}

/// The absolute paths in `ldd`'s answer; what the kernel maps by itself has none.
fn needed(answer: &str) -> Vec<String> {
    let path = |line: &str| {
        let line = line.trim();
        let found = line.split_once("=> ").map_or(line, |(_, found)| found);
        let path = found.split(" (").next().unwrap_or_default();
        path.starts_with('/').then(|| path.to_owned())
    };
    answer.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_loader_are_read_from_ldd_and_the_vdso_is_not() {
        let answer = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            needed(answer),
            [
                "/lib/x86_64-linux-gnu/libgcc_s.so.1",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
    }
}
