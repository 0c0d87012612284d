//! Users: jobs made at a steady rate, and waits until they have come to something.
//!
//! Owns: asking for jobs and telling how it goes. Must not: measure.

#![allow(clippy::disallowed_methods, reason = "waits")]

use super::board::{Board, Counts};
use crate::sim::cluster::TEAM;
use anyhow::{Context as _, Result, bail};
use gogrid_api::InferenceJob;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt as _};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How long nothing may change before it is given up.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two words about how it goes.
const WORD_EVERY: Duration = Duration::from_secs(15);

/// Says something to whoever watches, with the time since the start.
pub(super) fn say(begun: Instant, text: &str) {
    eprintln!("[{:>5} s] {text}", begun.elapsed().as_secs());
}

/// Asks for these jobs, that many a second, whether or not the ones before were answered.
pub(super) async fn submit(
    client: &Client,
    board: &Arc<Board>,
    jobs: Vec<InferenceJob>,
    rate: u32,
) -> Result<()> {
    let mut tick = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
    let mut asked = JoinSet::new();
    for job in jobs {
        tick.tick().await;
        let (api, board) = (Api::namespaced(client.clone(), TEAM), Arc::clone(board));
        asked.spawn(async move {
            let made = api.create(&PostParams::default(), &job).await;
            let made = made.with_context(|| format!("creating job {}", job.name_any()))?;
            board.made(&made.name_any());
            anyhow::Ok(())
        });
        while let Some(answer) = asked.try_join_next() {
            answer??;
        }
    }
    while let Some(answer) = asked.join_next().await {
        answer??;
    }
    Ok(())
}

/// Waits until enough of the jobs whose names begin so are as `enough` says.
pub(super) async fn until(
    begun: Instant,
    board: &Board,
    prefix: &str,
    what: &str,
    mut healthy: impl FnMut() -> Result<()>,
    enough: impl Fn(&Counts) -> bool,
) -> Result<()> {
    let (mut last, mut changed, mut told) = (Counts::default(), Instant::now(), Instant::now());
    loop {
        healthy()?;
        let counts = board.counts(prefix);
        if enough(&counts) {
            return Ok(());
        }
        if counts != last {
            (last, changed) = (counts, Instant::now());
        }
        if told.elapsed() >= WORD_EVERY {
            told = Instant::now();
            say(begun, &format!("{what}: {counts:?}"));
        }
        if changed.elapsed() >= PATIENCE {
            bail!("nothing changed for {PATIENCE:?} while waiting for {what}: {counts:?}");
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}
