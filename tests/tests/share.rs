//! The compute share of real workers, measured by this process from /proc.
//!
//! `GOGRID_SOAK=1` measures every combination for longer; without it three of them, each long enough for 10 s windows.

#![allow(
    clippy::disallowed_methods,
    reason = "the test measures real time from outside"
)]

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_agent_core::protocol::{IoPriority, Usage, WorkerLimits};
use gogrid_agent_core::shares::{Claim, batch_each, divide};
use gogrid_testmodels::quant::TensorType;
use gogrid_testmodels::random::RandomLlama;
use gogrid_tests::driver::{Feed, Node, Worker};
use gogrid_tests::share::{Samples, Verdict};

/// Time before the first window: the share is a property of the steady state.
const SETTLE: Duration = Duration::from_secs(1);
const EVERY: Duration = Duration::from_millis(50);
/// A machine that others use is asked again so often.
const ATTEMPTS: usize = 3;

/// A decode step and what makes it that long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// About 5 ms.
    Short,
    /// About 150 ms.
    Long,
}

impl Step {
    fn model(self) -> RandomLlama {
        let (layers, hidden, ffn) = match self {
            Self::Short => (8, 512, 1536),
            Self::Long => (8, 1024, 3072),
        };
        RandomLlama {
            seed: 3,
            layers,
            hidden,
            heads: hidden / 64,
            kv_heads: hidden / 256,
            head_dim: 64,
            ffn,
            vocab: 2048,
            context: 2048,
            tensor_type: TensorType::Q8_0,
            tied: false,
        }
    }

    fn sequences(self) -> u16 {
        match self {
            Self::Short => 1,
            Self::Long => 16,
        }
    }
}

fn limits(step: Step, threads: u16) -> WorkerLimits {
    WorkerLimits {
        generation: 1,
        niceness: 0,
        io: IoPriority::None,
        max_batch: step.sequences(),
        request_interval: 0,
        threads,
    }
}

fn cores() -> Result<u16> {
    Ok(u16::try_from(std::thread::available_parallelism()?.get())?)
}

fn busy(node: &mut Node, model: &File, step: Step, threads: u16) -> Result<Worker> {
    let worker = node.spawn(limits(step, threads))?;
    worker.load(model, 2048, step.sequences())?;
    worker.share(1000);
    worker.until("the model to be loaded", |said| said.loaded.is_some())?;
    worker.share(0);
    worker.feed(Some(Feed {
        tokens: 1900,
        window: u64::from(step.sequences()) * 2,
    }));
    Ok(worker)
}

/// Lets workers divide so many permille of the device, now and as long as they are not told otherwise.
fn allow(workers: &[Worker], permille: u16) {
    let claims: Vec<Claim> = (0_u64..)
        .take(workers.len())
        .map(|worker| Claim {
            worker,
            most: 1000,
            active: true,
        })
        .collect();
    for ((_, share), worker) in divide(permille, &claims).into_iter().zip(workers) {
        worker.share(share);
    }
    std::thread::sleep(SETTLE);
}

fn sample(workers: &[Worker], span: Duration) -> Result<Samples> {
    let pids: Vec<u32> = workers.iter().map(Worker::pid).collect();
    Samples::over(&pids, span, EVERY)
}

/// Percent of the device that the workers take when nothing holds them: threads of one worker wait for each other, and what
/// they leave unused no share can give them.
fn unlimited(workers: &[Worker]) -> Result<f64> {
    allow(workers, 1000);
    let taken = sample(workers, SETTLE * 4)?.whole(u32::from(cores()?));
    Ok(taken.context("no sample")?.percent)
}

/// 1 s and 10 s windows of workers that divide `percent` of the device, of which they can use `most`.
fn windows(workers: &[Worker], percent: u16, most: f64, span: Duration) -> Result<(Verdict, Verdict)> {
    allow(workers, percent * 10);
    let counted = || workers.iter().map(|w| w.said().usage).collect::<Vec<Usage>>();
    let before = counted();
    let samples = sample(workers, span)?;
    let after = counted();
    let sum = |count: &dyn Fn(&Usage) -> u64| {
        after.iter().map(count).sum::<u64>() - before.iter().map(count).sum::<u64>()
    };
    let (tokens, device, outside) = (sum(&|u| u.tokens), sum(&|u| u.device), sum(&|u| u.outside));
    let outside = outside * 10_000 / device.max(1);
    for worker in workers {
        worker.share(0);
    }
    let cores = u32::from(cores()?);
    let asked = f64::from(percent);
    let of = |seconds| Verdict::of(&samples.windows(Duration::from_secs(seconds), cores), asked, most);
    let (short, long) = (of(1), of(10));
    let mean = samples.whole(cores).map_or(0.0, |w| w.percent);
    println!(
        "{percent} %, {} workers, {tokens} tokens: mean {mean:.2} %; 10 s windows +{:.2} -{:.2} points, {:.0} % of {} \
         excluded, run delay {:.1} %; 1 s windows +{:.2} -{:.2} points; {}.{:02} % of device time outside permits",
        workers.len(),
        long.above,
        long.below,
        long.excluded_percent(),
        long.windows,
        long.delay_percent,
        short.above,
        short.below,
        outside / 100,
        outside % 100,
    );
    ensure!(
        outside <= 200,
        "{outside} hundredths of a percent outside permits"
    );
    Ok((short, long))
}

fn holds(workers: &[Worker], percent: u16, span: Duration) -> Result<()> {
    for _ in 0..ATTEMPTS {
        let most = unlimited(workers)?;
        println!("without a limit they take {most:.2} %");
        let (short, long) = windows(workers, percent, most, span)?;
        ensure!(long.windows > 0, "no window of 10 s in {span:?}");
        // Whatever others do: never more.
        ensure!(long.above <= 2.0, "10 s windows {:.2} points above", long.above);
        ensure!(short.above <= 8.0, "1 s windows {:.2} points above", short.above);
        if long.excluded_percent() <= 20.0 {
            ensure!(long.below <= 2.0, "10 s windows {:.2} points below", long.below);
            ensure!(short.below <= 8.0, "1 s windows {:.2} points below", short.below);
            return Ok(());
        }
        println!(
            "others use this machine: {} of {} windows say nothing",
            long.excluded, long.windows
        );
    }
    anyhow::bail!("in {ATTEMPTS} attempts others used the CPUs too much for the share to be judged");
}

fn measure(dir: &Path, step: Step, workers: usize, percents: &[u16], span: Duration) -> Result<()> {
    let path = dir.join("model.gguf");
    step.model().write_to(&path)?;
    let mut node = Node::start(dir)?;
    let model = File::open(&path)?;
    let threads = batch_each(cores()?, workers);
    let workers: Vec<Worker> = (0..workers)
        .map(|_| busy(&mut node, &model, step, threads))
        .collect::<Result<_>>()?;
    for percent in percents {
        println!("{step:?} steps");
        holds(&workers, *percent, span)?;
    }
    Ok(())
}

/// One share and kind of step within seconds, or all of them for long.
fn try_shares(workers: usize, quick: (Step, u16)) -> Result<()> {
    let dir = tempfile::tempdir()?;
    #[expect(clippy::disallowed_methods, reason = "asks how long the tests may take")]
    let soak = std::env::var_os("GOGRID_SOAK").is_some();
    if !soak {
        return measure(dir.path(), quick.0, workers, &[quick.1], Duration::from_secs(11));
    }
    for (name, step) in [("short", Step::Short), ("long", Step::Long)] {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir)?;
        measure(&dir, step, workers, &[60, 80, 95], Duration::from_secs(40))?;
    }
    Ok(())
}

#[test]
fn one_worker_takes_its_share_and_no_more() -> Result<()> {
    try_shares(1, (Step::Long, 80))
}

#[test]
fn two_workers_together_take_the_share_of_one() -> Result<()> {
    try_shares(2, (Step::Short, 60))
}
