//! Shares that yield to other people's work.
//!
//! Owns: one law per device for the node's profile, one per job whose own profile asks for it, both fed with samples of
//! the device; what is said of them in status. Must not measure or grant anything.

use super::Owner;
use super::work::Work;
use gogrid_agent_core::adaptive::{Law, Mood, Sample, Settings};
use gogrid_agent_core::session::Nanos;
use gogrid_agent_core::shares::permille;
use gogrid_api::assignment::Notice;
use gogrid_api::effective::Limits;
use gogrid_api::names::CPU_DEVICE;

/// While a share climbs, it is granted anew in steps of this many permille.
const STEP_PERMILLE: u16 = 10;
/// Between two changes of what a job's status says of its share.
const NOTICE_NANOS: Nanos = 60_000_000_000;

/// What a law allows just now.
#[derive(Clone, Debug)]
pub(super) struct Yield {
    law: Law,
    share: u16,
    /// What was last told of it: samples turn the law too, between two looks at it.
    told: Mood,
}

impl Yield {
    /// Keeps a law where the limits ask for one.
    fn keep(kept: &mut Option<Self>, limits: &Limits) {
        *kept = Settings::of(limits).map(|settings| match kept.take() {
            Some(mut kept) => {
                kept.law.set(settings);
                kept
            }
            None => Self {
                law: Law::new(settings),
                share: settings.ceiling,
                told: Mood::Unsensed,
            },
        });
    }

    fn breathe(&mut self, now: Nanos) {
        let share = self.law.share(now);
        self.share = match self.law.mood() {
            Mood::Climbing => share - share % STEP_PERMILLE,
            Mood::Unsensed | Mood::Full | Mood::Yielding | Mood::Blind => share,
        };
    }
}

fn share_of(kept: Option<&Yield>) -> u16 {
    kept.map_or(u16::MAX, |kept| kept.share)
}

impl Owner {
    /// A device was looked at.
    pub(super) fn sensed(&mut self, device: &str, sample: Sample) {
        let gauge = self.tools.metrics.foreign.with_label_values(&[device]);
        gauge.set(sample.foreign.map_or(-1, i64::from));
        let on_device = self.work.values_mut().filter(|work| work.device == device);
        let of_jobs = on_device.filter_map(|work| work.yielding.as_mut());
        for kept in self.laws.get_mut(device).into_iter().flatten().chain(of_jobs) {
            kept.law.observe(sample);
        }
    }

    /// Laws follow the profiles in force; what was seen stays seen.
    pub(super) fn keep_laws(&mut self) {
        let Some(node) = self.ceiling() else { return };
        for device in self.ledger.devices() {
            Yield::keep(self.laws.entry(device.to_owned()).or_default(), &node.ceiling);
        }
        for work in self.work.values_mut() {
            if let Some(effective) = &work.effective {
                Yield::keep(&mut work.yielding, &effective.limits);
            }
        }
    }

    /// Lets time pass for every law, and counts the turns of the nodes'.
    pub(super) fn breathe(&mut self, now: Nanos) {
        let in_use = self.driver_devices_in_use();
        for (device, kept) in &mut self.laws {
            let Some(kept) = kept else { continue };
            // The driver is asked seldom about devices that no job of ours is on.
            if device != CPU_DEVICE && !in_use.contains(device) {
                kept.law.forget();
            }
            kept.breathe(now);
            let mood = kept.law.mood();
            if mood != kept.told {
                kept.told = mood;
                tracing::info!(
                    device,
                    mood = mood.word(),
                    share_permille = kept.share,
                    "the share of the device yields differently"
                );
                let turns = &self.tools.metrics.turns;
                turns.with_label_values(&[device.as_str(), mood.word()]).inc();
            }
        }
        for work in self.work.values_mut() {
            if let Some(kept) = &mut work.yielding {
                kept.breathe(now);
            }
        }
    }

    /// What the workers of a device may use together, in permille of its time.
    pub(super) fn device_share(&self, device: &str, limits: &Limits) -> u16 {
        permille(limits.compute_percent).min(share_of(self.laws.get(device).and_then(Option::as_ref)))
    }

    /// The law that a device's share follows, where the profile asks for one.
    pub(super) fn law(&self, device: &str) -> Option<&Law> {
        Some(&self.laws.get(device)?.as_ref()?.law)
    }

    /// What one job may use of its device at most, in permille of its time.
    pub(super) fn job_share(work: &Work, limits: &Limits) -> u16 {
        permille(limits.compute_percent).min(share_of(work.yielding.as_ref()))
    }

    /// Says of a job whether others' work holds it below its share; not more often than once a minute.
    pub(super) fn say_throttled(&mut self, now: Nanos) {
        for work in self.work.values_mut() {
            let node = self.laws.get(&work.device).and_then(Option::as_ref);
            let running = work.loaded_at.is_some() && work.link.is_some();
            let notice = node
                .into_iter()
                .chain(&work.yielding)
                .filter(|_| running)
                .find_map(notice);
            let recent = work
                .noticed_at
                .is_some_and(|at| now < at.saturating_add(NOTICE_NANOS));
            if work.status.throttled != notice && (!recent || !running) {
                work.status.throttled = notice;
                work.noticed_at = Some(now);
            }
        }
    }
}

/// What is said of a job under a law.
fn notice(kept: &Yield) -> Option<Notice> {
    let settings = kept.law.settings();
    let (floor, threshold) = (settings.floor.min(settings.ceiling) / 10, settings.threshold / 10);
    let (reason, message) = match kept.law.mood() {
        Mood::Unsensed | Mood::Full => return None,
        Mood::Yielding | Mood::Climbing => (
            "ForeignLoad",
            format!(
                "others use the device or did a moment ago: above {threshold} % of foreign load this job gets {floor} % \
                 of its time, and more again once they are done"
            ),
        ),
        Mood::Blind => (
            "SensorLost",
            format!(
                "the load of others can't be read any more: this job gets {floor} % of the device's time"
            ),
        ),
    };
    Some(Notice {
        reason: reason.into(),
        message,
    })
}
