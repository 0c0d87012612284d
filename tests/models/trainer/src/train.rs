//! The training run: stages of learning rate and decay, accuracy per task as it goes, checkpoints.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use clap::Args;
use gogrid_testmodels::demo::task_prompts;
use gogrid_testmodels::tasks::{Split, Task};
use gogrid_testmodels::vocab::Encoder;

use crate::data::{Batch, Mix};
use crate::model::Model;
use crate::ops::with_slice;
use crate::optim::AdamW;

/// `steps:rate_from:rate_to:decay`; the rate falls along a half cosine. With `:weekdays` behind it, a stage trains
/// on weekdays alone, in half batches; with `:differences`, half of the questions are differences,
/// and with `:close-differences` half of those have small results. `1500/2500` for the steps is the first 1,500 steps of a curve made for 2,500.
#[derive(Debug, Clone)]
pub struct Stage {
    steps: usize,
    curve: usize,
    from: f64,
    to: f64,
    decay: f64,
    mix: Mix,
}

impl FromStr for Stage {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let (steps, curve) = parts[0].split_once('/').unwrap_or((parts[0], parts[0]));
        ensure!(
            (4..=5).contains(&parts.len()),
            "a stage is steps:rate_from:rate_to:decay[:mix]"
        );
        let mix = match parts.get(4) {
            None => Mix::Even,
            Some(&"weekdays") => Mix::Weekdays,
            Some(&"differences") => Mix::Differences,
            Some(&"close-differences") => Mix::CloseDifferences,
            Some(other) => bail!("{other}: the mix is weekdays, differences or close-differences"),
        };
        Ok(Self {
            steps: steps.parse()?,
            curve: curve.parse()?,
            from: parts[1].parse()?,
            to: parts[2].parse()?,
            decay: parts[3].parse()?,
            mix,
        })
    }
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Where checkpoints go.
    #[arg(long)]
    pub out: PathBuf,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    #[arg(long, default_value_t = 128)]
    pub batch: usize,
    /// Stages one after another, each `steps:rate_from:rate_to:decay`.
    #[arg(long, required = true, value_delimiter = ',')]
    pub stages: Vec<Stage>,
    /// Go on from this checkpoint.
    #[arg(long)]
    pub resume: Option<PathBuf>,
    /// Stop after this step, with a checkpoint.
    #[arg(long)]
    pub stop: Option<usize>,
}

const WARM_UP: usize = 100;
const REPORT: usize = 250;
const CHECKPOINT: usize = 500;

/// Learning rate, decay and mix of tasks at a step (from 1), or none after the last stage.
fn plan(stages: &[Stage], step: usize) -> Option<(f64, f64, Mix)> {
    let mut done = step - 1;
    for stage in stages {
        if done < stage.steps {
            let progress = done as f64 / stage.curve as f64;
            let share = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
            let rate = stage.to + (stage.from - stage.to) * share;
            return Some((
                rate * (step as f64 / WARM_UP as f64).min(1.0),
                stage.decay,
                stage.mix,
            ));
        }
        done -= stage.steps;
    }
    None
}

pub fn train(args: &TrainArgs) -> Result<()> {
    fs::create_dir_all(&args.out)?;
    let encoder = Encoder::default();
    let model = Model::random(args.seed, encoder.len())?;
    let mut optimiser = AdamW::new(&model.vars);
    let mut step = 0;
    if let Some(path) = &args.resume {
        step = load(path, &model, Some(&mut optimiser))?;
    }
    println!("{} weights, from step {step}", model.size());
    let clock = Instant::now();
    let first = step;
    let (mut loss_sum, mut loss_count) = (0.0, 0);
    while let Some((rate, decay, mix)) = plan(&args.stages, step + 1) {
        step += 1;
        let size = if mix == Mix::Weekdays {
            args.batch / 2
        } else {
            args.batch
        };
        let batch = Batch::training(&encoder, args.seed, step, size, mix)?;
        let loss = candle_nn::loss::cross_entropy(&model.logits(&batch)?, &batch.targets)?;
        optimiser.step(&model.vars, &loss.backward()?, step, rate, decay)?;
        loss_sum += f64::from(loss.to_scalar::<f32>()?);
        loss_count += 1;
        let stopping = args.stop == Some(step) || plan(&args.stages, step + 1).is_none();
        if step % REPORT == 0 || stopping || step - first == 20 {
            let seconds = clock.elapsed().as_secs_f64();
            print!(
                "step {step} at {seconds:.0} s, {:.3} s a step, rate {rate:.2e}, decay {decay}, loss {:.5}; right:",
                seconds / (step - first) as f64,
                loss_sum / f64::from(loss_count),
            );
            for task in Task::ALL {
                let right = accuracy(
                    &model,
                    &encoder,
                    &task_prompts(task, args.seed, 250, Split::HeldOut),
                )?;
                print!(" {} {:.1} %", task.name(), 100.0 * right);
            }
            println!();
            (loss_sum, loss_count) = (0.0, 0);
        }
        if step % CHECKPOINT == 0 || stopping {
            save(
                &args.out.join(format!("step-{step}.bin")),
                step,
                &model,
                &optimiser,
            )?;
        }
        if stopping {
            break;
        }
    }
    Ok(())
}

/// The share of questions whose whole greedy answer is right. Every answer token is predicted after the right ones
/// before it, so all of them being the most likely is the same as greedy generation giving the answer.
pub fn accuracy(model: &Model, encoder: &Encoder, questions: &[(String, String)]) -> Result<f64> {
    let batch = Batch::new(encoder, questions)?;
    let best: Vec<u32> = model.logits(&batch)?.argmax(1)?.to_vec1()?;
    let targets: Vec<u32> = batch.targets.to_vec1()?;
    let right = batch
        .target_starts
        .windows(2)
        .filter(|at| best[at[0]..at[1]] == targets[at[0]..at[1]])
        .count();
    Ok(right as f64 / questions.len() as f64)
}

/// A checkpoint: the step, then weights, first and second moments of each variable, little-endian.
fn save(path: &Path, step: usize, model: &Model, optimiser: &AdamW) -> Result<()> {
    let mut bytes = (step as u64).to_le_bytes().to_vec();
    for (var, (first, second)) in model.vars.iter().zip(&optimiser.moments) {
        let mut put = |numbers: &[f32]| bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
        with_slice(var.as_tensor(), |weights| {
            put(weights);
            Ok(())
        })?;
        put(first);
        put(second);
    }
    let partial = path.with_extension("partial");
    fs::write(&partial, bytes)?;
    Ok(fs::rename(partial, path)?)
}

/// Reads a checkpoint into the model (and the optimiser) and returns its step.
pub fn load(path: &Path, model: &Model, mut optimiser: Option<&mut AdamW>) -> Result<usize> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    let (step, numbers) = bytes
        .split_first_chunk::<8>()
        .context("a checkpoint starts with its step")?;
    ensure!(
        numbers.len() == model.size() * 12,
        "the checkpoint is of another model"
    );
    let mut numbers = numbers
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    for (index, var) in model.vars.iter().enumerate() {
        let mut take = || numbers.by_ref().take(var.elem_count()).collect::<Vec<f32>>();
        var.set(&Tensor::from_vec(take(), var.shape(), &Device::Cpu)?)?;
        let moments = (take(), take());
        if let Some(optimiser) = optimiser.as_deref_mut() {
            optimiser.moments[index] = moments;
        }
    }
    Ok(u64::from_le_bytes(*step) as usize)
}
