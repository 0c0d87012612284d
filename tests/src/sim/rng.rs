//! Numbers of chance that a seed determines.
//!
//! Owns: the generator (SplitMix64) and the few shapes that schedules need.

/// A generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5DEE_CE66_D1CE_4E5B)
    }

    /// Another generator that this one determines.
    #[must_use]
    pub fn split(&mut self) -> Self {
        Self::new(self.number())
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.number() % (high.saturating_sub(low) + 1)
    }

    /// An index below `length`, which must not be 0.
    pub fn index(&mut self, length: usize) -> usize {
        let length = u64::try_from(length).unwrap_or(1).max(1);
        usize::try_from(self.number() % length).unwrap_or(0)
    }

    /// From `least` to `most`, as often as not within the first sixteenth: how long things take that are mostly at hand.
    pub fn mostly_short(&mut self, least: u64, most: u64) -> u64 {
        let usual = least + most.saturating_sub(least) / 16;
        if self.permille(500) {
            self.between(least, usual)
        } else {
            self.between(least, most)
        }
    }

    /// True that often in a thousand.
    pub fn permille(&mut self, chance: u64) -> bool {
        self.number() % 1000 < chance
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.index(all.len()))
    }
}
