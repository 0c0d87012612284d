//! Renewals of node Leases, by the agent's own keeper and clients, while every call about them goes wrong in one way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::{Args as _, Command, FromArgMatches as _};
use gogrid_agent::clock::Machine;
use gogrid_agent::config::{Config, Flags};
use gogrid_agent::{Keeper, LeaseEvent, kube_client};
use gogrid_agent_core::session::Session;
use gogrid_tests::cluster::{lease_seconds, on_runtime};
use gogrid_tests::controlplane::ControlPlane;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// What goes wrong. The answers 429 and 503 say `Retry-After: 3600`.
const WAYS: [&str; 5] = ["hang", "swallow", "drip", "answer-429", "answer-503"];
/// Agents that suffer from the same.
const AGENTS: usize = 10;
/// The first calls about a Lease that go wrong, and the last: the renewals before that are good.
const STRUCK: (usize, usize) = (4, 23);
/// How late a busy machine may notice that a deadline has passed.
const SLACK: Duration = Duration::from_millis(150);

fn config(node: &str, fault: &str) -> Result<Config> {
    let flags = Flags::augment_args(Command::new("agent")).try_get_matches_from([
        "agent",
        "--node-name",
        node,
        // The operator judges nodes by Leases of its own namespace alone.
        "--namespace",
        "default",
        "--state-dir",
        "/nowhere",
        "--lease-duration-seconds",
        &lease_seconds().to_string(),
        "--fault",
        fault,
    ])?;
    Ok(Config::try_from(Flags::from_arg_matches(&flags)?)?)
}

/// What one agent's renewals came to.
struct Outcome {
    way: &'static str,
    failed: usize,
    /// The longest time from the end of one attempt to the end of the next, the first good one after the faults included.
    longest: Duration,
}

async fn renew(way: &'static str, number: usize, base: kube::Config) -> Result<Outcome> {
    let (first, last) = STRUCK;
    let node = format!("renews-{way}-{number}");
    let config = config(&node, &format!("leases:{way}={first}..{last}"))?;
    let clients = kube_client::clients(base, &config)?;
    let session = Session::new("boot", &node);
    let keeper = Keeper::new(Arc::new(Machine), clients.lease, &config, session, vec![]);
    let (events, mut heard) = mpsc::channel(16);
    let task = tokio::spawn(keeper.keep(events));
    let wedged = Duration::from_millis(config.timing.lease().0);
    let (mut failed, mut longest, mut since) = (0, Duration::ZERO, None::<Instant>);
    loop {
        let event = tokio::time::timeout(wedged, heard.recv()).await;
        let event = event.with_context(|| format!("{node}: wedged after {failed} failures"))?;
        match event.with_context(|| format!("{node}: the keeper ended"))? {
            LeaseEvent::Renewed { .. } if failed == 0 => since = None,
            LeaseEvent::Renewed { .. } => {
                longest = longest.max(since.map_or(Duration::ZERO, |since| since.elapsed()));
                break;
            }
            LeaseEvent::Failed { .. } => {
                failed += 1;
                longest = longest.max(since.map_or(Duration::ZERO, |since| since.elapsed()));
                since = Some(Instant::now());
            }
            LeaseEvent::Superseded { holder } => anyhow::bail!("{node}: superseded by {holder}"),
        }
    }
    // Nobody listens any more: it ends with its next attempt, unless it hangs in one.
    drop(heard);
    tokio::time::timeout(wedged, task)
        .await
        .with_context(|| format!("{node}: wedged at the end"))??;
    Ok(Outcome { way, failed, longest })
}

#[test]
fn no_attempt_to_renew_outlives_its_deadline_and_the_next_is_on_time_however_a_thousand_calls_go_wrong()
-> Result<()> {
    on_runtime(async {
        let control = ControlPlane::shared().await?;
        let kubeconfig = Kubeconfig::read_from(control.admin_kubeconfig())?;
        let base = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let mut all = JoinSet::new();
        for way in WAYS {
            for number in 0..AGENTS {
                all.spawn(renew(way, number, base.clone()));
            }
        }
        let mut outcomes = vec![];
        while let Some(outcome) = all.join_next().await {
            outcomes.push(outcome??);
        }
        let timing = config("any", "leases:drop=1")?.timing;
        let (deadline, pause) = (timing.attempt().0, timing.renew().0 / 4);
        for way in WAYS {
            let of: Vec<&Outcome> = outcomes.iter().filter(|o| o.way == way).collect();
            let failed: usize = of.iter().map(|o| o.failed).sum();
            let longest = of.iter().map(|o| o.longest).max().unwrap_or_default();
            println!(
                "{way}: {failed} attempts failed; the next had ended {} ms later at most",
                longest.as_millis()
            );
            ensure!(
                failed >= AGENTS * (STRUCK.1 - STRUCK.0),
                "{way}: only {failed} attempts failed"
            );
            // An attempt begins a quarter of an interval after the one before began, or when that was given up: where none
            // ends before its deadline, one follows upon the other.
            let most = if way == "hang" { deadline } else { pause + deadline };
            let most = Duration::from_millis(most) + SLACK;
            ensure!(
                longest <= most,
                "{way}: {longest:?} between two attempts' ends, not {most:?}"
            );
        }
        Ok(())
    })
}
