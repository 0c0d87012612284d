//! When to ask the driver what, and what follows from its answers.
//!
//! Owns: the rounds of questions, deadlines and pauses, the memory of others while ours is known, and the view that is
//! told on. One question is outstanding at any time. Must not ask itself: an executor carries [`Next`] out.

mod view;

use super::{Answer, Ask, DriverState, Found, Identity, MAX_DEVICES, MAX_OWN, Own, Reading, Trouble, View};
use crate::results::clip;
use crate::session::Nanos;

use std::collections::BTreeSet;
use view::{bounded, bounded_identity};

/// How far the memory in use must move before processes are asked for out of turn.
const MOVED_BYTES: u64 = 64 << 20;
/// Doublings of the pause between two attempts.
const MOST_DOUBLINGS: u32 = 6;

/// Durations, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Between two rounds while a job of ours has one of the devices.
    pub round: Nanos,
    /// Between two rounds otherwise.
    pub idle_round: Nanos,
    /// How long a reading of one device may take.
    pub answer: Nanos,
    /// How long loading the driver or listing its devices may take: a driver without persistence mode initialises
    /// every GPU then.
    pub open: Nanos,
    /// Between two lists.
    pub list: Nanos,
    /// Between two looks for a driver that is not there.
    pub absent: Nanos,
    /// The same where it was there before.
    pub gone: Nanos,
    /// Pause after the first failure; each further one doubles it up to 64 times that.
    pub retry: Nanos,
    /// Between two looks at the memory of each process, the slow call.
    pub processes: Nanos,
    /// The same when the memory in use has moved.
    pub processes_moved: Nanos,
}

impl Timing {
    /// All durations in proportion to a second of that many nanoseconds: tests shorten it.
    pub const fn with_second(second: Nanos) -> Self {
        Self {
            round: second,
            idle_round: second.saturating_mul(10),
            answer: second.saturating_mul(2),
            open: second.saturating_mul(30),
            list: second.saturating_mul(60),
            absent: second.saturating_mul(30),
            gone: second.saturating_mul(2),
            retry: second,
            processes: second.saturating_mul(10),
            processes_moved: second.saturating_mul(5),
        }
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self::with_second(1_000_000_000)
    }
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask, starting the probe if none runs, and wait that many nanoseconds at most.
    Ask(Ask, Nanos),
    /// End the probe.
    End,
    /// Nothing before that instant, unless told something.
    Wait(Nanos),
}

/// Why there was no answer. The probe does not run any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The deadline passed; it was killed.
    Late,
    /// It could not be started, it ended, or it said something that is no answer.
    Ended(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// No probe is wanted before that instant.
    Closed { until: Nanos },
    /// Device after device.
    Reading { index: usize },
    /// Between two rounds.
    Resting,
}

#[derive(Clone, Debug)]
struct Known {
    index: u32,
    mig: Option<u32>,
    identity: Identity,
    reading: Option<(Reading, Nanos)>,
    trouble: Option<Trouble>,
    /// The last list could not name it: there is nothing to ask for.
    nameless: bool,
    foreign: Option<u64>,
    processes_at: Option<Nanos>,
    processes_used: u64,
}

impl Known {
    fn new(found: &Found, identity: Identity) -> Self {
        Self {
            index: found.index,
            mig: found.mig,
            identity,
            reading: None,
            trouble: None,
            nameless: false,
            foreign: None,
            processes_at: None,
            processes_used: 0,
        }
    }
}

/// What is known, and what comes next.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts, not states of one machine"
)]
pub struct Watch {
    timing: Timing,
    worker: bool,
    mode: Mode,
    state: DriverState,
    known: Vec<Known>,
    nameless: Vec<String>,
    version: String,
    own: BTreeSet<u32>,
    busy: bool,
    released: bool,
    open: bool,
    asked: Option<Ask>,
    round_began: Option<Nanos>,
    /// A list was just made: its devices are measured as soon as their last measurement allows.
    hurry: bool,
    listed_at: Nanos,
    failures: u32,
    reopen_at: Option<Nanos>,
    /// It has answered in this life, and was not released since.
    worked: bool,
    /// Since when it can't be loaded any more although it has answered.
    gone_since: Option<Nanos>,
    dirty: bool,
}

impl Watch {
    /// Nothing known yet. `worker` says whether jobs can be run on the driver's devices by this build.
    pub fn new(timing: Timing, worker: bool) -> Self {
        Self {
            timing,
            worker,
            mode: Mode::Closed { until: 0 },
            state: DriverState::Starting,
            known: vec![],
            nameless: vec![],
            version: String::new(),
            own: BTreeSet::new(),
            busy: false,
            released: false,
            open: false,
            asked: None,
            round_began: None,
            hurry: false,
            listed_at: 0,
            failures: 0,
            reopen_at: None,
            worked: false,
            gone_since: None,
            dirty: true,
        }
    }

    /// Our processes that may use the driver, and whether a job of ours has one of its devices.
    pub fn set_own(&mut self, own: impl IntoIterator<Item = u32>, busy: bool) {
        self.own = own.into_iter().take(MAX_OWN).collect();
        self.busy = busy;
    }

    /// Whether everything of ours must let go of the driver.
    pub fn set_released(&mut self, released: bool, now: Nanos) {
        if released == self.released {
            return;
        }
        self.released = released;
        self.mode = Mode::Closed { until: now };
        self.failures = 0;
        // What is not there after it was let go may be on its way out or in.
        (self.worked, self.gone_since) = (false, None);
        self.state = if released {
            DriverState::Released
        } else {
            DriverState::Starting
        };
        self.dirty = true;
    }

    /// What to do now.
    pub fn next(&mut self, now: Nanos) -> Next {
        loop {
            match self.mode {
                Mode::Closed { .. } if self.open => {
                    self.open = false;
                    return Next::End;
                }
                Mode::Closed { .. } if self.released => return Next::Wait(Nanos::MAX),
                Mode::Closed { until } if now < until => return Next::Wait(until),
                Mode::Closed { .. } => {
                    self.open = true;
                    return self.ask(Ask::List, self.timing.open);
                }
                Mode::Resting => {
                    if self.reopen_at.is_some_and(|at| now >= at) {
                        self.reopen_at = None;
                        self.failures = self.failures.saturating_add(1);
                        self.mode = Mode::Closed { until: now };
                        continue;
                    }
                    let every = if self.busy || self.hurry {
                        self.timing.round
                    } else {
                        self.timing.idle_round
                    };
                    let until = self.round_began.map_or(now, |began| began.saturating_add(every));
                    if now < until {
                        return Next::Wait(self.reopen_at.map_or(until, |at| at.min(until)));
                    }
                    if now >= self.listed_at.saturating_add(self.timing.list) {
                        return self.ask(Ask::List, self.timing.open);
                    }
                    (self.round_began, self.hurry) = (Some(now), false);
                    self.mode = Mode::Reading { index: 0 };
                }
                Mode::Reading { index } => {
                    let Some(known) = self.known.get(index) else {
                        self.round_ended(now);
                        continue;
                    };
                    if known.nameless {
                        self.mode = Mode::Reading { index: index + 1 };
                        continue;
                    }
                    let processes = !self.own.is_empty() && self.processes_due(known, now);
                    let ask = Ask::Read {
                        uuid: known.identity.uuid.clone(),
                        own: self.own.iter().copied().collect(),
                        processes,
                    };
                    return self.ask(ask, self.timing.answer);
                }
            }
        }
    }

    fn ask(&mut self, ask: Ask, limit: Nanos) -> Next {
        self.asked = Some(ask.clone());
        Next::Ask(ask, limit)
    }

    fn processes_due(&self, known: &Known, now: Nanos) -> bool {
        let Some(at) = known.processes_at else { return true };
        let used = known.reading.as_ref().map_or(0, |(r, _)| r.used);
        let moved = used.abs_diff(known.processes_used) > MOVED_BYTES;
        let every = if moved {
            self.timing.processes_moved
        } else {
            self.timing.processes
        };
        now >= at.saturating_add(every)
    }

    /// The outcome of the question asked last.
    pub fn heard(&mut self, outcome: Result<Answer, Silence>, now: Nanos) {
        let Some(asked) = self.asked.take() else { return };
        if self.released {
            // Whatever it was: End comes next.
            self.open &= outcome.is_ok();
            return;
        }
        match (asked, outcome) {
            (Ask::List, Ok(Answer::Listed { version, devices })) => self.listed(&version, devices, now),
            (Ask::List, Ok(Answer::NoDriver { message })) => self.absent(&message, now),
            (Ask::List, Ok(Answer::Trouble(trouble))) => {
                let text = format!(
                    "the NVIDIA driver can't list its devices: {}",
                    bounded(&trouble).message
                );
                self.silent(text, now);
            }
            (Ask::Read { uuid, processes, .. }, Ok(Answer::Read(reading))) => {
                self.read(&uuid, reading, processes, now);
                self.advance();
            }
            (Ask::Read { uuid, .. }, Ok(Answer::Trouble(trouble))) => {
                let mut known = self.known.iter_mut();
                if let Some(known) = known.find(|k| k.identity.uuid == uuid) {
                    known.trouble = Some(bounded(&trouble));
                    known.reading = None;
                }
                self.advance();
            }
            (asked, Ok(_)) => {
                let text = format!(
                    "the probe of the NVIDIA driver gave no answer to {}",
                    about(&asked)
                );
                // The executor keeps it running; it must not.
                self.silent(text, now);
            }
            (asked, Err(Silence::Late)) => {
                self.open = false;
                let limit = match asked {
                    Ask::List => self.timing.open,
                    Ask::Read { .. } => self.timing.answer,
                };
                let text = format!(
                    "the NVIDIA driver did not answer within {} ms when asked {}",
                    limit / 1_000_000,
                    about(&asked)
                );
                self.silent(text, now);
            }
            (asked, Err(Silence::Ended(how))) => {
                self.open = false;
                let text = format!(
                    "the probe of the NVIDIA driver ended when asked {}: {}",
                    about(&asked),
                    clip(&how, 256)
                );
                self.silent(text, now);
            }
        }
    }

    fn advance(&mut self) {
        if let Mode::Reading { index } = &mut self.mode {
            *index = index.saturating_add(1);
        }
    }

    fn pause(&self) -> Nanos {
        self.timing
            .retry
            .saturating_mul(1 << self.failures.min(MOST_DOUBLINGS))
    }

    fn silent(&mut self, why: String, now: Nanos) {
        self.gone_since = None;
        self.mode = Mode::Closed {
            until: now.saturating_add(self.pause()),
        };
        self.failures = self.failures.saturating_add(1);
        self.reopen_at = None;
        self.state = DriverState::Unresponsive(why);
        self.dirty = true;
    }

    fn absent(&mut self, message: &str, now: Nanos) {
        if self.worked {
            self.gone_since.get_or_insert(now);
        }
        // One that has answered is soon looked for again: it decides whether this container is of any more use.
        let pause = if self.worked {
            self.timing.gone
        } else {
            self.timing.absent
        };
        self.mode = Mode::Closed {
            until: now.saturating_add(pause),
        };
        self.known.clear();
        self.failures = 0;
        self.state = DriverState::NoDriver(clip(message, 256).to_owned());
        self.dirty = true;
    }

    fn listed(&mut self, version: &str, devices: Vec<Found>, now: Nanos) {
        clip(version, 32).clone_into(&mut self.version);
        (self.worked, self.gone_since) = (true, None);
        let mut old = std::mem::take(&mut self.known);
        self.nameless.clear();
        for found in devices {
            if self.known.len() == MAX_DEVICES {
                self.nameless.push(format!("more than {MAX_DEVICES} devices"));
                break;
            }
            match &found.device {
                Ok(identity) => {
                    let identity = bounded_identity(identity.clone());
                    if identity.uuid.is_empty() || self.known.iter().any(|k| k.identity.uuid == identity.uuid)
                    {
                        self.nameless
                            .push(format!("GPU {}: its UUID is not its own", found.index));
                        continue;
                    }
                    let before = old.iter().position(|k| k.identity.uuid == identity.uuid);
                    let mut known =
                        before.map_or_else(|| Known::new(&found, identity.clone()), |i| old.remove(i));
                    (known.index, known.mig, known.identity) = (found.index, found.mig, identity);
                    known.nameless = false;
                    self.known.push(known);
                }
                Err(trouble) => {
                    let place = |k: &Known| (k.index, k.mig) == (found.index, found.mig);
                    if let Some(i) = old.iter().position(place) {
                        // It had a name before: it is still that device that is in trouble.
                        let mut known = old.remove(i);
                        known.trouble = Some(bounded(trouble));
                        known.reading = None;
                        known.nameless = true;
                        self.known.push(known);
                    } else {
                        let why = clip(&trouble.message, 96);
                        self.nameless.push(format!("GPU {}: {why}", found.index));
                    }
                }
            }
        }
        self.listed_at = now;
        self.hurry = true;
        self.mode = Mode::Resting;
    }

    fn read(&mut self, uuid: &str, reading: Reading, processes: bool, now: Nanos) {
        let nothing_of_ours = self.own.is_empty();
        let Some(known) = self.known.iter_mut().find(|k| k.identity.uuid == uuid) else {
            return;
        };
        let used = reading.used;
        if processes {
            known.processes_at = Some(now);
            known.processes_used = used;
        }
        match reading.own {
            Own::Bytes(own) => known.foreign = Some(used.saturating_sub(own)),
            _ if nothing_of_ours => known.foreign = Some(used),
            // What of it is ours is not known now: others hold what they held when it was.
            Own::NotAsked | Own::Moved | Own::Unreadable => {}
        }
        known.reading = Some((reading, now));
        known.trouble = None;
    }

    fn round_ended(&mut self, now: Nanos) {
        self.mode = Mode::Resting;
        let nameless = (!self.nameless.is_empty()).then(|| clip(&self.nameless.join("; "), 512).to_owned());
        let trouble = nameless.is_some() || self.known.iter().any(|k| k.trouble.is_some());
        if trouble {
            // Only a driver that is loaded anew sees a device that has come back.
            let at = now.saturating_add(self.pause());
            self.reopen_at.get_or_insert(at);
        } else {
            self.reopen_at = None;
            self.failures = 0;
        }
        self.state = DriverState::Answering {
            version: self.version.clone(),
            nameless,
        };
        self.dirty = true;
    }

    /// The view, if there is anything new to tell.
    pub fn news(&mut self) -> Option<View> {
        std::mem::take(&mut self.dirty).then(|| self.view())
    }
}

/// The question as part of a sentence.
fn about(ask: &Ask) -> String {
    match ask {
        Ask::List => "for its devices".into(),
        Ask::Read { uuid, .. } => format!("about device {uuid}"),
    }
}

#[cfg(test)]
mod tests;
