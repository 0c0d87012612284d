//! Writes GGUF files, sound ones by default, for tests to read or to damage.

use gogrid_gguf::{Array, TensorType, Value, ValueType};

#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) kind: u32,
    /// Offset in the data section; laid out one after the other when `None`.
    pub(crate) offset: Option<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct File {
    pub(crate) version: u32,
    pub(crate) entries: Vec<(String, Value)>,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) alignment: u64,
}

impl Default for File {
    fn default() -> Self {
        Self {
            version: 3,
            entries: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }
}

impl File {
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        self.entries.retain(|(present, _)| present != key);
        self.entries.push((key.to_owned(), value));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.entries.retain(|(present, _)| present != key);
        self
    }

    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], kind: TensorType) -> Self {
        let (name, shape, kind) = (name.to_owned(), shape.to_vec(), kind.id());
        self.tensors.push(Tensor {
            name,
            shape,
            kind,
            offset: None,
        });
        self
    }

    /// The whole file, data (zeros) included.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(u64::try_from(self.tensors.len()).unwrap().to_le_bytes());
        out.extend(u64::try_from(self.entries.len()).unwrap().to_le_bytes());
        for (key, value) in &self.entries {
            text(&mut out, key);
            out.extend(type_id(value.kind()).to_le_bytes());
            put(&mut out, value);
        }
        let mut end = 0_u64;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend(u32::try_from(tensor.shape.len()).unwrap().to_le_bytes());
            for dim in &tensor.shape {
                out.extend(dim.to_le_bytes());
            }
            out.extend(tensor.kind.to_le_bytes());
            let offset = tensor.offset.unwrap_or(end);
            out.extend(offset.to_le_bytes());
            let elements = tensor
                .shape
                .iter()
                .fold(1_u64, |product, dim| product.saturating_mul(*dim));
            let bytes = TensorType::from_id(tensor.kind).map_or(0, |kind| {
                (elements / kind.block_size()).saturating_mul(kind.type_size())
            });
            if bytes < 1 << 20 {
                end = (offset + bytes).max(end).next_multiple_of(self.alignment);
            }
        }
        if !self.tensors.is_empty() {
            let start = out
                .len()
                .next_multiple_of(usize::try_from(self.alignment).unwrap());
            out.resize(start + usize::try_from(end).unwrap(), 0);
        }
        out
    }
}

fn type_id(kind: ValueType) -> u32 {
    (0..13).find(|id| ValueType::from_id(*id) == Some(kind)).unwrap()
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend(u64::try_from(text.len()).unwrap().to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => text(out, v),
        Value::Array(v) => put_array(out, v),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    let (kind, elements): (ValueType, Vec<Vec<u8>>) = match array {
        Array::U8(v) => (ValueType::U8, v.iter().map(|v| vec![*v]).collect()),
        Array::I8(v) => (
            ValueType::I8,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::U16(v) => (
            ValueType::U16,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::I16(v) => (
            ValueType::I16,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::U32(v) => (
            ValueType::U32,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::I32(v) => (
            ValueType::I32,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::U64(v) => (
            ValueType::U64,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::I64(v) => (
            ValueType::I64,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::F32(v) => (
            ValueType::F32,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::F64(v) => (
            ValueType::F64,
            v.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        ),
        Array::Bool(v) => (ValueType::Bool, v.iter().map(|v| vec![u8::from(*v)]).collect()),
        Array::String(v) => (
            ValueType::String,
            v.iter().map(|v| written(|out| text(out, v))).collect(),
        ),
        Array::Array(v) => (
            ValueType::Array,
            v.iter().map(|v| written(|out| put_array(out, v))).collect(),
        ),
    };
    out.extend(type_id(kind).to_le_bytes());
    out.extend(u64::try_from(elements.len()).unwrap().to_le_bytes());
    out.extend(elements.concat());
}

fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut out);
    out
}

/// A llama of two layers with grouped heads: embedding 64, 4 heads of 16, 2 key/value heads, vocabulary 8.
pub(crate) fn llama() -> File {
    let mut file = File::default()
        .with("general.architecture", Value::String("llama".to_owned()))
        .with("general.name", Value::String("Tiny \u{7} model".to_owned()))
        .with("llama.block_count", Value::U32(2))
        .with("llama.embedding_length", Value::U32(64))
        .with("llama.context_length", Value::U32(128))
        .with("llama.feed_forward_length", Value::U32(96))
        .with("llama.attention.head_count", Value::U32(4))
        .with("llama.attention.head_count_kv", Value::U32(2))
        .with("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .with(
            "tokenizer.ggml.tokens",
            Value::Array(Array::String(
                ["<s>", "", "a", "b", "c", "é", "🦙", "z"].into_iter().collect(),
            )),
        )
        .tensor("token_embd.weight", &[64, 8], TensorType::F16);
    for layer in 0..2 {
        file = file
            .tensor(&format!("blk.{layer}.attn_norm.weight"), &[64], TensorType::F32)
            .tensor(&format!("blk.{layer}.attn_q.weight"), &[64, 64], TensorType::Q4_0)
            .tensor(&format!("blk.{layer}.attn_k.weight"), &[64, 32], TensorType::Q4_0)
            .tensor(&format!("blk.{layer}.ffn_up.weight"), &[64, 96], TensorType::Q8_0);
    }
    file.tensor("output_norm.weight", &[64], TensorType::F32)
}
