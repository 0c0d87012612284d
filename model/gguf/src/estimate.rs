//! How much memory a loaded model takes. Owns the arithmetic and the constants of each backend; the planner compares
//! the result with budgets. All numbers are bytes; every sum and product is checked.

use crate::error::EstimateError;
use crate::facts::Facts;
use serde::{Deserialize, Serialize};

/// Element type of the key/value cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvType {
    /// 4 bytes per element: what the CPU engine keeps.
    #[default]
    F32,
    /// 2 bytes per element.
    F16,
}

impl KvType {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// What a backend adds to weights and cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Constant cost of one worker before it loads anything: code, thread stacks, allocator slack; on a GPU the context.
    pub overhead_bytes: u64,
    /// Most tokens that go through the layers in one step (the prompt chunk).
    pub batch_tokens: u32,
    /// Whether F16 and BF16 matrices are widened to F32 when loaded. The CPU engine does that.
    pub widens_half: bool,
}

impl Backend {
    /// The CPU engine. 64 MiB covers the worker's code and thread stacks with room to spare; its prompt chunk is at most 256 tokens.
    pub const CPU: Self = Self {
        overhead_bytes: 64 << 20,
        batch_tokens: 256,
        widens_half: true,
    };
}

/// What a worker is asked to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Tokens of context of each sequence.
    pub context_tokens: u32,
    /// Sequences that run at once, each with a context of its own.
    pub parallel_sequences: u32,
    /// Element type of the cache.
    pub kv_type: KvType,
    /// Where it runs.
    pub backend: Backend,
}

/// Memory of a loaded model in bytes, by cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Estimate {
    /// Tensors as the backend holds them. The token embedding is looked up row by row, and an output layer tied to it
    /// shares its tensor, so neither is counted twice.
    pub weights: u64,
    /// Keys and values of every layer, allocated in full at the start.
    pub kv_cache: u64,
    /// Upper bound of the activations of one step.
    pub compute: u64,
    /// The backend's constant and the tokenizer's tables.
    pub overhead: u64,
    /// Sum of all of them.
    pub total: u64,
}

/// Tokenizer tables (strings, hash maps, merge ranks) per byte of header, rounded up.
const TOKENIZER_FACTOR: u64 = 4;
const F32_BYTES: u64 = 4;

impl Estimate {
    /// Estimates what `facts` takes under `demand`.
    pub fn new(facts: &Facts, demand: &Demand) -> Result<Self, EstimateError> {
        if demand.context_tokens == 0 {
            return Err(EstimateError::Zero {
                what: "context tokens",
            });
        }
        if demand.parallel_sequences == 0 {
            return Err(EstimateError::Zero {
                what: "parallel sequences",
            });
        }
        if demand.context_tokens > facts.context_length {
            return Err(EstimateError::ContextTooLong {
                context_tokens: demand.context_tokens,
                limit: facts.context_length,
            });
        }
        let weights = weights(facts, demand).ok_or(EstimateError::Overflow { what: "weights" })?;
        let kv_cache = kv_cache(facts, demand).ok_or(EstimateError::Overflow { what: "the cache" })?;
        let compute = compute(facts, demand).ok_or(EstimateError::Overflow { what: "activations" })?;
        let overhead = facts
            .header_bytes
            .checked_mul(TOKENIZER_FACTOR)
            .and_then(|bytes| bytes.checked_add(demand.backend.overhead_bytes))
            .ok_or(EstimateError::Overflow { what: "overhead" })?;
        let total = sum([weights, kv_cache, compute, overhead])
            .ok_or(EstimateError::Overflow { what: "the total" })?;
        Ok(Self {
            weights,
            kv_cache,
            compute,
            overhead,
            total,
        })
    }
}

fn weights(facts: &Facts, demand: &Demand) -> Option<u64> {
    let stored = facts
        .layer_bytes
        .iter()
        .try_fold(facts.other_bytes, |sum, bytes| sum.checked_add(*bytes))?;
    stored.checked_add(if demand.backend.widens_half {
        facts.half_bytes
    } else {
        0
    })
}

/// Per layer: context × sequences × key/value heads × (key + value length) × bytes of an element.
fn kv_cache(facts: &Facts, demand: &Demand) -> Option<u64> {
    let heads = sum(facts.kv_heads.iter().map(|heads| u64::from(*heads)))?;
    let per_head = u64::from(facts.key_length).checked_add(u64::from(facts.value_length))?;
    u64::from(demand.context_tokens)
        .checked_mul(u64::from(demand.parallel_sequences))?
        .checked_mul(heads)?
        .checked_mul(per_head)?
        .checked_mul(demand.kv_type.bytes())
}

/// One step of `batch` tokens through one layer in F32: residual, norm and projections, queries and attention output,
/// new keys and values, gate, up and their product, and the attention scores twice (before and after the softmax); then
/// one row of logits per sequence. Layers reuse the same memory.
fn compute(facts: &Facts, demand: &Demand) -> Option<u64> {
    let [
        embedding,
        feed_forward,
        heads,
        key,
        value,
        vocab,
        context,
        parallel,
    ] = [
        facts.embedding,
        facts.feed_forward,
        facts.heads,
        facts.key_length,
        facts.value_length,
        facts.vocab,
        demand.context_tokens,
        demand.parallel_sequences,
    ]
    .map(u64::from);
    // A step holds a prompt chunk or one token of every sequence, whichever is more.
    let batch = u64::from(demand.backend.batch_tokens).min(context).max(parallel);
    let kv_heads = facts.kv_heads.iter().copied().max().map_or(0, u64::from);
    let head_pair = key.checked_add(value)?;
    let per_token = sum([
        embedding.checked_mul(4)?,
        heads.checked_mul(head_pair)?,
        kv_heads.checked_mul(head_pair)?,
        feed_forward.checked_mul(3)?,
        heads.checked_mul(context)?.checked_mul(2)?,
    ])?;
    let elements = batch
        .checked_mul(per_token)?
        .checked_add(vocab.checked_mul(parallel)?)?;
    elements.checked_mul(F32_BYTES)
}

fn sum(parts: impl IntoIterator<Item = u64>) -> Option<u64> {
    parts.into_iter().try_fold(0_u64, u64::checked_add)
}
