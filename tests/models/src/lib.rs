//! Seeded generator of small GGUF files, and the demo model.
