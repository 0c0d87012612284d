//! The only way to the device.
//!
//! Owns the candle device and whatever computes on it; both are reachable only through [`Permit::run`]. A permit is given
//! when the grant allows it, and bills when it is dropped: CPU time of the whole process ÷ the cores of the device, so a
//! panic or an early return is billed too. Wall time would collapse the share under contention. What the process uses
//! between two permits is billed with the next one, so no work escapes the share, and counted. Must not sleep; the caller
//! waits.

use crate::clock;
use candle_core::Device;
use gogrid_agent_core::throttle::{Grant, ShareMeter};

/// Keeps a device and its user behind a share.
pub(crate) struct Keeper<T> {
    device: Device,
    user: T,
    meter: ShareMeter,
    /// Cores of the device, whatever number of threads use them.
    cores: u64,
    billed: u64,
    outside: u64,
    /// CPU time of the process up to which everything is billed.
    seen: u64,
}

/// Why there is no permit now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Ask again then.
    Until(u64),
    /// The grant allows nothing; ask again after the next one.
    Grant,
}

impl<T> Keeper<T> {
    pub(crate) fn new(device: Device, user: T, cores: usize) -> Self {
        let cores = u64::try_from(cores).unwrap_or(1).max(1);
        Self {
            device,
            user,
            meter: ShareMeter::default(),
            cores,
            billed: 0,
            outside: 0,
            seen: clock::process_cpu(),
        }
    }

    /// Replaces the grant.
    pub(crate) fn grant(&mut self, now: u64, grant: Grant) {
        self.meter.set_grant(now, grant);
    }

    /// Puts another user behind the permit; the last one is dropped.
    pub(crate) fn place(&mut self, user: T) {
        self.user = user;
    }

    /// Looks at the user without computing.
    pub(crate) fn peek(&self) -> &T {
        &self.user
    }

    /// Device time billed so far, in nanoseconds.
    pub(crate) fn billed(&self) -> u64 {
        self.billed
    }

    /// The part of it that was used between permits.
    pub(crate) fn outside(&self) -> u64 {
        self.outside
    }

    /// Whether a step may begin now.
    pub(crate) fn ready(&mut self, now: u64) -> Result<u64, Wait> {
        #[cfg(feature = "faults")]
        if crate::faults::heedless() {
            return Ok(now);
        }
        match self.meter.ready_at(now) {
            Some(at) if at <= now => Ok(now),
            Some(at) => Err(Wait::Until(at)),
            None => Err(Wait::Grant),
        }
    }

    /// The right to use the device for one short step.
    pub(crate) fn acquire(&mut self, now: u64) -> Result<Permit<'_, T>, Wait> {
        let outside = self.bill(now);
        self.outside = self.outside.saturating_add(outside);
        self.ready(now)?;
        Ok(Permit { keeper: self })
    }

    /// One short step under a permit of its own.
    pub(crate) fn run<R>(&mut self, now: u64, compute: impl FnOnce(&Device, &mut T) -> R) -> Result<R, Wait> {
        Ok(self.acquire(now)?.run(compute))
    }

    /// Bills everything since the last bill; returns the device time.
    fn bill(&mut self, now: u64) -> u64 {
        let cpu = clock::process_cpu();
        let time = cpu.saturating_sub(self.seen).div_ceil(self.cores);
        self.seen = cpu;
        self.billed = self.billed.saturating_add(time);
        self.meter.bill(now, time);
        time
    }
}

/// The right to use the device; dropping it bills the time.
pub(crate) struct Permit<'k, T> {
    keeper: &'k mut Keeper<T>,
}

impl<T> Permit<'_, T> {
    /// Computes.
    pub(crate) fn run<R>(self, compute: impl FnOnce(&Device, &mut T) -> R) -> R {
        compute(&self.keeper.device, &mut self.keeper.user)
    }
}

impl<T> Drop for Permit<'_, T> {
    fn drop(&mut self) {
        self.keeper.bill(clock::boottime());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(share_permille: u16) -> Grant {
        Grant {
            share_permille,
            expires_at: u64::MAX,
            fence_at: u64::MAX,
        }
    }

    #[test]
    fn without_a_grant_there_is_no_permit() {
        let mut keeper = Keeper::new(Device::Cpu, (), 1);
        assert_eq!(keeper.acquire(5).err(), Some(Wait::Grant));
        keeper.grant(5, grant(0));
        assert_eq!(keeper.acquire(5).err(), Some(Wait::Grant));
    }

    #[test]
    fn a_permit_bills_even_when_the_computation_panics() {
        // So many cores that other tests in this process leave no debt.
        let cores = 1000;
        let mut keeper = Keeper::new(Device::Cpu, 0_u64, cores);
        keeper.grant(clock::boottime(), grant(1000));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            keeper.acquire(clock::boottime()).ok().unwrap().run(|_, count| {
                let before = clock::process_cpu();
                while clock::process_cpu() < before + 2_000_000 {
                    *count += 1;
                }
                panic!("boom")
            })
        }));
        assert!(result.is_err());
        assert!(keeper.billed() - keeper.outside() >= 2_000, "{}", keeper.billed());
    }

    #[test]
    fn what_was_billed_is_repaid_before_the_next_permit() {
        let mut keeper = Keeper::new(Device::Cpu, (), 1);
        let before = clock::process_cpu();
        while clock::process_cpu() < before + 2_000_000 {}
        keeper.grant(clock::boottime(), grant(1));
        // 2 ms at one permille are repaid after about two seconds.
        assert!(matches!(keeper.acquire(clock::boottime()), Err(Wait::Until(_))));
    }

    #[test]
    fn what_is_computed_between_permits_is_billed_with_the_next_one() {
        let mut keeper = Keeper::new(Device::Cpu, (), 1);
        keeper.grant(clock::boottime(), grant(1000));
        let before = clock::process_cpu();
        while clock::process_cpu() < before + 3_000_000 {}
        keeper.run(clock::boottime(), |_, ()| ()).ok();
        assert!(keeper.outside() >= 3_000_000, "{}", keeper.outside());
        assert!(keeper.billed() >= keeper.outside());
    }
}
