//! What a damaged or hostile file is refused with.

use crate::builder::{File, Tensor, llama};
use crate::format::parse;
use gogrid_gguf::{Array, GgufError, Header, Limits, TensorType, Value};

fn one_tensor(name: &str, shape: &[u64], kind: u32, offset: u64) -> File {
    let tensor = Tensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
        kind,
        offset: Some(offset),
    };
    File {
        tensors: vec![tensor],
        ..File::default()
    }
}

/// Candle 0.11.1 divides by this alignment and panics.
#[test]
fn the_162_byte_file_with_alignment_zero_is_refused() {
    let mut file = one_tensor("t", &[32], TensorType::F32.id(), 0)
        .with("general.alignment", Value::U32(0))
        .with("general.architecture", Value::String("llama".to_owned()));
    file.alignment = 1;
    let mut bytes = file.bytes();
    bytes.resize(162, 0);
    assert!(matches!(
        parse(&bytes),
        Err(GgufError::InvalidAlignment { alignment: 0 })
    ));
}

/// Candle 0.11.1 accepts this file with a tensor of no bytes, and aborts when it is multiplied.
#[test]
fn the_129_byte_file_whose_product_wraps_to_zero_is_refused() {
    let mut bytes = one_tensor("t", &[32, 1 << 59], TensorType::F32.id(), 0).bytes();
    bytes.resize(129, 0);
    assert!(matches!(parse(&bytes), Err(GgufError::SizeOverflow { tensor }) if tensor == "t"));
}

#[test]
fn a_quantised_product_that_wraps_is_refused_too() {
    let bytes = one_tensor("t", &[256, 1 << 56], TensorType::Q4K.id(), 0).bytes();
    assert!(matches!(parse(&bytes), Err(GgufError::SizeOverflow { .. })));
}

#[test]
fn other_files_are_told_apart_by_their_first_bytes() {
    assert!(matches!(
        parse(b"PK\x03\x04 and more"),
        Err(GgufError::NotGguf { magic: 0x0403_4b50 })
    ));
    assert!(matches!(
        parse(b""),
        Err(GgufError::Truncated { needed: 4, have: 0 })
    ));
    let mut bytes = llama().bytes();
    bytes[4..8].copy_from_slice(&1_u32.to_le_bytes());
    assert!(matches!(
        parse(&bytes),
        Err(GgufError::UnsupportedVersion { version: 1 })
    ));
    bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
    assert!(matches!(parse(&bytes), Err(GgufError::BigEndian)));
}

#[test]
fn announced_counts_are_checked_before_anything_is_read() {
    let head = |tensors: u64, entries: u64| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes
    };
    assert!(matches!(
        parse(&head(u64::MAX, 0)),
        Err(GgufError::TooManyTensors { count: u64::MAX, .. })
    ));
    assert!(matches!(
        parse(&head(0, u64::MAX)),
        Err(GgufError::TooManyEntries { count: u64::MAX, .. })
    ));
    assert!(matches!(
        parse(&head(60_000, 4000)),
        Err(GgufError::Truncated { have: 24, .. })
    ));
}

#[test]
fn announced_lengths_are_checked_against_limit_and_file() {
    let limits = Limits {
        string_bytes: 8,
        array_elements: 4,
        array_depth: 1,
        ..Limits::default()
    };
    let limited = |value: Value| {
        let bytes = File::default().with("k", value).bytes();
        Header::parse(&bytes, u64::try_from(bytes.len()).unwrap(), &limits).unwrap_err()
    };
    assert!(matches!(
        limited(Value::String("123456789".to_owned())),
        GgufError::TextTooLong {
            what: "string",
            length: 9,
            limit: 8,
            offset: 37
        }
    ));
    assert!(matches!(
        limited(Value::Array(Array::U8(vec![0; 5]))),
        GgufError::ArrayTooLong {
            length: 5,
            limit: 4,
            ..
        }
    ));
    assert!(matches!(
        limited(Value::Array(Array::Array(vec![Array::U8(vec![])]))),
        GgufError::ArrayTooDeep {
            depth: 2,
            limit: 1,
            ..
        }
    ));
    // An array of 2^20 u64 in a file of a few bytes: nothing is allocated for it.
    let mut bytes = File::default()
        .with("k", Value::Array(Array::U64(vec![])))
        .bytes();
    let at = bytes.len() - 8;
    bytes[at..].copy_from_slice(&(1_u64 << 20).to_le_bytes());
    assert!(matches!(parse(&bytes), Err(GgufError::Truncated { needed, .. }) if needed > 8 << 20));
}

#[test]
fn a_header_beyond_its_budget_is_refused_even_if_every_part_is_small() {
    let limits = Limits {
        header_bytes: 100,
        ..Limits::default()
    };
    let bytes = llama().bytes();
    let error = Header::parse(&bytes, u64::try_from(bytes.len()).unwrap(), &limits).unwrap_err();
    assert!(
        matches!(error, GgufError::HeaderTooLong { limit: 100, .. }),
        "{error}"
    );
}

#[test]
fn duplicates_are_refused() {
    let mut twice = llama();
    twice.entries.push(twice.entries[0].clone());
    assert!(
        matches!(parse(&twice.bytes()), Err(GgufError::DuplicateKey { key, .. }) if key == "general.architecture")
    );
    let twice = llama().tensor("output_norm.weight", &[64], TensorType::F32);
    assert!(matches!(
        parse(&twice.bytes()),
        Err(GgufError::DuplicateTensor { .. })
    ));
}

#[test]
fn tensors_must_lie_aligned_inside_the_file_and_apart() {
    let misaligned = one_tensor("t", &[32], 0, 8).bytes();
    assert!(matches!(
        parse(&misaligned),
        Err(GgufError::Misaligned {
            offset: 8,
            alignment: 32,
            ..
        })
    ));
    let mut outside = one_tensor("t", &[32], 0, 0).bytes();
    outside.pop();
    assert!(matches!(
        parse(&outside),
        Err(GgufError::OutsideFile { bytes: 128, .. })
    ));
    let far = one_tensor("t", &[1 << 30], 0, u64::MAX - 31).bytes();
    assert!(matches!(parse(&far), Err(GgufError::OutsideFile { .. })));
    let mut overlap = one_tensor("a", &[32], 0, 0);
    overlap.tensors.push(Tensor {
        name: "b".to_owned(),
        shape: vec![32],
        kind: 0,
        offset: Some(96),
    });
    assert!(
        matches!(parse(&overlap.bytes()), Err(GgufError::Overlap { first, second, .. }) if first == "a" && second == "b")
    );
}

#[test]
fn shapes_must_make_sense() {
    let refused = |shape: &[u64], kind: u32| parse(&one_tensor("t", shape, kind, 0).bytes()).unwrap_err();
    assert!(matches!(
        refused(&[1, 1, 1, 1, 1], 0),
        GgufError::InvalidRank {
            rank: 5,
            limit: 4,
            ..
        }
    ));
    assert!(matches!(
        refused(&[4, 0], 0),
        GgufError::ZeroDimension { index: 1, .. }
    ));
    assert!(matches!(
        refused(&[100], TensorType::Q4_0.id()),
        GgufError::PartialBlock {
            row: 100,
            block: 32,
            ..
        }
    ));
    assert!(matches!(
        refused(&[32], 4),
        GgufError::UnknownTensorType { id: 4, .. }
    ));
    let mut scalar = one_tensor("t", &[], 0, 0).bytes();
    scalar.resize(200, 0);
    assert!(matches!(
        parse(&scalar),
        Err(GgufError::InvalidRank { rank: 0, .. })
    ));
}

#[test]
fn alignment_must_be_a_power_of_two_of_the_right_type() {
    let with = |value| parse(&File::default().with("general.alignment", value).bytes()).unwrap_err();
    assert!(matches!(
        with(Value::U32(48)),
        GgufError::InvalidAlignment { alignment: 48 }
    ));
    assert!(matches!(with(Value::U64(32)), GgufError::AlignmentType { .. }));
}

#[test]
fn texts_must_be_utf8_and_booleans_zero_or_one() {
    let mut bytes = File::default().with("k", Value::String("xy".to_owned())).bytes();
    let last = bytes.len() - 1;
    bytes[last] = 0xff;
    assert!(matches!(
        parse(&bytes),
        Err(GgufError::NotUtf8 { what: "string", .. })
    ));
    let mut bytes = File::default().with("k", Value::Bool(true)).bytes();
    let last = bytes.len() - 1;
    bytes[last] = 2;
    assert!(matches!(
        parse(&bytes),
        Err(GgufError::InvalidBool { value: 2, .. })
    ));
    bytes[33..37].copy_from_slice(&99_u32.to_le_bytes());
    assert!(matches!(
        parse(&bytes),
        Err(GgufError::UnknownValueType { id: 99, offset: 33 })
    ));
}

#[test]
fn errors_show_only_a_short_harmless_part_of_a_name() {
    let name = format!("evil\u{1b}[31m\n{}", "x".repeat(200));
    let error = parse(&one_tensor(&name, &[4, 0], 0, 0).bytes())
        .unwrap_err()
        .to_string();
    assert!(error.contains("evil??31m?xxx"), "{error}");
    assert!(
        error.len() < 120 && error.chars().all(|c| !c.is_control()),
        "{error}"
    );
}
