//! The person at the machine: three kinds of work, each in a process of its own.
//!
//! Owns: the work and its measurement. A child waits for a line with milliseconds on its standard input, works that long
//! and answers with one line of JSON; between two lines it costs nothing.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What the person does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Kind {
    /// Arithmetic on every core, and a thread that wakes every millisecond beside it.
    Alu,
    /// Memory, on one core.
    Stream,
    /// One core for 2 ms, then 8 ms of rest.
    Bursty,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Alu, Self::Stream, Self::Bursty];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Alu => "alu",
            Self::Stream => "stream",
            Self::Bursty => "bursty",
        }
    }
}

/// What a child has measured.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Units of work per second.
    pub(crate) rate: f64,
    /// Wakes of a sleeping thread.
    pub(crate) wakes: u64,
    /// Those more than a millisecond late.
    pub(crate) late: u64,
}

/// A child at work.
pub(crate) struct Worker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts a child; `session`: in a session of its own; `cgroup`: there.
    pub(crate) fn start(kind: Kind, session: bool, cgroup: Option<&Path>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("foreground").arg(kind.name());
        if session {
            command.arg("--own-session");
        }
        if let Some(cgroup) = cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let input = child.stdin.take().context("no pipe to the foreground")?;
        let output = child.stdout.take().context("no pipe from the foreground")?;
        let mut worker = Self {
            child,
            input,
            output: BufReader::new(output),
        };
        worker.line().context("the foreground did not start")?;
        Ok(worker)
    }

    /// Lets it work that long; [`Worker::measured`] waits for the end.
    pub(crate) fn go(&mut self, span: Duration) -> Result<()> {
        writeln!(self.input, "{}", span.as_millis())?;
        Ok(())
    }

    pub(crate) fn measured(&mut self) -> Result<Measured> {
        Ok(serde_json::from_str(&self.line()?)?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The child's whole life.
pub(crate) fn child(kind: Kind, own_session: bool, cgroup: Option<&Path>) -> Result<()> {
    if own_session {
        // Refused to one that leads a session already.
        rustix::process::setsid()?;
    }
    if let Some(cgroup) = cgroup {
        gogrid_tests::cgroups::enter(cgroup, std::process::id())?;
    }
    let mut stream = Stream::new(kind);
    let burst = burst();
    println!("ready");
    for line in std::io::stdin().lines() {
        let span = Duration::from_millis(line?.trim().parse()?);
        let measured = match kind {
            Kind::Alu => alu(span),
            Kind::Stream => stream.run(span),
            Kind::Bursty => bursty(span, burst),
        };
        println!("{}", serde_json::to_string(&measured)?);
    }
    Ok(())
}

/// About 20 µs of dependent arithmetic.
fn unit(mut state: u64) -> u64 {
    for _ in 0..10_000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
    }
    std::hint::black_box(state)
}

fn count(value: u64) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

fn alu(span: Duration) -> Measured {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (units, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let (mut wakes, mut late) = (0, 0);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for core in 0..cores {
            let (units, over) = (&units, &over);
            scope.spawn(move || {
                let (mut done, mut state) = (0, u64::try_from(core).unwrap_or(0));
                while !over.load(Ordering::Relaxed) {
                    state = unit(state);
                    done += 1;
                }
                units.fetch_add(done, Ordering::Relaxed);
            });
        }
        while begun.elapsed() < span {
            wakes += 1;
            late += u64::from(overslept(Duration::from_millis(1)) > Duration::from_millis(1));
        }
        over.store(true, Ordering::Relaxed);
    });
    Measured {
        rate: count(units.load(Ordering::Relaxed)) / begun.elapsed().as_secs_f64(),
        wakes,
        late,
    }
}

fn overslept(pause: Duration) -> Duration {
    let asked = Instant::now();
    std::thread::sleep(pause);
    asked.elapsed().saturating_sub(pause)
}

/// Two arrays that no cache holds.
struct Stream {
    from: Vec<u64>,
    to: Vec<u64>,
}

/// Bytes of a unit.
const PIECE: usize = 1 << 20;
/// Bytes of each array.
const ARRAY: usize = 96 << 20;

impl Stream {
    fn new(kind: Kind) -> Self {
        let words = if kind == Kind::Stream { ARRAY / 8 } else { 0 };
        Self {
            from: (0..words).map(|n| u64::try_from(n).unwrap_or(0)).collect(),
            to: vec![0; words],
        }
    }

    fn run(&mut self, span: Duration) -> Measured {
        let begun = Instant::now();
        let mut pieces = 0_u64;
        while begun.elapsed() < span {
            let words = PIECE / 8;
            for (to, from) in self.to.chunks_mut(words).zip(self.from.chunks(words)) {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from.wrapping_mul(3).wrapping_add(*to);
                }
                std::hint::black_box(&to);
                pieces += 1;
                if begun.elapsed() >= span {
                    break;
                }
            }
        }
        Measured {
            rate: count(pieces) / begun.elapsed().as_secs_f64(),
            ..Measured::default()
        }
    }
}

/// Units that take 2 ms on a core of one's own.
fn burst() -> u32 {
    let mut best = u32::MAX;
    for _ in 0..50 {
        let begun = Instant::now();
        std::hint::black_box(unit(7));
        best = best.min(u32::try_from(begun.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
    (2_000_000 / best.max(1)).max(1)
}

fn bursty(span: Duration, units: u32) -> Measured {
    let begun = Instant::now();
    let (mut bursts, mut late) = (0, 0);
    while begun.elapsed() < span {
        for state in 0..units {
            std::hint::black_box(unit(u64::from(state)));
        }
        bursts += 1;
        late += u64::from(overslept(Duration::from_millis(8)) > Duration::from_millis(1));
    }
    Measured {
        rate: count(bursts) / begun.elapsed().as_secs_f64(),
        wakes: bursts,
        late,
    }
}
