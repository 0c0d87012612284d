//! Flags, read once.
//!
//! Owns: raw flags → validated configuration.

use clap::{Args, ValueEnum};
use gogrid_api::timing::LeaseTimingError;
use gogrid_api::{LeaseTiming, Millis};
use std::net::SocketAddr;
use std::time::Duration;

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// The operator's flags as they are typed.
#[derive(Debug, Args)]
pub struct Flags {
    /// GoGrid's own namespace: assignments, staged inputs, heartbeats.
    #[arg(long, env = "GOGRID_NAMESPACE", default_value = "gogrid-system")]
    namespace: String,
    /// Length of a node's lease; every other time of fencing is a fixed ratio of it.
    #[arg(long, default_value_t = 40)]
    lease_duration_seconds: u64,
    /// Where /metrics, /healthz and /readyz are served; port 0 picks one and logs it.
    #[arg(long, default_value = "127.0.0.1:0")]
    metrics_addr: SocketAddr,
    /// Directory beneath which nodes hold `file:` models; repeat for several; none = agents alone decide.
    #[arg(long = "model-root")]
    model_roots: Vec<String>,
    /// Which install this is: the cluster belongs to one, and no other leads; default the namespace.
    #[arg(long)]
    release: Option<String>,
    /// Name of this process among operators, which is its pod's; the process makes it unique.
    #[arg(long, env = "POD_NAME", default_value = "gogrid-operator")]
    identity: String,
    /// Uid of its pod, for events about it.
    #[arg(long, env = "POD_UID")]
    pod_uid: Option<String>,
    /// Form of log lines.
    #[arg(long, value_enum, default_value = "json")]
    log_format: LogFormat,
    /// Jobs worked on at the same time.
    #[arg(long, default_value_t = 32)]
    concurrency: u16,
    /// A fault at chosen requests, such as kill-before=3; may be repeated.
    #[cfg(feature = "faults")]
    #[arg(long = "fault", hide = true)]
    faults: Vec<gogrid_faults::Fault>,
    /// The version that this program takes itself for.
    #[cfg(feature = "faults")]
    #[arg(long, hide = true, default_value = env!("CARGO_PKG_VERSION"))]
    reported_version: String,
}

/// The pod that this process runs in.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its uid, where that is known.
    pub uid: Option<String>,
}

/// Layers of the fence that simulations take away, one at a time, to show what each is for. No flag does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// Nodes are judged by observed changes alone, with patience after blindness.
    pub observed_change: bool,
    /// A record counts once, whatever its epochs answered.
    pub one_answer: bool,
}

impl Default for Layers {
    fn default() -> Self {
        Self {
            observed_change: true,
            one_answer: true,
        }
    }
}

/// What the operator goes by.
#[derive(Clone, Debug)]
pub struct Config {
    /// GoGrid's own namespace.
    pub namespace: String,
    /// Durations of leases.
    pub timing: LeaseTiming,
    /// Where metrics are served.
    pub metrics_addr: SocketAddr,
    /// Directories beneath which nodes hold `file:` models.
    pub model_roots: Vec<String>,
    /// Which install this is.
    pub release: String,
    /// What this program's version goes by.
    pub version: String,
    /// This process among operators, unique.
    pub holder: String,
    /// The pod it runs in.
    pub pod: Pod,
    /// Form of log lines.
    pub log_format: LogFormat,
    /// Jobs worked on at the same time.
    pub concurrency: usize,
    /// Layers of the fence: all of them.
    pub layers: Layers,
    /// Kills the process around its N-th mutating request.
    #[cfg(feature = "faults")]
    pub faults: Vec<gogrid_faults::Fault>,
}

impl Config {
    /// Longest time of a call to the API server that is no watch: a renewal's interval, from 3 to 10 s.
    pub fn call_deadline(&self) -> Duration {
        Duration::from_millis(self.timing.renew().0.clamp(3_000, 10_000))
    }
}

/// A flag can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The lease's length.
    #[error("--lease-duration-seconds: {0}")]
    Lease(#[from] LeaseTimingError),
    /// A root that is no absolute path.
    #[error("--model-root {0:?} must be an absolute path without '..'")]
    ModelRoot(String),
    /// No work could ever be done.
    #[error("--concurrency must be at least 1")]
    Concurrency,
}

impl Flags {
    /// Validates; `unique` tells this process from every other.
    pub fn validate(self, unique: &str) -> Result<Config, ConfigError> {
        if let Some(bad) = self
            .model_roots
            .iter()
            .find(|r| !r.starts_with('/') || r.split('/').any(|p| p == ".."))
        {
            return Err(ConfigError::ModelRoot(bad.clone()));
        }
        if self.concurrency == 0 {
            return Err(ConfigError::Concurrency);
        }
        #[cfg(feature = "faults")]
        let version = self.reported_version;
        #[cfg(not(feature = "faults"))]
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Config {
            release: self.release.unwrap_or_else(|| self.namespace.clone()),
            version,
            namespace: self.namespace,
            timing: LeaseTiming::from_lease(Millis(self.lease_duration_seconds.saturating_mul(1000)))?,
            metrics_addr: self.metrics_addr,
            model_roots: self
                .model_roots
                .iter()
                .map(|r| r.trim_end_matches('/').to_owned())
                .collect(),
            holder: format!("{}_{unique}", self.identity),
            pod: Pod {
                name: self.identity,
                uid: self.pod_uid,
            },
            log_format: self.log_format,
            concurrency: self.concurrency.into(),
            layers: Layers::default(),
            #[cfg(feature = "faults")]
            faults: self.faults,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_flags_is_what_this_program_takes() {
        let command = Flags::augment_args(clap::Command::new("gogrid-operator"));
        let page = gogrid_reference::flags_page(&command, "operator/src/config.rs");
        gogrid_reference::compare("docs/reference/flags-operator.md", &page);
    }
}
