//! Conversions between number types without `as`. Owns nothing else.

/// A 32-bit number as an index; exact on every platform this builds for.
pub(crate) fn index(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A length as 64 bits.
pub(crate) fn wide(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// A length as 32 bits, saturating.
pub(crate) fn narrow(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// The nearest float: both halves are exact, so the sum rounds once.
pub(crate) fn float(value: u32) -> f32 {
    let [a, b, c, d] = value.to_be_bytes();
    f32::from(u16::from_be_bytes([a, b])) * 65536.0 + f32::from(u16::from_be_bytes([c, d]))
}
