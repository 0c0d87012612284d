//! Counting right answers of a GGUF file, with the arithmetic of its own number format.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use candle_core::quantized::{QMatMul, gguf_file::Content};
use candle_core::{Device, Module, Tensor};
use clap::Args;
use gogrid_testmodels::demo::{prompts, task_prompts};
use gogrid_testmodels::tasks::{Split, Task};
use gogrid_testmodels::vocab::Encoder;

use crate::data::Batch;
use crate::model::LAYERS;
use crate::ops::{Attention, RmsNorm, SwiGlu};

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The files to examine.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Held-out questions of each task.
    #[arg(long, default_value_t = 1000)]
    count: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Ask facts seen in training instead of held-out ones.
    #[arg(long)]
    seen: bool,
    /// Print the wrong answers' questions.
    #[arg(long)]
    wrong: bool,
    /// Write this many held-out prompts with greedy answer and margin as tab-separated lines, from the first file.
    #[arg(long, requires = "golden_out")]
    golden: Option<usize>,
    #[arg(long)]
    golden_out: Option<PathBuf>,
}

struct Layer {
    norms: [Tensor; 2],
    inputs: [QMatMul; 3],
    output: QMatMul,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

struct Quantised {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: QMatMul,
}

impl Quantised {
    fn open(path: &PathBuf) -> Result<Self> {
        let mut reader = BufReader::new(File::open(path)?);
        let content = Content::read(&mut reader)?;
        let mut tensor = |name: &str| content.tensor(&mut reader, &format!("{name}.weight"), &Device::Cpu);
        let mut layers = Vec::new();
        for layer in 0..LAYERS {
            let mut part = |name: &str| tensor(&format!("blk.{layer}.{name}"));
            let mut norm = |name: &str| part(name)?.dequantize(&Device::Cpu);
            let norms = [norm("attn_norm")?, norm("ffn_norm")?];
            let mut matrix = |name: &str| QMatMul::from_qtensor(part(name)?);
            layers.push(Layer {
                norms,
                inputs: [matrix("attn_q")?, matrix("attn_k")?, matrix("attn_v")?],
                output: matrix("attn_output")?,
                gate: matrix("ffn_gate")?,
                up: matrix("ffn_up")?,
                down: matrix("ffn_down")?,
            });
        }
        Ok(Self {
            embedding: tensor("token_embd")?.dequantize(&Device::Cpu)?,
            layers,
            norm: tensor("output_norm")?.dequantize(&Device::Cpu)?,
            head: QMatMul::from_qtensor(tensor("output")?)?,
        })
    }

    fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut x = self.embedding.index_select(&batch.tokens, 0)?;
        for layer in &self.layers {
            let normed = x.apply_op2(&layer.norms[0], RmsNorm)?;
            let [q, k, v] = &layer.inputs;
            let inputs = [q.forward(&normed)?, k.forward(&normed)?, v.forward(&normed)?];
            let attention = Attention {
                starts: Arc::clone(&batch.starts),
            };
            let mixed = Tensor::cat(&inputs, 1)?.contiguous()?.apply_op1(attention)?;
            x = (x + layer.output.forward(&mixed)?)?;
            let normed = x.apply_op2(&layer.norms[1], RmsNorm)?;
            let inner = Tensor::cat(&[layer.gate.forward(&normed)?, layer.up.forward(&normed)?], 1)?;
            x = (x + layer.down.forward(&inner.contiguous()?.apply_op1(SwiGlu)?)?)?;
        }
        let x = x.index_select(&batch.asked, 0)?.apply_op2(&self.norm, RmsNorm)?;
        Ok(self.head.forward(&x)?)
    }

    /// For each question: whether the greedy answer is right, and the smallest lead of the best token over the next.
    fn judge(&self, encoder: &Encoder, questions: &[(String, String)]) -> Result<Vec<(bool, f32)>> {
        let mut judged = Vec::new();
        for questions in questions.chunks(250) {
            let batch = Batch::new(encoder, questions)?;
            let logits: Vec<Vec<f32>> = self.logits(&batch)?.to_vec2()?;
            let targets: Vec<u32> = batch.targets.to_vec1()?;
            for at in batch.target_starts.windows(2) {
                // The lead of the right token over the best other one: below zero, greedy decoding goes wrong.
                let lead = (at[0]..at[1]).map(|i| {
                    let right = targets[i] as usize;
                    let others = logits[i].iter().enumerate().filter(|(id, _)| *id != right);
                    logits[i][right] - others.map(|(_, x)| *x).fold(f32::MIN, f32::max)
                });
                let lead = lead.fold(f32::MAX, f32::min);
                judged.push((lead > 0.0, lead));
            }
        }
        Ok(judged)
    }
}

pub fn eval(args: &EvalArgs) -> Result<()> {
    let encoder = Encoder::default();
    let split = if args.seen { Split::Train } else { Split::HeldOut };
    for (index, path) in args.files.iter().enumerate() {
        let model = Quantised::open(path)?;
        let (mut all, mut all_right) = (0, 0);
        print!("{}:", path.display());
        for task in Task::ALL {
            let questions = task_prompts(task, args.seed, args.count, split);
            let judged = model.judge(&encoder, &questions)?;
            let right = judged.iter().filter(|(right, _)| *right).count();
            print!(
                " {} {:.1} %",
                task.name(),
                100.0 * right as f64 / args.count as f64
            );
            all += args.count;
            all_right += right;
            if args.wrong {
                let wrong = questions.iter().zip(&judged).filter(|(_, judged)| !judged.0);
                wrong.for_each(|((question, _), (_, lead))| print!("\n  {question} ({lead:.2})"));
            }
        }
        println!(
            " together {:.2} % of {all}",
            100.0 * all_right as f64 / all as f64
        );
        if let (0, Some(count), Some(out)) = (index, args.golden, &args.golden_out) {
            golden(&model, &encoder, args.seed, count, out)?;
        }
    }
    Ok(())
}

/// Golden prompts are those every sound engine answers alike: right, and with a clear lead at every token.
fn golden(model: &Quantised, encoder: &Encoder, seed: u64, count: usize, out: &PathBuf) -> Result<()> {
    const LEAD: f32 = 2.0;
    let questions = prompts(seed, count * 4, Split::HeldOut);
    let judged = model.judge(encoder, &questions)?;
    let mut file = File::create(out)?;
    for ((question, answer), (_, lead)) in questions
        .iter()
        .zip(judged)
        .filter(|(_, (_, lead))| *lead >= LEAD)
        .take(count)
    {
        writeln!(file, "{question}\t{answer}\t{lead:.2}")?;
    }
    Ok(())
}
