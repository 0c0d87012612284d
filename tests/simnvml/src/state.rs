//! The state of one process that has loaded the library.
//!
//! Owns: reading the scenario anew when it changes, initialisation and resets, what every call does before it answers.
//! Must not touch memory of the caller.

use crate::scenario::{Device, Lost, Part, Scenario};
use crate::{LIBRARY_FILE, SCENARIO_FILE, SCENARIO_VARIABLE};
use nvml_wrapper_sys::bindings::{
    nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST as GPU_IS_LOST,
    nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT as INVALID_ARGUMENT,
    nvmlReturn_enum_NVML_ERROR_UNINITIALIZED as UNINITIALIZED, nvmlReturn_enum_NVML_ERROR_UNKNOWN as UNKNOWN,
    nvmlReturn_t,
};
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// Bits of a handle that name the part of a GPU.
const PART_BITS: u32 = 8;

/// The scenario as last read, when its file was written, and which file that was: two may be written within one tick.
static READ: Mutex<Option<(SystemTime, u64, Scenario)>> = Mutex::new(None);
/// 0: not initialised; else the number of resets at initialisation, plus one.
static INITIALISED: AtomicU64 = AtomicU64::new(0);
/// Calls made under the scenario as last read.
static CALLS: AtomicU64 = AtomicU64::new(0);

/// The file that the variable names, or the one beside this library, wherever that lies.
fn path() -> Option<PathBuf> {
    #[expect(
        clippy::disallowed_methods,
        reason = "a library has no other way to be told anything"
    )]
    let named = std::env::var_os(SCENARIO_VARIABLE).map(PathBuf::from);
    named.or_else(|| {
        let maps = fs::read_to_string("/proc/self/maps").ok()?;
        let mut files = maps
            .lines()
            .filter_map(|line| line.find('/').and_then(|at| line.get(at..)));
        let library = files.find(|file| file.ends_with(LIBRARY_FILE))?;
        Some(Path::new(library).with_file_name(SCENARIO_FILE))
    })
}

/// The scenario as it is now; none that can be read: a driver that answers UNKNOWN.
fn scenario() -> Option<Scenario> {
    let path = path()?;
    let meta = fs::metadata(&path).ok()?;
    let (at, file) = (meta.modified().ok()?, meta.ino());
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((before, known, scenario)) = read.as_ref()
        && (*before, *known) == (at, file)
    {
        return Some(scenario.clone());
    }
    let scenario: Scenario = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
    *read = Some((at, file, scenario.clone()));
    CALLS.store(0, Ordering::Relaxed);
    Some(scenario)
}

/// Does nothing for that long, or for ever.
fn stand_still(time: Option<Duration>) {
    #[expect(
        clippy::disallowed_methods,
        reason = "it simulates a driver's slowness, which no condition ends"
    )]
    match time {
        Some(time) => std::thread::sleep(time),
        None => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
    }
}

/// What happens at one call of this process under chaos.
fn chaos(scenario: &Scenario, call: u64) -> Option<nvmlReturn_t> {
    let chaos = scenario.chaos?;
    let mut mixed = chaos.seed ^ (u64::from(std::process::id()) << 32);
    for _ in 0..3 {
        mixed ^= mixed >> 31;
        mixed = mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
    let within = chaos.within.max(1);
    if call % within != mixed % within {
        return None;
    }
    match (mixed >> 40) % 8 {
        0 => std::process::abort(),
        1 => std::process::exit(1),
        2 => Some(UNKNOWN),
        3 => Some(GPU_IS_LOST),
        _ => {
            stand_still(None);
            None
        }
    }
}

/// What every call does first: counts, waits, fails as the scenario says. `Err` is what it must return.
pub(crate) fn enter(symbol: &str) -> Result<Scenario, nvmlReturn_t> {
    let scenario = scenario().ok_or(UNKNOWN)?;
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    if let Some(log) = &scenario.calls
        && let Ok(mut file) = OpenOptions::new().append(true).create(true).open(log)
    {
        // A test that counts calls finds fewer when this fails.
        let _ = writeln!(file, "{symbol}");
    }
    if scenario.hang.iter().any(|name| name == symbol) {
        stand_still(None);
    }
    if scenario.slow_millis > 0 {
        stand_still(Some(Duration::from_millis(scenario.slow_millis)));
    }
    if let Some(code) = chaos(&scenario, call) {
        return Err(code);
    }
    if let Some(code) = scenario.codes.get(symbol) {
        return Err(*code);
    }
    match INITIALISED.load(Ordering::Relaxed) {
        _ if symbol == "nvmlInit_v2" => INITIALISED.store(scenario.resets + 1, Ordering::Relaxed),
        0 => return Err(UNINITIALIZED),
        resets if resets != scenario.resets + 1 => return Err(UNKNOWN),
        _ => {}
    }
    Ok(scenario)
}

/// `nvmlShutdown`.
pub(crate) fn leave() {
    INITIALISED.store(0, Ordering::Relaxed);
}

/// The number that stands for a GPU, or for a part of it.
pub(crate) fn handle(index: usize, part: Option<usize>) -> usize {
    ((index + 1) << PART_BITS) | part.map_or(0, |part| part + 1)
}

/// The GPU of a handle, and which part of it, if it is one.
pub(crate) fn gpu(scenario: &Scenario, handle: usize) -> Result<(&Device, Option<usize>), nvmlReturn_t> {
    let index = (handle >> PART_BITS).checked_sub(1).ok_or(INVALID_ARGUMENT)?;
    let device = scenario.devices.get(index).ok_or(GPU_IS_LOST)?;
    if device.lost != Lost::No {
        return Err(GPU_IS_LOST);
    }
    let part = (handle & ((1 << PART_BITS) - 1)).checked_sub(1);
    Ok((device, part))
}

/// What a handle names.
pub(crate) fn part(scenario: &Scenario, handle: usize) -> Result<&Part, nvmlReturn_t> {
    match gpu(scenario, handle)? {
        (device, None) => Ok(&device.part),
        (device, Some(part)) => {
            let parts = device.mig.as_deref().unwrap_or_default();
            parts.get(part).ok_or(INVALID_ARGUMENT)
        }
    }
}
