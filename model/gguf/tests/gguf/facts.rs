//! What is derived from a header, and what the engine says to it.

use crate::builder::{File, llama};
use crate::format::parse;
use gogrid_gguf::{Array, Facts, FactsError, FieldError, TensorType, UnsupportedModel, Value, supported};

pub(crate) fn facts(file: &File) -> Result<Facts, FactsError> {
    Facts::from_header(&parse(&file.bytes()).unwrap())
}

#[test]
fn facts_of_a_small_llama_are_exact() {
    let bytes = llama().bytes();
    let facts = facts(&llama()).unwrap();
    assert_eq!(facts.architecture, "llama");
    assert_eq!(facts.name.as_deref(), Some("Tiny  model"));
    assert_eq!(facts.quantization, TensorType::Q8_0);
    assert_eq!(
        facts.tensor_types,
        [
            TensorType::F32,
            TensorType::F16,
            TensorType::Q4_0,
            TensorType::Q8_0
        ]
    );
    assert_eq!(
        (facts.layers, facts.embedding, facts.feed_forward, facts.heads),
        (2, 64, 96, 4)
    );
    assert_eq!(facts.kv_heads, [2, 2]);
    assert_eq!(
        (
            facts.key_length,
            facts.value_length,
            facts.context_length,
            facts.vocab
        ),
        (16, 16, 128, 8)
    );
    let layer = 64 * 4 + (64 * 64 + 64 * 32) / 32 * 18 + 64 * 96 / 32 * 34;
    assert_eq!(facts.layer_bytes, [layer, layer]);
    assert_eq!(facts.other_bytes, 64 * 8 * 2 + 64 * 4);
    assert_eq!(facts.half_bytes, 1024);
    assert_eq!(facts.weight_bytes(), 2 * layer + 1280);
    assert_eq!(
        facts.parameters,
        64 * 8 + 2 * (64 + 64 * 64 + 64 * 32 + 64 * 96) + 64
    );
    assert_eq!(facts.file_bytes, u64::try_from(bytes.len()).unwrap());
    supported(&facts).unwrap();
}

#[test]
fn facts_are_written_in_camel_case_and_read_back() {
    let facts = facts(&llama()).unwrap();
    let json = serde_json::to_string(&facts).unwrap();
    assert!(
        json.contains("\"kvHeads\":[2,2]") && json.contains("\"quantization\":\"Q8_0\""),
        "{json}"
    );
    assert_eq!(serde_json::from_str::<Facts>(&json).unwrap(), facts);
}

#[test]
fn head_counts_may_differ_per_layer_and_lengths_may_be_stated() {
    let file = llama()
        .with(
            "llama.attention.head_count_kv",
            Value::Array(Array::I32(vec![2, 0])),
        )
        .with("llama.attention.key_length", Value::U32(24))
        .with("llama.attention.value_length", Value::U16(8));
    let facts = facts(&file).unwrap();
    assert_eq!(facts.kv_heads, [2, 0]);
    assert_eq!((facts.key_length, facts.value_length), (24, 8));
}

#[test]
fn without_key_value_heads_every_head_has_its_own() {
    assert_eq!(
        facts(&llama().without("llama.attention.head_count_kv"))
            .unwrap()
            .kv_heads,
        [4, 4]
    );
}

#[test]
fn numbers_beyond_reason_are_refused_with_their_limit() {
    let refused = |key: &str, value| facts(&llama().with(key, value)).unwrap_err();
    assert_eq!(
        refused("llama.block_count", Value::U32(u32::MAX)).to_string(),
        "metadata key llama.block_count: 4294967295 is not within 1..=1024"
    );
    assert!(matches!(
        refused("llama.attention.head_count", Value::U32(0)),
        FactsError::OutOfRange { value: 0, .. }
    ));
    assert!(matches!(
        refused("llama.attention.head_count_kv", Value::Array(Array::U32(vec![1]))),
        FactsError::LayerArray {
            length: 1,
            layers: 2,
            ..
        }
    ));
    assert!(matches!(
        refused("llama.attention.head_count", Value::U32(7)),
        FactsError::HeadLength {
            embedding: 64,
            heads: 7,
            ..
        }
    ));
    assert!(matches!(
        refused("llama.block_count", Value::I32(-1)),
        FactsError::Field(FieldError::OutOfRange { value: -1, .. })
    ));
    assert!(matches!(
        refused("llama.block_count", Value::U32(1)),
        FactsError::LayerOutOfRange {
            layer: 1,
            layers: 1,
            ..
        } | FactsError::LayerArray { .. }
    ));
}

#[test]
fn a_missing_key_or_embedding_is_named() {
    let error = facts(&llama().without("llama.context_length")).unwrap_err();
    assert_eq!(error.to_string(), "metadata key llama.context_length is missing");
    let mut file = llama();
    file.tensors.remove(0);
    assert_eq!(
        facts(&file).unwrap_err().to_string(),
        "tensor token_embd.weight is missing"
    );
}

#[test]
fn the_engine_names_what_it_cannot_run() {
    let known = facts(&llama()).unwrap();
    let other = Facts {
        architecture: "mamba".to_owned(),
        ..known.clone()
    };
    assert_eq!(
        supported(&other).unwrap_err().to_string(),
        "architecture mamba is not supported; supported: llama"
    );
    let mixture = Facts {
        experts: 8,
        ..known.clone()
    };
    assert!(matches!(
        supported(&mixture),
        Err(UnsupportedModel::Experts { experts: 8, .. })
    ));
    let exotic = Facts {
        tensor_types: vec![TensorType::F32, TensorType::Iq4Nl],
        ..known
    };
    let error = supported(&exotic).unwrap_err().to_string();
    assert!(
        error.starts_with("tensor type IQ4_NL is not supported; supported: F32, F16, BF16, Q4_0"),
        "{error}"
    );
}
