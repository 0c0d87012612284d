//! A small seeded generator: the same seed gives the same bytes on every machine and in every release.

/// SplitMix64. Not for secrets; for test data that must never change under a dependency's update.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator whose whole sequence follows from `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A generator for one numbered part of a larger whole, independent of the other parts.
    pub fn part(seed: u64, part: u64) -> Self {
        Self(mix(seed ^ mix(part.wrapping_add(0x9e37_79b9_7f4a_7c15))))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `0..bound` (0 for a bound of 0). The bias of at most `bound / 2^32` does not matter here.
    pub fn below(&mut self, bound: u32) -> u32 {
        let high = self.next_u64() >> 32;
        let scaled = (high * u64::from(bound)) >> 32;
        u32::try_from(scaled).unwrap_or(0)
    }

    /// A number in `0..bound` for use as an index.
    pub fn index(&mut self, bound: usize) -> usize {
        let bound = u32::try_from(bound).unwrap_or(u32::MAX);
        usize::try_from(self.below(bound)).unwrap_or(0)
    }

    /// A number in `[0, 1)` with 24 random bits, which an `f32` holds exactly.
    pub fn unit(&mut self) -> f32 {
        let bits = u16::try_from(self.next_u64() >> 48).unwrap_or(0);
        let low = u8::try_from((self.next_u64() >> 32) & 0xff).unwrap_or(0);
        (f32::from(bits) + f32::from(low) / 256.0) / 65536.0
    }

    /// Roughly normal with variance 1: the sum of twelve uniform numbers. Uses no library `ln` or `cos`, whose
    /// last bit differs between platforms.
    pub fn normal(&mut self) -> f32 {
        let mut sum = 0.0;
        for _ in 0..3 {
            let word = self.next_u64();
            for shift in [0, 16, 32, 48] {
                sum += f32::from(u16::try_from((word >> shift) & 0xffff).unwrap_or(0));
            }
        }
        sum / 65536.0 - 6.0
    }
}

/// The finaliser of SplitMix64: a good 64-bit hash of a 64-bit number.
pub const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_of_a_seed_never_changes() {
        let mut rng = Rng::new(0);
        assert_eq!(rng.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(rng.next_u64(), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn numbers_stay_in_their_ranges() {
        let mut rng = Rng::new(7);
        for _ in 0..10_000 {
            assert!(rng.below(10) < 10);
            assert!((0.0..1.0).contains(&rng.unit()));
            assert!((-6.0..6.0).contains(&rng.normal()));
        }
        assert_eq!(rng.below(0), 0);
    }

    #[test]
    fn normal_numbers_have_variance_one() {
        let mut rng = Rng::new(11);
        let (mut sum, mut squares) = (0.0_f64, 0.0_f64);
        for _ in 0..100_000 {
            let x = f64::from(rng.normal());
            sum += x;
            squares += x * x;
        }
        assert!((sum / 1e5).abs() < 0.02);
        assert!((squares / 1e5 - 1.0).abs() < 0.02);
    }

    #[test]
    fn parts_of_one_seed_differ() {
        assert_ne!(Rng::part(1, 0).next_u64(), Rng::part(1, 1).next_u64());
        assert_ne!(Rng::part(1, 0).next_u64(), Rng::part(2, 0).next_u64());
    }
}
