//! A small GGUF v3 writer. It writes what it is told, sound or not: hostile-file tests use it too.

use std::io::{self, Write};

use crate::quant::TensorType;

/// Where tensor data starts and each tensor begins is a multiple of this.
pub const ALIGNMENT: usize = 32;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Type 0.
    U8(u8),
    /// Type 1.
    I8(i8),
    /// Type 2.
    U16(u16),
    /// Type 3.
    I16(i16),
    /// Type 4.
    U32(u32),
    /// Type 5.
    I32(i32),
    /// Type 6.
    F32(f32),
    /// Type 7.
    Bool(bool),
    /// Type 8.
    String(String),
    /// Type 9: the element type's number, then the elements. The type is kept apart because an empty array has one
    /// too, and readers insist that it is right.
    Array(u32, Vec<Value>),
    /// Type 10.
    U64(u64),
    /// Type 11.
    I64(i64),
    /// Type 12.
    F64(f64),
}

impl Value {
    /// An array of strings.
    pub fn strings<S: Into<String>>(list: impl IntoIterator<Item = S>) -> Self {
        Self::Array(
            8,
            list.into_iter().map(|text| Self::String(text.into())).collect(),
        )
    }

    /// An array of signed 32-bit numbers.
    pub fn i32s(list: impl IntoIterator<Item = i32>) -> Self {
        Self::Array(5, list.into_iter().map(Self::I32).collect())
    }

    /// The type's number in the file.
    pub const fn type_id(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(..) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(x) => out.push(*x),
            Self::I8(x) => out.extend(x.to_le_bytes()),
            Self::U16(x) => out.extend(x.to_le_bytes()),
            Self::I16(x) => out.extend(x.to_le_bytes()),
            Self::U32(x) => out.extend(x.to_le_bytes()),
            Self::I32(x) => out.extend(x.to_le_bytes()),
            Self::F32(x) => out.extend(x.to_le_bytes()),
            Self::Bool(x) => out.push(u8::from(*x)),
            Self::String(x) => put_string(x, out),
            Self::Array(kind, list) => {
                out.extend(kind.to_le_bytes());
                out.extend(length(list.len()));
                for value in list {
                    value.put(out);
                }
            }
            Self::U64(x) => out.extend(x.to_le_bytes()),
            Self::I64(x) => out.extend(x.to_le_bytes()),
            Self::F64(x) => out.extend(x.to_le_bytes()),
        }
    }
}

macro_rules! value_from {
    ($($variant:ident: $kind:ty),*) => {
        $(impl From<$kind> for Value {
            fn from(x: $kind) -> Self {
                Self::$variant(x)
            }
        })*
    };
}
value_from!(U32: u32, U64: u64, F32: f32, Bool: bool, String: String);

impl From<&str> for Value {
    fn from(x: &str) -> Self {
        Self::String(x.to_owned())
    }
}

/// What the file says about one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dimensions in ggml's order: the length of a row first.
    pub dims: Vec<u64>,
    /// The format's number in the file.
    pub type_id: u32,
    /// Where its data starts, from the start of all tensor data.
    pub offset: u64,
}

/// Everything before the tensor data. All fields are open, so that a test can make any one of them wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// `GGUF` in a sound file.
    pub magic: [u8; 4],
    /// 3 in a sound file.
    pub version: u32,
    /// The number of tensors the file claims; their true number when none.
    pub claimed_tensors: Option<u64>,
    /// The number of metadata entries the file claims; their true number when none.
    pub claimed_metadata: Option<u64>,
    /// Keys and values in order.
    pub metadata: Vec<(String, Value)>,
    /// The tensors in order.
    pub tensors: Vec<TensorInfo>,
}

impl Default for Header {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            claimed_tensors: None,
            claimed_metadata: None,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

impl Header {
    /// Adds a metadata entry.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.push((key.to_owned(), value.into()));
    }

    /// Adds a tensor behind those before it and returns its size in bytes. `dims` starts with the length of a row.
    pub fn add_tensor(&mut self, name: &str, dims: &[usize], kind: TensorType) -> usize {
        let end = self
            .tensors
            .last()
            .map_or(0, |last| last.offset + last.padded_bytes());
        let info = TensorInfo {
            name: name.to_owned(),
            dims: dims.iter().map(|dim| wide(*dim)).collect(),
            type_id: kind.id(),
            offset: end,
        };
        let bytes = info.bytes();
        self.tensors.push(info);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// The header's bytes, padded so that tensor data may follow.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(
            self.claimed_tensors
                .unwrap_or(wide(self.tensors.len()))
                .to_le_bytes(),
        );
        out.extend(
            self.claimed_metadata
                .unwrap_or(wide(self.metadata.len()))
                .to_le_bytes(),
        );
        for (key, value) in &self.metadata {
            put_string(key, &mut out);
            out.extend(value.type_id().to_le_bytes());
            value.put(&mut out);
        }
        for tensor in &self.tensors {
            put_string(&tensor.name, &mut out);
            out.extend(u32::try_from(tensor.dims.len()).unwrap_or(u32::MAX).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(tensor.type_id.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }
}

impl TensorInfo {
    /// The data's size, or 0 for a type this crate does not write.
    pub fn bytes(&self) -> u64 {
        let kind = TensorType::ALL.into_iter().find(|kind| kind.id() == self.type_id);
        let weights = self
            .dims
            .iter()
            .fold(1_u64, |product, dim| product.saturating_mul(*dim));
        kind.map_or(0, |kind| {
            weights
                .div_ceil(wide(kind.block_len()))
                .saturating_mul(wide(kind.block_bytes()))
        })
    }

    fn padded_bytes(&self) -> u64 {
        self.bytes().next_multiple_of(wide(ALIGNMENT))
    }
}

/// Writes one tensor's data and the padding behind it.
pub fn write_tensor(out: &mut impl Write, data: &[u8]) -> io::Result<()> {
    out.write_all(data)?;
    write_padding(out, data.len())
}

/// Writes the padding behind `written` bytes of one tensor's data.
pub fn write_padding(out: &mut impl Write, written: usize) -> io::Result<()> {
    let padding = written.next_multiple_of(ALIGNMENT) - written;
    out.write_all([0; ALIGNMENT].split_at(padding).0)
}

/// A whole file in memory: header, then the tensors' data in the same order.
pub fn file<'a>(header: &Header, data: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out = header.to_bytes();
    for tensor in data {
        out.extend(tensor);
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    }
    out
}

fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

fn length(count: usize) -> [u8; 8] {
    wide(count).to_le_bytes()
}

fn put_string(text: &str, out: &mut Vec<u8>) {
    out.extend(length(text.len()));
    out.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Reader<'a>(&'a [u8], usize);

    impl Reader<'_> {
        fn take<const N: usize>(&mut self) -> [u8; N] {
            let bytes = self.0[self.1..self.1 + N].try_into().unwrap();
            self.1 += N;
            bytes
        }

        fn u32(&mut self) -> u32 {
            u32::from_le_bytes(self.take())
        }

        fn u64(&mut self) -> u64 {
            u64::from_le_bytes(self.take())
        }

        fn string(&mut self) -> String {
            let length = usize::try_from(self.u64()).unwrap();
            self.1 += length;
            String::from_utf8(self.0[self.1 - length..self.1].to_vec()).unwrap()
        }
    }

    #[test]
    fn a_written_file_reads_back_by_the_letter_of_the_format() {
        let mut header = Header::default();
        header.set("general.architecture", "llama");
        header.set("a.number", 7_u32);
        header.set("a.list", Value::strings(["x", "yz"]));
        header.set("an.empty.list", Value::strings(Vec::<String>::new()));
        let first = vec![1_u8; header.add_tensor("one", &[3], TensorType::F32)];
        let second = vec![2_u8; header.add_tensor("two", &[32, 2], TensorType::Q8_0)];
        let bytes = file(&header, [&first[..], &second[..]]);

        let mut reader = Reader(&bytes, 0);
        assert_eq!(&reader.take::<4>(), b"GGUF");
        assert_eq!((reader.u32(), reader.u64(), reader.u64()), (3, 2, 4));
        assert_eq!(
            (reader.string().as_str(), reader.u32()),
            ("general.architecture", 8)
        );
        assert_eq!(reader.string(), "llama");
        assert_eq!(
            (reader.string().as_str(), reader.u32(), reader.u32()),
            ("a.number", 4, 7)
        );
        assert_eq!((reader.string().as_str(), reader.u32()), ("a.list", 9));
        assert_eq!((reader.u32(), reader.u64()), (8, 2));
        assert_eq!((reader.string().as_str(), reader.string().as_str()), ("x", "yz"));
        assert_eq!((reader.string().as_str(), reader.u32()), ("an.empty.list", 9));
        assert_eq!(
            (reader.u32(), reader.u64()),
            (8, 0),
            "an empty array keeps its element type"
        );
        assert_eq!(
            (reader.string().as_str(), reader.u32(), reader.u64()),
            ("one", 1, 3)
        );
        assert_eq!((reader.u32(), reader.u64()), (0, 0));
        assert_eq!((reader.string().as_str(), reader.u32()), ("two", 2));
        assert_eq!(
            (reader.u64(), reader.u64(), reader.u32(), reader.u64()),
            (32, 2, 8, 32)
        );
        let start = reader.1.next_multiple_of(ALIGNMENT);
        assert_eq!(bytes[start..start + 12], [1; 12]);
        assert_eq!(bytes[start + 32..start + 32 + 68], [2; 68]);
        assert_eq!(bytes.len(), start + 32 + 96, "the last tensor is padded too");
    }

    #[test]
    fn a_header_can_claim_what_is_not_there() {
        let header = Header {
            claimed_tensors: Some(u64::MAX),
            version: 99,
            ..Header::default()
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[4..8], 99_u32.to_le_bytes());
        assert_eq!(bytes[8..16], [0xff; 8]);
    }

    #[test]
    fn streamed_and_collected_tensors_give_the_same_bytes() {
        let mut header = Header::default();
        let data = vec![5_u8; header.add_tensor("t", &[5], TensorType::F16)];
        let mut streamed = header.to_bytes();
        write_tensor(&mut streamed, &data).unwrap();
        assert_eq!(streamed, file(&header, [&data[..]]));
    }
}
