//! The ledger of device memory: who holds how much of which device, and whether more may be given.
//!
//! Owns: reservations per device and the promise that no reservation ever lifts their sum above the cap. Must not
//! measure anything: totals, foreign use and caps are told to it.

use gogrid_api::Bytes;
use std::collections::BTreeMap;

/// Why a reservation was not given, with every number behind it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// No device of that name, or none that is told about yet.
    #[error("device {0:?} is not on this node")]
    NoDevice(String),
    /// The name already holds bytes of the device.
    #[error("{0:?} already holds bytes of this device")]
    Held(String),
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

#[derive(Clone, Debug, Default)]
struct Account {
    total: Bytes,
    reserved: Bytes,
    foreign: Bytes,
    cap: Bytes,
    holdings: BTreeMap<String, Bytes>,
}

impl Account {
    fn held(&self) -> Bytes {
        self.holdings
            .values()
            .fold(Bytes(0), |sum, held| sum.saturating_add(*held))
    }

    fn free(&self) -> Bytes {
        let usable = self
            .total
            .saturating_sub(self.reserved)
            .saturating_sub(self.foreign);
        self.cap.min(usable).saturating_sub(self.held())
    }

    fn shortage(&self, needed: Bytes) -> Shortage {
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

/// Reservations of every device of the node.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    accounts: BTreeMap<String, Account>,
}

impl Ledger {
    /// States a device's memory: in all, kept by driver or system, used by others. Reservations stay.
    pub fn set_device(&mut self, device: &str, total: Bytes, reserved: Bytes, foreign: Bytes) {
        let account = self.accounts.entry(device.to_owned()).or_default();
        account.total = total;
        account.reserved = reserved;
        account.foreign = foreign;
    }

    /// States the ceiling of the node's profile on the sum of all jobs. What is held above it stays until released.
    pub fn set_cap(&mut self, device: &str, cap: Bytes) {
        if let Some(account) = self.accounts.get_mut(device) {
            account.cap = cap;
        }
    }

    /// Reserves bytes of a device for one holder.
    ///
    /// # Errors
    /// [`Shortage`]: nothing is reserved then.
    pub fn reserve(&mut self, device: &str, holder: &str, bytes: Bytes) -> Result<(), Shortage> {
        let account = self
            .accounts
            .get_mut(device)
            .ok_or_else(|| Shortage::NoDevice(device.to_owned()))?;
        if account.holdings.contains_key(holder) {
            return Err(Shortage::Held(holder.to_owned()));
        }
        if bytes > account.free() {
            return Err(account.shortage(bytes));
        }
        account.holdings.insert(holder.to_owned(), bytes);
        Ok(())
    }

    /// Replaces a reservation by what was really taken. Less gives the rest back; more is given only where free.
    ///
    /// # Errors
    /// [`Shortage`]: the reservation stays as it was.
    pub fn commit(&mut self, device: &str, holder: &str, actual: Bytes) -> Result<(), Shortage> {
        let account = self
            .accounts
            .get_mut(device)
            .ok_or_else(|| Shortage::NoDevice(device.to_owned()))?;
        let held = account.holdings.get(holder).copied().unwrap_or_default();
        if actual.saturating_sub(held) > account.free() {
            return Err(account.shortage(actual));
        }
        account.holdings.insert(holder.to_owned(), actual);
        Ok(())
    }

    /// Gives back all that a holder has, on every device.
    pub fn release(&mut self, holder: &str) {
        for account in self.accounts.values_mut() {
            account.holdings.remove(holder);
        }
    }

    /// Sum of a device's reservations.
    pub fn held(&self, device: &str) -> Bytes {
        self.accounts.get(device).map(Account::held).unwrap_or_default()
    }

    /// Bytes of a device that could be reserved now.
    pub fn free(&self, device: &str) -> Bytes {
        self.accounts.get(device).map(Account::free).unwrap_or_default()
    }

    /// Cap on the sum of a device's reservations.
    pub fn cap(&self, device: &str) -> Bytes {
        self.accounts.get(device).map(|a| a.cap).unwrap_or_default()
    }

    /// Names of the devices.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        self.accounts.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ledger(total: u64, cap: u64) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.set_device("cpu", Bytes(total), Bytes(0), Bytes(0));
        ledger.set_cap("cpu", Bytes(cap));
        ledger
    }

    #[test]
    fn a_refused_reservation_tells_all_numbers_and_changes_nothing() {
        let mut ledger = ledger(1000, 500);
        ledger.reserve("cpu", "a", Bytes(300)).unwrap();
        let shortage = ledger.reserve("cpu", "b", Bytes(201)).unwrap_err();
        assert_eq!(
            shortage,
            Shortage::TooLittle {
                needed: Bytes(201),
                free: Bytes(200),
                cap: Bytes(500),
                held: Bytes(300),
                foreign: Bytes(0),
                total: Bytes(1000)
            }
        );
        assert_eq!(ledger.held("cpu"), Bytes(300));
        assert_eq!(
            ledger.reserve("cpu", "a", Bytes(1)),
            Err(Shortage::Held("a".into()))
        );
        assert_eq!(
            ledger.reserve("gpu", "a", Bytes(1)),
            Err(Shortage::NoDevice("gpu".into()))
        );
    }

    #[test]
    fn memory_of_others_is_never_promised() {
        let mut ledger = ledger(1000, 900);
        ledger.set_device("cpu", Bytes(1000), Bytes(100), Bytes(700));
        assert_eq!(ledger.free("cpu"), Bytes(200));
        assert!(ledger.reserve("cpu", "a", Bytes(201)).is_err());
    }

    #[test]
    fn committing_less_gives_back_and_committing_more_needs_room() {
        let mut ledger = ledger(1000, 500);
        ledger.reserve("cpu", "a", Bytes(300)).unwrap();
        ledger.commit("cpu", "a", Bytes(100)).unwrap();
        assert_eq!(ledger.free("cpu"), Bytes(400));
        assert!(ledger.commit("cpu", "a", Bytes(501)).is_err());
        assert_eq!(ledger.held("cpu"), Bytes(100));
        ledger.release("a");
        assert_eq!(ledger.held("cpu"), Bytes(0));
    }

    proptest! {
        #[test]
        fn no_sequence_of_requests_lifts_the_sum_of_reservations_above_the_cap(
            cap in 0_u64..2000,
            steps in prop::collection::vec((0_u8..4, 0_u8..6, 0_u64..1500), 0..64),
        ) {
            let mut ledger = ledger(1500, cap);
            for (what, who, bytes) in steps {
                let who = who.to_string();
                match what {
                    0 => drop(ledger.reserve("cpu", &who, Bytes(bytes))),
                    1 => drop(ledger.commit("cpu", &who, Bytes(bytes))),
                    2 => ledger.set_device("cpu", Bytes(1500), Bytes(0), Bytes(bytes)),
                    _ => ledger.release(&who),
                }
                prop_assert!(ledger.held("cpu") <= Bytes(cap));
            }
        }

        #[test]
        fn under_a_falling_cap_no_new_byte_is_given(
            first in 0_u64..1000, lower in 0_u64..1000, more in 1_u64..1000,
        ) {
            let mut ledger = ledger(1000, 1000);
            ledger.reserve("cpu", "a", Bytes(first)).unwrap();
            ledger.set_cap("cpu", Bytes(lower));
            let given = ledger.reserve("cpu", "b", Bytes(more)).is_ok();
            prop_assert_eq!(given, first + more <= lower);
        }
    }
}
