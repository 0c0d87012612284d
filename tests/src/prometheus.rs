//! promtool and Prometheus, built on first use.
//!
//! Owns: finding them and running them. Must not: know any rule or metric.

use crate::ports;
use crate::process::Process;
use crate::wait::eventually;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// The directory with `promtool` and `prometheus`; the first call on a machine builds them, which takes minutes.
pub fn binaries() -> Result<PathBuf> {
    built_by("prometheus/build.sh")
}

/// The directory that a script beneath `tests` prints once what it builds is there.
pub(crate) fn built_by(script: &str) -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let built = Command::new(&script)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("running {}", script.display()))?;
    ensure!(built.status.success(), "{} failed; see above", script.display());
    let output = String::from_utf8(built.stdout)?;
    Ok(PathBuf::from(
        output.lines().last().context("the build printed no directory")?,
    ))
}

/// Runs a program that reads its standard input to the end before it says anything.
pub(crate) fn with_input(mut command: Command, input: &str) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {}", command.get_program().display()))?;
    child
        .stdin
        .take()
        .context("no standard input")?
        .write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

/// Runs promtool and returns what it said; an error with its words when it found fault.
pub fn promtool(args: &[&str]) -> Result<String> {
    let ended = Command::new(binaries()?.join("promtool"))
        .args(args)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .stdin(Stdio::null())
        .output()
        .context("running promtool")?;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr)
    );
    ensure!(ended.status.success(), "promtool {}: {said}", args.join(" "));
    Ok(said)
}

/// What `promtool check metrics` says against what a program shows, as an error.
pub fn check_metrics(shown: &str) -> Result<()> {
    let mut command = Command::new(binaries()?.join("promtool"));
    command.args(["check", "metrics"]);
    let ended = with_input(command, shown)?;
    ensure!(
        ended.status.success(),
        "promtool check metrics: {}{}",
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr)
    );
    Ok(())
}

/// A Prometheus that scrapes programs on this machine.
#[derive(Debug)]
pub struct Prometheus {
    _process: Process,
    port: u16,
}

impl Prometheus {
    /// Starts one in `dir` with these rules and returns when it has scraped every target, each of which carries its
    /// program's name as the label `node`. It scrapes and judges four times a second.
    pub async fn start(dir: &Path, rules: &str, targets: &BTreeMap<String, SocketAddr>) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let targets: Vec<Value> = targets
            .iter()
            .map(|(name, address)| json!({"targets": [address.to_string()], "labels": {"node": name}}))
            .collect();
        std::fs::write(dir.join("rules.yaml"), rules)?;
        let config = json!({
            "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "250ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "gogrid", "static_configs": targets}],
        });
        std::fs::write(dir.join("prometheus.yaml"), config.to_string())?;
        let port = ports::fixed()?.port();
        let mut command = Command::new(binaries()?.join("prometheus"));
        command
            .current_dir(dir)
            .arg("--config.file=prometheus.yaml")
            .arg("--storage.tsdb.path=data")
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let process = Process::start("prometheus", command, &dir.join("prometheus.log"))?;
        let started = Self {
            _process: process,
            port,
        };
        eventually(Duration::from_secs(30), "every target to be scraped", || async {
            let said: Value = serde_json::from_str(&get(port, "/api/v1/query?query=sum(up)").await?)?;
            let up = &said["data"]["result"][0]["value"][1];
            ensure!(
                *up == targets.len().to_string().as_str(),
                "{up} of {} are up",
                targets.len()
            );
            Ok(())
        })
        .await?;
        Ok(started)
    }

    /// The alerts that fire now.
    pub async fn firing(&self) -> Result<BTreeSet<String>> {
        let said: Value = serde_json::from_str(&get(self.port, "/api/v1/alerts").await?)?;
        let alerts = said["data"]["alerts"]
            .as_array()
            .context("no alerts in the answer")?;
        Ok(alerts
            .iter()
            .filter(|alert| alert["state"] == "firing")
            .filter_map(|alert| alert["labels"]["alertname"].as_str().map(str::to_owned))
            .collect())
    }

    /// Waits until all of these fire (`true`) or none of them does.
    pub async fn until(&self, alerts: &[&str], fire: bool, within: Duration) -> Result<()> {
        let what = format!("{alerts:?} to {}", if fire { "fire" } else { "clear" });
        eventually(within, &what, || async {
            let firing = self.firing().await?;
            let as_wanted = alerts.iter().all(|alert| firing.contains(*alert) == fire);
            ensure!(as_wanted, "firing: {firing:?}");
            Ok(())
        })
        .await
    }
}

/// The body of an HTTP answer from a program on this machine that is content.
pub async fn get(port: u16, path: &str) -> Result<String> {
    let (status, body) = answer(port, path).await?;
    ensure!(status == 200, "{path}: {status} {body}");
    Ok(body)
}

/// Status and body of an HTTP answer from a program on this machine.
pub async fn answer(port: u16, path: &str) -> Result<(u16, String)> {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    // 1.0: the answer ends where the connection does.
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}
