//! Whether this machine's clock agrees with the API server's.
//!
//! Owns: when a difference is worth telling. Nothing is decided by it: leases and fences count on CLOCK_BOOTTIME.

use gogrid_api::ConditionStatus;

/// Seconds of difference from which on it is told.
const OFF: u64 = 30;
/// Seconds down to which it goes on to be told.
const STILL_OFF: u64 = 20;
/// Seconds by which the difference must change before another figure is told.
const STEP: u64 = 10;

/// What is told of the clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Skew {
    /// Nothing was compared yet.
    #[default]
    Unknown,
    /// It agrees well enough.
    Agrees,
    /// It is ahead by so many seconds, or behind if negative.
    Off(i64),
}

impl Skew {
    /// Takes in by how many seconds this clock is ahead now.
    pub fn observe(&mut self, ahead: i64) {
        let size = ahead.unsigned_abs();
        *self = match *self {
            Self::Off(told) if size > STILL_OFF && told.abs_diff(ahead) < STEP => Self::Off(told),
            Self::Off(_) if size > STILL_OFF => Self::Off(ahead),
            _ if size > OFF => Self::Off(ahead),
            Self::Unknown | Self::Agrees | Self::Off(_) => Self::Agrees,
        };
    }

    /// The condition `ClockAgrees` of the node: status, reason and message.
    pub fn condition(self) -> Option<(ConditionStatus, &'static str, String)> {
        match self {
            Self::Unknown => None,
            Self::Agrees => Some((
                ConditionStatus::True,
                "ClockAgrees",
                format!("this node's clock is within {OFF} s of the API server's"),
            )),
            Self::Off(ahead) => {
                let way = if ahead < 0 { "behind" } else { "ahead of" };
                let message = format!(
                    "this node's clock is some {} s {way} the API server's: set it by NTP; jobs run all the same, but \
                     their times are wrong and tokens may count as expired",
                    ahead.unsigned_abs()
                );
                Some((ConditionStatus::False, "ClockOff", message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_off_beyond_thirty_seconds_and_right_again_within_twenty() {
        let mut skew = Skew::default();
        assert_eq!(skew.condition(), None);
        for (ahead, off) in [
            (30, false),
            (-30, false),
            (31, true),
            (21, true),
            (20, false),
            (-31, true),
            (-20, false),
        ] {
            skew.observe(ahead);
            assert_eq!(matches!(skew, Skew::Off(_)), off, "{ahead}: {skew:?}");
        }
        skew.observe(i64::MIN);
        let (status, reason, message) = skew.condition().unwrap();
        assert_eq!((status, reason), (ConditionStatus::False, "ClockOff"));
        assert!(message.contains("behind") && message.contains("NTP"), "{message}");
    }

    #[test]
    fn a_difference_that_trembles_is_told_once() {
        let mut skew = Skew::default();
        skew.observe(100);
        let told = skew.condition();
        for ahead in [101, 95, 109, 91] {
            skew.observe(ahead);
            assert_eq!(skew.condition(), told, "{ahead}");
        }
        skew.observe(110);
        assert_ne!(skew.condition(), told);
    }
}
