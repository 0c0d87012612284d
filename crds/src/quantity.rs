//! Units: numbers that know what they count.
//!
//! Owns: parsing and printing of byte quantities, and the newtypes used by every decider.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Bytes(pub u64);

impl Bytes {
    /// One mebibyte.
    pub const MIB: Bytes = Bytes(1 << 20);

    /// `self × percent / 100`, rounded down, without overflow.
    #[must_use]
    pub fn percent(self, percent: Percent) -> Bytes {
        let part = u128::from(self.0) * u128::from(percent.0) / 100;
        Bytes(u64::try_from(part).unwrap_or(u64::MAX))
    }

    /// `self − other`, never below zero.
    #[must_use]
    pub fn saturating_sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }

    /// `self + other`, never above `u64::MAX`.
    #[must_use]
    pub fn saturating_add(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_add(other.0))
    }
}

impl fmt::Display for Bytes {
    /// Prints whole KiB, MiB or GiB with at most one decimal, e.g. `5.4 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >> shift > 0 {
                let tenths = (u128::from(self.0) * 10) >> shift;
                return write!(f, "{}.{} {unit}", tenths / 10, tenths % 10);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// A share in percent, 0 to 100.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Percent(pub u8);

/// A duration in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Millis(pub u64);

/// A Unix nice value, −20 (greedy) to 19 (kind).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Niceness(pub i8);

/// A Kubernetes `resource.Quantity` that counts bytes: `4Gi`, `512Mi`, `1500M` or a plain number.
///
/// The API server checks the form by pattern; [`ByteQuantity::bytes`] gives the value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ByteQuantity(pub String);

impl ByteQuantity {
    /// The number of bytes, or why the text is none.
    ///
    /// # Errors
    /// [`QuantityError`] when the text is not an unsigned number with an optional binary or decimal suffix,
    /// or when the value does not fit 63 bits.
    pub fn bytes(&self) -> Result<Bytes, QuantityError> {
        let text = self.0.as_str();
        let err = || QuantityError(text.chars().take(32).collect());
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, suffix) = text.split_at(split);
        let number: u64 = number.parse().map_err(|_| err())?;
        let factor: u64 = match suffix {
            "" => 1,
            "k" => 1000,
            "M" => 1_000_000,
            "G" => 1_000_000_000,
            "T" => 1_000_000_000_000,
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            _ => return Err(err()),
        };
        number
            .checked_mul(factor)
            .filter(|bytes| i64::try_from(*bytes).is_ok())
            .map(Bytes)
            .ok_or_else(err)
    }
}

impl From<Bytes> for ByteQuantity {
    /// The shortest exact form: whole Gi, Mi or Ki where the value allows, else plain bytes.
    fn from(Bytes(bytes): Bytes) -> Self {
        for (shift, unit) in [(30, "Gi"), (20, "Mi"), (10, "Ki")] {
            if bytes >> shift > 0 && bytes.trailing_zeros() >= shift {
                return Self(format!("{}{unit}", bytes >> shift));
            }
        }
        Self(bytes.to_string())
    }
}

impl<'de> Deserialize<'de> for ByteQuantity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u64),
            Text(String),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Number(number) => Self(number.to_string()),
            Raw::Text(text) => Self(text),
        })
    }
}

/// The text is not a byte quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a byte quantity: it must be a whole number with one of the suffixes k, M, G, T, Ki, Mi, Gi, Ti or none"
)]
pub struct QuantityError(String);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_quantity_made_of_bytes_reads_back_as_the_same_bytes(bytes in 0..=i64::MAX.cast_unsigned()) {
            prop_assert_eq!(ByteQuantity::from(Bytes(bytes)).bytes(), Ok(Bytes(bytes)));
        }
    }

    #[test]
    fn quantities_that_overflow_or_have_an_unknown_suffix_are_refused_with_their_text() {
        for text in ["", "Gi", "-1", "1.5Gi", "9999999999Gi", "1Zi", "1 Gi"] {
            let error = ByteQuantity(text.into()).bytes().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
        assert_eq!(ByteQuantity("2Gi".into()).bytes(), Ok(Bytes(2 << 30)));
    }

    #[test]
    fn bytes_print_with_one_decimal_of_the_largest_unit() {
        assert_eq!(Bytes(5 * (1 << 30) + (1 << 29)).to_string(), "5.5 GiB");
        assert_eq!(Bytes(17).to_string(), "17 B");
        assert_eq!(Bytes(1 << 30).percent(Percent(50)), Bytes(1 << 29));
    }
}
