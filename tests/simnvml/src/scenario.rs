//! What the simulated driver has and does.
//!
//! Owns: the file's format. Tests write it with [`Scenario::write`], which replaces the file in one step.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// A driver and its devices.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scenario {
    /// Version of the driver.
    pub driver: String,
    /// Counts resets: whoever initialised before the last one gets UNKNOWN from every call until it does so again.
    pub resets: u64,
    /// Devices by index.
    pub devices: Vec<Device>,
    /// Return codes by symbol, e.g. 9 for `nvmlInit_v2` (driver not loaded) or 3 (not supported).
    pub codes: BTreeMap<String, u32>,
    /// Symbols that never return.
    pub hang: Vec<String>,
    /// How long every call takes, in milliseconds.
    pub slow_millis: u64,
    /// Something goes wrong at some call of every process.
    pub chaos: Option<Chaos>,
    /// File that gets one line for every call, if given.
    pub calls: Option<PathBuf>,
}

/// One GPU.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Device {
    /// Name, memory and what runs on it; its own and not its parts'.
    #[serde(flatten)]
    pub part: Part,
    /// Parts it is split into; absent: MIG mode is off.
    pub mig: Option<Vec<Part>>,
    /// Whether it is lost.
    pub lost: Lost,
}

/// A GPU, or a part of one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Part {
    /// UUID.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// CUDA compute capability.
    pub capability: (i32, i32),
    /// Memory in all, bytes.
    pub total: u64,
    /// Memory of the driver, bytes.
    pub reserved: u64,
    /// Memory in use besides that of `processes`, bytes.
    pub used: u64,
    /// Utilisation in percent; absent: not supported.
    pub busy: Option<u32>,
    /// Temperature in degrees Celsius; absent: not supported.
    pub celsius: Option<u32>,
    /// Bits of throttle reasons.
    pub throttle: u64,
    /// Processes on it.
    pub processes: Vec<Process>,
    /// Whether processes come faster than they can be listed: lists always find their buffer too small.
    pub growing: bool,
    /// Whether utilisation by process is supported.
    pub by_process: bool,
}

/// A process on a device.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Memory it holds, bytes; absent: not available.
    pub bytes: Option<u64>,
    /// Its part of the device's time, percent.
    pub busy: u32,
}

/// Whether a device is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lost {
    /// It is there.
    #[default]
    No,
    /// It fell off the bus after the driver was loaded: it has a handle, whose calls fail.
    Calls,
    /// As found by a driver loaded later: it has no handle.
    Handle,
}

/// Something goes wrong at one of every `within` calls of a process, chosen by seed and process id.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chaos {
    /// Seed.
    pub seed: u64,
    /// Calls within which it happens, ≥ 1.
    pub within: u64,
}

impl Scenario {
    /// Replaces the file in one step.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let beside = path.with_extension("new");
        std::fs::write(&beside, serde_json::to_vec(self)?)?;
        std::fs::rename(beside, path)
    }

    /// That many GPUs of one name with 24 GiB, 1 GiB of it the driver's and 2 GiB in use.
    pub fn cards(count: u32) -> Self {
        let card = |index: u32| Device {
            part: Part {
                uuid: format!("GPU-{index:08x}-0000-4000-8000-000000000000"),
                name: "NVIDIA GeForce RTX 4090".into(),
                capability: (8, 9),
                total: 24 << 30,
                reserved: 1 << 30,
                used: 2 << 30,
                busy: Some(35),
                celsius: Some(55),
                by_process: true,
                ..Part::default()
            },
            ..Device::default()
        };
        Self {
            driver: "580.95.05".into(),
            devices: (0..count).map(card).collect(),
            ..Self::default()
        }
    }
}
