//! How large a header may be. Owns the numbers only; the parser applies them.

/// Upper bounds on what a header may contain. A file beyond any of them is refused before memory is set aside for it.
///
/// Memory used while parsing stays below about four times [`Limits::header_bytes`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes from the start of the file to the end of the tensor list.
    pub header_bytes: u64,
    /// Metadata entries.
    pub metadata_entries: u64,
    /// Tensors.
    pub tensors: u64,
    /// Bytes of one metadata key.
    pub key_bytes: u64,
    /// Bytes of one tensor name.
    pub tensor_name_bytes: u64,
    /// Bytes of one string value (a chat template, one token).
    pub string_bytes: u64,
    /// Elements of one array.
    pub array_elements: u64,
    /// Nesting of arrays; 1 is an array of plain values.
    pub array_depth: u32,
}

impl Default for Limits {
    /// Several times what the largest published models need (vocabularies of 256 Ki tokens with merges take about
    /// 20 MiB of header; the largest tensor lists hold a few thousand entries).
    fn default() -> Self {
        Self {
            header_bytes: 128 << 20,
            metadata_entries: 4096,
            tensors: 65_536,
            key_bytes: 1024,
            tensor_name_bytes: 256,
            string_bytes: 4 << 20,
            array_elements: 4 << 20,
            array_depth: 3,
        }
    }
}
