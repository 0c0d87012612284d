//! Memory a job takes, from the numbers its model's header gave.
//!
//! Owns: the arithmetic over `ModelFacts`, an upper bound of `gogrid_gguf::Estimate` (which sees the whole header),
//! and whether this version's engine knows the model. Must not: know of budgets.

use gogrid_api::Bytes;
use gogrid_api::assignment::ModelFacts;
use gogrid_api::node::Backend;

/// Bytes by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimated {
    /// Tensors.
    pub weights: Bytes,
    /// Keys and values of all sequences.
    pub kv_cache: Bytes,
    /// Activations.
    pub compute: Bytes,
    /// The backend's own, and the tokenizer.
    pub overhead: Bytes,
    /// The sum.
    pub total: Bytes,
}

/// Why no estimate could be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EstimateError {
    /// More context than the model was made for.
    #[error(
        "{context_tokens} tokens of context exceed the model's {limit}: spec.contextTokens must be at most that"
    )]
    ContextTooLong {
        /// Asked for.
        context_tokens: i32,
        /// The model's.
        limit: i64,
    },
    /// The engine has no code for it.
    #[error("architecture {architecture:?} is not supported; supported: {supported}")]
    Architecture {
        /// The model's.
        architecture: String,
        /// Those supported.
        supported: String,
    },
    /// The engine has no kernel for it.
    #[error("tensor type {quantization:?} is not supported; supported: {supported}")]
    TensorType {
        /// The model's.
        quantization: String,
        /// Those supported.
        supported: String,
    },
    /// A number is negative or a sum beyond 63 bits.
    #[error("the model's numbers can't be right: {what} is out of range")]
    OutOfRange {
        /// Which number.
        what: &'static str,
    },
}

/// Whether this version's engine runs such a model with that context.
///
/// # Errors
/// What stands in the way.
pub fn supported(facts: &ModelFacts, context_tokens: i32) -> Result<(), EstimateError> {
    if !gogrid_gguf::ENGINE_ARCHITECTURES.contains(&facts.architecture.as_str()) {
        let supported = gogrid_gguf::ENGINE_ARCHITECTURES.join(", ");
        return Err(EstimateError::Architecture {
            architecture: facts.architecture.clone(),
            supported,
        });
    }
    if !gogrid_gguf::ENGINE_TENSOR_TYPES
        .iter()
        .any(|t| t.name() == facts.quantization)
    {
        let supported = gogrid_gguf::ENGINE_TENSOR_TYPES
            .iter()
            .map(|t| t.name())
            .collect::<Vec<_>>()
            .join(", ");
        return Err(EstimateError::TensorType {
            quantization: facts.quantization.clone(),
            supported,
        });
    }
    if i64::from(context_tokens) > facts.context_length {
        return Err(EstimateError::ContextTooLong {
            context_tokens,
            limit: facts.context_length,
        });
    }
    Ok(())
}

/// Constant cost of a worker on a GPU: context, kernels and allocator slack.
const GPU_OVERHEAD: u64 = 600 << 20;
/// Tokenizer tables per byte of header, as in `gogrid_gguf`.
const TOKENIZER_FACTOR: u64 = 4;
const F32_BYTES: u64 = 4;

/// Estimates what the model takes on that backend.
///
/// # Errors
/// The numbers are out of range.
pub fn estimate(
    facts: &ModelFacts,
    context_tokens: i32,
    parallel: i32,
    backend: Backend,
) -> Result<Estimated, EstimateError> {
    let number = |what, value: i64| u64::try_from(value).map_err(|_| EstimateError::OutOfRange { what });
    let overflow = |what| EstimateError::OutOfRange { what };
    let file = number("fileBytes", facts.file_bytes)?;
    let stored = number("weightBytes", facts.weight_bytes)?;
    let context = number("contextTokens", context_tokens.into())?;
    let parallel = number("parallelSequences", parallel.into())?.max(1);
    let engine = gogrid_gguf::Backend::CPU;
    let (constant, widens) = match backend {
        Backend::Cpu => (engine.overhead_bytes, engine.widens_half),
        Backend::Cuda | Backend::Metal => (GPU_OVERHEAD, false),
    };
    let half = matches!(facts.quantization.as_str(), "F16" | "BF16");
    let weights = if widens && half {
        stored.checked_mul(2)
    } else {
        Some(stored)
    }
    .ok_or(overflow("weightBytes"))?;
    let kv_cache = number("kvBytesPerToken", facts.kv_bytes_per_token)?
        .checked_mul(context)
        .and_then(|b| b.checked_mul(parallel))
        .ok_or(overflow("kvBytesPerToken"))?;
    let compute =
        activations(facts, context, parallel, engine.batch_tokens.into()).ok_or(overflow("embedding"))?;
    let overhead = file
        .saturating_sub(stored)
        .checked_mul(TOKENIZER_FACTOR)
        .and_then(|b| b.checked_add(constant))
        .ok_or(overflow("fileBytes"))?;
    // Whole mebibytes read well, and rounding up is on the safe side.
    let whole = |bytes: u64, what| bytes.checked_next_multiple_of(Bytes::MIB.0).ok_or(overflow(what));
    let (weights, kv_cache) = (
        whole(weights, "weightBytes")?,
        whole(kv_cache, "kvBytesPerToken")?,
    );
    let (compute, overhead) = (whole(compute, "embedding")?, whole(overhead, "fileBytes")?);
    let total = [kv_cache, compute, overhead]
        .into_iter()
        .try_fold(weights, u64::checked_add)
        .filter(|t| i64::try_from(*t).is_ok())
        .ok_or(overflow("the sum"))?;
    let [weights, kv_cache, compute, overhead, total] =
        [weights, kv_cache, compute, overhead, total].map(Bytes);
    Ok(Estimated {
        weights,
        kv_cache,
        compute,
        overhead,
        total,
    })
}

/// One step through one layer in F32 and a row of logits per sequence. The number of heads is not among the facts:
/// heads of 32 elements bound it from above for every model in use.
fn activations(facts: &ModelFacts, context: u64, parallel: u64, batch_tokens: u64) -> Option<u64> {
    let [embedding, feed_forward, vocabulary] =
        [facts.embedding, facts.feed_forward, facts.vocabulary].map(|n| u64::try_from(n).unwrap_or(0));
    let heads = (embedding / 32).max(1);
    let batch = batch_tokens.min(context).max(parallel);
    let per_token = [
        embedding.checked_mul(8)?,
        feed_forward.checked_mul(3)?,
        heads.checked_mul(context)?.checked_mul(2)?,
    ]
    .into_iter()
    .try_fold(0_u64, u64::checked_add)?;
    batch
        .checked_mul(per_token)?
        .checked_add(vocabulary.checked_mul(parallel)?)?
        .checked_mul(F32_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> ModelFacts {
        ModelFacts {
            architecture: "llama".into(),
            name: "tiny".into(),
            quantization: "Q8_0".into(),
            file_bytes: 1_100_000,
            weight_bytes: 1_000_000,
            parameters: 1_000_000,
            layers: 4,
            embedding: 128,
            feed_forward: 256,
            vocabulary: 512,
            context_length: 512,
            kv_bytes_per_token: 4096,
        }
    }

    #[test]
    fn the_cache_grows_with_context_and_with_sequences_and_the_sum_is_exact() {
        let e = estimate(&facts(), 256, 4, Backend::Cpu).unwrap();
        assert_eq!(e.kv_cache, Bytes(4096 * 256 * 4));
        assert_eq!(e.total.0, e.weights.0 + e.kv_cache.0 + e.compute.0 + e.overhead.0);
        assert!(estimate(&facts(), 256, 4, Backend::Cuda).unwrap().overhead > e.overhead);
    }

    #[test]
    fn a_model_that_the_engine_does_not_know_is_refused_by_name() {
        let mut other = facts();
        other.architecture = "mamba".into();
        assert!(supported(&other, 16).unwrap_err().to_string().contains("mamba"));
        other = facts();
        other.quantization = "IQ2_XS".into();
        assert!(supported(&other, 16).unwrap_err().to_string().contains("IQ2_XS"));
        assert_eq!(
            supported(&facts(), 513),
            Err(EstimateError::ContextTooLong {
                context_tokens: 513,
                limit: 512
            })
        );
        assert_eq!(supported(&facts(), 512), Ok(()));
    }

    #[test]
    fn absurd_numbers_are_an_error_and_no_overflow() {
        let mut absurd = facts();
        absurd.kv_bytes_per_token = i64::MAX;
        assert!(estimate(&absurd, i32::MAX, i32::MAX, Backend::Cpu).is_err());
        absurd.kv_bytes_per_token = -1;
        assert!(estimate(&absurd, 16, 1, Backend::Cpu).is_err());
    }
}
