//! The CPU device as it is measured.
//!
//! Owns: the node's memory as this process may use it. Must not bucket, pace or judge figures.

use crate::event::{Event, Hub};
use gogrid_api::Bytes;
use gogrid_api::names::CPU_DEVICE;
use gogrid_api::node::{Backend, Device, Health};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Between two measurements.
const EVERY: Duration = Duration::from_secs(2);
const GIB: u64 = 1 << 30;

/// Measures the CPU device for ever. `limit` is the workers' own memory limit, where they have another than the agent.
pub(crate) async fn measure(reserve: Option<Bytes>, limit: Option<Bytes>, hub: Hub) {
    // Writing /proc/cpuinfo costs the kernel a look at every core.
    let name = model_name(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
    loop {
        let name = name.clone();
        match tokio::task::spawn_blocking(move || cpu(name, reserve, limit)).await {
            Ok(device) => hub.send(Event::Devices(Backend::Cpu, vec![device])).await,
            Err(error) => tracing::error!(%error, "measuring the CPU device ended"),
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// A figure of /proc/meminfo in bytes.
fn meminfo(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    let kib = line
        .and_then(|l| l.split_ascii_whitespace().next())
        .and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// The lowest memory limit between this process's cgroup and the root.
fn cgroup_limit() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own
        .lines()
        .find_map(|l| l.strip_prefix("0::"))?
        .trim_matches('/')
        .to_owned();
    let mut directory = Path::new("/sys/fs/cgroup").join(path);
    let mut lowest = None::<u64>;
    while directory.starts_with("/sys/fs/cgroup") {
        let limit = fs::read_to_string(directory.join("memory.max")).ok();
        let limit = limit.and_then(|text| text.trim().parse::<u64>().ok());
        lowest = match (lowest, limit) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if !directory.pop() {
            break;
        }
    }
    lowest
}

fn model_name(text: &str) -> String {
    let name = text
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    let name: String = name
        .map_or("CPU", |(_, name)| name.trim())
        .chars()
        .take(128)
        .collect();
    if name.is_empty() { "CPU".into() } else { name }
}

fn cpu(name: String, reserve: Option<Bytes>, limit: Option<Bytes>) -> Device {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let machine = meminfo(&text, "MemTotal");
    let available = meminfo(&text, "MemAvailable");
    let limit = limit.map(|Bytes(limit)| limit).or_else(cgroup_limit);
    let total = limit.map_or(machine, |limit| limit.min(machine));
    let reserved = reserve
        .map_or_else(|| GIB.max(total / 10), |Bytes(b)| b)
        .min(total);
    Device {
        uuid: CPU_DEVICE.into(),
        name,
        backend: Backend::Cpu,
        memory_total: Bytes(total).into(),
        memory_reserved: Bytes(reserved).into(),
        // Raw: everything in use, ours included. The owner takes our workers' part out.
        // Memory that others use beyond a limit takes nothing from beneath it.
        memory_foreign: Bytes(total.saturating_sub(available)).into(),
        memory_free: Bytes(available.min(total)).into(),
        compute_capability: None,
        health: Health::Healthy,
        message: None,
        holder: None,
    }
}
