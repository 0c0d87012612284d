//! Tensor types of ggml and what one tensor of a file is. Owns sizes and ids; knows nothing about files or kernels.

use serde::{Deserialize, Serialize};

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the file.
    pub name: String,
    /// Dimensions in ggml order: `shape[0]` is the row length, contiguous in memory. 1 to 4 of them, none zero.
    pub shape: Vec<u64>,
    /// Storage type.
    pub kind: TensorType,
    /// Where its data start, in bytes from the start of the file.
    pub offset: u64,
    /// Size of its data in bytes.
    pub bytes: u64,
}

impl TensorInfo {
    /// Number of elements (the parser has checked that the product fits).
    pub fn elements(&self) -> u64 {
        self.shape
            .iter()
            .fold(1, |product, dim| product.saturating_mul(*dim))
    }
}

macro_rules! tensor_types {
    ($($variant:ident = $id:literal, $name:literal, $block:literal, $bytes:literal;)*) => {
        /// Storage type of a tensor, with the ids of ggml.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum TensorType {
            $(
                #[doc = concat!("`", $name, "`: ", stringify!($block), " elements in ", stringify!($bytes), " bytes.")]
                #[serde(rename = $name)]
                $variant,
            )*
        }

        impl TensorType {
            /// Every type, by id.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The type with this ggml id; `None` for one that is unknown or was withdrawn.
            pub fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)* _ => None }
            }

            /// Id of the type in ggml and in files.
            pub fn id(self) -> u32 {
                match self { $(Self::$variant => $id,)* }
            }

            /// Name as ggml writes it, such as `Q4_K`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Elements in one block.
            pub fn block_size(self) -> u64 {
                match self { $(Self::$variant => $block,)* }
            }

            /// Bytes of one block.
            pub fn type_size(self) -> u64 {
                match self { $(Self::$variant => $bytes,)* }
            }
        }
    };
}

tensor_types! {
    F32 = 0, "F32", 1, 4;
    F16 = 1, "F16", 1, 2;
    Q4_0 = 2, "Q4_0", 32, 18;
    Q4_1 = 3, "Q4_1", 32, 20;
    Q5_0 = 6, "Q5_0", 32, 22;
    Q5_1 = 7, "Q5_1", 32, 24;
    Q8_0 = 8, "Q8_0", 32, 34;
    Q8_1 = 9, "Q8_1", 32, 36;
    Q2K = 10, "Q2_K", 256, 84;
    Q3K = 11, "Q3_K", 256, 110;
    Q4K = 12, "Q4_K", 256, 144;
    Q5K = 13, "Q5_K", 256, 176;
    Q6K = 14, "Q6_K", 256, 210;
    Q8K = 15, "Q8_K", 256, 292;
    Iq2Xxs = 16, "IQ2_XXS", 256, 66;
    Iq2Xs = 17, "IQ2_XS", 256, 74;
    Iq3Xxs = 18, "IQ3_XXS", 256, 98;
    Iq1S = 19, "IQ1_S", 256, 50;
    Iq4Nl = 20, "IQ4_NL", 32, 18;
    Iq3S = 21, "IQ3_S", 256, 110;
    Iq2S = 22, "IQ2_S", 256, 82;
    Iq4Xs = 23, "IQ4_XS", 256, 136;
    I8 = 24, "I8", 1, 1;
    I16 = 25, "I16", 1, 2;
    I32 = 26, "I32", 1, 4;
    I64 = 27, "I64", 1, 8;
    F64 = 28, "F64", 1, 8;
    Iq1M = 29, "IQ1_M", 256, 56;
    Bf16 = 30, "BF16", 1, 2;
    Tq1_0 = 34, "TQ1_0", 256, 54;
    Tq2_0 = 35, "TQ2_0", 256, 66;
    Mxfp4 = 39, "MXFP4", 32, 17;
}

impl TensorType {
    /// Bytes of a row of `elements`; `None` when it is not whole blocks or overflows.
    pub fn row_bytes(self, elements: u64) -> Option<u64> {
        elements
            .is_multiple_of(self.block_size())
            .then(|| (elements / self.block_size()).checked_mul(self.type_size()))
            .flatten()
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
