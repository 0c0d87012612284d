//! A victim that is killed before and after each call of a flow, one kill a run.
//!
//! Counted are all requests to the API server, reads too, but those that go on for ever whether there is work or not: watches
//! and whatever keeps a Lease (the node's heartbeat; the leader's election with its look at the CRDs). An agent's lists are part
//! of its watches. Written by the clock and thus now in a flow, now not: a GpuNode's heartbeat, a profile's counts.
//!
//! Under `GOGRID_SOAK=1` every call of every flow is struck until a run ends before its fault came (`GOGRID_SOAK=kill-before`
//! and `=kill-after`: at that moment only); else some of each.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use gogrid_api::{GpuNode, condition};
use gogrid_tests::cluster::Cluster;
use gogrid_tests::process::Process;
use gogrid_tests::wait::eventually;
use kube::api::Api;

use crate::World;
use crate::end::{End, LONG};
use crate::flows::Flow;

/// No flow makes so many calls; a sweep that gets here makes no progress.
const MOST_CALLS: usize = 200;
const MOMENTS: [&str; 2] = ["kill-before", "kill-after"];

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Victim {
    /// The one operator.
    Operator,
    /// The agent of the node where the flow's jobs begin.
    Agent,
}

impl Victim {
    fn process(self, flow: Flow) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Agent => flow.nodes()[0],
        }
    }

    /// The failure that one death may bring about: of an order whose leader was followed by another before it was taken up,
    /// and of all orders of an agent's session.
    fn cause(self) -> &'static str {
        match self {
            Self::Operator => "StaleTerm",
            Self::Agent => "AgentRestarted",
        }
    }

    fn start(self, cluster: &Cluster, flow: Flow, more: &[&str]) -> Result<Arc<Process>> {
        match self {
            Self::Operator => cluster.start_operator(more),
            Self::Agent => cluster.start_agent_with(self.process(flow), more),
        }
    }

    /// Starts it with a fault in the place of the one that runs; returns when it can work, or is dead.
    async fn replace(self, cluster: &Cluster, flow: Flow, fault: &str) -> Result<Arc<Process>> {
        let name = self.process(flow);
        let former = cluster.process(name)?;
        let nodes: Api<GpuNode> = Api::all(cluster.client.clone());
        let session = async || anyhow::Ok(nodes.get(flow.nodes()[0]).await?.status.unwrap_or_default());
        let old = session().await?.session;
        // An operator that ends in order gives its Lease back; an agent's next session need not wait for it.
        match self {
            Self::Operator => former.stop(LONG),
            Self::Agent => former.kill(),
        }
        let victim = self.start(cluster, flow, &["--fault", fault])?;
        eventually(LONG, "the victim to be ready", || async {
            let ready = match self {
                Self::Operator => victim.log().contains("leading term="),
                Self::Agent => {
                    let now = session().await?;
                    now.session != old && condition::is_true(&now.conditions, "Ready")
                }
            };
            ensure!(ready || !victim.is_running(), "{}", victim.log_tail(10));
            Ok(())
        })
        .await?;
        Ok(victim)
    }
}

/// What a victim's log says of requests that were struck, one a line.
fn struck(victim: &Process) -> Vec<String> {
    let log = victim.log();
    let lines = log.lines().filter_map(|line| line.split_once(" number="));
    lines.map(|(_, call)| call.to_owned()).collect()
}

/// A sweep, and what came of it.
pub(crate) struct Sweep<'a> {
    pub(crate) world: &'a World,
    pub(crate) flow: Flow,
    pub(crate) victim: Victim,
    /// Whether calls of the victim's start are struck as well.
    pub(crate) from_start: bool,
    /// Kills a moment where only some calls are struck.
    pub(crate) sample: usize,
}

impl Sweep<'_> {
    /// Runs it; returns the number of kills.
    pub(crate) async fn run(&self) -> Result<usize> {
        let began = Instant::now();
        let (first, last, undisturbed) = self.undisturbed().await?;
        let (mut kills, mut again, mut failures) = (0, 0, vec![]);
        for (moment, what) in MOMENTS.iter().enumerate() {
            let soak = std::env::var("GOGRID_SOAK").ok();
            if soak
                .as_ref()
                .is_some_and(|only| MOMENTS.contains(&only.as_str()) && only != what)
            {
                continue;
            }
            for call in self.calls(first, last, moment, soak.is_some()) {
                let fault = format!("any:{what}={call}");
                match self.strike(&fault, &format!("{what}-{call}"), &undisturbed).await {
                    Ok(None) => break,
                    Ok(Some(epoch_more)) => {
                        kills += 1;
                        again += usize::from(epoch_more);
                    }
                    Err(error) => {
                        kills += 1;
                        failures.push(format!("{fault}: {error:?}"));
                    }
                }
                ensure!(call < MOST_CALLS, "{what}: no end after {MOST_CALLS} calls");
            }
        }
        let (flow, victim) = (self.flow.name(), self.victim);
        let seconds = began.elapsed().as_secs();
        println!(
            "{flow}, {victim:?}: calls {first} to {last} undisturbed, {kills} kills, {again} of them cost an epoch, {} \
             failures, {seconds} s",
            failures.len()
        );
        ensure!(
            failures.is_empty(),
            "{flow}, {victim:?}: {}",
            failures.join("\n\n")
        );
        Ok(kills)
    }

    /// The first and the last call of the flow by number, and how it ends.
    async fn undisturbed(&self) -> Result<(usize, usize, End)> {
        let victim = self
            .victim
            .replace(&self.world.cluster, self.flow, "any:note=1..")
            .await?;
        let before = struck(&victim).len();
        let name = format!("{}-undisturbed", self.name());
        let end = self.flow.run(self.world, &name).await?;
        let calls = struck(&victim);
        for call in calls.get(before..).unwrap_or_default() {
            println!("{}: {call}", self.name());
        }
        let first = if self.from_start { 1 } else { before + 1 };
        ensure!(calls.len() >= first, "no call was noted: is the fault layer in?");
        Ok((first, calls.len(), end))
    }

    /// Which calls are struck: all, without an end, or some at even distances, others before than after.
    fn calls(&self, first: usize, last: usize, moment: usize, all: bool) -> Box<dyn Iterator<Item = usize>> {
        if all {
            return Box::new(first..);
        }
        let (calls, sample) = (last + 1 - first, self.sample);
        Box::new((0..sample).map(move |n| first + (3 * n + moment + 1) * calls / (3 * sample)))
    }

    fn name(&self) -> String {
        format!("{}-{:?}", self.flow.name(), self.victim).to_lowercase()
    }

    /// One run with one fault; returns nothing when that did not come, else whether it cost an epoch.
    async fn strike(&self, fault: &str, name: &str, undisturbed: &End) -> Result<Option<bool>> {
        let Self {
            world, flow, victim, ..
        } = self;
        let cluster = &world.cluster;
        let doomed = victim.replace(cluster, *flow, fault).await?;
        let name = format!("{}-{name}", self.name());
        let nurse = async {
            while doomed.is_running() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            victim.start(cluster, *flow, &[])
        };
        let mut run = pin!(flow.run(world, &name));
        let (end, died) = tokio::select! {
            biased;
            restarted = nurse => {
                restarted?;
                (run.await, true)
            }
            end = &mut run => (end, false),
        };
        if !died {
            // Its fault may come yet, and would strike in what comes after.
            doomed.kill();
            victim.start(cluster, *flow, &[])?;
        }
        let call = struck(&doomed).pop().unwrap_or_default();
        let struck_at = || format!("struck at {call}");
        let compared = match (end.with_context(struck_at)?, undisturbed) {
            (Some(over), Some(undisturbed)) => over.explained(undisturbed, victim.cause()),
            (None, None) => Ok(false),
            (end, _) => bail!("ended as {end:?}"),
        };
        let epoch_more = compared.with_context(struck_at)?;
        Ok(died.then_some(epoch_more))
    }
}
