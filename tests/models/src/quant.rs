//! Plain reference quantisation into ggml's block layouts. The layouts are exact; the rounding is simple, which is
//! good enough for random weights (the demo model's Q4_K comes from candle's more careful search).

use half::f16;

/// A tensor's number format, with ggml's number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 32 weights of 4 bits with one scale.
    Q4_0,
    /// 32 weights of 8 bits with one scale.
    Q8_0,
    /// 256 weights of 4 bits in 8 groups, each with a 6-bit scale and minimum.
    Q4K,
    /// 256 weights of 6 bits in 16 groups, each with an 8-bit scale.
    Q6K,
}

impl TensorType {
    /// Every format this crate writes.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::Q4_0, Self::Q8_0, Self::Q4K, Self::Q6K];

    /// The number in a GGUF tensor info.
    pub const fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
        }
    }

    /// The number in `general.file_type` of a file that is mostly of this format.
    pub const fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4K => 15,
            Self::Q6K => 18,
        }
    }

    /// Weights in one block; a row must be a multiple of it.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 => 1,
            Self::Q4_0 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Q4_0 => 18,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Bytes of `weights` weights, rounded up to whole blocks.
    pub const fn bytes_of(self, weights: usize) -> usize {
        weights.div_ceil(self.block_len()) * self.block_bytes()
    }

    /// Appends `weights` in this format. A last block that is not full is filled with zeros.
    pub fn quantize(self, weights: &[f32], out: &mut Vec<u8>) {
        for block in weights.chunks(self.block_len()) {
            let mut full = [0.0; 256];
            full.iter_mut()
                .zip(block)
                .for_each(|(full, weight)| *full = *weight);
            match self {
                Self::F32 => out.extend(full.iter().take(1).flat_map(|x| x.to_le_bytes())),
                Self::F16 => out.extend(full.iter().take(1).flat_map(|x| f16::from_f32(*x).to_le_bytes())),
                Self::Q4_0 => q4_0(full.split_at(32).0, out),
                Self::Q8_0 => q8_0(full.split_at(32).0, out),
                Self::Q4K => q4_k(&full, out),
                Self::Q6K => q6_k(&full, out),
            }
        }
    }
}

/// Rounds to a whole number in `low..=high`, both within −128..=255.
#[expect(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "clamped just before; NaN becomes 0"
)]
fn level(x: f32, low: f32, high: f32) -> i16 {
    x.round().clamp(low, high) as i16
}

/// The low eight bits, which is how both signed and unsigned levels are stored.
fn byte(level: i16) -> u8 {
    level.to_le_bytes()[0]
}

fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The value of the largest magnitude, with its sign.
fn extreme(x: &[f32]) -> f32 {
    x.iter()
        .copied()
        .fold(0.0, |top: f32, x| if x.abs() > top.abs() { x } else { top })
}

fn put_f16(x: f32, out: &mut Vec<u8>) -> f32 {
    let rounded = f16::from_f32(x);
    out.extend(rounded.to_le_bytes());
    rounded.to_f32()
}

fn q4_0(x: &[f32], out: &mut Vec<u8>) {
    let scale = extreme(x) / -8.0;
    put_f16(scale, out);
    let scale = inverse(scale);
    let nibble = |x: &f32| byte(level(x * scale + 8.0, 0.0, 15.0));
    let (low, high) = x.split_at(16);
    out.extend(
        low.iter()
            .zip(high)
            .map(|(low, high)| nibble(low) | (nibble(high) << 4)),
    );
}

fn q8_0(x: &[f32], out: &mut Vec<u8>) {
    let scale = extreme(x).abs() / 127.0;
    put_f16(scale, out);
    let scale = inverse(scale);
    out.extend(x.iter().map(|x| byte(level(x * scale, -127.0, 127.0))));
}

/// Layout: f16 scale of scales, f16 scale of minima, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.
fn q4_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let mut spans = [(0.0_f32, 0.0_f32); 8];
    for (span, group) in spans.iter_mut().zip(x.chunks(32)) {
        // Minima are stored as what is taken away, so they can't be below zero.
        let low = group.iter().copied().fold(0.0, f32::min);
        let high = group.iter().copied().fold(low, f32::max);
        *span = ((high - low) / 15.0, -low);
    }
    let scale = put_f16(spans.iter().map(|s| s.0).fold(0.0, f32::max) / 63.0, out);
    let minimum = put_f16(spans.iter().map(|s| s.1).fold(0.0, f32::max) / 63.0, out);
    let mut scales = [0_u8; 8];
    let mut minima = [0_u8; 8];
    for ((span, s), m) in spans.iter().zip(&mut scales).zip(&mut minima) {
        *s = byte(level(span.0 * inverse(scale), 0.0, 63.0));
        *m = byte(level(span.1 * inverse(minimum), 0.0, 63.0));
    }
    let ([s0, s1, s2, s3, s4, s5, s6, s7], [m0, m1, m2, m3, m4, m5, m6, m7]) = (scales, minima);
    let top = |low: u8, high: u8| low | ((high >> 4) << 6);
    let rest = |s: u8, m: u8| (s & 15) | ((m & 15) << 4);
    out.extend([top(s0, s4), top(s1, s5), top(s2, s6), top(s3, s7)]);
    out.extend([top(m0, m4), top(m1, m5), top(m2, m6), top(m3, m7)]);
    out.extend([rest(s4, m4), rest(s5, m5), rest(s6, m6), rest(s7, m7)]);
    let nibble = |x: f32, s: u8, m: u8| {
        let shifted = x + minimum * f32::from(m);
        byte(level(shifted * inverse(scale * f32::from(s)), 0.0, 15.0))
    };
    let pairs = |v: [u8; 8]| [(v[0], v[1]), (v[2], v[3]), (v[4], v[5]), (v[6], v[7])];
    for ((groups, s), m) in x.chunks(64).zip(pairs(scales)).zip(pairs(minima)) {
        let (low, high) = groups.split_at(32);
        out.extend(
            low.iter()
                .zip(high)
                .map(|(a, b)| nibble(*a, s.0, m.0) | (nibble(*b, s.1, m.1) << 4)),
        );
    }
}

/// Layout: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, f16 scale of scales.
fn q6_k(x: &[f32; 256], out: &mut Vec<u8>) {
    let mut steps = [0.0_f32; 16];
    for (step, group) in steps.iter_mut().zip(x.chunks(16)) {
        *step = extreme(group) / -32.0;
    }
    let scale = f16::from_f32(extreme(&steps) / -128.0);
    let wide = scale.to_f32();
    let scales = steps.map(|step| level(step * inverse(wide), -128.0, 127.0));
    let mut levels = [0_u8; 256];
    for ((levels, group), s) in levels.chunks_mut(16).zip(x.chunks(16)).zip(scales) {
        let step = inverse(wide * f32::from(s));
        for (to, x) in levels.iter_mut().zip(group) {
            *to = byte(level(x * step, -32.0, 31.0) + 32);
        }
    }
    // Each half of 128 holds four runs of 32: nibbles of runs 0|2 and 1|3 share bytes, as do all four bit pairs.
    let halves: Vec<Vec<&[u8]>> = levels.chunks(128).map(|half| half.chunks(32).collect()).collect();
    for half in &halves {
        for (low, high) in half.iter().take(2).zip(half.iter().skip(2)) {
            out.extend(
                low.iter()
                    .zip(*high)
                    .map(|(low, high)| (low & 15) | ((high & 15) << 4)),
            );
        }
    }
    for half in &halves {
        for at in 0..32 {
            let pair = |run: &&[u8]| run.get(at).map_or(0, |level| level >> 4);
            out.push(half.iter().rev().fold(0, |bits, run| (bits << 2) | pair(run)));
        }
    }
    out.extend(scales.map(byte));
    out.extend(scale.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[expect(clippy::many_single_char_names, reason = "the names of ggml's own code")]
    /// Reads one block back, written from the format's description and not from the writer above.
    fn dequantize(kind: TensorType, b: &[u8]) -> Vec<f32> {
        let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        let signed = |byte: u8| f32::from(i8::from_le_bytes([byte]));
        match kind {
            TensorType::F32 => vec![f32::from_le_bytes([b[0], b[1], b[2], b[3]])],
            TensorType::F16 => vec![half(0)],
            TensorType::Q4_0 => (0..32)
                .map(|i| {
                    let q = if i < 16 { b[2 + i] & 15 } else { b[2 + i - 16] >> 4 };
                    half(0) * (f32::from(q) - 8.0)
                })
                .collect(),
            TensorType::Q8_0 => (0..32).map(|i| half(0) * signed(b[2 + i])).collect(),
            TensorType::Q4K => (0..256)
                .map(|i| {
                    let j = i / 32;
                    let sc = &b[4..16];
                    let (s, m) = if j < 4 {
                        (sc[j] & 63, sc[j + 4] & 63)
                    } else {
                        (
                            (sc[j + 4] & 15) | ((sc[j - 4] >> 6) << 4),
                            (sc[j + 4] >> 4) | ((sc[j] >> 6) << 4),
                        )
                    };
                    let q = b[16 + (i / 64) * 32 + i % 32];
                    let q = if j % 2 == 0 { q & 15 } else { q >> 4 };
                    half(0) * f32::from(s) * f32::from(q) - half(2) * f32::from(m)
                })
                .collect(),
            TensorType::Q6K => (0..256)
                .map(|i| {
                    let (n, r, l) = (i / 128, (i % 128) / 32, i % 32);
                    let low = b[n * 64 + (r % 2) * 32 + l];
                    let low = if r < 2 { low & 15 } else { low >> 4 };
                    let high = (b[128 + n * 32 + l] >> (2 * r)) & 3;
                    half(208) * signed(b[192 + i / 16]) * (f32::from(low | (high << 4)) - 32.0)
                })
                .collect(),
        }
    }

    #[test]
    fn every_format_reads_back_close_to_what_was_written() {
        for (kind, bound) in TensorType::ALL
            .into_iter()
            .zip([0.0, 0.002, 0.3, 0.02, 0.3, 0.08])
        {
            let mut rng = Rng::new(9);
            for _ in 0..20 {
                let weights: Vec<f32> = (0..kind.block_len()).map(|_| rng.normal()).collect();
                let mut bytes = Vec::new();
                kind.quantize(&weights, &mut bytes);
                assert_eq!(bytes.len(), kind.block_bytes());
                for (x, y) in weights.iter().zip(dequantize(kind, &bytes)) {
                    assert!((x - y).abs() <= bound, "{kind:?}: {x} became {y}");
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_large_weights_do_not_wrap_round() {
        for kind in TensorType::ALL {
            let mut bytes = Vec::new();
            kind.quantize(&[0.0; 256], &mut bytes);
            assert!(
                bytes
                    .chunks(kind.block_bytes())
                    .all(|b| dequantize(kind, b).iter().all(|x| *x == 0.0))
            );
            let mut weights = [1.0; 256];
            weights[0] = -200.0;
            weights[1] = 200.0;
            bytes.clear();
            kind.quantize(&weights, &mut bytes);
            let back: Vec<f32> = bytes
                .chunks(kind.block_bytes())
                .flat_map(|block| dequantize(kind, block))
                .collect();
            assert!(
                back[0] < -170.0 && back[1] > 170.0,
                "{kind:?}: {} {}",
                back[0],
                back[1]
            );
        }
    }

    #[test]
    fn sizes_count_whole_blocks() {
        assert_eq!(TensorType::Q8_0.bytes_of(256), 272);
        assert_eq!(TensorType::Q4K.bytes_of(512), 288);
        assert_eq!(TensorType::Q6K.bytes_of(1), 210);
        assert_eq!(TensorType::F16.bytes_of(3), 6);
    }
}
