//! What a sound file reads as.

use crate::builder::{File, llama};
use gogrid_gguf::{Array, FieldError, GgufError, Header, Limits, TensorType, Value, ValueType, parse_from};

pub(crate) fn parse(bytes: &[u8]) -> Result<Header, GgufError> {
    Header::parse(bytes, u64::try_from(bytes.len()).unwrap(), &Limits::default())
}

#[test]
fn both_versions_read_the_same() {
    let three = parse(&llama().bytes()).unwrap();
    let two = parse(
        &File {
            version: 2,
            ..llama()
        }
        .bytes(),
    )
    .unwrap();
    assert_eq!((two.version, three.version), (2, 3));
    assert_eq!(two.metadata, three.metadata);
    assert_eq!(two.tensors, three.tensors);
}

#[test]
fn tensors_have_absolute_offsets_and_sizes_in_bytes() {
    let header = parse(&llama().bytes()).unwrap();
    let embeddings = header.tensor("token_embd.weight").unwrap();
    assert_eq!(embeddings.offset, header.data_offset);
    assert_eq!(
        (embeddings.bytes, embeddings.elements(), embeddings.kind),
        (1024, 512, TensorType::F16)
    );
    let query = header.tensor("blk.1.attn_q.weight").unwrap();
    assert_eq!(query.bytes, 64 * 64 / 32 * 18);
    assert!(query.offset.is_multiple_of(32));
}

#[test]
fn a_reader_that_gives_one_byte_at_a_time_gives_the_same_header() {
    struct Trickle<'a>(&'a [u8]);
    impl std::io::Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let count = self.0.len().min(buffer.len()).min(1);
            let (head, tail) = self.0.split_at(count);
            buffer[..count].copy_from_slice(head);
            self.0 = tail;
            Ok(count)
        }
    }
    let bytes = llama().bytes();
    let length = u64::try_from(bytes.len()).unwrap();
    let header = parse_from(&mut Trickle(&bytes), length, &Limits::default()).unwrap();
    assert_eq!(header, parse(&bytes).unwrap());
}

#[test]
fn a_prefix_that_holds_the_header_is_enough_and_a_shorter_one_says_what_it_needs() {
    let bytes = llama().bytes();
    let length = u64::try_from(bytes.len()).unwrap();
    let whole = parse(&bytes).unwrap();
    let mut have = 0_usize;
    let mut steps = 0;
    let header = loop {
        match Header::parse(&bytes[..have], length, &Limits::default()) {
            Ok(header) => break header,
            Err(GgufError::Truncated { needed, have: had }) => {
                assert!(needed > had, "{needed} {had}");
                have = usize::try_from(needed).unwrap();
            }
            Err(other) => panic!("{other}"),
        }
        steps += 1;
        assert!(steps < 10_000);
    };
    assert_eq!(header, whole);
    assert!(have <= usize::try_from(whole.data_offset).unwrap());
}

#[test]
fn typed_getters_name_the_key_and_the_type_found() {
    let header = parse(&llama().with("llama.big", Value::U64(1 << 40)).bytes()).unwrap();
    assert_eq!(header.u32("llama.block_count").unwrap(), 2);
    assert_eq!(header.u64("llama.big").unwrap(), 1 << 40);
    assert!((header.f32_or("llama.rope.freq_base", 1e4).unwrap() - 1e4).abs() < f32::EPSILON);
    assert_eq!(
        header.strings("tokenizer.ggml.tokens").unwrap().iter().nth(6),
        Some("🦙")
    );
    assert_eq!(header.strings("tokenizer.ggml.tokens").unwrap().get(1), Some(""));
    assert_eq!(header.strings("tokenizer.ggml.tokens").unwrap().get(8), None);
    assert_eq!(
        header.u32("nope"),
        Err(FieldError::Missing {
            key: "nope".to_owned()
        })
    );
    assert_eq!(
        header.str("llama.block_count").unwrap_err().to_string(),
        "metadata key llama.block_count is u32, not string"
    );
    assert_eq!(
        header.u32("llama.big").unwrap_err().to_string(),
        "metadata key llama.big: 1099511627776 is not within 0..=4294967295"
    );
    assert_eq!(header.str_opt("general.author").unwrap(), None);
    assert!(header.bool_or("tokenizer.ggml.add_bos_token", true).unwrap());
}

#[test]
fn every_scalar_and_array_type_survives_a_round_trip() {
    let nested = Array::Array(vec![Array::U8(vec![1, 2]), Array::U8(vec![])]);
    let values = [
        Value::U8(1),
        Value::I8(-1),
        Value::U16(2),
        Value::I16(-2),
        Value::U32(3),
        Value::I32(-3),
        Value::U64(4),
        Value::I64(-4),
        Value::F32(0.5),
        Value::F64(-0.5),
        Value::Bool(true),
        Value::String("text".to_owned()),
        Value::Array(nested),
        Value::Array(Array::I16(vec![-5, 5])),
        Value::Array(Array::F64(vec![1.0])),
        Value::Array(Array::Bool(vec![true, false])),
    ];
    let file = values
        .iter()
        .enumerate()
        .fold(File::default(), |file, (index, value)| {
            file.with(&format!("k{index}"), value.clone())
        });
    let header = parse(&file.bytes()).unwrap();
    for (index, value) in values.iter().enumerate() {
        assert_eq!(header.get(&format!("k{index}")), Some(value));
    }
}

#[test]
fn a_larger_alignment_moves_the_data() {
    let file = File {
        alignment: 256,
        ..llama().with("general.alignment", Value::U32(256))
    };
    let header = parse(&file.bytes()).unwrap();
    assert_eq!(header.alignment, 256);
    assert!(
        header
            .tensors
            .iter()
            .all(|tensor| tensor.offset.is_multiple_of(256))
    );
}

#[test]
fn rows_take_whole_blocks() {
    assert_eq!(TensorType::Q4K.row_bytes(512), Some(288));
    assert_eq!(TensorType::Q4K.row_bytes(500), None);
    assert_eq!(TensorType::F64.row_bytes(u64::MAX), None);
    assert_eq!(TensorType::Q8_0.row_bytes(0), Some(0));
}

#[test]
fn tensor_type_ids_and_names_are_distinct_and_reversible() {
    let mut names = std::collections::HashSet::new();
    for kind in TensorType::ALL {
        assert_eq!(TensorType::from_id(kind.id()), Some(*kind));
        assert!(names.insert(kind.name()));
        assert_eq!(serde_json::to_string(kind).unwrap(), format!("\"{kind}\""));
    }
    for withdrawn in [4, 5, 31, 32, 33, 36, 37, 38, 1000] {
        assert_eq!(TensorType::from_id(withdrawn), None);
    }
    assert_eq!(ValueType::from_id(13), None);
}
