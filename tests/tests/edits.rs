//! Profiles edited under running work: in force within five seconds, and nothing of the work is lost or repeated.
//!
//! `GOGRID_SOAK=1` makes 200 edits over ten minutes instead of 20 in a row.

#![allow(
    clippy::disallowed_methods,
    reason = "the test measures real time from outside"
)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gogrid_agent_core::rank::session_rank;
use gogrid_api::{GpuNode, InferenceJob, ResourceProfile};
use gogrid_testmodels::quant::TensorType;
use gogrid_testmodels::random::RandomLlama;
use gogrid_tests::cgroups::{self, Tree};
use gogrid_tests::cluster::{Cluster, ClusterOptions, answer, on_runtime, program, record};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, sha256, spec};
use gogrid_tests::process::Means;
use gogrid_tests::procfs::{self, Seen};
use gogrid_tests::wait::eventually;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use kube::{Resource as _, ResourceExt as _};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(240);
/// An edit acts within this.
const IN_FORCE: Duration = Duration::from_secs(5);
const NODE: &str = "edited";
/// Best effort and idle: what an I/O class is called and what `ioprio_get` answers >> 13.
const CLASSES: [(&str, i64); 2] = [("BestEffort", 2), ("Idle", 3)];

fn models() -> PathBuf {
    std::env::temp_dir().join(format!("gogrid-edits-{}", std::process::id()))
}

async fn cluster() -> Result<Arc<Cluster>> {
    static SHARED: tokio::sync::OnceCell<Arc<Cluster>> = tokio::sync::OnceCell::const_new();
    let started = SHARED.get_or_try_init(|| async {
        std::fs::create_dir_all(models())?;
        model().write_to(&models().join("model.gguf"))?;
        let mut options = ClusterOptions::quick(0);
        options.nodes = vec![(NODE.into(), Some("edited".into()))];
        options.model_roots.push(models());
        anyhow::Ok(Arc::new(
            Cluster::start(ControlPlane::shared().await?, options).await?,
        ))
    });
    Ok(Arc::clone(started.await?))
}

/// A few milliseconds a token.
fn model() -> RandomLlama {
    RandomLlama {
        seed: 5,
        layers: 6,
        hidden: 512,
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        ffn: 1024,
        vocab: 1024,
        context: 512,
        tensor_type: TensorType::Q8_0,
        tied: false,
    }
}

/// What is edited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edit {
    percent: u64,
    interval: u64,
    niceness: u64,
    class: usize,
    batch: u64,
}

const FREE: Edit = Edit {
    percent: 95,
    interval: 0,
    niceness: 0,
    class: 0,
    batch: 4,
};

impl Edit {
    fn spec(self) -> Value {
        let (class, _) = CLASSES.get(self.class).copied().unwrap_or(("Idle", 3));
        json!({
            "vram": {"maxPercent": 80}, "io": {"class": class, "level": 7}, "maxBatchSize": self.batch,
            "compute": {"maxPercent": self.percent, "minRequestIntervalMillis": self.interval},
            "cpu": {"niceness": self.niceness}, "nodeSelector": {"gogrid.dev/profile": "edited"},
        })
    }

    fn class(self) -> i64 {
        CLASSES.get(self.class).map_or(3, |(_, class)| *class)
    }
}

/// Edits that follow from a seed; no two neighbours have the same nice value, so that each can be seen.
struct Edits(u64);

impl Edits {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % bound
    }

    fn after(&mut self, last: Edit) -> Edit {
        Edit {
            percent: 20 + self.below(76),
            interval: self.below(3) * 20,
            niceness: (last.niceness + 1 + self.below(19)) % 20,
            class: usize::try_from(self.below(2)).unwrap_or(0),
            batch: 1 + self.below(4),
        }
    }
}

/// Applies an edit; its generation.
async fn apply(cluster: &Cluster, edit: Edit) -> Result<i64> {
    let profiles: Api<ResourceProfile> = Api::all(cluster.client.clone());
    let profile = json!({
        "apiVersion": "gogrid.dev/v1alpha1", "kind": "ResourceProfile",
        "metadata": {"name": "edited"}, "spec": edit.spec(),
    });
    let applied = profiles
        .patch(
            "edited",
            &PatchParams::apply("test").force(),
            &Patch::Apply(&profile),
        )
        .await?;
    applied.meta().generation.context("no generation")
}

fn workers(cluster: &Cluster) -> Result<Vec<Seen>> {
    procfs::workers_of(u32::try_from(cluster.process(NODE)?.pid())?)
}

/// Waits until every worker there is gives way as edited.
async fn until_in_force(cluster: &Cluster, edit: Edit, within: Duration) -> Result<()> {
    eventually(within, &format!("{edit:?} in force"), || async {
        for worker in workers(cluster)? {
            // One that ends meanwhile is none any more.
            if procfs::threads(worker.pid).is_ok() {
                procfs::gives_way(worker.pid, i64::try_from(edit.niceness)?, edit.class())?;
                let processors = std::thread::available_parallelism()?.get();
                let rank = session_rank(i8::try_from(edit.niceness)?, u16::try_from(processors)?);
                let found = procfs::autogroup(worker.pid)?;
                ensure!(
                    found.is_none_or(|found| found == i64::from(rank)),
                    "autogroup at nice {found:?}, not {rank}"
                );
            }
        }
        Ok(())
    })
    .await
}

fn lines() -> Vec<String> {
    (0..6)
        .map(|n| record(&format!("r{n}"), &format!("Say something long about {n}."), 300))
        .collect()
}

async fn job(cluster: &Cluster, name: &str) -> Result<InferenceJob> {
    let path = models().join("model.gguf");
    let spec = json!({
        "model": {"uri": format!("file://{}", path.display()), "sha256": sha256(&path)?},
        "input": {"inline": lines()}, "output": {"configMap": name}, "contextTokens": 512,
        "parallelSequences": 4, "generation": {"maxTokens": 300},
    });
    cluster.create_job("default", name, spec).await
}

async fn answers(cluster: &Cluster, job: &InferenceJob) -> Result<BTreeMap<String, String>> {
    let job = cluster.until_finished(job, LONG).await?;
    let results = cluster.results(&job).await?;
    let answers: BTreeMap<String, String> = results
        .iter()
        .filter_map(|r| Some((r["custom_id"].as_str()?.to_owned(), answer(r)?.to_owned())))
        .collect();
    ensure!(
        answers.len() == lines().len() && results.len() == lines().len(),
        "{} results: {results:#?}",
        results.len()
    );
    Ok(answers)
}

fn soak() -> bool {
    std::env::var_os("GOGRID_SOAK").is_some()
}

#[test]
fn every_edit_is_in_force_within_five_seconds_and_no_answer_changes() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        apply(&cluster, FREE).await?;
        let undisturbed = answers(&cluster, &job(&cluster, "undisturbed").await?).await?;
        let (count, pause) = if soak() {
            (200, Duration::from_secs(3))
        } else {
            (20, Duration::ZERO)
        };
        let mut edits = Edits(11);
        let (mut edit, mut slowest, mut seen, mut done) = (FREE, Duration::ZERO, 0, 0);
        let mut jobs = vec![job(&cluster, "edited-0").await?, job(&cluster, "edited-1").await?];
        let mut made = jobs.len();
        let mut last = 0;
        for _ in 0..count {
            eventually(LONG, "a worker", || async {
                ensure!(!workers(&cluster)?.is_empty(), "none");
                Ok(())
            })
            .await?;
            edit = edits.after(edit);
            let begun = Instant::now();
            last = apply(&cluster, edit).await?;
            until_in_force(&cluster, edit, IN_FORCE).await?;
            seen += usize::from(!workers(&cluster)?.is_empty());
            slowest = slowest.max(begun.elapsed());
            tokio::time::sleep(pause).await;
            // Work goes on as long as edits do.
            for slot in &mut jobs {
                let now = cluster.jobs("default").get(&slot.name_any()).await?;
                let conditions = now.status.clone().unwrap_or_default().conditions;
                if gogrid_api::condition::is_true(&conditions, "Finished") {
                    ensure!(
                        answers(&cluster, &now).await? == undisturbed,
                        "{} differs",
                        now.name_any()
                    );
                    done += 1;
                    *slot = job(&cluster, &format!("edited-{made}")).await?;
                    made += 1;
                }
            }
        }
        let edited = Instant::now();
        let nodes: Api<GpuNode> = Api::all(cluster.client.clone());
        eventually(IN_FORCE * 2, "the status to tell the last edit", || async {
            let profiles = nodes.get(NODE).await?.status.unwrap_or_default().profiles;
            ensure!(
                profiles
                    .iter()
                    .any(|p| p.name == "edited" && p.generation == last),
                "{profiles:?}, edited to {last}"
            );
            Ok(())
        })
        .await?;
        let told = edited.elapsed();
        apply(&cluster, FREE).await?;
        for job in &jobs {
            ensure!(
                answers(&cluster, job).await? == undisturbed,
                "{} differs",
                job.name_any()
            );
            done += 1;
        }
        println!(
            "{count} edits, {seen} of them seen on running workers, slowest {slowest:?}; the status told the last after \
             {told:?}; {done} jobs answered as undisturbed"
        );
        ensure!(
            seen * 10 >= count * 8,
            "workers ran during {seen} of {count} edits only"
        );
        Ok(())
    })
}

#[test]
fn a_worker_that_may_not_lower_its_nice_value_hands_over_to_one_that_starts_with_it() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let kind = Edit {
            niceness: 15,
            batch: 1,
            interval: 30,
            ..FREE
        };
        apply(&cluster, kind).await?;
        cluster.process(NODE)?.stop(Duration::from_secs(5));
        let wrapper = models().join(format!("without-{}", Means::Lowering.name()));
        std::os::unix::fs::symlink(program("without-priority")?, &wrapper)?;
        cluster.start_agent_with(NODE, &["--worker-binary", &wrapper.display().to_string()])?;
        cluster.until_node_ready(NODE).await?;
        let questions = Questions::new(8, 250);
        let job = cluster
            .create_job("default", "handed-over", spec(&questions.lines(), "handed-over")?)
            .await?;
        let old = eventually(LONG, "a worker", || async {
            workers(&cluster)?.pop().context("none")
        })
        .await?;
        cluster
            .until(&job, "records to be answered", LONG, |job| {
                let done = job
                    .status
                    .as_ref()
                    .and_then(|s| s.progress.as_ref())
                    .map_or(0, |p| p.done);
                let loaded = job.status.clone().unwrap_or_default().conditions;
                ensure!(
                    done > 0 || gogrid_api::condition::is_true(&loaded, "Loaded"),
                    "{done} done"
                );
                Ok(())
            })
            .await?;
        let less = Edit { niceness: 4, ..kind };
        apply(&cluster, less).await?;
        let new = eventually(Duration::from_secs(30), "another worker", || async {
            let worker = workers(&cluster)?.pop().context("none")?;
            ensure!(worker.pid != old.pid, "the old one");
            procfs::gives_way(worker.pid, 4, less.class())?;
            Ok(worker)
        })
        .await?;
        let job = cluster.until_finished(&job, LONG).await?;
        let results = cluster.results(&job).await?;
        let right = questions.right(&results)?;
        let mut starts: Vec<i64> = results
            .iter()
            .filter_map(|r| r.pointer("/response/body/gogrid/startedMicros")?.as_i64())
            .collect();
        starts.sort_unstable();
        let gap = starts
            .windows(2)
            .map(|w| w[1] - w[0])
            .max()
            .context("no starts")?;
        println!(
            "worker {} handed over to {}: longest gap between two starts {} ms, {right} of {} right",
            old.pid,
            new.pid,
            gap / 1000,
            results.len()
        );
        ensure!(starts.len() == 250, "{} starts", starts.len());
        // Loading this model takes less than a tenth of a second.
        ensure!(gap <= 2_100_000, "{gap} µs without a start");
        cluster.process(NODE)?.stop(Duration::from_secs(5));
        cluster.start_agent(NODE)?;
        cluster.until_node_ready(NODE).await?;
        Ok(())
    })
}

/// A group that goes when the test does.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            println!("{} stays: {error}", self.0.display());
        }
    }
}

#[test]
fn workers_live_in_the_idle_cgroup_that_the_node_offers_and_the_status_says_so() -> Result<()> {
    on_runtime(async {
        let name = format!("gogrid-edits-idle-{}", std::process::id());
        let made = Tree::find().and_then(|tree| {
            let path = tree.root.join(&name);
            tree.make(&path, 1024)?;
            let group = Group(path);
            cgroups::make_idle(&group.0)?;
            Ok(group)
        });
        let group = match made {
            Ok(group) => group,
            Err(error) => {
                println!("SKIPPED: no idle cgroup can be made here: {error:#}");
                return Ok(());
            }
        };
        let cluster = cluster().await?;
        apply(&cluster, FREE).await?;
        cluster.process(NODE)?.stop(Duration::from_secs(5));
        cluster.start_agent_with(NODE, &["--idle-cgroup", &group.0.display().to_string()])?;
        cluster.until_node_ready(NODE).await?;
        let job = job(&cluster, "idle").await?;
        let worker = eventually(LONG, "a worker", || async {
            workers(&cluster)?.pop().context("none")
        })
        .await?;
        eventually(
            Duration::from_secs(10),
            "the worker in the idle cgroup",
            || async {
                ensure!(cgroups::is_in(worker.pid, &name)?, "elsewhere");
                Ok(())
            },
        )
        .await?;
        let nodes: Api<GpuNode> = Api::all(cluster.client.clone());
        eventually(
            Duration::from_secs(15),
            "the status to name the cgroup",
            || async {
                let rows = nodes.get(NODE).await?.status.unwrap_or_default().enforcement;
                let row = rows
                    .iter()
                    .find(|row| row.limit == "niceness")
                    .context("no row")?;
                ensure!(row.mechanism.starts_with("cgroup"), "{row:?}");
                Ok(())
            },
        )
        .await?;
        cluster
            .jobs("default")
            .delete(&job.name_any(), &DeleteParams::default())
            .await?;
        cluster.process(NODE)?.stop(Duration::from_secs(5));
        eventually(Duration::from_secs(10), "the group to be empty", || async {
            let members = std::fs::read_to_string(group.0.join("cgroup.procs"))?;
            ensure!(members.is_empty(), "{members}");
            Ok(())
        })
        .await?;
        drop(group);
        cluster.start_agent(NODE)?;
        cluster.until_node_ready(NODE).await
    })
}
