//! One weight matrix and its product with rows of activations.
//!
//! Owns the choice of kernel. Every kernel computes each (row, output) pair by itself in a fixed order, so a row's result
//! depends on nothing else in the batch, bit for bit. That is why candle's `QMatMul` is not used: it takes other kernels
//! (packed tiles, AMX, gemm) for other row counts. Its barrier pool is not used either (one thread, see
//! `compute_environment`): whoever calls it spins until every helper has been scheduled, which at nice 15 beside busy
//! neighbours is a long time. A matrix is cut into shards instead, which rayon's threads take one by one. Must not know
//! what the matrix is for.

use super::EngineError;
use crate::num::{index, wide};
use candle_core::quantized::{GgmlDType, QStorage, QuantizedType};
use candle_core::{CpuStorage, Device};
use gogrid_gguf::TensorType;
use rayon::prelude::*;
use std::borrow::Cow;

/// `outputs` × `inputs`, one output's weights contiguous.
pub(crate) struct Matrix {
    kind: TensorType,
    outputs: usize,
    inputs: usize,
    /// Bytes of one output's weights in the file.
    row: usize,
    /// Outputs of each shard but the last.
    shard: usize,
    shards: Vec<Store>,
}

enum Store {
    /// F32, and F16 or BF16 widened once.
    Float(Vec<f32>),
    Quantized(Box<dyn QuantizedType>),
}

/// Shards of a large matrix: enough for threads to share, few enough to cost nothing.
const SHARDS: usize = 16;
/// Fewest outputs of a shard; a multiple of 4, which kernels take at once.
const SHARD_OUTPUTS: usize = 32;
/// Below this many multiplications a product is not worth waking another thread for.
const PARALLEL_FROM: usize = 1 << 19;

impl Matrix {
    /// A matrix without its weights, which [`Matrix::push`] brings shard by shard.
    pub(crate) fn begin(
        kind: TensorType,
        outputs: u64,
        inputs: u64,
        bytes: u64,
    ) -> Result<Self, EngineError> {
        let size = |value: u64| usize::try_from(value).map_err(|_| EngineError::Internal("matrix size"));
        let (outputs, inputs, bytes) = (size(outputs)?, size(inputs)?, size(bytes)?);
        let row = bytes / outputs.max(1);
        if row == 0 || inputs == 0 || row.checked_mul(outputs) != Some(bytes) {
            return Err(EngineError::Internal("matrix bytes"));
        }
        let shard = outputs.div_ceil(SHARDS).next_multiple_of(4).max(SHARD_OUTPUTS);
        Ok(Self {
            kind,
            outputs,
            inputs,
            row,
            shard,
            shards: Vec::with_capacity(outputs.div_ceil(shard)),
        })
    }

    /// Bytes of the file that the next shard takes; 0 when all are there.
    pub(crate) fn missing(&self) -> usize {
        let there = (self.shards.len() * self.shard).min(self.outputs);
        self.shard.min(self.outputs - there) * self.row
    }

    /// Copies the next shard's bytes to the device.
    pub(crate) fn push(&mut self, device: &Device, bytes: &[u8]) -> Result<(), EngineError> {
        if bytes.len() != self.missing() {
            return Err(EngineError::Internal("shard bytes"));
        }
        self.shards.push(match quantized(self.kind) {
            None => Store::Float(floats(self.kind, bytes)?),
            Some(dtype) => {
                reserve(bytes.len())?;
                match QStorage::from_data(Cow::Borrowed(bytes), device, dtype)? {
                    QStorage::Cpu(store) => Store::Quantized(store),
                    _ => {
                        return Err(EngineError::UnsupportedFeature(
                            "this build computes on the CPU only".into(),
                        ));
                    }
                }
            }
        });
        Ok(())
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        let bytes = |store: &Store| match store {
            Store::Float(values) => wide(values.len()).saturating_mul(4),
            Store::Quantized(store) => wide(store.storage_size_in_bytes()),
        };
        self.shards.iter().map(bytes).sum()
    }

    /// Number of outputs.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// One row of weights in F32 (a token's embedding).
    pub(crate) fn row(&self, row: u32, into: &mut [f32]) -> Result<(), EngineError> {
        let outside = || EngineError::Internal("row outside the matrix");
        let row = index(row);
        if row >= self.outputs || into.len() != self.inputs {
            return Err(outside());
        }
        let (shard, within) = (row / self.shard, row % self.shard);
        match self.shards.get(shard).ok_or_else(outside)? {
            Store::Float(values) => {
                let start = within * self.inputs;
                into.copy_from_slice(values.get(start..start + self.inputs).ok_or_else(outside)?);
            }
            Store::Quantized(store) => {
                let rows = self.shard.min(self.outputs - shard * self.shard);
                match store.embedding(&[u32::try_from(within).unwrap_or(0)], rows, self.inputs)? {
                    CpuStorage::F32(values) => {
                        into.copy_from_slice(values.get(..self.inputs).ok_or_else(outside)?);
                    }
                    _ => return Err(EngineError::Internal("embedding type")),
                }
            }
        }
        Ok(())
    }

    /// `into[r][o] = Σ rows[r][i] · weight[o][i]`.
    pub(crate) fn multiply(&self, rows: &[f32], into: &mut [f32]) -> Result<(), EngineError> {
        let count = rows.len() / self.inputs;
        if rows.len() != count * self.inputs || into.len() != count * self.outputs {
            return Err(EngineError::Internal("activation size"));
        }
        let work = rows.len().saturating_mul(self.outputs);
        if count == 1 {
            return self.each(work, into, self.shard, |store, out| {
                self.product(store, rows, 1, out)
            });
        }
        // Shard by shard, so that every task owns one contiguous piece; put in place afterwards.
        let mut pieces = vec![0.0_f32; into.len()];
        self.each(work, &mut pieces, self.shard * count, |store, out| {
            self.product(store, rows, count, out)
        })?;
        for (shard, piece) in pieces.chunks(self.shard * count).enumerate() {
            let width = piece.len() / count;
            let first = shard * self.shard;
            for (piece, row) in piece.chunks(width).zip(into.chunks_mut(self.outputs)) {
                if let Some(row) = row.get_mut(first..first + width) {
                    row.copy_from_slice(piece);
                }
            }
        }
        Ok(())
    }

    fn each(
        &self,
        work: usize,
        into: &mut [f32],
        piece: usize,
        run: impl Fn(&Store, &mut [f32]) -> Result<(), EngineError> + Sync,
    ) -> Result<(), EngineError> {
        if work < PARALLEL_FROM {
            self.shards
                .iter()
                .zip(into.chunks_mut(piece))
                .try_for_each(|(store, out)| run(store, out))
        } else {
            self.shards
                .par_iter()
                .zip(into.par_chunks_mut(piece))
                .try_for_each(|(store, out)| run(store, out))
        }
    }

    fn product(&self, store: &Store, rows: &[f32], count: usize, out: &mut [f32]) -> Result<(), EngineError> {
        let outputs = out.len() / count;
        match store {
            Store::Quantized(store) => Ok(store.matmul_t((count, self.inputs, outputs), rows, out)?),
            Store::Float(weights) => {
                for (output, weights) in weights.chunks(self.inputs).enumerate() {
                    for (row, out) in rows.chunks(self.inputs).zip(out.chunks_mut(outputs)) {
                        if let Some(out) = out.get_mut(output) {
                            *out = dot(weights, row);
                        }
                    }
                }
                Ok(())
            }
        }
    }
}

/// Runs every task once, on several threads when there is enough work.
pub(crate) fn for_each<T: Send>(tasks: &mut [T], work: usize, run: impl Fn(&mut T) + Send + Sync) {
    if work < PARALLEL_FROM {
        tasks.iter_mut().for_each(run);
    } else {
        tasks.par_iter_mut().for_each(run);
    }
}

/// Candle's allocation aborts when memory is short; this asks first.
fn reserve(bytes: usize) -> Result<(), EngineError> {
    Vec::<u8>::new()
        .try_reserve_exact(bytes)
        .map_err(|_| EngineError::Allocation {
            what: "weights",
            bytes: wide(bytes),
        })
}

const LANES: usize = 16;

/// Scalar product in a fixed order: 16 partial sums, then their sum from left to right, then the rest.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// The tensor's values in F32.
pub(crate) fn floats(kind: TensorType, bytes: &[u8]) -> Result<Vec<f32>, EngineError> {
    let count = match kind {
        TensorType::F32 => bytes.len() / 4,
        _ => bytes.len() / 2,
    };
    let mut values = Vec::new();
    values
        .try_reserve_exact(count)
        .map_err(|_| EngineError::Allocation {
            what: "weights",
            bytes: wide(count).saturating_mul(4),
        })?;
    match kind {
        TensorType::F32 => values.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
        TensorType::F16 => {
            values.extend(
                bytes
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|b| half::f16::from_le_bytes(*b).to_f32()),
            );
        }
        TensorType::Bf16 => {
            values.extend(
                bytes
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|b| half::bf16::from_le_bytes(*b).to_f32()),
            );
        }
        _ => {
            return Err(EngineError::TensorType {
                tensor: "1-dimensional".into(),
                kind: kind.name(),
            });
        }
    }
    Ok(values)
}

/// Candle's name of a block-quantised type.
fn quantized(kind: TensorType) -> Option<GgmlDType> {
    Some(match kind {
        TensorType::Q4_0 => GgmlDType::Q4_0,
        TensorType::Q4_1 => GgmlDType::Q4_1,
        TensorType::Q5_0 => GgmlDType::Q5_0,
        TensorType::Q5_1 => GgmlDType::Q5_1,
        TensorType::Q8_0 => GgmlDType::Q8_0,
        TensorType::Q2K => GgmlDType::Q2K,
        TensorType::Q3K => GgmlDType::Q3K,
        TensorType::Q4K => GgmlDType::Q4K,
        TensorType::Q5K => GgmlDType::Q5K,
        TensorType::Q6K => GgmlDType::Q6K,
        TensorType::Q8K => GgmlDType::Q8K,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_type_that_a_job_may_bring_has_a_kernel() {
        let plain = [TensorType::F32, TensorType::F16, TensorType::Bf16];
        for kind in gogrid_gguf::ENGINE_TENSOR_TYPES {
            assert!(
                plain.contains(kind) || quantized(*kind).is_some(),
                "{}",
                kind.name()
            );
        }
    }
}
