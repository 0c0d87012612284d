//! Checked GGUF header parser, model facts and memory estimate.
