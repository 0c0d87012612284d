//! The NVIDIA driver, seen through a child process that may hang at any call.
//!
//! Owns: the frames between the agent and that probe, their bounds, and what a view of the driver means for devices,
//! jobs and the node's conditions. When to ask what is in [`watch`]. Must not do I/O, read a clock or know NVML.

pub mod watch;

use crate::adaptive::Sample;
use crate::session::{Nanos, nanos};
use gogrid_api::node::Device;
use gogrid_api::{Bytes, ConditionStatus, Millis};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest frame body in bytes, in both directions: 4 bytes little-endian length, then JSON.
pub const MAX_FRAME_BYTES: usize = 64 << 10;
/// Most devices of the driver that a node shows: a GpuNode lists 64, the CPU among them.
pub const MAX_DEVICES: usize = 63;
/// Most process ids that one question carries.
pub const MAX_OWN: usize = 512;

/// Agent → probe; one at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Ask {
    /// Load the driver's library if it is not loaded, and list all devices.
    List,
    /// Measure one device of the last list.
    Read {
        /// Which.
        uuid: String,
        /// Our processes, so that the rest is others'.
        own: Vec<u32>,
        /// Whether to ask for the memory of each process, which is the one slow call.
        processes: bool,
    },
}

/// Probe → agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Answer {
    /// There is no driver that could be asked.
    NoDriver {
        /// Why, in the loader's or the driver's words.
        message: String,
    },
    /// All devices.
    Listed {
        /// The driver's version, empty if it does not say.
        version: String,
        /// What was found at each place.
        devices: Vec<Found>,
    },
    /// One device as measured.
    Read(Reading),
    /// That device can't be measured.
    Trouble(Trouble),
}

/// What is at one place of the driver's list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Found {
    /// The GPU's index.
    pub index: u32,
    /// The MIG device's index within its GPU, if it is one.
    pub mig: Option<u32>,
    /// The device, or why it can't be named.
    pub device: Result<Identity, Trouble>,
}

/// What does not change about a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The driver's UUID.
    pub uuid: String,
    /// Product name; several devices may share it.
    pub name: String,
    /// CUDA compute capability.
    pub capability: Option<(u32, u32)>,
    /// Why nothing can be run on it although it answers.
    pub unusable: Option<String>,
}

/// Why a device does not answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trouble {
    /// Whether the driver says that the device is gone, rather than that a call failed.
    pub lost: bool,
    /// The driver's words.
    pub message: String,
}

/// One device as measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reading {
    /// Memory in all, bytes.
    pub total: u64,
    /// Memory the driver keeps, bytes.
    pub reserved: u64,
    /// Memory in use by any process, bytes.
    pub used: u64,
    /// Memory nobody holds, bytes.
    pub free: u64,
    /// Our part of what is used.
    pub own: Own,
    /// Part of the last sample period in which any kernel ran, 0 to 100.
    pub busy_percent: Option<u8>,
    /// The same from processes other than ours, where the driver tells them apart.
    pub foreign_busy_percent: Option<u8>,
    /// Temperature of the die in degrees Celsius.
    pub celsius: Option<u16>,
    /// Why the driver holds clocks down, where it says.
    pub throttle: Option<Throttle>,
}

/// Our part of a device's used memory, read before and after the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Own {
    /// Not asked for.
    NotAsked,
    /// The driver does not say, or its process ids are not those of this PID namespace.
    Unreadable,
    /// It changed while the whole was read: no difference of the two means anything.
    Moved,
    /// Bytes.
    Bytes(u64),
}

/// Why clocks are held down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Throttle {
    /// It is too hot.
    pub thermal: bool,
    /// It draws too much power.
    pub power: bool,
}

/// What is known of the driver as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverState {
    /// Nothing is known yet.
    Starting,
    /// It answers; devices that can't even be named are counted by the sentence, if there are any.
    Answering {
        /// Its version.
        version: String,
        /// What can't be named, and why.
        nameless: Option<String>,
    },
    /// There is none.
    NoDriver(String),
    /// It does not answer in time, or its library ends the probe.
    Unresponsive(String),
    /// Nothing of ours holds it open, because the node asks for that.
    Released,
}

/// The driver and its devices at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The driver.
    pub state: DriverState,
    /// Its devices as the GpuNode shows them, in the driver's order.
    pub devices: Vec<Device>,
    /// What each device does, where it could be measured.
    pub loads: BTreeMap<String, Load>,
    /// Devices that are gone, and the driver's words.
    pub lost: BTreeMap<String, String>,
    /// Index of each device's GPU, and its own index within that if it is a part of one.
    pub places: BTreeMap<String, (u32, Option<u32>)>,
    /// Since when it can't be loaded any more although it has answered in this life.
    pub gone_since: Option<Nanos>,
    /// Whether the node's kernel has the driver, whatever this process can load.
    pub kernel: bool,
}

/// How long a driver that has answered may be impossible to load before this process is of no more use: a container loses
/// its devices for good when they are taken from its cgroup, and a new one gets them.
pub const GONE_LIMIT: Millis = Millis(10_000);

/// Why this process should be replaced by a new one for the driver's sake, if so. Never where there was no driver: a new
/// process would find none either.
pub fn useless(gone_since: Option<Nanos>, now: Nanos) -> Option<String> {
    let since = gone_since?;
    (now >= since.saturating_add(nanos(GONE_LIMIT))).then(|| {
        format!(
            "the NVIDIA driver has answered before and can't be loaded since {} s: a new container gets its devices again",
            now.saturating_sub(since) / 1_000_000_000
        )
    })
}

/// What a device does: the signals of the adaptive law.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// When it was measured, CLOCK_BOOTTIME nanoseconds.
    pub at: u64,
    /// Part of the last sample period in which any kernel ran, 0 to 100.
    pub busy_percent: Option<u8>,
    /// The same from others' processes, where it can be told apart.
    pub foreign_busy_percent: Option<u8>,
    /// Temperature of the die in degrees Celsius.
    pub celsius: Option<u16>,
    /// Why clocks are held down, where the driver says.
    pub throttle: Option<Throttle>,
    /// Memory in use by anybody.
    pub used: Bytes,
    /// Memory of others, once it was ever told apart.
    pub foreign: Option<Bytes>,
}

impl Load {
    /// What the adaptive law is told of it. Heat harms the person at the machine whoever makes it; the power limit is
    /// where a device that works alone runs, so it counts only while others use the device too.
    pub fn sample(&self) -> Sample {
        let foreign = self.foreign_busy_percent.map(|percent| u16::from(percent) * 10);
        let Throttle { thermal, power } = self.throttle.unwrap_or_default();
        Sample {
            at: self.at,
            foreign,
            strained: thermal || (power && foreign.is_some_and(|foreign| foreign > 0)),
        }
    }
}

/// The driver as a condition of the node: status, reason and message. `expected` says by which of the Node's labels there
/// must be a GPU, if by one.
pub fn condition(view: &View, expected: Option<&str>) -> (ConditionStatus, &'static str, String) {
    match &view.state {
        DriverState::Starting => (
            ConditionStatus::Unknown,
            "DriverStarting",
            "the NVIDIA driver is asked for the first time".into(),
        ),
        DriverState::Answering { version, nameless } => {
            let version = if version.is_empty() {
                "of unknown version"
            } else {
                version
            };
            match nameless {
                None => (
                    ConditionStatus::True,
                    "DriverAnswers",
                    format!("NVIDIA driver {version} answers for all of its devices"),
                ),
                Some(nameless) => (
                    ConditionStatus::True,
                    "DevicesLost",
                    format!("NVIDIA driver {version} answers, but not for {nameless}"),
                ),
            }
        }
        DriverState::NoDriver(why) if view.kernel => (
            ConditionStatus::False,
            "DriverNotInPod",
            format!(
                "the node's kernel has the NVIDIA driver, and this process can't use it ({why}): set \
                 agent.runtimeClassName, or runtimeClassName of the node's flavour, to the RuntimeClass of NVIDIA's \
                 container runtime, most often nvidia; until then jobs run on the CPU only"
            ),
        ),
        DriverState::NoDriver(why) => match expected {
            Some(label) => (
                ConditionStatus::False,
                "DriverNotLoaded",
                format!(
                    "by its label {label} the Node has an NVIDIA GPU, and its kernel has no driver for it ({why}): \
                     install the driver on the node, or take the label away; until then jobs run on the CPU only"
                ),
            ),
            None => (
                ConditionStatus::False,
                "NoDriver",
                format!("no NVIDIA driver can be used ({why}): jobs run on the CPU only"),
            ),
        },
        DriverState::Unresponsive(why) => (
            ConditionStatus::False,
            "DriverUnresponsive",
            format!(
                "{why}: no job is started on its devices until it answers again, jobs on the CPU go on; if it stays \
                 so, look at the kernel's log for NVRM and Xid, and restart the driver or the node"
            ),
        ),
        DriverState::Released => (
            ConditionStatus::False,
            "DriverReleased",
            format!(
                "nothing of GoGrid's holds the NVIDIA driver, because the Node is labelled {}={}: remove the label \
                 to use its devices again",
                gogrid_api::names::DRIVER_NODE_LABEL,
                gogrid_api::names::DRIVER_RELEASED
            ),
        ),
    }
}

impl View {
    /// A driver that answers for these devices and says nothing else of them.
    pub fn of(devices: Vec<Device>) -> Self {
        Self {
            state: DriverState::Answering {
                version: String::new(),
                nameless: None,
            },
            devices,
            loads: BTreeMap::new(),
            lost: BTreeMap::new(),
            places: BTreeMap::new(),
            gone_since: None,
            kernel: false,
        }
    }

    /// Why a job that runs on that device of the driver can't go on, if so. A driver that is merely silent takes no
    /// device away: what runs may well go on.
    pub fn lost(&self, uuid: &str) -> Option<String> {
        match &self.state {
            DriverState::Starting | DriverState::Unresponsive(_) => None,
            DriverState::NoDriver(why) => Some(format!("device {uuid}: the driver is gone: {why}")),
            DriverState::Released => Some(format!(
                "device {uuid}: the Node asks for the driver to be released"
            )),
            DriverState::Answering { .. } => match self.lost.get(uuid) {
                Some(message) => Some(format!("device {uuid}: {message}")),
                None if self.devices.iter().any(|d| d.uuid == uuid) => None,
                None => Some(format!("device {uuid}: the driver does not list it any more")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(state: DriverState) -> View {
        View {
            state,
            lost: BTreeMap::from([("GPU-a".into(), "it fell off the bus".into())]),
            ..View::of(vec![])
        }
    }

    #[test]
    fn a_silent_driver_takes_no_running_job_away_and_a_missing_released_or_forgetful_one_does() {
        assert_eq!(view(DriverState::Starting).lost("GPU-a"), None);
        assert_eq!(view(DriverState::Unresponsive("late".into())).lost("GPU-a"), None);
        let gone = |state| view(state).lost("GPU-b").unwrap();
        assert!(gone(DriverState::NoDriver("unloaded".into())).contains("unloaded"));
        assert!(gone(DriverState::Released).contains("released"));
        let answering = DriverState::Answering {
            version: "1".into(),
            nameless: None,
        };
        assert!(gone(answering.clone()).contains("does not list it"));
        assert_eq!(
            view(answering).lost("GPU-a").as_deref(),
            Some("device GPU-a: it fell off the bus")
        );
    }

    #[test]
    fn heat_always_strains_a_device_and_its_power_limit_only_beside_others_load() {
        let load = |foreign_busy_percent, thermal, power| Load {
            at: 7,
            busy_percent: Some(100),
            foreign_busy_percent,
            celsius: Some(90),
            throttle: Some(Throttle { thermal, power }),
            used: Bytes(1),
            foreign: None,
        };
        let strained = |foreign, thermal, power| load(foreign, thermal, power).sample().strained;
        assert!(strained(Some(0), true, false) && strained(None, true, false));
        assert!(!strained(Some(0), false, true) && !strained(None, false, true));
        assert!(strained(Some(1), false, true));
        assert!(!strained(Some(100), false, false));
        let sample = load(Some(35), false, false).sample();
        assert_eq!((sample.at, sample.foreign), (7, Some(350)));
        assert_eq!(load(None, false, false).sample().foreign, None);
    }

    #[test]
    fn every_condition_of_the_driver_says_what_to_do_or_what_goes_on() {
        let of = |state| condition(&view(state), None);
        assert_eq!(of(DriverState::NoDriver("x".into())).1, "NoDriver");
        assert!(of(DriverState::NoDriver("x".into())).2.contains("CPU"));
        assert!(of(DriverState::Unresponsive("late".into())).2.contains("Xid"));
        assert!(of(DriverState::Released).2.contains("gogrid.dev/driver=released"));
        let (status, reason, message) = of(DriverState::Answering {
            version: "580.1".into(),
            nameless: Some("GPU 1: lost".into()),
        });
        assert_eq!((status, reason), (ConditionStatus::True, "DevicesLost"));
        assert!(message.contains("580.1") && message.contains("GPU 1: lost"));
    }

    #[test]
    fn a_missing_driver_names_the_value_to_set_or_the_label_that_promises_one() {
        let absent = view(DriverState::NoDriver("no libnvidia-ml.so.1".into()));
        let in_kernel = View {
            kernel: true,
            ..absent.clone()
        };
        for expected in [None, Some("nvidia.com/gpu.present=true")] {
            let (_, reason, message) = condition(&in_kernel, expected);
            assert_eq!(reason, "DriverNotInPod");
            assert!(message.contains("agent.runtimeClassName") && message.contains("libnvidia-ml"));
        }
        let (_, reason, message) = condition(&absent, Some("nvidia.com/gpu.present=true"));
        assert_eq!(reason, "DriverNotLoaded");
        assert!(message.contains("nvidia.com/gpu.present=true") && message.contains("install"));
        assert_eq!(condition(&absent, None).1, "NoDriver");
    }

    #[test]
    fn a_process_is_useless_ten_seconds_after_its_driver_went_and_never_where_there_was_none() {
        let limit = nanos(GONE_LIMIT);
        assert_eq!(useless(None, u64::MAX), None);
        assert_eq!(useless(Some(5), 4 + limit), None);
        assert!(useless(Some(5), 5 + limit).is_some_and(|why| why.contains("10 s")));
    }
}
