//! The memory estimate.

use crate::builder::llama;
use crate::facts::facts;
use gogrid_gguf::{Backend, Demand, Estimate, EstimateError, Facts, KvType};

const DEMAND: Demand = Demand {
    context_tokens: 100,
    parallel_sequences: 3,
    kv_type: KvType::F32,
    backend: Backend::CPU,
};

fn tiny() -> Facts {
    facts(&llama()).unwrap()
}

#[test]
fn the_estimate_is_the_sum_of_its_parts() {
    let facts = tiny();
    let estimate = Estimate::new(&facts, &DEMAND).unwrap();
    assert_eq!(estimate.weights, facts.weight_bytes() + facts.half_bytes);
    assert_eq!(estimate.kv_cache, 100 * 3 * (2 + 2) * (16 + 16) * 4);
    let per_token = 4 * 64 + 4 * 32 + 2 * 32 + 3 * 96 + 4 * 100 * 2;
    assert_eq!(estimate.compute, (100 * per_token + 8 * 3) * 4);
    assert_eq!(estimate.overhead, (64 << 20) + 4 * facts.header_bytes);
    let parts = estimate.weights + estimate.kv_cache + estimate.compute + estimate.overhead;
    assert_eq!(estimate.total, parts);
}

#[test]
fn half_precision_halves_the_cache_and_native_kernels_keep_weights_as_stored() {
    let facts = tiny();
    let backend = Backend {
        widens_half: false,
        ..Backend::CPU
    };
    let estimate = Estimate::new(
        &facts,
        &Demand {
            kv_type: KvType::F16,
            backend,
            ..DEMAND
        },
    )
    .unwrap();
    assert_eq!(
        estimate.kv_cache * 2,
        Estimate::new(&facts, &DEMAND).unwrap().kv_cache
    );
    assert_eq!(estimate.weights, facts.weight_bytes());
}

/// The formula must give what llama.cpp prints for Llama 3 8B at 8192 tokens in F16: 1024 MiB.
#[test]
fn the_cache_of_llama_3_8b_is_one_gibibyte() {
    let facts = Facts {
        layers: 32,
        kv_heads: vec![8; 32],
        heads: 32,
        key_length: 128,
        value_length: 128,
        context_length: 8192,
        ..tiny()
    };
    let demand = Demand {
        context_tokens: 8192,
        parallel_sequences: 1,
        kv_type: KvType::F16,
        backend: Backend::CPU,
    };
    assert_eq!(Estimate::new(&facts, &demand).unwrap().kv_cache, 1 << 30);
}

#[test]
fn nothing_overflows_silently() {
    let huge = Facts {
        layer_bytes: vec![u64::MAX, 1],
        ..tiny()
    };
    assert_eq!(
        Estimate::new(&huge, &DEMAND),
        Err(EstimateError::Overflow { what: "weights" })
    );
    let wide = Facts {
        kv_heads: vec![u32::MAX; 1024],
        key_length: u32::MAX,
        value_length: u32::MAX,
        context_length: u32::MAX,
        ..tiny()
    };
    let demand = Demand {
        context_tokens: u32::MAX,
        parallel_sequences: u32::MAX,
        ..DEMAND
    };
    assert_eq!(
        Estimate::new(&wide, &demand),
        Err(EstimateError::Overflow { what: "the cache" })
    );
}

#[test]
fn senseless_demands_are_refused() {
    let facts = tiny();
    let ask = |context_tokens, parallel_sequences| {
        Estimate::new(
            &facts,
            &Demand {
                context_tokens,
                parallel_sequences,
                ..DEMAND
            },
        )
    };
    assert_eq!(
        ask(0, 1),
        Err(EstimateError::Zero {
            what: "context tokens"
        })
    );
    assert_eq!(
        ask(1, 0),
        Err(EstimateError::Zero {
            what: "parallel sequences"
        })
    );
    assert_eq!(
        ask(129, 1),
        Err(EstimateError::ContextTooLong {
            context_tokens: 129,
            limit: 128
        })
    );
}
