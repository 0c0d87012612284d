//! kubectl and helm against the control plane, with nothing of the user's home read or written.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use tokio::process::Command;

use super::ControlPlane;

impl ControlPlane {
    /// The kubectl program.
    pub fn kubectl_path(&self) -> PathBuf {
        self.binaries.kubectl()
    }

    /// The helm program.
    pub fn helm_path(&self) -> PathBuf {
        self.binaries.helm()
    }

    /// Runs kubectl as the admin and returns what it wrote to standard output; its error text on failure.
    pub async fn kubectl<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<String> {
        self.tool(self.kubectl_path(), args).await
    }

    /// `kubectl apply --server-side` of YAML text.
    pub async fn kubectl_apply(&self, yaml: &str) -> Result<String> {
        let mut file = tempfile::NamedTempFile::new_in(&self.layout.dir)?;
        file.write_all(yaml.as_bytes())?;
        let path = file.path().to_owned();
        let args: [&OsStr; 4] = [
            "apply".as_ref(),
            "--server-side".as_ref(),
            "-f".as_ref(),
            path.as_os_str(),
        ];
        self.kubectl(&args).await
    }

    /// Runs helm as the admin and returns what it wrote to standard output; its error text on failure.
    pub async fn helm<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<String> {
        self.tool(self.helm_path(), args).await
    }

    async fn tool<S: AsRef<OsStr>>(&self, program: PathBuf, args: &[S]) -> Result<String> {
        let home = self.layout.path("home");
        let mut command = Command::new(&program);
        command
            .args(args)
            .env("KUBECONFIG", self.admin_kubeconfig())
            .env("HOME", &home)
            .env("KUBECACHEDIR", home.join("kube"))
            .env("HELM_CACHE_HOME", home.join("helm/cache"))
            .env("HELM_CONFIG_HOME", home.join("helm/config"))
            .env("HELM_DATA_HOME", home.join("helm/data"))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let ended = command
            .output()
            .await
            .with_context(|| format!("running {}", program.display()))?;
        let words: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
        ensure!(
            ended.status.success(),
            "{} {}: {}: {}",
            program.file_name().unwrap_or_default().to_string_lossy(),
            words.join(" "),
            ended.status,
            String::from_utf8_lossy(&ended.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
    }
}
