//! Flags and environment, read once and checked once.
//!
//! Owns: every setting of the agent. Must not act on any of them.

use clap::{Args, ValueEnum};
use gogrid_agent_core::guest::{GPU_RESOURCES, GpuResources, ResourceNameError};
use gogrid_api::{ByteQuantity, Bytes, LeaseTiming, Millis};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// The agent's flags as they are typed.
#[derive(Clone, Debug, Args)]
pub struct Flags {
    /// Node that this agent serves.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// GoGrid's own namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = "gogrid-system")]
    namespace: String,
    /// Which install this is: the cluster belongs to one, and no agent of another begins; default the namespace.
    #[arg(long)]
    release: Option<String>,
    /// Directory beneath which `file:` models may lie; may be repeated.
    #[arg(long)]
    model_root: Vec<PathBuf>,
    /// Directory for the cache of models, the socket and the record of processes.
    #[arg(long)]
    state_dir: PathBuf,
    /// Socket on which pool and workers connect; default `<state-dir>/agent.sock`.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// The gogrid-worker program; when given, the agent starts the pool itself, else it waits for one.
    #[arg(long)]
    worker_binary: Option<PathBuf>,
    /// Cgroup at the top of the node's tree whose cpu.idle is 1; workers are moved there and give way to everything else.
    #[arg(long)]
    idle_cgroup: Option<PathBuf>,
    /// User id of an external pool.
    #[arg(long, default_value_t = 65_532)]
    pool_uid: u32,
    /// Host name or CIDR that http model sources may resolve to although it is private; may be repeated.
    #[arg(long)]
    allow_address: Vec<String>,
    /// Length of the node's Lease in seconds; every other duration of fencing follows from it.
    #[arg(long, default_value_t = 40)]
    lease_duration_seconds: u64,
    /// Memory that models on the CPU leave alone; default max(1 GiB, 10 %).
    #[arg(long)]
    cpu_memory_reserve: Option<String>,
    /// Memory limit of the workers, where they run in another container than the agent; default the agent's own.
    #[arg(long, env = "GOGRID_WORKERS_MEMORY_LIMIT")]
    workers_memory_limit: Option<String>,
    /// Library to load instead of the driver's NVML.
    #[arg(long)]
    nvml_library: Option<PathBuf>,
    /// Socket of the kubelet's pod-resources service, by which GPUs that other pods hold are known; without it none counts
    /// as held.
    #[arg(long)]
    pod_resources_socket: Option<PathBuf>,
    /// Extended resource, or driver of resource claims, whose devices are GPUs; a * at the end stands for any ending; may
    /// be repeated.
    #[arg(long, default_values = GPU_RESOURCES)]
    gpu_resource: Vec<String>,
    /// This agent's own pod: what it holds is not somebody else's.
    #[arg(long, env = "POD_NAME")]
    pod_name: Option<String>,
    /// Address of /metrics, /healthz and /readyz.
    #[arg(long, default_value = "127.0.0.1:0")]
    metrics_addr: SocketAddr,
    /// Form of log lines.
    #[arg(long, value_enum, default_value = "json")]
    log_format: LogFormat,
    /// A fault at chosen requests, such as kill-before=3; may be repeated.
    #[cfg(feature = "faults")]
    #[arg(long = "fault", hide = true)]
    faults: Vec<gogrid_faults::Fault>,
    /// What the wall clock of this agent is wrong by.
    #[cfg(feature = "faults")]
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, hide = true)]
    wall_offset_seconds: i64,
    /// Directory into which workers stamp each of their steps.
    #[cfg(feature = "faults")]
    #[arg(long, hide = true)]
    stamps: Option<PathBuf>,
    /// Jobs on NVIDIA devices are computed on the CPU.
    #[cfg(feature = "faults")]
    #[arg(long, hide = true)]
    cuda_on_cpu: bool,
    /// What counts as a second towards the GPU driver, in milliseconds.
    #[cfg(feature = "faults")]
    #[arg(long, hide = true, default_value_t = 1000)]
    driver_second_millis: u64,
    /// The version that this program takes itself for.
    #[cfg(feature = "faults")]
    #[arg(long, hide = true, default_value = env!("CARGO_PKG_VERSION"))]
    reported_version: String,
}

/// The agent's settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Node that this agent serves.
    pub node: String,
    /// GoGrid's own namespace.
    pub namespace: String,
    /// Which install this is.
    pub release: String,
    /// What this program's version goes by.
    pub version: String,
    /// Directories beneath which `file:` models may lie.
    pub roots: Vec<PathBuf>,
    /// Directory for what outlives the process.
    pub state_dir: PathBuf,
    /// Where pool and workers connect.
    pub socket: PathBuf,
    /// Program of the pool, if the agent starts it.
    pub worker_binary: Option<PathBuf>,
    /// Idle cgroup for workers, if the node offers one.
    pub idle_cgroup: Option<PathBuf>,
    /// User id of the pool.
    pub pool_uid: u32,
    /// Exceptions from the ban on private addresses.
    pub allow: Vec<String>,
    /// Durations of leases and fences.
    pub timing: LeaseTiming,
    /// Memory that models on the CPU leave alone, if said.
    pub cpu_reserve: Option<Bytes>,
    /// Memory limit of the workers, if not the agent's own.
    pub workers_limit: Option<Bytes>,
    /// NVML library, if not the driver's.
    pub nvml: Option<PathBuf>,
    /// Socket of the kubelet's pod-resources service, if it is to be asked.
    pub pod_resources: Option<PathBuf>,
    /// Which resources are GPUs.
    pub gpu_resources: GpuResources,
    /// Namespace and name of this agent's own pod, if it is in one.
    pub own_pod: Option<(String, String)>,
    /// What counts as a second towards the GPU driver, in nanoseconds.
    pub driver_second: u64,
    /// Whether jobs on NVIDIA devices are computed on the CPU: in tests only.
    pub cuda_on_cpu: bool,
    /// Address of the metrics server.
    pub metrics: SocketAddr,
    /// Form of log lines.
    pub log: LogFormat,
    /// Faults at chosen requests.
    #[cfg(feature = "faults")]
    pub faults: Vec<gogrid_faults::Fault>,
    /// What the wall clock is wrong by.
    #[cfg(feature = "faults")]
    pub wall_offset_seconds: i64,
    /// Where workers stamp their steps.
    #[cfg(feature = "faults")]
    pub stamps: Option<PathBuf>,
}

/// A flag that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The lease.
    #[error("--lease-duration-seconds: {0}")]
    Lease(#[from] gogrid_api::timing::LeaseTimingError),
    /// A number of bytes.
    #[error("--{flag}: {error}")]
    Bytes {
        /// Which flag.
        flag: &'static str,
        /// What is wrong with it.
        error: gogrid_api::quantity::QuantityError,
    },
    /// A name of resources.
    #[error("--gpu-resource: {0}")]
    GpuResource(#[from] ResourceNameError),
    /// The node's name.
    #[error("--node-name must be 1 to 253 characters long")]
    NodeName,
    /// A relative directory would depend on where the agent was started.
    #[error("--{flag} {path:?} must be an absolute path")]
    Relative {
        /// Which flag.
        flag: &'static str,
        /// Its value.
        path: PathBuf,
    },
}

impl TryFrom<Flags> for Config {
    type Error = ConfigError;

    fn try_from(flags: Flags) -> Result<Self, ConfigError> {
        let Flags {
            node_name,
            namespace,
            release,
            model_root,
            state_dir,
            socket,
            worker_binary,
            idle_cgroup,
            pool_uid,
            allow_address,
            lease_duration_seconds,
            cpu_memory_reserve,
            workers_memory_limit,
            nvml_library,
            pod_resources_socket,
            gpu_resource,
            pod_name,
            metrics_addr,
            log_format,
            #[cfg(feature = "faults")]
            faults,
            #[cfg(feature = "faults")]
            wall_offset_seconds,
            #[cfg(feature = "faults")]
            stamps,
            #[cfg(feature = "faults")]
            cuda_on_cpu,
            #[cfg(feature = "faults")]
            driver_second_millis,
            #[cfg(feature = "faults")]
                reported_version: version,
        } = flags;
        #[cfg(not(feature = "faults"))]
        let (cuda_on_cpu, driver_second_millis, version) =
            (false, 1000_u64, env!("CARGO_PKG_VERSION").to_owned());
        if node_name.is_empty() || node_name.len() > 253 {
            return Err(ConfigError::NodeName);
        }
        let roots = model_root.iter().map(|p| ("model-root", p));
        let group = idle_cgroup.iter().map(|p| ("idle-cgroup", p));
        let kubelet = pod_resources_socket.iter().map(|p| ("pod-resources-socket", p));
        for (flag, path) in roots
            .chain(group)
            .chain(kubelet)
            .chain([("state-dir", &state_dir)])
        {
            if !path.is_absolute() {
                return Err(ConfigError::Relative {
                    flag,
                    path: path.clone(),
                });
            }
        }
        Ok(Self {
            node: node_name,
            release: release.unwrap_or_else(|| namespace.clone()),
            version,
            own_pod: pod_name.map(|pod| (namespace.clone(), pod)),
            namespace,
            roots: model_root,
            socket: socket.unwrap_or_else(|| state_dir.join("agent.sock")),
            state_dir,
            worker_binary,
            idle_cgroup,
            pool_uid,
            allow: allow_address,
            timing: LeaseTiming::from_lease(Millis(lease_duration_seconds.saturating_mul(1000)))?,
            cpu_reserve: bytes("cpu-memory-reserve", cpu_memory_reserve)?,
            workers_limit: bytes("workers-memory-limit", workers_memory_limit)?,
            nvml: nvml_library,
            pod_resources: pod_resources_socket,
            gpu_resources: GpuResources::new(gpu_resource)?,
            driver_second: driver_second_millis.saturating_mul(1_000_000),
            cuda_on_cpu,
            metrics: metrics_addr,
            log: log_format,
            #[cfg(feature = "faults")]
            faults,
            #[cfg(feature = "faults")]
            wall_offset_seconds,
            #[cfg(feature = "faults")]
            stamps,
        })
    }
}

fn bytes(flag: &'static str, text: Option<String>) -> Result<Option<Bytes>, ConfigError> {
    text.map(|text| ByteQuantity(text).bytes())
        .transpose()
        .map_err(|error| ConfigError::Bytes { flag, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_flags_is_what_this_program_takes() {
        let command = Flags::augment_args(clap::Command::new("gogrid-agent"));
        let page = gogrid_reference::flags_page(&command, "agent/src/config.rs");
        gogrid_reference::compare("docs/reference/flags-agent.md", &page);
    }
}
