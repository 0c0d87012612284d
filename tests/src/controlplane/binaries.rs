//! Where the control plane's programs are, built on first use.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};

/// Names a directory that holds all five programs; nothing is looked for or built elsewhere then.
const DIR_VARIABLE: &str = "GOGRID_CONTROLPLANE_BIN";
const NAMES: [&str; 5] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kubectl",
    "helm",
];

/// The directory with the control plane's programs.
#[derive(Clone, Debug)]
pub struct Binaries {
    dir: PathBuf,
}

impl Binaries {
    /// Finds the programs, or builds them with `tests/controlplane/build.sh`, whose progress goes to standard error.
    pub async fn find() -> Result<Self> {
        let dir = find_set("controlplane", DIR_VARIABLE, &NAMES).await?;
        Ok(Self { dir })
    }

    /// The etcd server.
    pub fn etcd(&self) -> PathBuf {
        self.dir.join("etcd")
    }

    /// The Kubernetes API server.
    pub fn api_server(&self) -> PathBuf {
        self.dir.join("kube-apiserver")
    }

    /// The Kubernetes controller manager.
    pub fn controller_manager(&self) -> PathBuf {
        self.dir.join("kube-controller-manager")
    }

    /// The Kubernetes command line.
    pub fn kubectl(&self) -> PathBuf {
        self.dir.join("kubectl")
    }

    /// The Helm command line.
    pub fn helm(&self) -> PathBuf {
        self.dir.join("helm")
    }
}

/// The directory with one set of programs: the one that `variable` names, else where `build.sh` puts them.
pub(crate) async fn find_set(set: &str, variable: &str, names: &[&str]) -> Result<PathBuf> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the tests' only configuration is the environment"
    )]
    let given = std::env::var_os(variable).filter(|dir| !dir.is_empty());
    let dir = match given {
        Some(dir) => PathBuf::from(dir),
        None => build_set(set).await?,
    };
    for name in names {
        ensure!(dir.join(name).is_file(), "{} holds no {name}", dir.display());
    }
    Ok(dir)
}

async fn build_set(set: &str) -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("controlplane/build.sh");
    let built = tokio::process::Command::new(&script)
        .arg(set)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("running {}", script.display()))?;
    ensure!(
        built.status.success(),
        "building the programs of {set} failed ({}); see above",
        built.status
    );
    let output = String::from_utf8(built.stdout)?;
    let dir = output.lines().last().context("the build printed no directory")?;
    Ok(PathBuf::from(dir))
}
