//! Nothing panics, whatever the bytes; and what was written is what is read.

use crate::builder::{File, llama};
use crate::format::parse;
use gogrid_gguf::{
    Array, Backend, Demand, Estimate, Facts, Header, KvType, Limits, TensorType, Value, supported,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// Goes as far with the bytes as any caller would.
fn exercise(bytes: &[u8], file_len: u64) {
    let Ok(header) = Header::parse(bytes, file_len, &Limits::default()) else {
        return;
    };
    for tensor in &header.tensors {
        assert!(tensor.offset + tensor.bytes <= file_len);
        assert!(tensor.offset.is_multiple_of(header.alignment));
        assert_eq!(
            tensor.elements() / tensor.kind.block_size() * tensor.kind.type_size(),
            tensor.bytes
        );
    }
    let Ok(facts) = Facts::from_header(&header) else {
        return;
    };
    let _ = supported(&facts);
    let demand = Demand {
        context_tokens: facts.context_length,
        parallel_sequences: u32::MAX,
        kv_type: KvType::F32,
        backend: Backend::CPU,
    };
    let _ = Estimate::new(&facts, &demand);
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i64>().prop_map(Value::I64),
        any::<u32>().prop_map(Value::U32),
        any::<i16>().prop_map(Value::I16),
        any::<bool>().prop_map(Value::Bool),
        (-1e30_f32..1e30).prop_map(Value::F32),
        ".{0,20}".prop_map(Value::String),
        vec(any::<i32>(), 0..8).prop_map(|values| Value::Array(Array::I32(values))),
        vec(".{0,8}", 0..8)
            .prop_map(|values| { Value::Array(Array::String(values.iter().map(String::as_str).collect())) }),
        vec(vec(any::<u16>(), 0..4), 0..4)
            .prop_map(|values| { Value::Array(Array::Array(values.into_iter().map(Array::U16).collect())) }),
    ]
}

fn file() -> impl Strategy<Value = File> {
    let entries = proptest::collection::btree_map("[a-z.]{1,12}", value(), 0..8);
    let kind = proptest::sample::select(TensorType::ALL.to_vec());
    let tensors = proptest::collection::btree_map("[a-z.0-9]{1,12}", (kind, vec(1_u64..4, 0..4)), 0..6);
    (entries, tensors).prop_map(|(entries, tensors)| {
        let start = entries
            .into_iter()
            .fold(File::default(), |file, (key, value)| file.with(&key, value));
        tensors.into_iter().fold(start, |file, (name, (kind, outer))| {
            let shape: Vec<u64> = std::iter::once(kind.block_size()).chain(outer).collect();
            file.tensor(&name, &shape, kind)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..512), file_len in any::<u64>()) {
        exercise(&bytes, file_len);
    }

    #[test]
    fn random_bytes_behind_a_sound_start_never_panic(
        tail in vec(any::<u8>(), 0..256), tensors in 0_u64..4, entries in 0_u64..4, file_len in any::<u64>(),
    ) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes.extend(tail);
        exercise(&bytes, file_len);
    }

    #[test]
    fn mutated_headers_never_panic(
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = llama().bytes();
        for (index, value) in changes {
            let length = bytes.len();
            bytes[index.index(length)] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(&bytes, u64::try_from(bytes.len()).unwrap());
    }

    #[test]
    fn numbers_replaced_by_extremes_never_panic(at in any::<prop::sample::Index>(), value in any::<u64>(), shift in 0_u32..64) {
        let mut bytes = llama().bytes();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&(value >> shift).to_le_bytes());
        exercise(&bytes, u64::try_from(bytes.len()).unwrap());
        exercise(&bytes, u64::MAX);
    }

    #[test]
    fn what_was_written_is_what_is_read(file in file()) {
        let bytes = file.bytes();
        let header = parse(&bytes).unwrap();
        prop_assert_eq!(header.metadata, file.entries.iter().cloned().collect());
        prop_assert_eq!(header.tensors.len(), file.tensors.len());
        for (read, written) in header.tensors.iter().zip(&file.tensors) {
            prop_assert_eq!(&read.name, &written.name);
            prop_assert_eq!(&read.shape, &written.shape);
            prop_assert_eq!(read.kind.id(), written.kind);
        }
    }
}
