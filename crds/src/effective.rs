//! What a node, and a job on it, may take: one pure function for planner, agent and CLI.
//!
//! Owns: which profile governs a node, and how a job's own profile tightens it field by field.
//! Must not: read a clock, know devices' fill or decide placement.

use crate::profile::{AdaptiveMode, CONSERVATIVE, IoClass, ResourceProfileSpec, presets};
use crate::quantity::{Bytes, Millis, Niceness, Percent, QuantityError};
use std::collections::BTreeMap;

/// A profile's limits, parsed: what is enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Share of each device's (total − reserved) memory.
    pub vram_percent: Percent,
    /// Most bytes of each device.
    pub vram_max: Option<Bytes>,
    /// Bytes left free below the cap.
    pub vram_reserve: Bytes,
    /// Share of each device's time.
    pub compute_percent: Percent,
    /// Shortest time between two request starts on a device.
    pub request_interval: Millis,
    /// Nice value of every worker thread.
    pub niceness: Niceness,
    /// I/O class of every worker thread.
    pub io_class: IoClass,
    /// I/O level within BestEffort.
    pub io_level: u8,
    /// Sequences decoded together on a device.
    pub max_batch: u16,
    /// How the share of a device's time yields to others; `None`: it is fixed.
    pub yielding: Option<Yielding>,
}

/// How a share yields to other people's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Yielding {
    /// Foreign load of a device above which the share falls.
    pub foreign: Percent,
    /// Share kept meanwhile.
    pub floor: Percent,
}

impl Yielding {
    fn tightened_by(self, other: Self) -> Self {
        Self {
            foreign: self.foreign.min(other.foreign),
            floor: self.floor.min(other.floor),
        }
    }
}

/// A field of a profile that this version does not enforce, or that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// A value that a later version will enforce.
    #[error("{field} = {value} is not enforced by this version of GoGrid: it must be left out")]
    Unsupported {
        /// Path of the field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// A value out of its bounds; the API server refuses these, a stored object may still hold one.
    #[error("{field} = {value} must be {must}")]
    OutOfBounds {
        /// Path of the field.
        field: &'static str,
        /// Its value.
        value: i64,
        /// What is allowed.
        must: &'static str,
    },
    /// Not a byte quantity.
    #[error("{field}: {source}")]
    Quantity {
        /// Path of the field.
        field: &'static str,
        /// What is wrong with it.
        source: QuantityError,
    },
}

fn bounded<T: TryFrom<i64>>(
    field: &'static str,
    value: impl Into<i64>,
    range: std::ops::RangeInclusive<i64>,
    must: &'static str,
) -> Result<T, ProfileError> {
    let value = value.into();
    let error = ProfileError::OutOfBounds { field, value, must };
    if !range.contains(&value) {
        return Err(error);
    }
    T::try_from(value).map_err(|_| error)
}

impl TryFrom<&ResourceProfileSpec> for Limits {
    type Error = ProfileError;

    fn try_from(spec: &ResourceProfileSpec) -> Result<Self, ProfileError> {
        let ResourceProfileSpec {
            vram,
            compute,
            cpu,
            io,
            max_batch_size,
            adaptive,
            node_selector: _,
            precedence: _,
        } = spec;
        if let Some(weight) = cpu.weight {
            return Err(ProfileError::Unsupported {
                field: "spec.cpu.weight",
                value: weight.to_string(),
            });
        }
        let yielding = Yielding {
            foreign: Percent(bounded(
                "spec.adaptive.foreignLoadPercent",
                adaptive.foreign_load_percent,
                1..=100,
                "1 to 100",
            )?),
            floor: Percent(bounded(
                "spec.adaptive.floorPercent",
                adaptive.floor_percent,
                1..=100,
                "1 to 100",
            )?),
        };
        let bytes = |field, quantity: &Option<crate::ByteQuantity>| {
            quantity
                .as_ref()
                .map(crate::ByteQuantity::bytes)
                .transpose()
                .map_err(|source| ProfileError::Quantity { field, source })
        };
        Ok(Self {
            vram_percent: Percent(bounded(
                "spec.vram.maxPercent",
                vram.max_percent,
                1..=100,
                "1 to 100",
            )?),
            vram_max: bytes("spec.vram.max", &vram.max)?,
            vram_reserve: bytes("spec.vram.reserve", &vram.reserve)?.unwrap_or_default(),
            compute_percent: Percent(bounded(
                "spec.compute.maxPercent",
                compute.max_percent,
                1..=100,
                "1 to 100",
            )?),
            request_interval: Millis(bounded(
                "spec.compute.minRequestIntervalMillis",
                compute.min_request_interval_millis,
                0..=3_600_000,
                "0 to 3600000",
            )?),
            niceness: Niceness(bounded("spec.cpu.niceness", cpu.niceness, -20..=19, "-20 to 19")?),
            io_class: io.class,
            io_level: bounded("spec.io.level", io.level, 0..=7, "0 to 7")?,
            max_batch: bounded("spec.maxBatchSize", *max_batch_size, 1..=256, "1 to 256")?,
            yielding: (adaptive.mode == AdaptiveMode::ForeignLoad).then_some(yielding),
        })
    }
}

impl Limits {
    /// Bytes of a device that all jobs together may take: the percentage of (total − reserved), at most `vram.max`,
    /// less `vram.reserve`.
    pub fn vram_cap(&self, total: Bytes, driver_reserved: Bytes) -> Bytes {
        let share = total.saturating_sub(driver_reserved).percent(self.vram_percent);
        self.vram_max
            .map_or(share, |max| share.min(max))
            .saturating_sub(self.vram_reserve)
    }

    /// The stricter of both in every field.
    #[must_use]
    pub fn tightened_by(&self, other: &Limits) -> Limits {
        let Limits {
            vram_percent,
            vram_max,
            vram_reserve,
            compute_percent,
            request_interval,
            niceness,
            io_class,
            io_level,
            max_batch,
            yielding,
        } = other;
        let kindest_io = match self.io_class.cmp(io_class) {
            std::cmp::Ordering::Greater => (self.io_class, self.io_level),
            std::cmp::Ordering::Equal => (self.io_class, self.io_level.max(*io_level)),
            std::cmp::Ordering::Less => (*io_class, *io_level),
        };
        Limits {
            vram_percent: self.vram_percent.min(*vram_percent),
            vram_max: match (self.vram_max, *vram_max) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            vram_reserve: self.vram_reserve.max(*vram_reserve),
            compute_percent: self.compute_percent.min(*compute_percent),
            request_interval: self.request_interval.max(*request_interval),
            niceness: self.niceness.max(*niceness),
            io_class: kindest_io.0,
            io_level: kindest_io.1,
            max_batch: self.max_batch.min(*max_batch),
            yielding: match (self.yielding, *yielding) {
                (Some(a), Some(b)) => Some(a.tightened_by(b)),
                (a, b) => a.or(b),
            },
        }
    }
}

/// A stored profile, as planner and agent hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedProfile {
    /// Its name.
    pub name: String,
    /// Its `metadata.generation`.
    pub generation: i64,
    /// Its spec.
    pub spec: ResourceProfileSpec,
}

/// What is in force for one node, or for one job on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EffectiveProfile {
    /// The node's ceiling: on the sum of all jobs, per device.
    pub ceiling: Limits,
    /// The job's own limits: the ceiling, tightened by the job's profile if it names one.
    pub limits: Limits,
    /// Names and generations that took part, the governing one first.
    pub sources: Vec<(String, i64)>,
}

/// Why no effective profile can be said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EffectiveProfileError {
    /// The job names a profile that is not there.
    #[error("ResourceProfile {0:?} does not exist: create it or name one of those that do")]
    NotFound(String),
    /// A profile can't be enforced.
    #[error("ResourceProfile {name:?}: {source}")]
    Invalid {
        /// Its name.
        name: String,
        /// What is wrong with it.
        source: ProfileError,
    },
}

/// The profile that governs a node: of those whose selector matches, highest precedence, then first name.
pub fn governing<'a>(
    profiles: &'a [NamedProfile],
    node_labels: &BTreeMap<String, String>,
) -> Option<&'a NamedProfile> {
    let matches = |p: &&NamedProfile| {
        p.spec
            .node_selector
            .as_ref()
            .is_some_and(|s| s.iter().all(|(k, v)| node_labels.get(k) == Some(v)))
    };
    profiles.iter().filter(matches).max_by(|a, b| {
        a.spec
            .precedence
            .cmp(&b.spec.precedence)
            .then_with(|| b.name.cmp(&a.name))
    })
}

/// What a job that names `job_profile` may take on a node with these labels.
///
/// The node's profile is a ceiling; the job's own only tightens it. Where no profile matches the node, the stored
/// `conservative` governs, and the built-in preset of that name where none is stored.
///
/// # Errors
/// The job's profile is missing, or one of the profiles can't be enforced.
pub fn effective_profile(
    profiles: &[NamedProfile],
    node_labels: &BTreeMap<String, String>,
    job_profile: Option<&str>,
) -> Result<EffectiveProfile, EffectiveProfileError> {
    let limits_of = |name: &str, spec: &ResourceProfileSpec| {
        Limits::try_from(spec).map_err(|source| EffectiveProfileError::Invalid {
            name: name.into(),
            source,
        })
    };
    let by_name = |name: &str| profiles.iter().find(|p| p.name == name);
    let stored = governing(profiles, node_labels).or_else(|| by_name(CONSERVATIVE));
    let (ceiling, source) = if let Some(p) = stored {
        (limits_of(&p.name, &p.spec)?, (p.name.clone(), p.generation))
    } else {
        let [(name, spec), ..] = presets();
        (limits_of(name, &spec)?, (name.into(), 0))
    };
    let mut sources = vec![source];
    let limits = match job_profile {
        None => ceiling.clone(),
        Some(name) => {
            let own = by_name(name).ok_or_else(|| EffectiveProfileError::NotFound(name.into()))?;
            if !sources.iter().any(|(s, _)| s == name) {
                sources.push((own.name.clone(), own.generation));
            }
            ceiling.tightened_by(&limits_of(&own.name, &own.spec)?)
        }
    };
    Ok(EffectiveProfile {
        ceiling,
        limits,
        sources,
    })
}
