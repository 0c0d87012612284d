//! Commands. Owns flags, their bounds and what people read; computes nothing itself.

use crate::confined;
use crate::engine::batch::{Batch, Event};
use crate::engine::load::{Checked, Size, check, estimate, header};
use crate::engine::template::Message;
use crate::engine::tokenizer::Tokenizer;
use crate::permit::{Keeper, Wait};
use crate::resident::{Pace, Resident, Source};
use crate::{clock, pool, sys, worker};
use anyhow::{Context, Result, anyhow, bail};
use candle_core::Device;
use clap::{Parser, Subcommand};
use gogrid_agent_core::protocol::{Finish, Sampling};
use gogrid_agent_core::throttle::Grant;
use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Runs one GGUF model inside its limits.
#[derive(Parser)]
#[command(name = "gogrid-worker", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start and reap workers for the agent.
    Pool {
        /// Unix socket on which the agent listens.
        #[arg(long)]
        socket: PathBuf,
        /// End when the process that started this one ends.
        #[arg(long)]
        die_with_parent: bool,
        /// Directory into which each worker stamps the beginning and end of every step, for tests.
        #[arg(long, hide = true)]
        stamps: Option<PathBuf>,
        /// Go wrong in this way: kernel-millis=N.
        #[cfg(feature = "faults")]
        #[arg(long, hide = true)]
        fault: Option<crate::faults::Fault>,
    },
    /// Answer records for the agent; started by the pool.
    #[command(hide = true)]
    Worker {
        /// Unix socket on which the agent listens.
        #[arg(long)]
        socket: PathBuf,
        /// Its name.
        #[arg(long)]
        worker: u64,
        /// Directory for its stamps.
        #[arg(long)]
        stamps: Option<PathBuf>,
        /// Go wrong in this way: kernel-millis=N.
        #[cfg(feature = "faults")]
        #[arg(long, hide = true)]
        fault: Option<crate::faults::Fault>,
    },
    /// Try what a worker must not be able to do, from where workers run; fails if anything succeeds.
    Confined {
        /// Address and port of the API server.
        api_server: std::net::SocketAddr,
    },
    /// Show what a model is and what memory it takes.
    Inspect {
        /// GGUF file.
        file: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// Context of one sequence in tokens [default: the model's, at most 4096].
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        context: Option<u32>,
        /// Sequences decoded together.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
        parallel: u16,
    },
    /// Show the tokens of a text.
    Tokenize {
        /// GGUF file.
        file: PathBuf,
        /// Text.
        text: String,
        /// Take texts of control tokens for those tokens and add the first token.
        #[arg(long)]
        prompt: bool,
    },
    /// Answer one prompt.
    Generate(Generate),
}

#[derive(clap::Args)]
struct Generate {
    /// GGUF file.
    file: PathBuf,
    /// Prompt [default: standard input].
    #[arg(long, short)]
    prompt: Option<String>,
    /// Wrap the prompt in the model's chat template.
    #[arg(long)]
    chat: bool,
    /// Most tokens to generate.
    #[arg(long, short = 'n', default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// 0 = always the most likely token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Keep the most likely tokens up to this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Keep this many tokens; 0 = all.
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Text that ends the answer; may be repeated.
    #[arg(long)]
    stop: Vec<String>,
    /// Context in tokens [default: the model's, at most 4096].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Answer the prompt this many times at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// Threads [default: the cores].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Show times and speed on standard error.
    #[arg(long, short)]
    verbose: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        Command::Pool {
            socket,
            die_with_parent,
            stamps,
            #[cfg(feature = "faults")]
            fault,
        } => {
            let mut flags: Vec<OsString> = vec![];
            if let Some(directory) = stamps {
                flags.extend(["--stamps".into(), directory.into()]);
            }
            #[cfg(feature = "faults")]
            flags.extend(fault.iter().map(|fault| format!("--fault={fault}").into()));
            pool::serve(socket, *die_with_parent, flags).context("serving the agent")
        }
        Command::Worker {
            socket,
            worker,
            stamps,
            #[cfg(feature = "faults")]
            fault,
        } => {
            #[cfg(feature = "faults")]
            if let Some(fault) = fault {
                fault.set();
            }
            return worker::run(socket, *worker, stamps.as_deref());
        }
        Command::Confined { api_server } => {
            let all_refused = confined::report(*api_server).context("confining this process")?;
            return Ok(if all_refused {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        Command::Inspect {
            file,
            json,
            context,
            parallel,
        } => inspect(file, *json, *context, *parallel),
        Command::Tokenize { file, text, prompt } => tokenize(file, text, *prompt),
        Command::Generate(generate) => answer(generate),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn open(path: &Path) -> Result<File> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    if !file.metadata().is_ok_and(|data| data.is_file()) {
        bail!("{} is not a file; give the path of a GGUF file", path.display());
    }
    Ok(file)
}

fn checked(file: &File, path: &Path) -> Result<Checked> {
    check(file).with_context(|| format!("{} can't be used", path.display()))
}

/// The context asked for, or the model's own up to a size that any machine has room for.
fn context(asked: Option<u32>, checked: &Checked) -> u32 {
    asked.unwrap_or_else(|| checked.facts.context_length.min(4096))
}

fn inspect(path: &Path, json: bool, asked: Option<u32>, parallel: u16) -> Result<()> {
    let checked = checked(&open(path)?, path)?;
    let size = Size {
        context_tokens: context(asked, &checked),
        parallel_sequences: parallel,
        memory: 0,
    };
    let estimate = estimate(&checked.facts, &size)?;
    let supported = gogrid_gguf::supported(&checked.facts).map_err(|error| error.to_string());
    let mut out = std::io::stdout().lock();
    if json {
        let value = serde_json::json!({
            "facts": checked.facts,
            "contextTokens": size.context_tokens,
            "parallelSequences": parallel,
            "estimate": estimate,
            "supported": supported.is_ok(),
            "reason": supported.err(),
        });
        writeln!(out, "{value:#}")?;
        return Ok(());
    }
    let facts = &checked.facts;
    let mib = |bytes: u64| format!("{:>10} KiB", bytes.div_ceil(1024));
    writeln!(
        out,
        "name            {}",
        facts.name.as_deref().unwrap_or("(none)")
    )?;
    writeln!(out, "architecture    {}", facts.architecture)?;
    writeln!(out, "quantization    {}", facts.quantization)?;
    writeln!(out, "parameters      {}", facts.parameters)?;
    writeln!(out, "layers          {}", facts.layers)?;
    writeln!(out, "embedding       {}", facts.embedding)?;
    let kv_heads = facts.kv_heads.iter().max().copied().unwrap_or(0);
    writeln!(
        out,
        "heads           {} ({kv_heads} for keys and values)",
        facts.heads
    )?;
    writeln!(out, "context         {}", facts.context_length)?;
    writeln!(out, "vocabulary      {}", facts.vocab)?;
    writeln!(
        out,
        "memory at {} tokens of context × {parallel}:",
        size.context_tokens
    )?;
    writeln!(out, "  weights     {}", mib(estimate.weights))?;
    writeln!(out, "  cache       {}", mib(estimate.kv_cache))?;
    writeln!(out, "  compute     {}", mib(estimate.compute))?;
    writeln!(out, "  overhead    {}", mib(estimate.overhead))?;
    writeln!(out, "  total       {}", mib(estimate.total))?;
    match supported {
        Ok(()) => writeln!(out, "supported       yes")?,
        Err(reason) => writeln!(out, "supported       no: {reason}")?,
    }
    Ok(())
}

fn tokenize(path: &Path, text: &str, prompt: bool) -> Result<()> {
    let header = header(&open(path)?).with_context(|| format!("{} can't be used", path.display()))?;
    let tokenizer = Tokenizer::from_header(&header)?;
    let tokens = if prompt {
        tokenizer.prompt(text)?
    } else {
        tokenizer.encode(text, false)?
    };
    let mut out = std::io::stdout().lock();
    for token in tokens {
        writeln!(out, "{token}\t{}", tokenizer.text(token).escape_debug())?;
    }
    Ok(())
}

/// A fraction as thousandths, from the text so that 0.7 is 700.
fn thousandths(value: f32, name: &str, most: f32) -> Result<u32> {
    if !(0.0..=most).contains(&value) {
        bail!("--{name} {value}: give a number from 0 to {most}");
    }
    let text = format!("{value:.3}");
    text.replace('.', "")
        .parse()
        .map_err(|_| anyhow!("--{name} {value} is not a number"))
}

fn answer(arguments: &Generate) -> Result<()> {
    let threads = arguments.threads.map_or_else(cores, usize::from);
    sys::set_environment_before_threads(&crate::compute_environment(threads))
        .context("setting the number of threads")?;
    let file = open(&arguments.file)?;
    let checked = checked(&file, &arguments.file)?;
    let size = Size {
        context_tokens: context(arguments.context, &checked),
        parallel_sequences: arguments.parallel,
        memory: 0,
    };
    let sampling = Sampling {
        max_tokens: arguments.max_tokens,
        temperature_milli: thousandths(arguments.temperature, "temperature", 100.0)?,
        top_p_milli: thousandths(arguments.top_p, "top-p", 1.0)?.max(1),
        top_k: arguments.top_k,
        seed: arguments.seed,
        stop: arguments.stop.clone(),
    };
    let begun = clock::boottime();
    drop(checked);
    let mut keeper = Keeper::new(Device::Cpu, Resident::Opened(file, size), cores());
    let whole = Grant {
        share_permille: 1000,
        expires_at: u64::MAX,
        fence_at: u64::MAX,
    };
    keeper.grant(begun, whole);
    let device_is_ours = |wait| anyhow!("the whole device is granted, but got {wait:?}");
    while !run_now(&mut keeper, |device, resident| resident.load(device)).map_err(device_is_ours)?? {}
    let loaded = clock::boottime();

    let prompt = match &arguments.prompt {
        Some(prompt) => prompt.clone(),
        None => read_prompt()?,
    };
    let message = [Message {
        role: "user".into(),
        content: prompt,
    }];
    let source = match &message {
        messages if arguments.chat => Source::Messages(messages),
        [message] => Source::Text(&message.content),
    };
    let tokens = run_now(&mut keeper, |_, resident| resident.prompt(&source)).map_err(device_is_ours)??;
    let prompt_tokens = tokens.len();
    let mut batch = Batch::new(usize::from(arguments.parallel));
    for key in 0..u64::from(arguments.parallel) {
        let sampling = Sampling {
            seed: sampling.seed.wrapping_add(key),
            ..sampling.clone()
        };
        batch.add(key, tokens.clone(), &sampling)?;
    }
    let mut pace = Pace::default();
    let mut out = std::io::stdout().lock();
    let (mut first, mut last_answer) = (None, None);
    while !batch.is_empty() {
        let events = run_now(&mut keeper, |_, resident| resident.advance(&mut batch, &mut pace))
            .map_err(device_is_ours)??;
        for event in events.into_iter().flatten() {
            first.get_or_insert_with(clock::boottime);
            match event {
                Event::Text(0, text) => {
                    out.write_all(text.as_bytes())?;
                    out.flush()?;
                }
                Event::Finished(0, answer) => last_answer = Some(answer),
                Event::Finished(..) | Event::Text(..) => {}
            }
        }
    }
    let ended = clock::boottime();
    let answer = last_answer.ok_or_else(|| anyhow!("the generation ended without an answer"))?;
    if !answer.text.ends_with('\n') {
        writeln!(out)?;
    }
    if arguments.verbose {
        let first = first.unwrap_or(ended);
        let (generated, _) = batch.tokens();
        let later = generated.saturating_sub(u64::from(arguments.parallel));
        eprintln!("load      {} ms", (loaded - begun) / 1_000_000);
        eprintln!(
            "prompt    {prompt_tokens} tokens, first token after {} ms",
            (first - loaded) / 1_000_000
        );
        eprintln!(
            "answer    {} tokens of {} sequences, {} tokens/s; the first ended {}",
            generated,
            arguments.parallel,
            later.saturating_mul(1_000_000_000) / (ended - first).max(1),
            if answer.finish == Finish::Stop {
                "by itself"
            } else {
                "at the limit"
            },
        );
    }
    Ok(())
}

fn read_prompt() -> Result<String> {
    let mut text = String::new();
    if std::io::stdin().is_terminal() {
        eprintln!("reading the prompt from standard input; end it with Ctrl-D (or use --prompt)");
    }
    std::io::stdin()
        .read_to_string(&mut text)
        .context("reading the prompt from standard input")?;
    Ok(text)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn run_now<T, R>(keeper: &mut Keeper<T>, compute: impl FnOnce(&Device, &mut T) -> R) -> Result<R, Wait> {
    // The whole device is ours, but billing may run a moment ahead of the clock: come back when it has caught up.
    loop {
        match keeper.ready(clock::boottime()) {
            Err(Wait::Until(at)) => clock::wait_until(at),
            Err(wait) => return Err(wait),
            Ok(now) => return keeper.run(now, compute),
        }
    }
}
