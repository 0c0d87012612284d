//! The C symbols.
//!
//! Owns: the caller's memory, which only `put`, `text` and `array` write to. Must not hold state.

#![expect(
    unsafe_code,
    reason = "C symbols are exported and write to pointers that the caller gives"
)]
#![allow(non_snake_case, reason = "NVML's names")]

use crate::scenario::{Lost, Part, Scenario};
use crate::state;
use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlMemory_v2_t, nvmlProcessInfo_t, nvmlProcessUtilizationSample_t,
    nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST as GPU_IS_LOST,
    nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE as INSUFFICIENT_SIZE,
    nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT as INVALID_ARGUMENT,
    nvmlReturn_enum_NVML_ERROR_NOT_FOUND as NOT_FOUND,
    nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED as NOT_SUPPORTED, nvmlReturn_enum_NVML_SUCCESS as SUCCESS,
    nvmlReturn_t, nvmlUtilization_t,
};
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong};
use std::time::SystemTime;

/// "Not available", as NVML says it of a process's memory or instance.
const NO_BYTES: c_ulonglong = c_ulonglong::MAX;
const NO_INSTANCE: c_uint = c_uint::MAX;
/// Most devices a split GPU can have.
const MOST_PARTS: c_uint = 7;

type Answer = Result<(), nvmlReturn_t>;

fn call(symbol: &str, answer: impl FnOnce(&Scenario) -> Answer) -> nvmlReturn_t {
    match state::enter(symbol).and_then(|scenario| answer(&scenario)) {
        Ok(()) => SUCCESS,
        Err(code) => code,
    }
}

fn put<T>(out: *mut T, value: T) -> Answer {
    if out.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: NVML's contract is that the caller's pointer is valid and aligned for the documented type, whose layout
    // is taken from the bindings that the caller uses.
    unsafe { out.write(value) };
    Ok(())
}

fn get<T: Copy>(from: *const T) -> Result<T, nvmlReturn_t> {
    if from.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: as in `put`; the caller has initialised what it passes in.
    Ok(unsafe { from.read() })
}

fn text(out: *mut c_char, length: c_uint, text: &str) -> Answer {
    let bytes = text.bytes().filter(|byte| *byte != 0).chain([0]);
    let room = usize::try_from(length).unwrap_or(0);
    if text.len() >= room {
        return Err(INSUFFICIENT_SIZE);
    }
    for (at, byte) in bytes.enumerate() {
        put(out.wrapping_add(at), byte.cast_signed())?;
    }
    Ok(())
}

/// A list behind a pointer with room for `count`, which becomes how many there are.
fn array<T>(count: *mut c_uint, out: *mut T, growing: bool, values: Vec<T>) -> Answer {
    let room = get(count)?;
    let many = c_uint::try_from(values.len()).unwrap_or(c_uint::MAX);
    put(count, many)?;
    if many > room || (growing && !out.is_null()) {
        return Err(INSUFFICIENT_SIZE);
    }
    for (at, value) in values.into_iter().enumerate() {
        put(out.wrapping_add(at), value)?;
    }
    Ok(())
}

fn of(scenario: &Scenario, device: nvmlDevice_t) -> Result<&Part, nvmlReturn_t> {
    state::part(scenario, device.addr())
}

fn device(index: usize, part: Option<usize>) -> nvmlDevice_t {
    std::ptr::without_provenance_mut(state::handle(index, part))
}

/// SAFETY of every symbol below: no other library of the process defines it; the loader resolves it by name in this one.
macro_rules! symbols {
    ($($name:ident($scenario:ident $(, $argument:ident: $kind:ty)*) $body:block)*) => {$(
        #[doc = concat!("`", stringify!($name), "`, as NVML documents it.")]
        // SAFETY: see the macro.
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $kind),*) -> nvmlReturn_t {
            call(stringify!($name), |$scenario| $body)
        }
    )*};
}

symbols! {
    nvmlInit_v2(_scenario) { Ok(()) }

    nvmlShutdown(_scenario) {
        state::leave();
        Ok(())
    }

    nvmlSystemGetDriverVersion(scenario, version: *mut c_char, length: c_uint) {
        text(version, length, &scenario.driver)
    }

    nvmlDeviceGetCount_v2(scenario, count: *mut c_uint) {
        put(count, c_uint::try_from(scenario.devices.len()).unwrap_or(0))
    }

    nvmlDeviceGetHandleByIndex_v2(scenario, index: c_uint, out: *mut nvmlDevice_t) {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        match scenario.devices.get(index) {
            None => Err(INVALID_ARGUMENT),
            Some(found) if found.lost == Lost::Handle => Err(GPU_IS_LOST),
            Some(_) => put(out, device(index, None)),
        }
    }

    nvmlDeviceGetHandleByUUID(scenario, uuid: *const c_char, out: *mut nvmlDevice_t) {
        if uuid.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        // As documented: any GPU that has fallen off the bus fails this call, whichever is looked for.
        if scenario.devices.iter().any(|found| found.lost != Lost::No) {
            return Err(GPU_IS_LOST);
        }
        // SAFETY: NVML's contract: a string that ends in a zero byte.
        let uuid = unsafe { CStr::from_ptr(uuid) }.to_str().map_err(|_| INVALID_ARGUMENT)?;
        for (index, found) in scenario.devices.iter().enumerate() {
            let parts = found.mig.iter().flatten();
            if found.part.uuid == uuid {
                return put(out, device(index, None));
            }
            if let Some(part) = parts.map(|part| &part.uuid).position(|other| other == uuid) {
                return put(out, device(index, Some(part)));
            }
        }
        Err(NOT_FOUND)
    }

    nvmlDeviceGetName(scenario, device: nvmlDevice_t, out: *mut c_char, length: c_uint) {
        text(out, length, &of(scenario, device)?.name)
    }

    nvmlDeviceGetUUID(scenario, device: nvmlDevice_t, out: *mut c_char, length: c_uint) {
        text(out, length, &of(scenario, device)?.uuid)
    }

    nvmlDeviceGetCudaComputeCapability(scenario, device: nvmlDevice_t, major: *mut c_int, minor: *mut c_int) {
        let (high, low) = of(scenario, device)?.capability;
        put(major, high)?;
        put(minor, low)
    }

    nvmlDeviceGetMemoryInfo_v2(scenario, device: nvmlDevice_t, out: *mut nvmlMemory_v2_t) {
        let part = of(scenario, device)?;
        let processes: u64 = part.processes.iter().filter_map(|process| process.bytes).sum();
        let used = part.used + processes;
        let free = part.total.saturating_sub(part.reserved).saturating_sub(used);
        let version = get(out)?.version;
        put(out, nvmlMemory_v2_t { version, total: part.total, reserved: part.reserved, free, used })
    }

    nvmlDeviceGetUtilizationRates(scenario, device: nvmlDevice_t, out: *mut nvmlUtilization_t) {
        let gpu = of(scenario, device)?.busy.ok_or(NOT_SUPPORTED)?;
        put(out, nvmlUtilization_t { gpu, memory: 0 })
    }

    nvmlDeviceGetTemperature(scenario, device: nvmlDevice_t, _sensor: c_uint, out: *mut c_uint) {
        put(out, of(scenario, device)?.celsius.ok_or(NOT_SUPPORTED)?)
    }

    nvmlDeviceGetCurrentClocksThrottleReasons(scenario, device: nvmlDevice_t, out: *mut c_ulonglong) {
        put(out, of(scenario, device)?.throttle)
    }

    nvmlDeviceGetComputeRunningProcesses_v3(
        scenario, device: nvmlDevice_t, count: *mut c_uint, out: *mut nvmlProcessInfo_t
    ) {
        let part = of(scenario, device)?;
        let info = |process: &crate::Process| nvmlProcessInfo_t {
            pid: process.pid,
            usedGpuMemory: process.bytes.unwrap_or(NO_BYTES),
            gpuInstanceId: NO_INSTANCE,
            computeInstanceId: NO_INSTANCE,
        };
        array(count, out, part.growing, part.processes.iter().map(info).collect())
    }

    nvmlDeviceGetProcessUtilization(
        scenario, device: nvmlDevice_t, out: *mut nvmlProcessUtilizationSample_t, count: *mut c_uint, since: c_ulonglong
    ) {
        let part = of(scenario, device)?;
        if !part.by_process {
            return Err(NOT_SUPPORTED);
        }
        #[expect(clippy::disallowed_methods, reason = "NVML stamps samples by this clock")]
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // A sample a second, taken as it passes.
        let timeStamp = now.as_secs().saturating_mul(1_000_000);
        if timeStamp <= since || part.processes.is_empty() {
            return Err(NOT_FOUND);
        }
        let sample = |process: &crate::Process| nvmlProcessUtilizationSample_t {
            pid: process.pid,
            timeStamp,
            smUtil: process.busy,
            memUtil: 0,
            encUtil: 0,
            decUtil: 0,
        };
        array(count, out, part.growing, part.processes.iter().map(sample).collect())
    }

    nvmlDeviceGetMigMode(scenario, device: nvmlDevice_t, current: *mut c_uint, pending: *mut c_uint) {
        let (gpu, _) = state::gpu(scenario, device.addr())?;
        let on = c_uint::from(gpu.mig.is_some());
        put(current, on)?;
        put(pending, on)
    }

    nvmlDeviceGetMaxMigDeviceCount(scenario, device: nvmlDevice_t, count: *mut c_uint) {
        let (gpu, _) = state::gpu(scenario, device.addr())?;
        put(count, if gpu.mig.is_some() { MOST_PARTS } else { 0 })
    }

    nvmlDeviceGetMigDeviceHandleByIndex(scenario, whole: nvmlDevice_t, index: c_uint, out: *mut nvmlDevice_t) {
        let (gpu, _) = state::gpu(scenario, whole.addr())?;
        let parts = gpu.mig.as_deref().unwrap_or_default();
        let place = usize::try_from(index).unwrap_or(usize::MAX);
        // Places need not be filled in order: the last one here comes after a hole.
        let hole = parts.len().saturating_sub(1);
        let part = match place {
            at if at < hole => at,
            at if at == hole + 1 && !parts.is_empty() => hole,
            _ => return Err(NOT_FOUND),
        };
        let of = (whole.addr() >> 8).checked_sub(1).ok_or(INVALID_ARGUMENT)?;
        put(out, device(of, Some(part)))
    }
}
