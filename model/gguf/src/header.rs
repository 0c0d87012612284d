//! The header of a GGUF file: metadata and tensor list, checked as a whole. Owns the rules of the format; the reader
//! owns lengths and budgets, [`crate::Facts`] owns what the fields mean.

use crate::error::{FieldError, GgufError, shown};
use crate::limits::Limits;
use crate::reader::Reader;
use crate::tensor::{TensorInfo, TensorType};
use crate::value::{Array, StringArray, Value};
use std::collections::{BTreeMap, HashSet};
use std::io::{BufReader, Read};

const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_RANK: u32 = 4;
/// Fewest bytes of a metadata entry: key length, type, one-byte value.
const MIN_ENTRY_BYTES: u64 = 13;
/// Fewest bytes of a tensor entry: name length, rank, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 32;

/// A header that passed every check: whatever it says about sizes and places is true of a file of the stated length.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Alignment of tensor data in bytes, a power of two.
    pub alignment: u64,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the order of the file; they are aligned, inside the file and disjoint.
    pub tensors: Vec<TensorInfo>,
    /// Where tensor data start, in bytes from the start of the file.
    pub data_offset: u64,
    /// Length of the file in bytes, as it was given to the parser.
    pub file_len: u64,
}

/// Reads a header from `source`, which stands at the start of a file of `file_len` bytes. Reads ahead by at most 64 KiB
/// and holds no more memory than the [`Limits`] allow.
pub fn parse_from(source: &mut impl Read, file_len: u64, limits: &Limits) -> Result<Header, GgufError> {
    let mut source = BufReader::with_capacity(64 << 10, source);
    let mut reader = Reader::new(&mut source, file_len, limits);

    let magic = reader.u32()?;
    if magic != MAGIC {
        return Err(GgufError::NotGguf { magic });
    }
    let version = reader.u32()?;
    if matches!(version.swap_bytes(), 1..=3) {
        return Err(GgufError::BigEndian);
    }
    if !matches!(version, 2 | 3) {
        return Err(GgufError::UnsupportedVersion { version });
    }
    let tensor_count = reader.u64()?;
    if tensor_count > limits.tensors {
        return Err(GgufError::TooManyTensors {
            count: tensor_count,
            limit: limits.tensors,
        });
    }
    let entry_count = reader.u64()?;
    if entry_count > limits.metadata_entries {
        return Err(GgufError::TooManyEntries {
            count: entry_count,
            limit: limits.metadata_entries,
        });
    }
    let least = tensor_count
        .saturating_mul(MIN_TENSOR_BYTES)
        .saturating_add(entry_count.saturating_mul(MIN_ENTRY_BYTES))
        .saturating_add(reader.position());
    if least > file_len {
        return Err(GgufError::Truncated {
            needed: least,
            have: file_len,
        });
    }

    let metadata = metadata(&mut reader, entry_count, limits)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = tensors(&mut reader, tensor_count, alignment, limits)?;
    let end = reader.position();
    let data_offset = end
        .checked_next_multiple_of(alignment)
        .ok_or(GgufError::InvalidAlignment { alignment })?;
    place(&mut tensors, data_offset, file_len)?;
    Ok(Header {
        version,
        alignment,
        metadata,
        tensors,
        data_offset,
        file_len,
    })
}

fn metadata<R: Read>(
    reader: &mut Reader<'_, R>,
    count: u64,
    limits: &Limits,
) -> Result<BTreeMap<String, Value>, GgufError> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let offset = reader.position();
        let key = reader.text("key", limits.key_bytes)?.to_owned();
        if metadata.contains_key(&key) {
            return Err(GgufError::DuplicateKey {
                key: shown(&key),
                offset,
            });
        }
        let value = reader.value()?;
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::U32(value)) => u64::from(*value),
        Some(other) => return Err(GgufError::AlignmentType { found: other.kind() }),
    };
    if alignment.is_power_of_two() {
        Ok(alignment)
    } else {
        Err(GgufError::InvalidAlignment { alignment })
    }
}

/// Reads the tensor list; offsets are still relative to the data section.
fn tensors<R: Read>(
    reader: &mut Reader<'_, R>,
    count: u64,
    alignment: u64,
    limits: &Limits,
) -> Result<Vec<TensorInfo>, GgufError> {
    let mut names = HashSet::new();
    let mut tensors = Vec::new();
    for _ in 0..count {
        let start = reader.position();
        let name = reader.text("tensor name", limits.tensor_name_bytes)?.to_owned();
        let tensor = || shown(&name);
        if !names.insert(name.clone()) {
            return Err(GgufError::DuplicateTensor {
                tensor: tensor(),
                offset: start,
            });
        }
        let rank = reader.u32()?;
        if rank == 0 || rank > MAX_RANK {
            return Err(GgufError::InvalidRank {
                tensor: tensor(),
                rank,
                limit: MAX_RANK,
            });
        }
        let mut shape = Vec::with_capacity(4);
        for index in 0..rank {
            let dim = reader.u64()?;
            if dim == 0 {
                let index = usize::try_from(index).unwrap_or(0);
                return Err(GgufError::ZeroDimension {
                    tensor: tensor(),
                    index,
                });
            }
            shape.push(dim);
        }
        let id = reader.u32()?;
        let kind =
            TensorType::from_id(id).ok_or_else(|| GgufError::UnknownTensorType { tensor: tensor(), id })?;
        let bytes = tensor_bytes(&shape, kind, tensor)?;
        let offset = reader.u64()?;
        if !offset.is_multiple_of(alignment) {
            return Err(GgufError::Misaligned {
                tensor: tensor(),
                offset,
                alignment,
            });
        }
        tensors.push(TensorInfo {
            name,
            shape,
            kind,
            offset,
            bytes,
        });
    }
    Ok(tensors)
}

fn tensor_bytes(shape: &[u64], kind: TensorType, tensor: impl Fn() -> String) -> Result<u64, GgufError> {
    let row = shape.first().copied().unwrap_or(0);
    let block = kind.block_size();
    if !row.is_multiple_of(block) {
        return Err(GgufError::PartialBlock {
            tensor: tensor(),
            row,
            kind,
            block,
        });
    }
    // Elements are checked too, not only bytes: users of the shape multiply it out.
    let overflow = || GgufError::SizeOverflow { tensor: tensor() };
    let elements = shape
        .iter()
        .try_fold(1_u64, |product, dim| product.checked_mul(*dim))
        .ok_or_else(overflow)?;
    (elements / block)
        .checked_mul(kind.type_size())
        .ok_or_else(overflow)
}

/// Makes offsets absolute and refuses tensors beyond the end of the file or on top of each other.
fn place(tensors: &mut [TensorInfo], data_offset: u64, file_len: u64) -> Result<(), GgufError> {
    for tensor in tensors.iter_mut() {
        let start = data_offset.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(tensor.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => tensor.offset = start,
            _ => {
                return Err(GgufError::OutsideFile {
                    tensor: shown(&tensor.name),
                    offset: tensor.offset,
                    bytes: tensor.bytes,
                    file_len,
                });
            }
        }
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_unstable_by_key(|tensor| tensor.offset);
    for pair in by_offset.windows(2) {
        if let [first, second] = pair
            && first.offset.saturating_add(first.bytes) > second.offset
        {
            return Err(GgufError::Overlap {
                first: shown(&first.name),
                second: shown(&second.name),
                offset: second.offset,
            });
        }
    }
    Ok(())
}

impl Header {
    /// Parses the header in `bytes`, the first bytes of a file of `file_len` bytes. A prefix that is too short gives
    /// [`GgufError::Truncated`] with the number of bytes to try next.
    pub fn parse(mut bytes: &[u8], file_len: u64, limits: &Limits) -> Result<Self, GgufError> {
        parse_from(&mut bytes, file_len, limits)
    }

    /// The value under `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    fn required(&self, key: &str) -> Result<&Value, FieldError> {
        self.get(key)
            .ok_or_else(|| FieldError::Missing { key: shown(key) })
    }

    /// An unsigned integer stored with any integer type.
    pub fn u64(&self, key: &str) -> Result<u64, FieldError> {
        let value = self.required(key)?;
        let integer = value.integer().ok_or_else(|| wrong(key, "an integer", value))?;
        u64::try_from(integer).map_err(|_| FieldError::OutOfRange {
            key: shown(key),
            value: integer,
            limit: u64::MAX,
        })
    }

    /// An unsigned integer of at most 32 bits, stored with any integer type.
    pub fn u32(&self, key: &str) -> Result<u32, FieldError> {
        let value = self.required(key)?;
        let integer = value.integer().ok_or_else(|| wrong(key, "an integer", value))?;
        narrow(key, integer)
    }

    /// Like [`Header::u32`], or `default` when the key is missing.
    pub fn u32_or(&self, key: &str, default: u32) -> Result<u32, FieldError> {
        if self.get(key).is_some() {
            self.u32(key)
        } else {
            Ok(default)
        }
    }

    /// A 32-bit float.
    pub fn f32(&self, key: &str) -> Result<f32, FieldError> {
        match self.required(key)? {
            Value::F32(value) => Ok(*value),
            other => Err(wrong(key, "f32", other)),
        }
    }

    /// Like [`Header::f32`], or `default` when the key is missing.
    pub fn f32_or(&self, key: &str, default: f32) -> Result<f32, FieldError> {
        if self.get(key).is_some() {
            self.f32(key)
        } else {
            Ok(default)
        }
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<bool, FieldError> {
        match self.required(key)? {
            Value::Bool(value) => Ok(*value),
            other => Err(wrong(key, "bool", other)),
        }
    }

    /// Like [`Header::bool`], or `default` when the key is missing.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, FieldError> {
        if self.get(key).is_some() {
            self.bool(key)
        } else {
            Ok(default)
        }
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str, FieldError> {
        match self.required(key)? {
            Value::String(value) => Ok(value),
            other => Err(wrong(key, "string", other)),
        }
    }

    /// Like [`Header::str`], `None` when the key is missing.
    pub fn str_opt(&self, key: &str) -> Result<Option<&str>, FieldError> {
        if self.get(key).is_some() {
            self.str(key).map(Some)
        } else {
            Ok(None)
        }
    }

    /// An array of strings (tokens, merges).
    pub fn strings(&self, key: &str) -> Result<&StringArray, FieldError> {
        match self.required(key)? {
            Value::Array(Array::String(value)) => Ok(value),
            other => Err(wrong(key, "an array of strings", other)),
        }
    }

    /// An array of 32-bit floats (scores).
    pub fn f32s(&self, key: &str) -> Result<&[f32], FieldError> {
        match self.required(key)? {
            Value::Array(Array::F32(value)) => Ok(value),
            other => Err(wrong(key, "an array of f32", other)),
        }
    }

    /// An array of 32-bit signed integers (token types).
    pub fn i32s(&self, key: &str) -> Result<&[i32], FieldError> {
        match self.required(key)? {
            Value::Array(Array::I32(value)) => Ok(value),
            other => Err(wrong(key, "an array of i32", other)),
        }
    }

    /// A number per layer: an array as it is, or one integer for all (then one element is returned).
    pub fn u32s(&self, key: &str) -> Result<Vec<u32>, FieldError> {
        let value = self.required(key)?;
        let integers = match value {
            Value::Array(array) => array.integers(),
            other => other.integer().map(|integer| vec![integer]),
        };
        let integers = integers.ok_or_else(|| wrong(key, "an integer or an array of integers", value))?;
        integers.into_iter().map(|integer| narrow(key, integer)).collect()
    }
}

fn narrow(key: &str, integer: i128) -> Result<u32, FieldError> {
    u32::try_from(integer).map_err(|_| FieldError::OutOfRange {
        key: shown(key),
        value: integer,
        limit: u64::from(u32::MAX),
    })
}

fn wrong(key: &str, expected: &'static str, found: &Value) -> FieldError {
    FieldError::WrongType {
        key: shown(key),
        expected,
        found: found.kind(),
    }
}
