//! Random models: same bytes for the same seed, right sizes, and a header that says what follows.

use gogrid_testmodels::gguf_writer::Value;
use gogrid_testmodels::quant::TensorType;
use gogrid_testmodels::random::{RandomLlama, random_llama};
use sha2::{Digest, Sha256};

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

#[test]
fn the_bytes_of_a_seed_are_the_same_on_every_machine_and_in_every_format() {
    let expected = [
        (
            TensorType::F32,
            "9632135a5a1645c40e07cbcde8640273cc6d9870b112236bc41d912a71538497",
        ),
        (
            TensorType::F16,
            "c8140b18e2eef4225606f2d8f06ce57ca0b3ca203ee2ed05113fd0bd21c031fd",
        ),
        (
            TensorType::Q4_0,
            "5bc670f6e8bf74b3b38b29f650084fe3a7a3e4c52c1ed1c092cd8a726989f3ec",
        ),
        (
            TensorType::Q8_0,
            "58528b8c4669ea523c8204ef0fe1c4b70ba79e7a1ba301fd8d2cb9bce9d64651",
        ),
        (
            TensorType::Q4K,
            "650851b22ddcef706831fef70c5c7053663a685fb051739cefc080a4f2cc2a2c",
        ),
        (
            TensorType::Q6K,
            "28abd646e492619871fefc04dd4f141ffa02d7255506eff68a4c8937b2a61c64",
        ),
    ];
    for (tensor_type, digest) in expected {
        let shape = RandomLlama {
            tensor_type,
            layers: 1,
            ..RandomLlama::default()
        };
        assert_eq!(sha256(&random_llama(&shape)), digest, "{tensor_type:?}");
    }
}

#[test]
fn a_streamed_file_has_the_bytes_of_the_one_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let shape = RandomLlama {
        tensor_type: TensorType::Q4K,
        ..RandomLlama::default()
    };
    shape.write_to(&path).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), random_llama(&shape));
}

#[test]
fn another_seed_gives_another_model() {
    let shape = RandomLlama::default();
    assert_ne!(
        random_llama(&shape),
        random_llama(&RandomLlama {
            seed: 2,
            ..shape.clone()
        })
    );
}

#[test]
fn a_file_is_its_header_and_the_blocks_of_every_tensor() {
    for tensor_type in TensorType::ALL {
        for tied in [false, true] {
            let shape = RandomLlama {
                tensor_type,
                tied,
                layers: 1,
                vocab: 259,
                ..RandomLlama::default()
            };
            let header = shape.header();
            let data: u64 = header
                .tensors
                .iter()
                .map(|tensor| tensor.bytes().next_multiple_of(32))
                .sum();
            let expected = header.to_bytes().len() + usize::try_from(data).unwrap();
            assert_eq!(random_llama(&shape).len(), expected, "{tensor_type:?}");
            let head = header.tensors.iter().any(|tensor| tensor.name == "output.weight");
            assert_eq!(head, !tied);
        }
    }
}

#[test]
fn norms_stay_f32_in_a_quantised_model() {
    let header = RandomLlama {
        tensor_type: TensorType::Q4K,
        ..RandomLlama::default()
    }
    .header();
    for tensor in &header.tensors {
        let kind = if tensor.name.contains("norm") {
            TensorType::F32
        } else {
            TensorType::Q4K
        };
        assert_eq!(tensor.type_id, kind.id(), "{}", tensor.name);
    }
}

#[test]
fn the_vocabulary_has_the_asked_size_and_a_byte_token_for_every_byte() {
    let header = RandomLlama {
        vocab: 300,
        ..RandomLlama::default()
    }
    .header();
    let Some((_, Value::Array(8, tokens))) = header
        .metadata
        .iter()
        .find(|(key, _)| key == "tokenizer.ggml.tokens")
    else {
        panic!("a list of strings");
    };
    assert_eq!(tokens.len(), 300);
    assert_eq!(tokens[2 + usize::from(b'A')], Value::from("A"));
    assert_eq!(tokens[2 + usize::from(b' ')], Value::from("Ġ"));
    assert_eq!(tokens[258], Value::from("th"));
}

#[test]
fn a_hundred_million_weights_are_counted_without_being_made() {
    let large = RandomLlama {
        layers: 12,
        hidden: 768,
        heads: 12,
        kv_heads: 4,
        head_dim: 64,
        ffn: 2304,
        vocab: 16_000,
        ..RandomLlama::default()
    };
    assert!(large.weights() > 100_000_000, "{}", large.weights());
}
