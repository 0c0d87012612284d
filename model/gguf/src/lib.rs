//! What a GGUF file says about itself, checked before anything trusts it.
//!
//! This crate owns three things: the bounded header parser ([`Header`]), the facts that a scheduler needs
//! ([`Facts`]), and the memory a model takes when it is loaded ([`Estimate`]). It is the only code of GoGrid that may
//! look at bytes whose digest has not been verified, so it is pure: no clock, no environment, no file system beyond the
//! `Read` it is handed, no `unsafe`, and no allocation that a number in the file can enlarge beyond the [`Limits`].
//!
//! It must not dequantise, open paths or know about nodes and assignments.

mod error;
mod estimate;
mod facts;
mod header;
mod limits;
mod reader;
mod tensor;
mod value;

pub use error::{EstimateError, FactsError, FieldError, GgufError, UnsupportedModel};
pub use estimate::{Backend, Demand, Estimate, KvType};
pub use facts::{ENGINE_ARCHITECTURES, ENGINE_TENSOR_TYPES, Facts, supported};
pub use header::{Header, parse_from};
pub use limits::Limits;
pub use tensor::{TensorInfo, TensorType};
pub use value::{Array, StringArray, Value, ValueType};
