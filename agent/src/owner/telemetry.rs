//! The owner's state in numbers.
//!
//! Owns: which gauge follows from which state. Must not change anything but gauges.

use super::Owner;
use gogrid_agent_core::plan::Phase;
use gogrid_agent_core::session::Nanos;
use gogrid_api::Bytes;
use gogrid_api::node::{Backend, Device, Health};
use prometheus::IntGaugeVec;

/// Between two looks, in nanoseconds.
const EVERY: Nanos = 1_000_000_000;

fn bytes(gauge: &IntGaugeVec, device: &str, Bytes(bytes): Bytes) {
    gauge
        .with_label_values(&[device])
        .set(i64::try_from(bytes).unwrap_or(i64::MAX));
}

fn count(items: usize) -> i64 {
    i64::try_from(items).unwrap_or(i64::MAX)
}

impl Owner {
    /// Sets every gauge, at most once a second.
    pub(super) fn tell(&mut self, now: Nanos) {
        if now < self.told_at.saturating_add(EVERY) {
            return;
        }
        self.told_at = now;
        let metrics = &self.tools.metrics;
        let live = self.jobs.values().filter(|job| job.phase != Phase::Over);
        metrics.jobs.set(count(live.count()));
        let fenced = self
            .jobs
            .values()
            .filter(|job| job.fenced && job.phase != Phase::Over);
        metrics.fenced.set(count(fenced.count()));
        for device in self.measured_devices() {
            self.tell_device(device);
        }
    }

    fn tell_device(&self, device: &Device) {
        let (metrics, uuid) = (&self.tools.metrics, device.uuid.as_str());
        let healthy = i64::from(device.health == Health::Healthy);
        metrics.healthy.with_label_values(&[uuid]).set(healthy);
        let total = device.memory_total.bytes().unwrap_or_default();
        bytes(&metrics.memory_total, uuid, total);
        let others = device.memory_foreign.bytes().unwrap_or_default();
        let others = if device.backend == Backend::Cpu {
            others.saturating_sub(self.used_by_workers(uuid))
        } else {
            others
        };
        bytes(&metrics.memory_foreign, uuid, others);
        bytes(&metrics.memory_limit, uuid, self.ledger.cap(uuid));
        bytes(&metrics.memory_reserved, uuid, self.ledger.held(uuid));
        bytes(&metrics.memory_free, uuid, self.ledger.free(uuid));
        let running = || {
            self.work
                .values()
                .filter(|work| work.device == uuid && work.link.is_some())
        };
        let used = running().fold(Bytes(0), |sum, work| {
            sum.saturating_add(Bytes(work.usage.peak_bytes))
        });
        bytes(&metrics.memory_used, uuid, used);
        let share: f64 = running().map(|work| f64::from(work.share)).sum();
        metrics.share.with_label_values(&[uuid]).set(share / 1000.0);
        if let Some(node) = self.ceiling() {
            let percent = f64::from(node.ceiling.compute_percent.0);
            metrics
                .compute_limit
                .with_label_values(&[uuid])
                .set(percent / 100.0);
        }
    }
}
