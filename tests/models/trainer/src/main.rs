//! Trains the demo model of GoGrid's tests from a seed, exports it as GGUF and counts its right answers.

mod data;
mod eval;
mod export;
mod model;
mod ops;
mod optim;
mod train;

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(about)]
enum Command {
    /// Train and write checkpoints.
    Train(train::TrainArgs),
    /// Write a checkpoint as GGUF in F32, F16, Q8_0 and Q4_K.
    Export(export::ExportArgs),
    /// Count the right answers of GGUF files to held-out questions.
    Eval(eval::EvalArgs),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Train(args) => train::train(&args),
        Command::Export(args) => export::export(&args),
        Command::Eval(args) => eval::eval(&args),
    }
}
