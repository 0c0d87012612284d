//! The ledger of device memory: who holds how much of which device, and whether more may be given.
//!
//! Owns: reservations per device and the promise that no reservation ever lifts their sum above the cap; what counts
//! as used by others; and since when bytes of an ended worker are free again. Must not measure anything: readings and
//! caps are told to it.

use crate::session::{Nanos, nanos};
use gogrid_api::{Bytes, Millis};
use std::collections::BTreeMap;

/// A device whose own use can't be read counts as clean up to this much use by others.
pub const CLEAN: Bytes = Bytes(64 << 20);
/// How far two readings of one device may lie apart and still tell the same.
pub const SLACK: Bytes = Bytes(64 << 20);
/// Bytes of an ended worker that the device still shows after this long are taken for somebody else's.
pub const LEAVE_DEADLINE: Millis = Millis(10_000);

/// Why a reservation was not given, with every number behind it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// No device of that name, or none that is told about yet.
    #[error("device {0:?} is not on this node")]
    NoDevice(String),
    /// The name already holds bytes of the device.
    #[error("{0:?} already holds bytes of this device")]
    Held(String),
    /// The name holds nothing of the device.
    #[error("{0:?} holds no bytes of this device")]
    NotHeld(String),
    /// Enough will be free once the device has given back what ended workers held.
    #[error(
        "{needed} of device memory are needed: the device has yet to give back {leaving} of workers that have ended"
    )]
    Leaving {
        /// Bytes asked for.
        needed: Bytes,
        /// Bytes that are being given back.
        leaving: Bytes,
    },
    /// Our own use can't be told from that of others, and there are others.
    #[error(
        "{foreign} of this device are in use and the driver does not say by whom: a job is only taken while nobody else \
         uses the device"
    )]
    NotClean {
        /// Bytes in use.
        foreign: Bytes,
    },
    /// Too little is left.
    #[error(
        "{needed} of device memory are needed, {free} are free: the profile allows {cap} for all jobs, {held} of them \
         are reserved, and {foreign} of {total} are used by others"
    )]
    TooLittle {
        /// Bytes asked for.
        needed: Bytes,
        /// Bytes that could be given.
        free: Bytes,
        /// The cap on the sum of all reservations.
        cap: Bytes,
        /// Sum of all reservations.
        held: Bytes,
        /// Bytes that others use.
        foreign: Bytes,
        /// The device's memory in all.
        total: Bytes,
    },
}

/// What a device shows of our own workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// Held by those that run.
    pub live: Bytes,
    /// Still shown of those that have ended, whichever agent they worked for.
    pub ended: Bytes,
}

impl Own {
    /// What held while the device's use was read between two looks at our own; nothing where the looks lie too far
    /// apart to say.
    pub fn between(before: Option<Own>, after: Option<Own>) -> Option<Own> {
        let (before, after) = (before?, after?);
        let near = |a: Bytes, b: Bytes| a.0.abs_diff(b.0) <= SLACK.0;
        (near(before.live, after.live) && near(before.ended, after.ended)).then(|| Own {
            live: before.live.max(after.live),
            ended: before.ended.max(after.ended),
        })
    }
}

/// A device's memory as it was read once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// When it was read, in nanoseconds of CLOCK_BOOTTIME.
    pub at: Nanos,
    /// Memory in all.
    pub total: Bytes,
    /// Kept by driver or system.
    pub reserved: Bytes,
    /// In use by anybody.
    pub used: Bytes,
    /// Of that, our workers'; `None`: can't be told.
    pub own: Option<Own>,
    /// Whether memory is free again as soon as its process has ended, as the system's own is; a GPU's may come later.
    pub free_at_exit: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing of it is on the device yet.
    Promised,
    /// It is being allocated: what the device shows is neither ours nor others' for sure.
    Loading,
    /// On the device.
    Loaded,
    /// Its worker has ended at that time; the device has yet to show it.
    Leaving(Nanos),
}

#[derive(Clone, Copy, Debug)]
struct Holding {
    bytes: Bytes,
    stage: Stage,
}

#[derive(Clone, Debug, Default)]
struct Account {
    total: Bytes,
    reserved: Bytes,
    foreign: Bytes,
    ended: Bytes,
    own_known: bool,
    free_at_exit: bool,
    cap: Bytes,
    holdings: BTreeMap<String, Holding>,
}

impl Account {
    fn sum(&self, of: impl Fn(Stage) -> bool) -> Bytes {
        self.holdings
            .values()
            .filter(|h| of(h.stage))
            .fold(Bytes(0), |sum, h| sum.saturating_add(h.bytes))
    }

    /// Reservations, and what the device still shows of workers that no reservation stands for any more: those of an
    /// agent before this one.
    fn held(&self) -> Bytes {
        let old = self.ended.saturating_sub(self.leaving());
        self.sum(|_| true).saturating_add(old)
    }

    fn leaving(&self) -> Bytes {
        self.sum(|stage| matches!(stage, Stage::Leaving(_)))
    }

    /// What all of ours together may hold now.
    fn room(&self) -> Bytes {
        let usable = self
            .total
            .saturating_sub(self.reserved)
            .saturating_sub(self.foreign);
        self.cap.min(usable)
    }

    fn free(&self) -> Bytes {
        if !self.own_known && self.foreign > CLEAN {
            return Bytes(0);
        }
        self.room().saturating_sub(self.held())
    }

    /// Why `more` bytes beyond those held are not given to somebody who needs `needed`.
    fn shortage(&self, needed: Bytes, more: Bytes) -> Shortage {
        let leaving = self.leaving().max(self.ended);
        let soon = self.held().saturating_sub(leaving).saturating_add(more);
        if !self.own_known && self.foreign > CLEAN {
            Shortage::NotClean {
                foreign: self.foreign,
            }
        } else if leaving > Bytes(0) && soon <= self.room() {
            Shortage::Leaving { needed, leaving }
        } else {
            Shortage::TooLittle {
                needed,
                free: self.free(),
                cap: self.cap,
                held: self.held(),
                foreign: self.foreign,
                total: self.total,
            }
        }
    }

    fn observe(&mut self, reading: Reading) {
        let Reading {
            at,
            total,
            reserved,
            used,
            own,
            free_at_exit,
        } = reading;
        self.total = total;
        self.reserved = reserved;
        self.own_known = own.is_some();
        self.ended = own.unwrap_or_default().ended;
        self.free_at_exit = free_at_exit;
        let staying = self.sum(|stage| !matches!(stage, Stage::Leaving(_)));
        let given_back = match own {
            Some(Own { ended, .. }) => ended == Bytes(0),
            None => used <= staying.saturating_add(self.foreign).saturating_add(SLACK),
        };
        self.holdings.retain(|_, holding| match holding.stage {
            Stage::Leaving(since) => {
                at <= since || (!given_back && at < since.saturating_add(nanos(LEAVE_DEADLINE)))
            }
            Stage::Promised | Stage::Loading | Stage::Loaded => true,
        });
        let moving = |stage| match stage {
            Stage::Loading => true,
            Stage::Leaving(_) => own.is_none(),
            Stage::Promised | Stage::Loaded => false,
        };
        if !self.holdings.values().any(|h| moving(h.stage)) {
            // Where ours can't be told from theirs, at least what is used beyond all that ours may hold is theirs.
            let ours = own.map_or_else(
                || self.sum(|stage| stage == Stage::Loaded),
                |Own { live, ended }| live.saturating_add(ended),
            );
            self.foreign = used.saturating_sub(ours);
        }
    }
}

/// Reservations of every device of the node.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    accounts: BTreeMap<String, Account>,
}

impl Ledger {
    /// Takes a reading of a device in. What others use stays at its last value while anything of ours loads, and where
    /// ours can't be told from theirs also until the device has given back what an ended worker held.
    pub fn observe(&mut self, device: &str, reading: Reading) {
        self.accounts
            .entry(device.to_owned())
            .or_default()
            .observe(reading);
    }

    /// States the ceiling of the node's profile on the sum of all jobs. What is held above it stays until released.
    pub fn set_cap(&mut self, device: &str, cap: Bytes) {
        if let Some(account) = self.accounts.get_mut(device) {
            account.cap = cap;
        }
    }

    fn account(&mut self, device: &str) -> Result<&mut Account, Shortage> {
        self.accounts
            .get_mut(device)
            .ok_or_else(|| Shortage::NoDevice(device.to_owned()))
    }

    /// Reserves bytes of a device for one holder.
    ///
    /// # Errors
    /// [`Shortage`]: nothing is reserved then.
    pub fn reserve(&mut self, device: &str, holder: &str, bytes: Bytes) -> Result<(), Shortage> {
        let account = self.account(device)?;
        if account.holdings.contains_key(holder) {
            return Err(Shortage::Held(holder.to_owned()));
        }
        if bytes > account.free() {
            return Err(account.shortage(bytes, bytes));
        }
        let stage = Stage::Promised;
        account
            .holdings
            .insert(holder.to_owned(), Holding { bytes, stage });
        Ok(())
    }

    /// The holder is about to allocate. Others may have grown since it was promised, or the cap may have fallen.
    ///
    /// # Errors
    /// [`Shortage`]: what is promised no longer fits, and it must not load.
    pub fn load(&mut self, device: &str, holder: &str) -> Result<(), Shortage> {
        let account = self.account(device)?;
        let Some(Holding { bytes, .. }) = account.holdings.get(holder).copied() else {
            return Err(Shortage::NotHeld(holder.to_owned()));
        };
        if account.held() > account.room() {
            return Err(account.shortage(bytes, Bytes(0)));
        }
        let stage = Stage::Loading;
        account
            .holdings
            .insert(holder.to_owned(), Holding { bytes, stage });
        Ok(())
    }

    /// The holder has allocated: replaces its reservation by what was really taken. Less gives the rest back; more is
    /// given only where free.
    ///
    /// # Errors
    /// [`Shortage`]: the reservation stays as it was.
    pub fn commit(&mut self, device: &str, holder: &str, actual: Bytes) -> Result<(), Shortage> {
        let account = self.account(device)?;
        let Some(Holding { bytes, .. }) = account.holdings.get(holder).copied() else {
            return Err(Shortage::NotHeld(holder.to_owned()));
        };
        let more = actual.saturating_sub(bytes);
        if more > account.free() {
            return Err(account.shortage(actual, more));
        }
        let stage = Stage::Loaded;
        let holding = Holding { bytes: actual, stage };
        account.holdings.insert(holder.to_owned(), holding);
        Ok(())
    }

    /// What a loaded holder was measured with beyond its reservation counts, room or not: nobody else may be promised it.
    pub fn overrun(&mut self, device: &str, holder: &str, measured: Bytes) {
        if let Some(holding) = self
            .accounts
            .get_mut(device)
            .and_then(|a| a.holdings.get_mut(holder))
            .filter(|h| h.stage == Stage::Loaded)
        {
            holding.bytes = holding.bytes.max(measured);
        }
    }

    /// The holder's worker has ended, or it never had one: its bytes go back on every device, where the device gives
    /// them back late as soon as it shows that.
    pub fn release(&mut self, now: Nanos, holder: &str) {
        for account in self.accounts.values_mut() {
            let Some(holding) = account.holdings.get_mut(holder) else {
                continue;
            };
            match holding.stage {
                // A second release does not begin the wait anew.
                Stage::Leaving(_) => {}
                Stage::Loading | Stage::Loaded if !account.free_at_exit => {
                    holding.stage = Stage::Leaving(now);
                }
                Stage::Promised | Stage::Loading | Stage::Loaded => {
                    account.holdings.remove(holder);
                }
            }
        }
    }

    /// Releases every holder that is not among the living: whatever way a job ended, nothing of it stays behind.
    pub fn keep_only(&mut self, now: Nanos, alive: impl Fn(&str) -> bool) {
        let dead: Vec<String> = self
            .accounts
            .values()
            .flat_map(|a| a.holdings.iter())
            .filter(|(holder, h)| !matches!(h.stage, Stage::Leaving(_)) && !alive(holder))
            .map(|(holder, _)| holder.clone())
            .collect();
        for holder in dead {
            self.release(now, &holder);
        }
    }

    /// Sum of a device's reservations, bytes on their way back and those of an old session included.
    pub fn held(&self, device: &str) -> Bytes {
        self.accounts.get(device).map(Account::held).unwrap_or_default()
    }

    /// Bytes of a device that could be reserved now.
    pub fn free(&self, device: &str) -> Bytes {
        self.accounts.get(device).map(Account::free).unwrap_or_default()
    }

    /// Bytes of a device that others use, as last known for sure.
    pub fn foreign(&self, device: &str) -> Bytes {
        self.accounts.get(device).map(|a| a.foreign).unwrap_or_default()
    }

    /// Cap on the sum of a device's reservations.
    pub fn cap(&self, device: &str) -> Bytes {
        self.accounts.get(device).map(|a| a.cap).unwrap_or_default()
    }

    /// Whether our own use of a device can be told from that of others.
    pub fn own_known(&self, device: &str) -> bool {
        self.accounts.get(device).is_some_and(|a| a.own_known)
    }

    /// Names of the devices.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        self.accounts.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests;
