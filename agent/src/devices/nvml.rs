//! The probe's own life: `gogrid-agent probe-nvml` asks NVML what the agent asks it.
//!
//! Owns: the one place that loads NVML, and the translation of its answers. It ends when the agent is gone, also while
//! a call hangs. Must not pace, judge or remember anything between two questions but handles and time stamps.

use super::probe::frame;
use gogrid_agent_core::driver::{
    Answer, Ask, Found, Identity, MAX_DEVICES, MAX_FRAME_BYTES, Own, Reading, Throttle, Trouble,
};
use gogrid_agent_core::results::clip;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessUtilizationSample;
use nvml_wrapper::{Device, Nvml};
use rustix::process::{Resource, Rlimit, Signal, getpid, kill_process, setrlimit};
use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::sync::mpsc;

/// What the kernel calls the PID namespace that the driver counts in.
const INITIAL_PIDS: &str = "pid:[4026531836]";
/// Samples older than this before the newest are history, in microseconds.
const SAMPLE_MICROS: u64 = 1_000_000;
/// Longest message about a device, in characters.
const MESSAGE: usize = 200;

/// The child's whole life: answers questions on standard input until it closes. `library` is loaded instead of the
/// driver's.
///
/// # Errors
/// The agent can't be spoken to.
pub fn child(library: Option<&Path>) -> io::Result<()> {
    let _ = rustix::thread::set_no_new_privs(true);
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = setrlimit(Resource::Core, none);
    let (asks, inbox) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("agent".into()).spawn(move || {
        while let Ok(ask) = next_ask() {
            if asks.send(ask).is_err() {
                break;
            }
        }
        // The other thread may hang in the driver: nothing less ends it.
        let _ = kill_process(getpid(), Signal::KILL);
    })?;
    while let Ok(ask) = inbox.recv() {
        match load(library) {
            Ok(nvml) => return serve(&nvml, ask, &inbox),
            Err(error) => say(&Answer::NoDriver {
                message: said(&error),
            })?,
        }
    }
    Ok(())
}

fn next_ask() -> io::Result<Ask> {
    let mut input = io::stdin().lock();
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_FRAME_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

fn say(answer: &Answer) -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(&frame(answer)?)?;
    output.flush()
}

fn load(library: Option<&Path>) -> Result<Nvml, NvmlError> {
    match library {
        Some(path) => Nvml::builder().lib_path(path.as_os_str()).init(),
        None => Nvml::init(),
    }
}

/// A device of the last list, and what was read of its processes last.
struct Handle<'nvml> {
    device: Device<'nvml>,
    seen: u64,
    foreign: u8,
}

fn serve(nvml: &Nvml, first: Ask, inbox: &mpsc::Receiver<Ask>) -> io::Result<()> {
    // The driver counts processes in the initial namespace: in another one its numbers name others.
    let same_pids = std::fs::read_link("/proc/self/ns/pid").is_ok_and(|n| n == Path::new(INITIAL_PIDS));
    let mut handles = BTreeMap::new();
    let mut ask = first;
    loop {
        let answer = match &ask {
            Ask::List => list(nvml, &mut handles).unwrap_or_else(|error| Answer::Trouble(trouble(&error))),
            Ask::Read { uuid, own, processes } => match handles.get_mut(uuid) {
                Some(handle) => {
                    let own = same_pids.then_some(own.as_slice());
                    read(handle, own, *processes)
                        .map_or_else(|error| Answer::Trouble(trouble(&error)), Answer::Read)
                }
                None => Answer::Trouble(Trouble {
                    lost: false,
                    message: "it was not listed".into(),
                }),
            },
        };
        say(&answer)?;
        ask = match inbox.recv() {
            Ok(ask) => ask,
            Err(mpsc::RecvError) => return Ok(()),
        };
    }
}

fn list<'nvml>(
    nvml: &'nvml Nvml,
    handles: &mut BTreeMap<String, Handle<'nvml>>,
) -> Result<Answer, NvmlError> {
    handles.clear();
    let mut devices = vec![];
    for index in 0..nvml.device_count()? {
        if devices.len() > MAX_DEVICES {
            break;
        }
        let mut add = |mig, device: Result<(Identity, Device<'nvml>), NvmlError>| {
            let device = match device {
                Ok((identity, device)) => {
                    let uuid = identity.uuid.clone();
                    let (seen, foreign) = (0, 0);
                    handles.insert(
                        uuid,
                        Handle {
                            device,
                            seen,
                            foreign,
                        },
                    );
                    Ok(identity)
                }
                Err(error) => Err(trouble(&error)),
            };
            devices.push(Found { index, mig, device });
        };
        let gpu = match nvml.device_by_index(index) {
            Ok(gpu) => gpu,
            Err(error) => {
                add(None, Err(error));
                continue;
            }
        };
        let capability = capability(&gpu);
        // Only few GPUs can be split at all; those that can't say so with an error.
        if !gpu.mig_mode().is_ok_and(|mode| mode.current == 1) {
            add(
                None,
                identity(&gpu, capability, None).map(|identity| (identity, gpu)),
            );
            continue;
        }
        let mut parts = 0;
        for part in 0..gpu.mig_device_count()? {
            match gpu.mig_device_by_index(part) {
                // The places of a split GPU need not be filled in order.
                Err(NvmlError::NotFound) => {}
                device => {
                    parts += 1;
                    let named = device.and_then(|d| Ok((identity(&d, capability, None)?, d)));
                    add(Some(part), named);
                }
            }
        }
        if parts == 0 {
            let why = "MIG mode is on and no MIG device is made: make one, or turn MIG mode off".to_owned();
            add(
                None,
                identity(&gpu, capability, Some(why)).map(|identity| (identity, gpu)),
            );
        }
    }
    let version = nvml.sys_driver_version().unwrap_or_default();
    Ok(Answer::Listed {
        version: clip(&version, 32).to_owned(),
        devices,
    })
}

fn capability(device: &Device<'_>) -> Option<(u32, u32)> {
    let found = device.cuda_compute_capability().ok()?;
    Some((u32::try_from(found.major).ok()?, u32::try_from(found.minor).ok()?))
}

fn identity(
    device: &Device<'_>,
    capability: Option<(u32, u32)>,
    unusable: Option<String>,
) -> Result<Identity, NvmlError> {
    let name = match device.name() {
        Err(error) if trouble(&error).lost => return Err(error),
        name => name.unwrap_or_default(),
    };
    Ok(Identity {
        uuid: device.uuid()?,
        name: clip(&name, 128).to_owned(),
        capability,
        unusable,
    })
}

/// One device. `own` is absent where the driver's process ids mean nothing here.
fn read(handle: &mut Handle<'_>, own: Option<&[u32]>, processes: bool) -> Result<Reading, NvmlError> {
    let before = processes.then(|| own_bytes(&handle.device, own));
    let memory = handle.device.memory_info()?;
    let own_part = match before {
        None => Own::NotAsked,
        // Nothing changes what can't be read.
        Some(Own::Unreadable) => Own::Unreadable,
        Some(before) => match own_bytes(&handle.device, own) {
            after if after == before => after,
            Own::Unreadable => Own::Unreadable,
            _ => Own::Moved,
        },
    };
    let device = &handle.device;
    let busy_percent = device.utilization_rates().ok().map(|u| percent(u.gpu));
    let celsius = device.temperature(TemperatureSensor::Gpu).ok();
    let throttle = device.current_throttle_reasons().ok().map(|reasons| Throttle {
        thermal: reasons.intersects(
            ThrottleReasons::SW_THERMAL_SLOWDOWN
                | ThrottleReasons::HW_THERMAL_SLOWDOWN
                | ThrottleReasons::HW_SLOWDOWN,
        ),
        power: reasons.intersects(ThrottleReasons::SW_POWER_CAP | ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN),
    });
    let foreign_busy_percent = match own {
        None => None,
        Some([]) => busy_percent,
        Some(own) => foreign_busy(handle, own, busy_percent),
    };
    Ok(Reading {
        total: memory.total,
        reserved: memory.reserved,
        used: memory.used,
        free: memory.free,
        own: own_part,
        busy_percent,
        foreign_busy_percent,
        celsius: celsius.and_then(|c| u16::try_from(c).ok()),
        throttle,
    })
}

fn own_bytes(device: &Device<'_>, own: Option<&[u32]>) -> Own {
    let Some(own) = own else {
        return Own::Unreadable;
    };
    let processes = match device.running_compute_processes() {
        Ok(processes) => processes,
        // More came while they were counted.
        Err(NvmlError::InsufficientSize(_)) => return Own::Moved,
        Err(_) => return Own::Unreadable,
    };
    let mut sum = 0_u64;
    for process in processes.iter().filter(|p| own.contains(&p.pid)) {
        match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => sum = sum.saturating_add(bytes),
            UsedGpuMemory::Unavailable => return Own::Unreadable,
        }
    }
    Own::Bytes(sum)
}

fn foreign_busy(handle: &mut Handle<'_>, own: &[u32], busy_percent: Option<u8>) -> Option<u8> {
    match handle.device.process_utilization_stats(handle.seen) {
        Ok(samples) => {
            (handle.foreign, handle.seen) = foreign_share(&samples, own, handle.seen);
            Some(handle.foreign)
        }
        // Nothing new was sampled: an idle device, or asked sooner than the driver samples.
        Err(NvmlError::NotFound) if busy_percent == Some(0) => Some(0),
        Err(NvmlError::NotFound | NvmlError::InsufficientSize(_)) => Some(handle.foreign),
        Err(_) => None,
    }
}

/// Others' part of the newest second in percent, and the newest sample's time stamp.
fn foreign_share(samples: &[ProcessUtilizationSample], own: &[u32], seen: u64) -> (u8, u64) {
    let newest = samples.iter().map(|s| s.timestamp).max().unwrap_or(seen);
    let mut others: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
    let recent = samples
        .iter()
        .filter(|s| s.timestamp.saturating_add(SAMPLE_MICROS) > newest);
    for sample in recent.filter(|s| !own.contains(&s.pid)) {
        let (sum, count) = others.entry(sample.pid).or_default();
        *sum = sum.saturating_add(sample.sm_util.min(100));
        *count = count.saturating_add(1);
    }
    let sum = others
        .values()
        .fold(0_u32, |all, (sum, count)| all.saturating_add(sum / count));
    (percent(sum), newest.max(seen))
}

fn percent(figure: u32) -> u8 {
    u8::try_from(figure.min(100)).unwrap_or(100)
}

fn trouble(error: &NvmlError) -> Trouble {
    Trouble {
        lost: matches!(error, NvmlError::GpuLost | NvmlError::ResetRequired),
        message: said(error),
    }
}

fn said(error: &NvmlError) -> String {
    let text = match error {
        NvmlError::FailedToLoadSymbol(symbol) => {
            format!("the driver is older than the R510 that is needed: {symbol}")
        }
        NvmlError::LibRmVersionMismatch => {
            "driver and library are of two versions: the node was upgraded and not rebooted".to_owned()
        }
        error => error.to_string(),
    };
    clip(&text, MESSAGE).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(pid: u32, timestamp: u64, sm_util: u32) -> ProcessUtilizationSample {
        ProcessUtilizationSample {
            pid,
            timestamp,
            sm_util,
            mem_util: 0,
            enc_util: 0,
            dec_util: 0,
        }
    }

    #[test]
    fn the_share_of_others_is_the_sum_of_their_means_over_the_newest_second() {
        let samples = [
            sample(1, 5_000_000, 90),
            sample(2, 5_000_000, 20),
            sample(2, 5_500_000, 40),
            sample(3, 5_900_000, 15),
            // History: the driver gives all it has to a first question.
            sample(2, 1_000_000, 100),
        ];
        assert_eq!(foreign_share(&samples, &[1], 0), (45, 5_900_000));
        assert_eq!(foreign_share(&samples, &[1, 2, 3], 0), (0, 5_900_000));
        assert_eq!(foreign_share(&[], &[1], 7), (0, 7));
        let many: Vec<_> = (1..9).map(|pid| sample(pid, 9, 60)).collect();
        assert_eq!(foreign_share(&many, &[], 0).0, 100);
    }
}
