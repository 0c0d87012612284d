//! Seeded generator of small GGUF files, and the demo model.

pub mod demo;
pub mod gguf_writer;
pub mod quant;
pub mod random;
pub mod rng;
pub mod tasks;
pub mod vocab;
