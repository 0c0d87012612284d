//! Faults for tests: a worker whose device computes for very long without a look at anything, or one that needs no permit.
//!
//! Owns: the flag and the spinning. Built only with the `faults` feature; must not touch grants or messages.

use crate::clock;
use std::str::FromStr;
use std::sync::OnceLock;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Every step of the batch computes this many milliseconds longer, as one kernel would.
    KernelMillis(u64),
    /// It computes whether its grant allows it or not.
    Heedless,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "heedless" {
            return Ok(Self::Heedless);
        }
        text.strip_prefix("kernel-millis=")
            .and_then(|n| n.parse().ok())
            .map(Self::KernelMillis)
            .ok_or_else(|| format!("{text:?} must be kernel-millis=N or heedless"))
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::KernelMillis(n) => write!(f, "kernel-millis={n}"),
            Self::Heedless => f.write_str("heedless"),
        }
    }
}

static FAULT: OnceLock<Fault> = OnceLock::new();

impl Fault {
    /// Makes it go wrong from now on; the first one set counts.
    pub(crate) fn set(self) {
        FAULT.get_or_init(|| self);
    }
}

/// Whether grants mean nothing.
pub(crate) fn heedless() -> bool {
    FAULT.get() == Some(&Fault::Heedless)
}

/// Computes for as long as a slow kernel would; the caller holds a permit.
pub(crate) fn strike() {
    if let Some(Fault::KernelMillis(millis)) = FAULT.get() {
        let until = clock::boottime().saturating_add(millis.saturating_mul(1_000_000));
        while clock::boottime() < until {
            std::hint::spin_loop();
        }
    }
}
