//! The one cluster of this test binary, and what is measured on it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{InferenceJob, names};
use gogrid_tests::cluster::{Cluster, ClusterOptions, tenths_of_lease};
use gogrid_tests::controlplane::{AuditEvent, ControlPlane};
use gogrid_tests::jobs::{Questions, lasting, short, spec, succeeded};
use gogrid_tests::netns::Outpost;
use gogrid_tests::steps::{self, Step, boottime_of};
use gogrid_tests::wait::eventually;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;

/// Longer than anything takes that has to happen.
pub(crate) fn long() -> Duration {
    tenths_of_lease(225)
}
/// Label of two nodes that stand in for each other, and for no others.
const PAIR: &str = "gogrid.test/pair";
/// Pairs and their nodes: a scenario of its own each, so that several can go on at once.
const PAIRS: [(&str, [&str; 2]); 4] = [
    ("cut", ["cut-1", "cut-2"]),
    ("one", ["one-1", "one-2"]),
    ("two", ["two-1", "two-2"]),
    ("three", ["three-1", "three-2"]),
];

/// What all tests here share.
pub(crate) struct World {
    pub(crate) cluster: Cluster,
    /// By node: the nodes of pair `cut` are here, where this user may make networks.
    pub(crate) outposts: BTreeMap<String, Outpost>,
}

/// The world, made by whoever asks first.
pub(crate) async fn world() -> Result<Arc<World>> {
    static SHARED: tokio::sync::OnceCell<Arc<World>> = tokio::sync::OnceCell::const_new();
    let made = SHARED.get_or_try_init(|| async { anyhow::Ok(Arc::new(make().await?)) });
    Ok(Arc::clone(made.await?))
}

async fn make() -> Result<World> {
    let control = ControlPlane::shared().await?;
    let mut options = ClusterOptions::quick(0);
    let nodes = || {
        PAIRS
            .iter()
            .flat_map(|(pair, nodes)| nodes.map(|node| (*pair, node)))
    };
    options.nodes = nodes()
        .map(|(_, node)| (node.to_owned(), Some("aggressive".to_owned())))
        .collect();
    options.stamped = true;
    // So little that two large jobs don't fit beside each other.
    options.agent_args = ["--workers-memory-limit=2Gi", "--cpu-memory-reserve=128Mi"]
        .map(str::to_owned)
        .into();
    // Wall clocks decide nothing: those of pair `one` are an hour fast and an hour slow.
    for (node, offset) in World::nodes("one").into_iter().zip(["3600", "-3600"]) {
        let flags = ["--wall-offset-seconds", offset].map(str::to_owned);
        options.node_args.insert(node.to_owned(), flags.into());
    }
    let mut outposts = BTreeMap::new();
    if rustix::process::geteuid().is_root() {
        for node in PAIRS[0].1 {
            let outpost = Outpost::start(node, control.dir(), control.address()).await?;
            outposts.insert(node.to_owned(), outpost);
        }
    }
    let cluster = Cluster::install(control, options).await?;
    let api: Api<Node> = Api::all(cluster.client.clone());
    for (pair, node) in nodes() {
        let label = Patch::Merge(json!({"metadata": {"labels": {PAIR: pair}}}));
        api.patch(node, &PatchParams::default(), &label).await?;
    }
    cluster.begin(&outposts).await?;
    Ok(World { cluster, outposts })
}

/// A job that takes some seconds, and when it began.
pub(crate) struct Run {
    pub(crate) job: InferenceJob,
    pub(crate) questions: Questions,
    pub(crate) pair: &'static str,
    /// Where it computes first.
    pub(crate) node: String,
    pub(crate) since: Timestamp,
}

impl World {
    /// Nodes of that pair.
    pub(crate) fn nodes(pair: &str) -> [&'static str; 2] {
        let found = PAIRS.iter().find(|(name, _)| *name == pair);
        found.map_or(PAIRS[0].1, |(_, nodes)| *nodes)
    }

    /// Starts a job of `records` (at least 100 ms each, and as many more as leases are longer than 4 s) on either node of a
    /// pair, and returns once it computes.
    pub(crate) async fn run(&self, name: &str, pair: &'static str, records: usize) -> Result<Run> {
        self.run_with(name, pair, records, json!({})).await
    }

    /// As [`Self::run`], with more in its spec.
    pub(crate) async fn run_with(
        &self,
        name: &str,
        pair: &'static str,
        records: usize,
        more: serde_json::Value,
    ) -> Result<Run> {
        let since = self.cluster.control.now();
        let questions = Questions::new(3, lasting(records));
        let mut spec = spec(&[], name)?;
        let input = format!("{name}-input");
        spec["input"] = self
            .cluster
            .create_input("default", &input, &questions.lines())
            .await?;
        spec["profileName"] = json!("conservative");
        spec["placement"] = json!({"nodeSelector": {PAIR: pair}});
        for (key, value) in more.as_object().context("not an object")? {
            spec[key] = value.clone();
        }
        let job = self.cluster.create_job("default", name, spec).await?;
        let job = self
            .cluster
            .until_reason(&job, "Loaded", "Loaded", long())
            .await?;
        let placement = job.status.clone().and_then(|s| s.placement);
        let node = placement.context("no placement")?.node_name;
        let run = Run {
            job,
            questions,
            pair,
            node,
            since,
        };
        eventually(long(), "a first step", || async {
            ensure!(!self.steps(&run)?.is_empty(), "none");
            Ok(())
        })
        .await?;
        Ok(run)
    }

    /// Steps of the job, on whichever node of its pair.
    pub(crate) fn steps(&self, run: &Run) -> Result<Vec<Step>> {
        let dirs = Self::nodes(run.pair).map(|node| self.cluster.stamps_dir(node));
        steps::read(&dirs, boottime_of(run.since)?)
    }

    /// Waits until the job is over, every record answered once and nearly all right, no two workers having computed at
    /// once; deletes it. Returns its epoch.
    pub(crate) async fn finished(&self, run: &Run) -> Result<i64> {
        let job = self.cluster.until_finished(&run.job, long()).await?;
        let status = job.status.clone().unwrap_or_default();
        let name = job.name_any();
        succeeded(&job)?;
        let (right, asked) = (
            run.questions.right(&self.cluster.results(&job).await?)?,
            run.questions.asked().count(),
        );
        ensure!(right * 100 >= asked * 90, "{name}: {right} of {asked} right");
        let steps = self.steps(run)?;
        let overlap = steps::overlap(&steps);
        ensure!(
            overlap.is_zero(),
            "{name}: two workers computed at once for {overlap:?}"
        );
        let jobs = self.cluster.jobs("default");
        jobs.delete(&name, &DeleteParams::default()).await?;
        Ok(status.epoch)
    }

    /// Waits until the job has another epoch than its first.
    pub(crate) async fn moved(&self, run: &Run, within: Duration) -> Result<InferenceJob> {
        self.cluster
            .until(&run.job, "another epoch", within, |job| {
                let status = job.status.clone().unwrap_or_default();
                ensure!(
                    status.epoch > 1,
                    "epoch {}, {}",
                    status.epoch,
                    short(&status.conditions)
                );
                Ok(())
            })
            .await
    }

    /// The creation of the assignment of that epoch, by the API server's log.
    pub(crate) fn placed(&self, run: &Run, epoch: i64) -> Result<AuditEvent> {
        let name = names::assignment(&run.job.uid().context("no uid")?, epoch);
        let mut all = self.accepted(run.since)?;
        all.retain(|e| e.verb == "create" && e.resource == "assignments" && e.name == name);
        ensure!(all.len() == 1, "{name} was created {} times", all.len());
        all.pop().context("not created")
    }

    /// What of GoGrid's writes the API server has taken since then.
    pub(crate) fn accepted(&self, since: Timestamp) -> Result<Vec<AuditEvent>> {
        let control = &self.cluster.control;
        control.audit_accepted(since, control.now())
    }

    /// Checks a move off a node that fell silent: its worker had taken its last step in time after the last renewal, the
    /// operator waited for the lease and the drift margin and no longer than half a lease, and no step of the second
    /// worker precedes the last of the first. Returns the creation of the second assignment.
    pub(crate) fn moved_in_time(&self, run: &Run) -> Result<AuditEvent> {
        let placed = self.placed(run, 2)?;
        let earlier = jiff::SignedDuration::try_from(tenths_of_lease(10))?;
        let mut renewals = self.accepted(run.since - earlier)?;
        let lease = names::node_lease(&run.node);
        renewals.retain(|e| e.resource == "leases" && e.name == lease && e.at < placed.received);
        let renewal = renewals.pop().context("no renewal")?;
        let second = boottime_of(placed.received)?;
        let steps = self.steps(run)?;
        let (before, after): (Vec<&Step>, Vec<&Step>) = steps.iter().partition(|s| s.from < second);
        let last = before
            .iter()
            .map(|s| s.until)
            .max()
            .context("no step before it")?;
        ensure!(!after.is_empty(), "no step after it");
        let stopped = Duration::from_nanos(last.saturating_sub(boottime_of(renewal.received)?));
        let elsewhere = placed.received.duration_since(renewal.at).unsigned_abs();
        println!(
            "{}: last step {} ms after the last renewal, placed again {} ms after it, first step {} ms after the last",
            run.job.name_any(),
            stopped.as_millis(),
            elsewhere.as_millis(),
            (after[0].from - last) / 1_000_000
        );
        ensure!(
            after.iter().all(|s| !before.iter().any(|b| b.worker == s.worker)),
            "a worker of the first epoch went on after the second began"
        );
        // 35, 45 and 60 of the 40 seconds of a lease.
        let lease = tenths_of_lease(10);
        ensure!(
            stopped <= lease * 35 / 40,
            "the last step came {stopped:?} after the last renewal"
        );
        ensure!(
            elsewhere >= lease * 45 / 40,
            "placed again after {elsewhere:?}: before it was safe"
        );
        ensure!(
            elsewhere <= lease * 60 / 40,
            "placed again only after {elsewhere:?}"
        );
        Ok(placed)
    }
}

/// A process's number as /proc has it.
pub(crate) fn pid(cluster: &Cluster, name: &str) -> Result<u32> {
    Ok(u32::try_from(cluster.process(name)?.pid())?)
}
