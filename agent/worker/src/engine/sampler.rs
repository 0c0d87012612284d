//! From scores to the next token. Owns the random numbers of one sequence: the same seed gives the same tokens whatever
//! else is in the batch. Must not know about text.

use super::model::softmax;
use crate::num::{float, index, narrow};
use gogrid_agent_core::protocol::Sampling;

/// Chooses the tokens of one sequence.
pub(crate) struct Sampler {
    temperature: f32,
    top_p: f32,
    top_k: usize,
    random: SplitMix,
}

impl Sampler {
    pub(crate) fn new(sampling: &Sampling) -> Self {
        Self {
            temperature: float(sampling.temperature_milli) / 1000.0,
            top_p: float(sampling.top_p_milli) / 1000.0,
            top_k: index(sampling.top_k),
            random: SplitMix(sampling.seed),
        }
    }

    /// The next token; the lowest number among equals when greedy.
    pub(crate) fn next(&mut self, scores: &[f32]) -> u32 {
        if self.temperature <= 0.0 || self.top_k == 1 {
            return greedy(scores);
        }
        let mut candidates: Vec<(u32, f32)> = scores
            .iter()
            .enumerate()
            .filter(|(_, score)| !score.is_nan())
            .map(|(id, score)| (narrow(id), *score))
            .collect();
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.top_k > 0 && self.top_k < candidates.len() {
            candidates.select_nth_unstable_by(self.top_k, order);
            candidates.truncate(self.top_k);
        }
        candidates.sort_unstable_by(order);
        let mut weights: Vec<f32> = candidates
            .iter()
            .map(|(_, score)| score / self.temperature)
            .collect();
        softmax(&mut weights);
        let mut kept = 0.0;
        let mut count = 0;
        for weight in &weights {
            kept += weight;
            count += 1;
            if kept >= self.top_p {
                break;
            }
        }
        let mut left = self.random.unit() * kept;
        for ((id, _), weight) in candidates.iter().zip(weights.iter().take(count)) {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        candidates
            .get(count.saturating_sub(1))
            .map_or_else(|| greedy(scores), |(id, _)| *id)
    }
}

fn greedy(scores: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, score) in scores.iter().enumerate() {
        if *score > best.1 {
            best = (id, *score);
        }
    }
    narrow(best.0)
}

/// SplitMix64: small, seeded, the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 24 random bits as a float from 0 up to, but not including, 1.
    fn unit(&mut self) -> f32 {
        let bits = u32::try_from(self.next() >> 40).unwrap_or(0);
        float(bits) / 16_777_216.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature_milli: u32, top_p_milli: u32, top_k: u32, seed: u64) -> Sampling {
        Sampling {
            max_tokens: 1,
            temperature_milli,
            top_p_milli,
            top_k,
            seed,
            stop: Vec::new(),
        }
    }

    #[test]
    fn temperature_zero_takes_the_highest_score_and_the_first_of_equals() {
        let mut sampler = Sampler::new(&sampling(0, 1000, 0, 1));
        assert_eq!(sampler.next(&[0.0, 3.0, 3.0, f32::NAN]), 1);
    }

    #[test]
    fn top_k_and_top_p_leave_out_the_rest() {
        let scores = [1.0, 5.0, 4.9, 4.8, -2.0];
        let mut top_k = Sampler::new(&sampling(5000, 1000, 2, 7));
        let mut top_p = Sampler::new(&sampling(1000, 500, 0, 7));
        for _ in 0..500 {
            assert!([1, 2].contains(&top_k.next(&scores)));
            assert!([1, 2].contains(&top_p.next(&scores)));
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens_and_another_seed_others() {
        let scores: Vec<f32> = (0..100_u16).map(|i| f32::from(i % 7)).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(&sampling(1000, 1000, 0, seed));
            (0..50).map(|_| sampler.next(&scores)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn frequencies_follow_the_scores() {
        let scores = [0.0, 2.0_f32.ln()];
        let mut sampler = Sampler::new(&sampling(1000, 1000, 0, 3));
        let twos = (0..30_000).filter(|_| sampler.next(&scores) == 1).count();
        assert!((19_500..20_500).contains(&twos), "{twos}");
    }
}
