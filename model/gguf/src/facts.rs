//! What a scheduler and a user need to know about a model, derived from its header, and whether the engine can run it.
//! Owns the meaning of metadata keys; decides nothing about nodes.

use crate::error::{FactsError, FieldError, UnsupportedModel, shown};
use crate::header::Header;
use crate::tensor::TensorType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Architectures the engine has code for.
pub const ENGINE_ARCHITECTURES: &[&str] = &["llama"];

/// Tensor types the engine's CPU kernels multiply: those candle 0.11.1 loads and has a `vec_dot` for, but
/// for Q8_1, which is for activations. It refuses every `IQ*`, `TQ*`, `MXFP4` and integer type ("unknown dtype").
pub const ENGINE_TENSOR_TYPES: &[TensorType] = &[
    TensorType::F32,
    TensorType::F16,
    TensorType::Bf16,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::Q2K,
    TensorType::Q3K,
    TensorType::Q4K,
    TensorType::Q5K,
    TensorType::Q6K,
    TensorType::Q8K,
];

/// Bounds beyond which a number is taken for damage, not for a model.
const MAX_LAYERS: u32 = 1024;
const MAX_WIDTH: u32 = 1 << 20;
const MAX_HEADS: u32 = 1 << 14;
const MAX_CONTEXT: u32 = 1 << 28;

/// Facts about a model. They are hints until the digest of the file has been verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Facts {
    /// Architecture (`general.architecture`), reduced to at most 64 harmless characters.
    pub architecture: String,
    /// Name (`general.name`), at most 128 printable characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The tensor type most of the bytes have, such as `Q4_K`.
    pub quantization: TensorType,
    /// Every tensor type in the file, by id.
    pub tensor_types: Vec<TensorType>,
    /// Number of parameters (elements of all tensors).
    pub parameters: u64,
    /// Transformer blocks.
    pub layers: u32,
    /// Width of the residual stream, in elements.
    pub embedding: u32,
    /// Width of the feed-forward network, in elements (the largest of all layers).
    pub feed_forward: u32,
    /// Attention heads (the largest of all layers).
    pub heads: u32,
    /// Key/value heads of each layer; 0 for a layer without attention.
    pub kv_heads: Vec<u32>,
    /// Elements of one key.
    pub key_length: u32,
    /// Elements of one value.
    pub value_length: u32,
    /// Experts per layer; 0 for a dense model.
    pub experts: u32,
    /// Tokens of context the model was made for.
    pub context_length: u32,
    /// Tokens in the vocabulary (rows of `token_embd.weight`).
    pub vocab: u32,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Length of header and padding in bytes; the tokenizer's tables are in it.
    pub header_bytes: u64,
    /// Bytes of the tensors of each layer (`blk.N.*`).
    pub layer_bytes: Vec<u64>,
    /// Bytes of all other tensors (embedding, output, norms).
    pub other_bytes: u64,
    /// Bytes, of both sums above, in F16 and BF16 matrices. A backend without half-precision kernels doubles them.
    pub half_bytes: u64,
}

impl Facts {
    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.layer_bytes
            .iter()
            .fold(self.other_bytes, |sum, bytes| sum.saturating_add(*bytes))
    }

    /// Derives the facts of a decoder-only language model from its header.
    pub fn from_header(header: &Header) -> Result<Self, FactsError> {
        let architecture = header.str("general.architecture")?;
        let key = |name: &str| format!("{architecture}.{name}");
        let layers = bounded(header, &key("block_count"), MAX_LAYERS)?;
        let embedding = bounded(header, &key("embedding_length"), MAX_WIDTH)?;
        let context_length = bounded(header, &key("context_length"), MAX_CONTEXT)?;
        let feed_forward = largest(&per_layer(
            header,
            &key("feed_forward_length"),
            layers,
            MAX_WIDTH,
        )?);

        let head_key = key("attention.head_count");
        let head_counts = per_layer(header, &head_key, layers, MAX_HEADS)?;
        let heads = largest(&head_counts);
        if heads == 0 {
            return Err(FactsError::OutOfRange {
                key: shown(&head_key),
                value: 0,
                limit: u64::from(MAX_HEADS),
            });
        }
        let kv_heads = match per_layer(header, &key("attention.head_count_kv"), layers, MAX_HEADS) {
            Err(FactsError::Field(FieldError::Missing { .. })) => head_counts,
            found => found?,
        };
        let key_length = head_length(header, &key("attention.key_length"), embedding, heads)?;
        let value_length = head_length(header, &key("attention.value_length"), embedding, heads)?;
        let experts = header.u32_or(&key("expert_count"), 0)?;

        let embeddings = header
            .tensor("token_embd.weight")
            .ok_or(FactsError::MissingTensor {
                tensor: "token_embd.weight",
            })?;
        let rows = embeddings.shape.get(1).copied().unwrap_or(1);
        let vocab = u32::try_from(rows).map_err(|_| FactsError::OutOfRange {
            key: "token_embd.weight".to_owned(),
            value: rows,
            limit: u64::from(u32::MAX),
        })?;

        let sizes = Sizes::of(header, layers)?;
        let quantization = sizes
            .by_type
            .iter()
            .max_by_key(|(_, bytes)| **bytes)
            .map_or(TensorType::F32, |(kind, _)| *kind);
        Ok(Self {
            architecture: shown(architecture),
            name: header.str_opt("general.name")?.map(printable),
            quantization,
            tensor_types: sizes.by_type.into_keys().collect(),
            parameters: sizes.parameters,
            layers,
            embedding,
            feed_forward,
            heads,
            kv_heads,
            key_length,
            value_length,
            experts,
            context_length,
            vocab,
            file_bytes: header.file_len,
            header_bytes: header.data_offset.min(header.file_len),
            layer_bytes: sizes.layer_bytes,
            other_bytes: sizes.other_bytes,
            half_bytes: sizes.half_bytes,
        })
    }
}

/// Whether the engine of this build can run the model.
pub fn supported(facts: &Facts) -> Result<(), UnsupportedModel> {
    if !ENGINE_ARCHITECTURES.contains(&facts.architecture.as_str()) {
        return Err(UnsupportedModel::Architecture {
            architecture: facts.architecture.clone(),
            supported: ENGINE_ARCHITECTURES.join(", "),
        });
    }
    if facts.experts > 0 {
        return Err(UnsupportedModel::Experts {
            architecture: facts.architecture.clone(),
            experts: facts.experts,
        });
    }
    match facts
        .tensor_types
        .iter()
        .find(|kind| !ENGINE_TENSOR_TYPES.contains(kind))
    {
        None => Ok(()),
        Some(kind) => Err(UnsupportedModel::TensorType {
            kind: *kind,
            supported: ENGINE_TENSOR_TYPES
                .iter()
                .map(|kind| kind.name())
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}

struct Sizes {
    parameters: u64,
    layer_bytes: Vec<u64>,
    other_bytes: u64,
    half_bytes: u64,
    by_type: BTreeMap<TensorType, u64>,
}

impl Sizes {
    fn of(header: &Header, layers: u32) -> Result<Self, FactsError> {
        let mut sizes = Self {
            parameters: 0,
            layer_bytes: vec![0; usize::try_from(layers).unwrap_or(0)],
            other_bytes: 0,
            half_bytes: 0,
            by_type: BTreeMap::new(),
        };
        for tensor in &header.tensors {
            add(&mut sizes.parameters, tensor.elements())?;
            add(sizes.by_type.entry(tensor.kind).or_default(), tensor.bytes)?;
            if matches!(tensor.kind, TensorType::F16 | TensorType::Bf16) && tensor.shape.len() > 1 {
                add(&mut sizes.half_bytes, tensor.bytes)?;
            }
            let sum = match layer_of(&tensor.name) {
                None => &mut sizes.other_bytes,
                Some(layer) => usize::try_from(layer)
                    .ok()
                    .and_then(|index| sizes.layer_bytes.get_mut(index))
                    .ok_or_else(|| FactsError::LayerOutOfRange {
                        tensor: shown(&tensor.name),
                        layer,
                        layers,
                    })?,
            };
            add(sum, tensor.bytes)?;
        }
        Ok(sizes)
    }
}

fn add(sum: &mut u64, bytes: u64) -> Result<(), FactsError> {
    *sum = sum.checked_add(bytes).ok_or(FactsError::Overflow)?;
    Ok(())
}

/// The layer in a name like `blk.12.attn_q.weight`.
fn layer_of(name: &str) -> Option<u64> {
    let (layer, _) = name.strip_prefix("blk.")?.split_once('.')?;
    layer.parse().ok()
}

fn bounded(header: &Header, key: &str, limit: u32) -> Result<u32, FactsError> {
    let value = header.u32(key)?;
    if (1..=limit).contains(&value) {
        Ok(value)
    } else {
        Err(FactsError::OutOfRange {
            key: shown(key),
            value: u64::from(value),
            limit: u64::from(limit),
        })
    }
}

/// One value per layer, from one number for all or an array of exactly that many.
fn per_layer(header: &Header, key: &str, layers: u32, limit: u32) -> Result<Vec<u32>, FactsError> {
    let values = header.u32s(key)?;
    if let Some(value) = values.iter().find(|value| **value > limit) {
        let value = u64::from(*value);
        return Err(FactsError::OutOfRange {
            key: shown(key),
            value,
            limit: u64::from(limit),
        });
    }
    let wanted = usize::try_from(layers).unwrap_or(usize::MAX);
    match (values.as_slice(), header.get(key)) {
        ([one], Some(value)) if value.integer().is_some() => Ok(vec![*one; wanted]),
        (many, _) if many.len() == wanted => Ok(values),
        (many, _) => Err(FactsError::LayerArray {
            key: shown(key),
            length: many.len(),
            layers,
        }),
    }
}

fn largest(values: &[u32]) -> u32 {
    values.iter().copied().max().unwrap_or(0)
}

fn head_length(header: &Header, key: &str, embedding: u32, heads: u32) -> Result<u32, FactsError> {
    match bounded(header, key, MAX_WIDTH) {
        Err(FactsError::Field(FieldError::Missing { .. })) if embedding.is_multiple_of(heads) => {
            Ok(embedding / heads)
        }
        Err(FactsError::Field(FieldError::Missing { .. })) => Err(FactsError::HeadLength {
            embedding,
            heads,
            key: shown(key),
        }),
        found => found,
    }
}

fn printable(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(128).collect()
}
