//! How every limit is held on this node, for its status.
//!
//! Owns: the rows, per device: what the profile asks for, what is in force, and by which means. Must not enforce anything.

use super::{Owner, workers};
use gogrid_agent_core::adaptive::{Law, Mood};
use gogrid_agent_core::protocol::Readback;
use gogrid_agent_core::shares::permille;
use gogrid_api::effective::Limits;
use gogrid_api::names::CPU_DEVICE;
use gogrid_api::node::{Enforcement, Health};
use gogrid_api::profile::IoClass;

fn row(device: &str, limit: &str, requested: String, effective: String, mechanism: &str) -> Enforcement {
    Enforcement {
        device: device.into(),
        limit: limit.into(),
        requested,
        effective,
        mechanism: mechanism.into(),
    }
}

impl Owner {
    /// The rows of the CPU, then those of every GPU that a job could run on.
    pub(super) fn enforcement(&self) -> Vec<Enforcement> {
        let Some(effective) = self.ceiling() else {
            return vec![];
        };
        let limits = &effective.ceiling;
        let live: Vec<(&Readback, bool)> = self
            .work
            .values()
            .filter(|w| w.link.is_some())
            .filter_map(|w| Some((w.applied.as_ref()?, w.idle)))
            .collect();
        let readbacks: Vec<&Readback> = live.iter().map(|(readback, _)| *readback).collect();
        let idle = !live.is_empty() && live.iter().all(|(_, idle)| *idle);
        let vram = |device: &str, mechanism: &str| {
            let cap = self.ledger.cap(device).to_string();
            row(
                device,
                "vram",
                format!("{} %", limits.vram_percent.0),
                cap,
                mechanism,
            )
        };
        let mut rows = vec![vram(CPU_DEVICE, "ledger, capped arena, RLIMIT_DATA")];
        rows.extend(of_workers(limits, &readbacks, &ranked_by(&readbacks, idle)));
        rows.extend(self.share_rows(CPU_DEVICE, limits));
        for device in self.lent.iter().filter(|d| d.health == Health::Healthy) {
            rows.push(vram(&device.uuid, "ledger, watchdog once a second"));
            rows.extend(self.share_rows(&device.uuid, limits));
        }
        rows
    }

    /// Computing time of a device, and whether it yields.
    fn share_rows(&self, device: &str, limits: &Limits) -> Vec<Enforcement> {
        let asked = limits.compute_percent.0;
        let kept = self.law(device);
        let mood = kept.map(Law::mood);
        let effective = match (mood, kept) {
            (Some(Mood::Yielding | Mood::Blind), Some(law)) => {
                format!(
                    "{} % while others work",
                    law.settings().floor.min(permille(limits.compute_percent)) / 10
                )
            }
            (Some(Mood::Climbing), _) => format!("climbing to {asked} %"),
            _ => format!("{asked} %"),
        };
        let billed = "expiring grants, billed by CPU time";
        let compute = row(device, "compute", format!("{asked} %"), effective, billed);
        let Some(yielding) = limits.yielding else {
            return vec![compute];
        };
        let mood = mood.unwrap_or(Mood::Unsensed);
        let mechanism = match mood {
            Mood::Unsensed => {
                "none: our own part of the device's use can't be told here, the share stays fixed"
            }
            Mood::Blind => "none: the device's use can't be read any more, the floor holds",
            Mood::Full | Mood::Yielding | Mood::Climbing => "adaptive: use and pressure by others",
        };
        let requested = format!(
            "{} % above {} % of foreign load",
            yielding.floor.0, yielding.foreign.0
        );
        vec![
            compute,
            row(device, "adaptive", requested, mood.word().into(), mechanism),
        ]
    }
}

/// What the workers' processes were read back with, on whatever device they compute.
fn of_workers(limits: &Limits, readbacks: &[&Readback], ranked: &str) -> [Enforcement; 4] {
    let idle = || "nothing runs".to_owned();
    let asked_io = match limits.io_class {
        IoClass::None => "None".to_owned(),
        IoClass::BestEffort => format!("BestEffort/{}", limits.io_level),
        IoClass::Idle => "Idle".to_owned(),
    };
    let nice = readbacks
        .iter()
        .map(|r| r.niceness)
        .min()
        .map_or_else(idle, |n| n.to_string());
    let io = readbacks.first().map_or_else(idle, |r| workers::io_text(r.io));
    let interval = readbacks.iter().map(|r| r.request_interval).min();
    let interval = interval.map_or_else(idle, |n| format!("{} ms", n / 1_000_000));
    let batch: u32 = readbacks.iter().map(|r| u32::from(r.max_batch)).sum();
    let batch = if readbacks.is_empty() {
        idle()
    } else {
        batch.to_string()
    };
    [
        row(
            CPU_DEVICE,
            "requestInterval",
            format!("{} ms", limits.request_interval.0),
            interval,
            "request gate per device",
        ),
        row(
            CPU_DEVICE,
            "niceness",
            limits.niceness.0.to_string(),
            nice,
            ranked,
        ),
        row(CPU_DEVICE, "io", asked_io, io, "ioprio_set on every thread"),
        row(
            CPU_DEVICE,
            "batch",
            limits.max_batch.to_string(),
            batch,
            "sequences per decode step",
        ),
    ]
}

/// What ranks the workers behind others: nice values of threads count only inside one autogroup or cgroup.
fn ranked_by(readbacks: &[&Readback], idle: bool) -> String {
    if idle {
        return "cgroup: idle at the top".to_owned();
    }
    match readbacks.iter().map(|r| r.autogroup).min() {
        Some(Some(nice)) => format!("thread, autogroup at {nice}"),
        Some(None) => "thread: ranks inside the workers' cgroup only".to_owned(),
        None => "thread".to_owned(),
    }
}
