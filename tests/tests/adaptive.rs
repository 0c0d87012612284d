//! The CPU's share yields to other people's programs, seen from outside: the agent's log says when, /proc how much.
//!
//! `GOGRID_SOAK=1` lets the others work for a minute instead of six seconds.

#![allow(
    clippy::disallowed_methods,
    reason = "the test measures real time from outside"
)]

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gogrid_api::ResourceProfile;
use gogrid_tests::cluster::{Cluster, ClusterOptions, on_runtime, record};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::spec;
use gogrid_tests::process::Process;
use gogrid_tests::procfs;
use gogrid_tests::wait::eventually;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

const LONG: Duration = Duration::from_secs(60);
const NODE: &str = "yielding";
/// Kept while others work, percent.
const FLOOR: i32 = 5;
const YIELDS_WITHIN: Duration = Duration::from_secs(2);
const BACK_WITHIN: Duration = Duration::from_secs(15);

/// How long the others work.
fn span() -> Duration {
    Duration::from_secs(if std::env::var_os("GOGRID_SOAK").is_some() {
        60
    } else {
        6
    })
}

struct Scene {
    cluster: Cluster,
    worker: u32,
    cores: f64,
}

impl Scene {
    /// What the agent's law has done so far, in its own words.
    fn moods(&self) -> Result<Vec<String>> {
        let log = self.cluster.process(NODE)?.log();
        let turns = log.lines().filter(|line| line.contains("yields differently"));
        let word = |line: &str| {
            let words = ["Full", "Yielding", "Climbing", "Blind"];
            words
                .iter()
                .find(|word| line.contains(**word))
                .map(|word| (*word).to_owned())
        };
        Ok(turns.filter_map(word).collect())
    }

    /// Waits for the law's last turn to be that one; how long it took from `since`.
    async fn until(&self, mood: &str, since: Instant) -> Result<Duration> {
        eventually(LONG, &format!("the share to be {mood}"), || async {
            let moods = self.moods()?;
            ensure!(moods.last().is_some_and(|last| last == mood), "{moods:?}");
            Ok(since.elapsed())
        })
        .await
    }

    /// Part of all cores that the worker uses over a span, in percent.
    async fn used(&self, over: Duration) -> Result<f64> {
        let (before, began) = (procfs::cpu_ticks(self.worker)?, Instant::now());
        tokio::time::sleep(over).await;
        let ticks = f64::from(i32::try_from(procfs::cpu_ticks(self.worker)? - before)?);
        Ok(ticks / began.elapsed().as_secs_f64() / self.cores)
    }
}

#[test]
fn a_job_on_the_cpu_is_on_its_floor_within_2_seconds_of_others_work_and_back_within_15_of_its_end()
-> Result<()> {
    on_runtime(async {
        let mut options = ClusterOptions::quick(0);
        options.nodes = vec![(NODE.into(), Some("default".into()))];
        let cluster = Cluster::start(ControlPlane::shared().await?, options).await?;
        let profiles: Api<ResourceProfile> = Api::all(cluster.client.clone());
        // What the control plane and this test use themselves must not count.
        let adaptive = json!({"mode": "ForeignLoad", "foreignLoadPercent": 60, "floorPercent": FLOOR});
        let patch =
            Patch::Merge(json!({"spec": {"adaptive": adaptive, "compute": {"minRequestIntervalMillis": 0}}}));
        profiles.patch("default", &PatchParams::default(), &patch).await?;
        let mut wanted = spec(&[], "yields")?;
        // The demo model answers this without an end: the job outlasts the scene.
        let lines: Vec<String> = (0..2_500)
            .map(|n| record(&format!("r{n}"), "zzz zzz", 100))
            .collect();
        wanted["input"] = cluster.create_input("default", "yields-input", &lines).await?;
        let job = cluster.create_job("default", "yields", wanted).await?;
        cluster.until_reason(&job, "Succeeded", "Running", LONG).await?;
        let agent = u32::try_from(cluster.process(NODE)?.pid())?;
        let worker = procfs::workers_of(agent)?.pop().context("no worker")?.pid;
        let cores = std::thread::available_parallelism()?.get();
        let scene = Scene {
            cluster,
            worker,
            cores: f64::from(u32::try_from(cores)?),
        };

        // Its own load alone trips nothing.
        let turns = scene.moods()?.len();
        let alone = scene.used(Duration::from_secs(4)).await?;
        ensure!(scene.moods()?.len() == turns, "{:?}", scene.moods()?);
        let floor = f64::from(FLOOR);
        ensure!(alone > 4.0 * floor, "{alone:.1} % alone: it computes nothing");

        let dir = tempfile::tempdir()?;
        let began = Instant::now();
        let others = (0..cores)
            .map(|n| {
                let mut command = Command::new("sh");
                command.args(["-c", "while :; do :; done"]);
                Process::start("other", command, &dir.path().join(n.to_string()))
            })
            .collect::<Result<Vec<_>>>()?;
        let yielded = scene.until("Yielding", began).await?;
        let turns = scene.moods()?.len();
        // What was granted before runs out.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let beside = scene.used(span()).await?;
        let turned = scene.moods()?.len() - turns;
        for other in &others {
            other.kill();
        }
        let ended = Instant::now();
        let back = scene.until("Full", ended).await?;
        let after = scene.used(Duration::from_secs(2)).await?;
        println!(
            "{alone:.1} % of the cores alone; {yielded:.2?} after others began {beside:.1} %, for {:?} with {turned} turns; full \
             again {back:.2?} after they ended: {after:.1} %",
            span()
        );
        ensure!(yielded <= YIELDS_WITHIN, "{yielded:?} until it yielded");
        ensure!(beside <= floor + 2.0, "{beside:.1} % beside others");
        ensure!(turned == 0, "it turned {turned} times under a constant load");
        ensure!(back <= BACK_WITHIN, "{back:?} until it was back");
        ensure!(
            after > 0.8 * alone,
            "{after:.1} % afterwards, {alone:.1} % before"
        );
        Ok(())
    })
}
