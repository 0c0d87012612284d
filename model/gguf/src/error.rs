//! One enum per step: parsing, reading a field, deriving facts, judging support, estimating.
//!
//! Messages carry values, limits and offsets. They never repeat content of the file beyond a short name reduced to
//! harmless characters, because they end up in conditions and logs.

use crate::{TensorType, ValueType};

/// Why a header was refused.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The bytes end before the header does.
    #[error("truncated: {needed} bytes are needed and {have} are there")]
    Truncated {
        /// Bytes needed, counted from the start of the file.
        needed: u64,
        /// Bytes there are, counted from the start of the file.
        have: u64,
    },
    /// The file does not start with `GGUF`.
    #[error("not a GGUF file: it starts with {magic:#010x}")]
    NotGguf {
        /// First four bytes, read little endian.
        magic: u32,
    },
    /// Version other than 2 or 3.
    #[error("GGUF version {version} is not supported; versions 2 and 3 are")]
    UnsupportedVersion {
        /// Version found.
        version: u32,
    },
    /// A file for machines of the other byte order.
    #[error("the file is big endian; only little-endian GGUF is supported")]
    BigEndian,
    /// More metadata entries than the limit.
    #[error("{count} metadata entries exceed the limit of {limit}")]
    TooManyEntries {
        /// Entries announced.
        count: u64,
        /// Limit.
        limit: u64,
    },
    /// More tensors than the limit.
    #[error("{count} tensors exceed the limit of {limit}")]
    TooManyTensors {
        /// Tensors announced.
        count: u64,
        /// Limit.
        limit: u64,
    },
    /// The header as a whole is longer than the limit.
    #[error("the header needs {needed} bytes at offset {offset}; the limit is {limit}")]
    HeaderTooLong {
        /// Bytes needed, counted from the start of the file.
        needed: u64,
        /// Limit.
        limit: u64,
        /// Where the element starts that goes beyond it.
        offset: u64,
    },
    /// One key, name or string is longer than the limit.
    #[error("{what} of {length} bytes at offset {offset} exceeds the limit of {limit}")]
    TextTooLong {
        /// "key", "tensor name" or "string".
        what: &'static str,
        /// Length announced, in bytes.
        length: u64,
        /// Limit.
        limit: u64,
        /// Where it starts.
        offset: u64,
    },
    /// A text that is not UTF-8.
    #[error("{what} at offset {offset} is not UTF-8")]
    NotUtf8 {
        /// "key", "tensor name" or "string".
        what: &'static str,
        /// Where it starts.
        offset: u64,
    },
    /// An array longer than the limit.
    #[error("array of {length} elements at offset {offset} exceeds the limit of {limit}")]
    ArrayTooLong {
        /// Elements announced.
        length: u64,
        /// Limit.
        limit: u64,
        /// Where it starts.
        offset: u64,
    },
    /// Arrays nested deeper than the limit.
    #[error("arrays nested {depth} deep at offset {offset} exceed the limit of {limit}")]
    ArrayTooDeep {
        /// Depth reached.
        depth: u32,
        /// Limit.
        limit: u32,
        /// Where the innermost starts.
        offset: u64,
    },
    /// A metadata type this version of the format does not have.
    #[error("unknown metadata type {id} at offset {offset}")]
    UnknownValueType {
        /// Number found.
        id: u32,
        /// Where.
        offset: u64,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("boolean {value} at offset {offset} is neither 0 nor 1")]
    InvalidBool {
        /// Byte found.
        value: u8,
        /// Where.
        offset: u64,
    },
    /// The same key twice.
    #[error("metadata key {key} appears twice (offset {offset})")]
    DuplicateKey {
        /// Sanitised key.
        key: String,
        /// Where the second one starts.
        offset: u64,
    },
    /// `general.alignment` is not an unsigned 32-bit number.
    #[error("general.alignment is {found}, not u32")]
    AlignmentType {
        /// Type found.
        found: ValueType,
    },
    /// `general.alignment` is zero or not a power of two.
    #[error("general.alignment {alignment} is not a power of two")]
    InvalidAlignment {
        /// Value found.
        alignment: u64,
    },
    /// The same tensor twice.
    #[error("tensor {tensor} appears twice (offset {offset})")]
    DuplicateTensor {
        /// Sanitised name.
        tensor: String,
        /// Where the second one starts.
        offset: u64,
    },
    /// A tensor without dimensions or with more than four.
    #[error("tensor {tensor} has {rank} dimensions; 1 to {limit} are possible")]
    InvalidRank {
        /// Sanitised name.
        tensor: String,
        /// Dimensions announced.
        rank: u32,
        /// Most there may be.
        limit: u32,
    },
    /// A dimension of zero.
    #[error("tensor {tensor} has dimension {index} equal to 0")]
    ZeroDimension {
        /// Sanitised name.
        tensor: String,
        /// Which dimension, ggml order.
        index: usize,
    },
    /// The number of elements or bytes does not fit 64 bits.
    #[error("the size of tensor {tensor} overflows")]
    SizeOverflow {
        /// Sanitised name.
        tensor: String,
    },
    /// A tensor type this crate does not know.
    #[error("tensor {tensor} has unknown type {id}")]
    UnknownTensorType {
        /// Sanitised name.
        tensor: String,
        /// Number found.
        id: u32,
    },
    /// Rows that are not whole blocks.
    #[error("tensor {tensor}: rows of {row} elements are not whole {kind} blocks of {block}")]
    PartialBlock {
        /// Sanitised name.
        tensor: String,
        /// Row length (`shape[0]`).
        row: u64,
        /// Type.
        kind: TensorType,
        /// Block size in elements.
        block: u64,
    },
    /// A tensor offset that is not aligned.
    #[error("tensor {tensor}: offset {offset} is not a multiple of {alignment}")]
    Misaligned {
        /// Sanitised name.
        tensor: String,
        /// Offset within the data section.
        offset: u64,
        /// Alignment of the file.
        alignment: u64,
    },
    /// A tensor whose bytes are not all in the file.
    #[error("tensor {tensor}: {bytes} bytes at offset {offset} end beyond the file of {file_len}")]
    OutsideFile {
        /// Sanitised name.
        tensor: String,
        /// Offset within the data section.
        offset: u64,
        /// Size in bytes.
        bytes: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first} and {second} overlap at offset {offset}")]
    Overlap {
        /// Sanitised name of the one that starts first.
        first: String,
        /// Sanitised name of the other.
        second: String,
        /// Absolute offset of the second.
        offset: u64,
    },
    /// The source could not be read.
    #[error("reading the header at offset {offset}")]
    Io {
        /// Where.
        offset: u64,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

/// Why a metadata field could not be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// The key is not there.
    #[error("metadata key {key} is missing")]
    Missing {
        /// Key asked for.
        key: String,
    },
    /// The key has another type.
    #[error("metadata key {key} is {found}, not {expected}")]
    WrongType {
        /// Key asked for.
        key: String,
        /// What was asked for.
        expected: &'static str,
        /// What is there.
        found: ValueType,
    },
    /// An integer that does not fit the type asked for.
    #[error("metadata key {key}: {value} is not within 0..={limit}")]
    OutOfRange {
        /// Key asked for.
        key: String,
        /// Value found.
        value: i128,
        /// Largest value that would do.
        limit: u64,
    },
}

/// Why no facts could be derived from a header that parsed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FactsError {
    /// A field is missing or has the wrong type.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// A field that must lie within bounds does not.
    #[error("metadata key {key}: {value} is not within 1..={limit}")]
    OutOfRange {
        /// Key.
        key: String,
        /// Value found.
        value: u64,
        /// Largest value that would do.
        limit: u64,
    },
    /// A per-layer array of the wrong length.
    #[error("metadata key {key} has {length} elements for {layers} layers")]
    LayerArray {
        /// Key.
        key: String,
        /// Elements found.
        length: usize,
        /// Layers announced.
        layers: u32,
    },
    /// The head length is not stated and cannot be derived.
    #[error("embedding length {embedding} is not a multiple of {heads} heads and {key} is missing")]
    HeadLength {
        /// Embedding length.
        embedding: u32,
        /// Attention heads.
        heads: u32,
        /// The key that would state it.
        key: String,
    },
    /// A tensor the facts rest on is missing.
    #[error("tensor {tensor} is missing")]
    MissingTensor {
        /// Name looked for.
        tensor: &'static str,
    },
    /// A block tensor of a layer that does not exist.
    #[error("tensor {tensor} belongs to layer {layer} of {layers}")]
    LayerOutOfRange {
        /// Sanitised name.
        tensor: String,
        /// Layer in its name.
        layer: u64,
        /// Layers announced.
        layers: u32,
    },
    /// Sums beyond 64 bits.
    #[error("the sizes of the tensors add up to more than 64 bits")]
    Overflow,
}

/// Why the engine cannot run a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnsupportedModel {
    /// The engine has no code for the architecture.
    #[error("architecture {architecture} is not supported; supported: {supported}")]
    Architecture {
        /// Architecture of the model.
        architecture: String,
        /// Comma-separated list of those supported.
        supported: String,
    },
    /// The engine has no kernel for a tensor type.
    #[error("tensor type {kind} is not supported; supported: {supported}")]
    TensorType {
        /// Type found.
        kind: TensorType,
        /// Comma-separated list of those supported.
        supported: String,
    },
    /// A mixture of experts.
    #[error("mixture-of-experts models ({experts} experts) of architecture {architecture} are not supported")]
    Experts {
        /// Architecture of the model.
        architecture: String,
        /// Experts per layer.
        experts: u32,
    },
}

/// Why no estimate could be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EstimateError {
    /// Nothing can run with no context or no sequence.
    #[error("{what} must be at least 1")]
    Zero {
        /// Which number.
        what: &'static str,
    },
    /// More context than the model was trained for.
    #[error("{context_tokens} tokens of context exceed the model's {limit}")]
    ContextTooLong {
        /// Tokens asked for.
        context_tokens: u32,
        /// Context length of the model.
        limit: u32,
    },
    /// A sum or product beyond 64 bits.
    #[error("the estimate of {what} overflows")]
    Overflow {
        /// Which part.
        what: &'static str,
    },
}

/// Reduces text of a file to a short, harmless name: at most 64 characters of `[A-Za-z0-9._-]`, others become `?`.
pub(crate) fn shown(text: &str) -> String {
    text.chars()
        .take(64)
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') {
                c
            } else {
                '?'
            }
        })
        .collect()
}
