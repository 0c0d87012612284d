//! `courtesy`: what GoGrid takes from the person at the machine, measured.
//!
//! Real workers on the CPU and the real fetching child pull, hash, load and generate beside a foreground in processes of
//! its own, in interleaved rounds: the foreground alone, with GoGrid under a profile, with a GoGrid without limits. What is
//! measured is measured from outside. Numbers depend on the machine; the losses are what compares.

#![allow(
    clippy::disallowed_methods,
    reason = "measures real processes by a real clock"
)]

mod foreground;
mod guest;
mod place;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use foreground::Kind;
use gogrid_api::effective::Limits;
use gogrid_api::profile::{IoClass, presets};
use gogrid_api::{Millis, Niceness, Percent};
use gogrid_testmodels::random::RandomLlama;
use gogrid_tests::server::{Body, serve};
use gogrid_tests::share::{Samples, Verdict};
use guest::{Guest, Model};
use place::{Arrangement, Place};
use report::{Adaptive, Collected, Gap, Mode, Report, Share, ThreadsReport};

/// Rounds of every kind of foreground.
const ROUNDS: usize = 10;
/// How long the share is measured with the machine to itself.
const SHARE_SPAN: Duration = Duration::from_secs(14);
/// Bytes a second of the download: 200 Mbit/s. A faster one would measure what serving it costs this machine.
const RATE: u64 = 25 << 20;
const MODEL: RandomLlama = RandomLlama::LARGE;

/// Measures what GoGrid takes from whoever works at the same machine.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    child: Option<Child>,
    /// Profile under which GoGrid runs: conservative, default or aggressive.
    #[arg(long, default_value = "conservative")]
    profile: String,
    /// Where the foreground lives.
    #[arg(long, value_enum, default_value = "same")]
    foreground: Arrangement,
    /// Length of every single measurement; there are 90 of them.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Child {
    /// One foreground process.
    #[command(hide = true)]
    Foreground {
        kind: Kind,
        #[arg(long)]
        own_session: bool,
        #[arg(long)]
        cgroup: Option<PathBuf>,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(Child::Foreground {
        kind,
        own_session,
        cgroup,
    }) = arguments.child
    {
        return foreground::child(kind, own_session, cgroup.as_deref());
    }
    let report = measure(&arguments)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

fn limits_of(profile: &str) -> Result<Limits> {
    let presets = presets();
    let (_, spec) = presets
        .iter()
        .find(|(name, _)| *name == profile)
        .with_context(|| format!("--profile {profile}: must be conservative, default or aggressive"))?;
    Ok(Limits::try_from(spec)?)
}

/// A GoGrid that nothing holds back.
fn unlimited(limits: &Limits) -> Limits {
    Limits {
        compute_percent: Percent(100),
        request_interval: Millis(0),
        niceness: Niceness(0),
        io_class: IoClass::None,
        max_batch: 16,
        ..limits.clone()
    }
}

/// Jiffies of this machine: all, stolen by others on the same host.
fn steal() -> Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<u64> = line
        .split_ascii_whitespace()
        .skip(1)
        .flat_map(str::parse)
        .collect();
    let stolen = fields.get(7).copied().unwrap_or(0);
    Ok((fields.iter().take(8).sum(), stolen))
}

fn measure(arguments: &Arguments) -> Result<Report> {
    let limits = limits_of(&arguments.profile)?;
    let cores = u16::try_from(std::thread::available_parallelism()?.get())?;
    // Dropped last: groups can go only once they are empty.
    let place = Place::make(arguments.foreground, u64::from(cores))?;
    let dir = tempfile::Builder::new().prefix("gogrid-courtesy-").tempdir()?;
    let path = dir.path().join("model.gguf");
    MODEL.write_to(&path)?;
    ensure!(MODEL.weights() >= 100_000_000, "{} weights", MODEL.weights());
    let model = Model {
        uri: serve(Body::File(path.clone()), Some(RATE))?,
        sha256: gogrid_tests::jobs::sha256(&path)?,
        path,
    };
    let free = unlimited(&limits);
    let mut guest = Guest::start(
        &dir.path().join("with"),
        limits.clone(),
        cores,
        &place,
        true,
        &model,
    )?;
    let share = share(&mut guest, &limits, cores)?;
    let mut unbound = Guest::start(&dir.path().join("unlimited"), free, cores, &place, false, &model)?;

    let (all_before, stolen_before) = steal()?;
    let span = Duration::from_secs(arguments.seconds);
    let session = arguments.foreground == Arrangement::OtherSession;
    let mut workers = Kind::ALL
        .into_iter()
        .map(|kind| {
            Ok((
                kind,
                foreground::Worker::start(kind, session, place.foreground.as_deref())?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut collected = Collected::default();
    let mut threads = guest.threads()?;
    for round in 0..ROUNDS {
        for (kind, worker) in &mut workers {
            for turn in 0..Mode::ALL.len() {
                // Another order every round, so that a drift of the machine favours none.
                let Some(mode) = Mode::ALL.get((turn + round) % Mode::ALL.len()) else {
                    continue;
                };
                worker.go(span)?;
                match mode {
                    Mode::Alone => {}
                    Mode::With => guest.work(span)?,
                    Mode::Unlimited => unbound.work(span)?,
                }
                collected.add(*kind, *mode, worker.measured()?);
                if *mode == Mode::With {
                    let more = guest.threads()?;
                    threads.total += more.total;
                    threads.nice_ok += more.nice_ok;
                    threads.ioprio_ok += more.ioprio_ok;
                }
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    let (all, stolen) = steal()?;
    eprintln!(
        "newcomers that came as far as generating: {} with GoGrid, {} with an unlimited one",
        guest.newcomers, unbound.newcomers
    );
    let millis = |nanos| Duration::from_nanos(nanos).as_secs_f64() * 1e3;
    let count = |jiffies: u64| f64::from(u32::try_from(jiffies).unwrap_or(u32::MAX));
    let report = Report {
        profile: arguments.profile.clone(),
        arrangement: arguments.foreground.name(),
        rounds: collected.rounds(),
        foreground: collected.medians(),
        wakes: collected.wakes(),
        share,
        gap_millis: Gap {
            requested: limits.request_interval.0,
            min: guest.gap.map(millis),
        },
        threads: ThreadsReport {
            total: threads.total,
            nice_ok: threads.nice_ok,
            ioprio_ok: threads.ioprio_ok,
        },
        adaptive: Adaptive::default(),
        steal_percent: 100.0 * count(stolen - stolen_before) / count((all - all_before).max(1)),
    };
    drop((workers, guest, unbound));
    drop(place);
    Ok(report)
}

/// The first job's share with the machine to itself.
fn share(guest: &mut Guest, limits: &Limits, cores: u16) -> Result<Share> {
    let samples = guest.generate(|pid| {
        // The share is a property of the steady state.
        std::thread::sleep(Duration::from_secs(1));
        Samples::over(&[pid], SHARE_SPAN, Duration::from_millis(50))
    })?;
    let asked = f64::from(limits.compute_percent.0);
    let windows = |seconds| samples.windows(Duration::from_secs(seconds), u32::from(cores));
    let (short, long) = (
        Verdict::of(&windows(1), asked, 100.0),
        Verdict::of(&windows(10), asked, 100.0),
    );
    Ok(Share {
        requested_percent: asked,
        mean_percent: samples.whole(u32::from(cores)).map_or(0.0, |w| w.percent),
        worst1s_points: short.above.max(short.below),
        worst10s_points: long.above.max(long.below),
        windows_excluded: long.excluded,
    })
}
