//! The driver's devices, their health, and the jobs on them.
//!
//! Owns: what a change of a device means for ledger, orders and jobs, and what the driver's thread is told. Must not
//! measure.

use super::Owner;
use crate::clock::wall_seconds;
use gogrid_agent_core::adaptive::Sample;
use gogrid_agent_core::driver::{View, condition};
use gogrid_agent_core::guest::{self, Allocated};
use gogrid_agent_core::plan::{Ending, Phase};
use gogrid_agent_core::session::Nanos;
use gogrid_agent_core::vram::{Own, Reading};
use gogrid_api::job::Failure;
use gogrid_api::names::{CPU_DEVICE, DRIVER_NODE_LABEL, DRIVER_RELEASED, GPU_NODE_LABELS};
use gogrid_api::node::{Device, Health};
use gogrid_api::{AssignmentSpec, Bytes, Condition, ConditionStatus};
use std::collections::BTreeSet;

impl Owner {
    /// All devices as they were measured and may be used, the CPU first.
    pub(super) fn measured_devices(&self) -> impl Iterator<Item = &Device> {
        self.cpu.iter().chain(&self.lent)
    }

    /// All devices as they are published, with our workers' memory taken out of what others use.
    pub(super) fn devices(&self) -> Vec<Device> {
        let ours_out = |device: &Device| {
            let mut device = device.clone();
            if device.uuid == CPU_DEVICE {
                let used = device.memory_foreign.bytes().unwrap_or_default();
                device.memory_foreign = used.saturating_sub(self.used_by_workers(CPU_DEVICE)).into();
            }
            device
        };
        self.measured_devices().map(ours_out).collect()
    }

    /// The driver was looked at: devices may have come, gone or fallen ill.
    pub(super) fn driver_seen(&mut self, view: View, now: Nanos) {
        let before = self.driver.replace(view);
        for (uuid, sample) in self.new_samples(before.as_ref()) {
            self.sensed(&uuid, sample);
        }
        let Some(view) = &self.driver else { return };
        for device in &view.devices {
            let of = |quantity: &gogrid_api::ByteQuantity| quantity.bytes().unwrap_or_default();
            let load = view.loads.get(&device.uuid);
            let used = load.map_or(of(&device.memory_foreign), |load| load.used);
            let own = load.map_or(Some(Bytes(0)), |load| {
                load.foreign.map(|foreign| used.saturating_sub(foreign))
            });
            let reading = Reading {
                at: now,
                total: of(&device.memory_total),
                reserved: of(&device.memory_reserved),
                used,
                own: own.map(|live| Own {
                    live,
                    ended: Bytes(0),
                }),
                free_at_exit: false,
            };
            self.ledger.observe(&device.uuid, reading);
        }
        let listed = |uuid: &str| view.devices.iter().any(|device| device.uuid == uuid);
        let gone = before.iter().flat_map(|view| &view.devices);
        for device in gone.filter(|old| !listed(&old.uuid)) {
            // What is still reserved there stays in the books until its worker is gone; nothing more is given.
            let nothing = Reading {
                at: now,
                total: Bytes(0),
                reserved: Bytes(0),
                used: Bytes(0),
                own: Some(Own::default()),
                free_at_exit: false,
            };
            self.ledger.observe(&device.uuid, nothing);
        }
        self.end_jobs_of_lost_devices();
        self.lend(now);
        self.set_caps();
    }

    /// What was measured of devices since that view.
    fn new_samples(&self, before: Option<&View>) -> Vec<(String, Sample)> {
        let seen = |uuid: &str| before.and_then(|view| view.loads.get(uuid)).map(|load| load.at);
        let loads = self.driver.iter().flat_map(|view| &view.loads);
        loads
            .filter(|(uuid, load)| seen(uuid).is_none_or(|at| at < load.at))
            .map(|(uuid, load)| (uuid.clone(), load.sample()))
            .collect()
    }

    /// Devices of the driver that a job has.
    pub(super) fn driver_devices_in_use(&self) -> BTreeSet<String> {
        let live = |name: &str| self.jobs.get(name).is_some_and(|job| job.phase != Phase::Over);
        self.work
            .iter()
            .filter(|(name, work)| live(name) && !work.device.is_empty() && work.device != CPU_DEVICE)
            .map(|(_, work)| work.device.clone())
            .collect()
    }

    /// The kubelet said which devices pods hold, or didn't.
    pub(super) fn pods_seen(&mut self, answer: Result<Vec<Allocated>, String>, now: Nanos) {
        if self.guest.heard(answer, now) {
            self.lend(now);
        }
    }

    /// Finds out anew which of the driver's devices may be used, and has jobs leave those that pods hold.
    fn lend(&mut self, now: Nanos) {
        let Some(view) = &self.driver else { return };
        self.holders = self.guest.holders(view);
        self.lent = self.guest.lent(view);
        let on = self
            .work
            .iter()
            .map(|(name, work)| (name.as_str(), work.device.as_str()));
        for (name, failure) in guest::claimed(&self.holders, on) {
            let Some(job) = self.jobs.get_mut(&name).filter(|job| job.phase != Phase::Over) else {
                continue;
            };
            let known = job
                .eviction
                .as_ref()
                .is_some_and(|(why, _)| why.reason == failure.reason);
            if !known {
                tracing::warn!(
                    assignment = name,
                    message = failure.message,
                    "a pod has its device"
                );
                // Without a grace: its pod waits for the memory.
                job.eviction = Some((failure, now));
            }
        }
        self.find_obstacles();
    }

    /// Finds out which held devices the written status still offers.
    pub(super) fn note_unsaid(&mut self) {
        let written = self.pace.last().map_or(&[][..], |status| &status.devices);
        self.unsaid = guest::unsaid(&self.holders, written);
    }

    /// Jobs on a device that is gone fail, and only those.
    fn end_jobs_of_lost_devices(&mut self) {
        let Some(view) = &self.driver else { return };
        let lost: Vec<(String, String)> = self
            .work
            .iter()
            .filter(|(_, work)| !work.device.is_empty() && work.device != CPU_DEVICE)
            .filter_map(|(name, work)| Some((name.clone(), view.lost(&work.device)?)))
            .collect();
        for (name, why) in lost {
            self.fail(&name, "DeviceLost", &why, true);
        }
    }

    /// Why an order can't be run here, whatever is free.
    pub(super) fn obstacle_of(&self, order: &AssignmentSpec) -> Option<Ending> {
        if let Some(failure) = self.obstacle(order.profile_name.as_deref()) {
            return Some(Ending::Failed(failure));
        }
        let uuid = order.stages.first().map(|stage| stage.gpu_uuid.as_str())?;
        if let Some(holder) = self.holders.get(uuid) {
            return Some(Ending::Evicted(guest::claim(uuid, holder)));
        }
        let device = self.measured_devices().find(|device| device.uuid == uuid)?;
        let message = device.message.as_deref().unwrap_or("it is not healthy");
        (device.health == Health::Unhealthy).then(|| {
            Ending::Failed(Failure {
                reason: "DeviceUnhealthy".into(),
                message: format!("device {uuid}: {message}"),
                retryable: true,
            })
        })
    }

    /// Looks at every order again.
    pub(super) fn find_obstacles(&mut self) {
        let found: Vec<(String, Option<Ending>)> = self
            .orders
            .iter()
            .map(|(name, order)| (name.clone(), self.obstacle_of(&order.assignment.spec)))
            .collect();
        for (name, obstacle) in found {
            if let Some(order) = self.orders.get_mut(&name) {
                order.obstacle = obstacle;
            }
        }
    }

    /// Tells the driver's thread which processes are ours, whether a job has one of its devices, and whether to let go.
    pub(super) fn tell_driver(&mut self) {
        let busy = !self.driver_devices_in_use().is_empty();
        let pids = self.pids.values().copied().collect();
        let label = self
            .labels
            .as_ref()
            .and_then(|labels| labels.get(DRIVER_NODE_LABEL));
        let released = label.is_some_and(|value| value == DRIVER_RELEASED);
        let gone = self.driver.as_ref().and_then(|view| view.gone_since);
        self.tools.metrics.set_driver_gone(gone);
        if let Some(driver) = &mut self.tools.driver {
            driver.own(pids, busy);
            driver.released(released);
        }
    }

    /// What the GpuNode says of the driver, of the pods that hold GPUs, and of the clock.
    pub(super) fn surroundings(&self, now: Nanos) -> Vec<Condition> {
        let driver = self
            .driver
            .as_ref()
            .map(|view| condition(view, self.expected_gpu().as_deref()));
        let said = [
            ("DriverReady", driver),
            ("PodGPUsKnown", Some(self.guest.condition(now))),
            ("ClockAgrees", self.skew.condition()),
        ];
        let condition = |type_: &str, (status, reason, message): (ConditionStatus, &str, String)| Condition {
            type_: type_.to_owned(),
            status,
            reason: reason.to_owned(),
            message,
            observed_generation: 1,
            last_transition_time: wall_seconds(&*self.tools.host),
        };
        said.into_iter()
            .filter_map(|(type_, said)| Some(condition(type_, said?)))
            .collect()
    }

    /// The label by which the Node has a GPU, if it has one of those.
    fn expected_gpu(&self) -> Option<String> {
        let labels = self.labels.as_ref()?;
        let has = |(key, value): &&(&str, &str)| labels.get(*key).is_some_and(|found| found == value);
        GPU_NODE_LABELS
            .iter()
            .find(has)
            .map(|(key, value)| format!("{key}={value}"))
    }
}
