//! The GoGrid worker: runs one GGUF model inside its limits; the only user of candle.
fn main() {}
