//! How a device's share yields to other people's work and comes back.
//!
//! Owns: the law from samples of a device to the share that may be granted there. Must not measure anything, know who
//! the others are, or read a clock.
//!
//! Down at once and all the way, up slowly: two samples above the threshold put the share on its floor; after a quiet
//! spell it climbs by [`RISE_PERMILLE`] a second. A load that comes back soon after a climb makes the next quiet spell
//! twice as long, so that a machine in use is not tried again and again.

pub mod cpu;

use crate::session::{Nanos, nanos};
use crate::shares::permille;
use gogrid_api::Millis;
use gogrid_api::effective::Limits;

/// Samples of a device are to come at least this often; the reaction times hold only then.
pub const SAMPLE_EVERY: Millis = Millis(500);
/// Samples above the threshold, one after the other, that put the share on its floor.
pub const TRIP_SAMPLES: u32 = 2;
/// Quiet that the first climb needs.
pub const QUIET: Millis = Millis(3_000);
/// Longest quiet that a climb needs, however often the load came back.
pub const QUIET_MOST: Millis = Millis(60_000);
/// A load that comes back within this time of a climb's beginning doubles the quiet that the next one needs.
pub const AGAIN: Millis = Millis(60_000);
/// Climb per second, in permille of the device.
pub const RISE_PERMILLE: u64 = 100;
/// Without a sample for this long the share goes to its floor.
pub const HOLD: Millis = Millis(5_000);

/// What was seen of a device at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When, in nanoseconds of CLOCK_BOOTTIME.
    pub at: Nanos,
    /// What others use of the device, and want of it beside that where this can be told, in permille of the device.
    /// Never a total less our own use: that saturates and never trips under a high ceiling. `None`: can't be read.
    pub foreign: Option<u16>,
    /// Something else asks to yield: memory pressure, heat or a power limit.
    pub strained: bool,
}

/// What the law keeps to; all in permille of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Most that is ever granted: the profile's.
    pub ceiling: u16,
    /// What is kept while others work; the ceiling where that is lower.
    pub floor: u16,
    /// Foreign load above which the share falls.
    pub threshold: u16,
}

impl Settings {
    /// What a profile's limits ask for; nothing where its share is fixed.
    pub fn of(limits: &Limits) -> Option<Self> {
        let yielding = limits.yielding?;
        Some(Self {
            ceiling: permille(limits.compute_percent),
            floor: permille(yielding.floor),
            threshold: permille(yielding.foreign),
        })
    }
}

/// What a device's share does now, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Nothing could ever be read of the device: the profile's share holds, and that is said.
    Unsensed,
    /// Nobody else works: the profile's share holds.
    Full,
    /// Others work: the floor holds.
    Yielding,
    /// Others have stopped: the share climbs.
    Climbing,
    /// The sensor was lost: the floor holds.
    Blind,
}

impl Mood {
    /// One word for status and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Mood::Unsensed => "Unsensed",
            Mood::Full => "Full",
            Mood::Yielding => "Yielding",
            Mood::Climbing => "Climbing",
            Mood::Blind => "Blind",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Ceiling,
    Floor,
    /// From the floor, since then.
    Climb(Nanos),
}

/// The law of one device.
#[derive(Clone, Debug)]
pub struct Law {
    settings: Settings,
    level: Level,
    /// When a readable sample was last taken.
    seen_at: Option<Nanos>,
    lost: bool,
    above: u32,
    quiet_since: Option<Nanos>,
    quiet_needed: Nanos,
    climbed_at: Option<Nanos>,
}

impl Law {
    /// A device of which nothing was seen yet: its ceiling.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            level: Level::Ceiling,
            seen_at: None,
            lost: false,
            above: 0,
            quiet_since: None,
            quiet_needed: nanos(QUIET),
            climbed_at: None,
        }
    }

    /// What it keeps to.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Nothing of ours is on the device any more, and nobody looks at it as often as the law needs: what was seen is
    /// forgotten, so that the next job there meets neither an old load nor a sensor that seems lost.
    pub fn forget(&mut self) {
        *self = Self::new(self.settings);
    }

    /// A profile was edited: new bounds hold at once, what was seen stays seen.
    pub fn set(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Takes a sample in; one that is older than the last is dropped.
    pub fn observe(&mut self, sample: Sample) {
        let Sample {
            at,
            foreign,
            strained,
        } = sample;
        if self.seen_at.is_some_and(|seen| at < seen) {
            return;
        }
        if foreign.is_some() {
            self.seen_at = Some(at);
            self.lost = false;
        }
        let foreign = foreign.unwrap_or(0);
        if strained || foreign > self.settings.threshold {
            self.above = self.above.saturating_add(1);
        } else {
            self.above = 0;
        }
        // A quarter below the threshold: a load that hovers at it must not be taken for one that has ended.
        let quiet = !strained && u32::from(foreign) * 4 <= u32::from(self.settings.threshold) * 3;
        self.quiet_since = if quiet {
            Some(self.quiet_since.unwrap_or(at))
        } else {
            None
        };
        if self.above >= TRIP_SAMPLES && self.level != Level::Floor {
            self.trip(at);
        } else if self.level == Level::Floor
            && self
                .quiet_since
                .is_some_and(|since| at >= since.saturating_add(self.quiet_needed))
        {
            self.level = Level::Climb(at);
            self.climbed_at = Some(at);
        }
    }

    fn trip(&mut self, at: Nanos) {
        let again = self
            .climbed_at
            .is_some_and(|climbed| at < climbed.saturating_add(nanos(AGAIN)));
        self.quiet_needed = if again {
            self.quiet_needed.saturating_mul(2).min(nanos(QUIET_MOST))
        } else {
            nanos(QUIET)
        };
        self.level = Level::Floor;
    }

    /// The share that may be granted now, in permille of the device.
    pub fn share(&mut self, now: Nanos) -> u16 {
        if self
            .seen_at
            .is_some_and(|seen| now >= seen.saturating_add(nanos(HOLD)))
        {
            // Blind is not quiet: what was seen before counts no more when the sensor is back.
            self.lost = true;
            self.level = Level::Floor;
            self.quiet_since = None;
            self.above = 0;
        }
        let ceiling = self.settings.ceiling;
        let floor = self.settings.floor.min(ceiling);
        match self.level {
            Level::Ceiling => ceiling,
            Level::Floor => floor,
            Level::Climb(since) => {
                let risen = now.saturating_sub(since).saturating_mul(RISE_PERMILLE) / 1_000_000_000;
                let share = u16::try_from(risen)
                    .unwrap_or(u16::MAX)
                    .saturating_add(floor)
                    .min(ceiling);
                if share == ceiling {
                    self.level = Level::Ceiling;
                }
                share
            }
        }
    }

    /// What the share does, as of the last [`Law::share`].
    pub fn mood(&self) -> Mood {
        match self.level {
            _ if self.lost => Mood::Blind,
            Level::Floor => Mood::Yielding,
            Level::Climb(_) => Mood::Climbing,
            Level::Ceiling if self.seen_at.is_none() => Mood::Unsensed,
            Level::Ceiling => Mood::Full,
        }
    }
}

#[cfg(test)]
mod tests;
