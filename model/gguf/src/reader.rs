//! Reads primitive values with every length checked first. Owns the position, the budget and the growth of buffers;
//! knows nothing about what the values mean.

use crate::error::GgufError;
use crate::limits::Limits;
use crate::value::{Array, StringArray, Value, ValueType};
use std::io::Read;

/// Buffers grow by what has really arrived, this many bytes at a time, whatever length the file announces.
const CHUNK: u64 = 64 << 10;

pub(crate) struct Reader<'a, R> {
    source: &'a mut R,
    limits: &'a Limits,
    file_len: u64,
    position: u64,
    scratch: Vec<u8>,
}

macro_rules! numbers {
    ($($name:ident: $type:ty),*) => {
        $(
            pub(crate) fn $name(&mut self) -> Result<$type, GgufError> {
                self.array().map(<$type>::from_le_bytes)
            }
        )*
    };
}

impl<'a, R: Read> Reader<'a, R> {
    pub(crate) fn new(source: &'a mut R, file_len: u64, limits: &'a Limits) -> Self {
        Self {
            source,
            limits,
            file_len,
            position: 0,
            scratch: Vec::new(),
        }
    }

    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    numbers!(u8: u8, i8: i8, u16: u16, i16: i16, u32: u32, i32: i32, u64: u64, i64: i64, f32: f32, f64: f64);

    fn bool(&mut self) -> Result<bool, GgufError> {
        let offset = self.position;
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(GgufError::InvalidBool { value, offset }),
        }
    }

    /// Text of at most `limit` bytes, preceded by its length. It lives until the next read.
    pub(crate) fn text(&mut self, what: &'static str, limit: u64) -> Result<&str, GgufError> {
        let offset = self.position;
        let length = self.u64()?;
        if length > limit {
            return Err(GgufError::TextTooLong {
                what,
                length,
                limit,
                offset,
            });
        }
        self.expect(length)?;
        self.scratch.clear();
        (&mut *self.source)
            .take(length)
            .read_to_end(&mut self.scratch)
            .map_err(|source| GgufError::Io {
                offset: self.position,
                source,
            })?;
        let arrived = u64::try_from(self.scratch.len()).unwrap_or(u64::MAX);
        if arrived < length {
            return Err(self.truncated(length, arrived));
        }
        self.position = self.position.saturating_add(length);
        std::str::from_utf8(&self.scratch).map_err(|_| GgufError::NotUtf8 { what, offset })
    }

    /// One metadata value, preceded by its type.
    pub(crate) fn value(&mut self) -> Result<Value, GgufError> {
        Ok(match self.value_type()? {
            ValueType::U8 => Value::U8(self.u8()?),
            ValueType::I8 => Value::I8(self.i8()?),
            ValueType::U16 => Value::U16(self.u16()?),
            ValueType::I16 => Value::I16(self.i16()?),
            ValueType::U32 => Value::U32(self.u32()?),
            ValueType::I32 => Value::I32(self.i32()?),
            ValueType::U64 => Value::U64(self.u64()?),
            ValueType::I64 => Value::I64(self.i64()?),
            ValueType::F32 => Value::F32(self.f32()?),
            ValueType::F64 => Value::F64(self.f64()?),
            ValueType::Bool => Value::Bool(self.bool()?),
            ValueType::String => Value::String(self.text("string", self.limits.string_bytes)?.to_owned()),
            ValueType::Array => Value::Array(self.elements(1)?),
        })
    }

    fn elements(&mut self, depth: u32) -> Result<Array, GgufError> {
        let offset = self.position;
        if depth > self.limits.array_depth {
            return Err(GgufError::ArrayTooDeep {
                depth,
                limit: self.limits.array_depth,
                offset,
            });
        }
        let kind = self.value_type()?;
        let length = self.u64()?;
        if length > self.limits.array_elements {
            return Err(GgufError::ArrayTooLong {
                length,
                limit: self.limits.array_elements,
                offset,
            });
        }
        self.expect(length.saturating_mul(kind.min_bytes()))?;
        Ok(match kind {
            ValueType::U8 => Array::U8(self.many(length, Self::u8)?),
            ValueType::I8 => Array::I8(self.many(length, Self::i8)?),
            ValueType::U16 => Array::U16(self.many(length, Self::u16)?),
            ValueType::I16 => Array::I16(self.many(length, Self::i16)?),
            ValueType::U32 => Array::U32(self.many(length, Self::u32)?),
            ValueType::I32 => Array::I32(self.many(length, Self::i32)?),
            ValueType::U64 => Array::U64(self.many(length, Self::u64)?),
            ValueType::I64 => Array::I64(self.many(length, Self::i64)?),
            ValueType::F32 => Array::F32(self.many(length, Self::f32)?),
            ValueType::F64 => Array::F64(self.many(length, Self::f64)?),
            ValueType::Bool => Array::Bool(self.many(length, Self::bool)?),
            ValueType::Array => {
                Array::Array(self.many(length, |reader| reader.elements(depth.saturating_add(1)))?)
            }
            ValueType::String => {
                let limit = self.limits.string_bytes;
                let mut strings = StringArray::default();
                for _ in 0..length {
                    strings.push(self.text("string", limit)?);
                }
                Array::String(strings)
            }
        })
    }

    fn many<T>(
        &mut self,
        length: u64,
        mut one: impl FnMut(&mut Self) -> Result<T, GgufError>,
    ) -> Result<Vec<T>, GgufError> {
        let mut values = Vec::with_capacity(usize::try_from(length.min(CHUNK / 8)).unwrap_or(0));
        for _ in 0..length {
            values.push(one(self)?);
        }
        Ok(values)
    }

    fn value_type(&mut self) -> Result<ValueType, GgufError> {
        let offset = self.position;
        let id = self.u32()?;
        ValueType::from_id(id).ok_or(GgufError::UnknownValueType { id, offset })
    }

    /// Refuses `length` further bytes that the file cannot hold or the header may not take.
    fn expect(&self, length: u64) -> Result<(), GgufError> {
        let needed = self.position.saturating_add(length);
        if needed > self.file_len {
            return Err(GgufError::Truncated {
                needed,
                have: self.file_len,
            });
        }
        if needed > self.limits.header_bytes {
            return Err(GgufError::HeaderTooLong {
                needed,
                limit: self.limits.header_bytes,
                offset: self.position,
            });
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let length = u64::try_from(N).unwrap_or(u64::MAX);
        self.expect(length)?;
        let mut bytes = [0; N];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.source.read(rest) {
                Ok(0) => return Err(self.truncated(length, u64::try_from(filled).unwrap_or(0))),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(GgufError::Io {
                        offset: self.position,
                        source,
                    });
                }
            }
        }
        self.position = self.position.saturating_add(length);
        Ok(bytes)
    }

    fn truncated(&self, length: u64, arrived: u64) -> GgufError {
        GgufError::Truncated {
            needed: self.position.saturating_add(length),
            have: self.position.saturating_add(arrived),
        }
    }
}
