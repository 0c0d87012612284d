//! The soak from beginning to end.
//!
//! Owns: what runs, the order of the phases, and what is measured in each.

#![allow(clippy::disallowed_methods, reason = "measures")]

use super::board::Board;
use super::fleet::{self, Fleet};
use super::load::{say, submit, until};
use super::meter::{self, Meter, Reading};
use super::number;
use super::report::{Bar, Latency, Phase, Report};
use super::tally::{Kind, Tally, WINDOW, Who};
use crate::chart;
use crate::cluster::{Cluster, ClusterOptions, NAMESPACE};
use crate::controlplane::{AuditTail, ControlPlane, ControlPlaneOptions};
use crate::sim::cluster::{TEAM, job, record};
use crate::sim::node::MODEL_ROOT;
use crate::sim::time::lock;
use crate::wait::eventually;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use gogrid_api::names::ROLE_LABEL;
use gogrid_api::{Assignment, GpuNode, InferenceJob, LeaseTiming, condition};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Names of the jobs of the second phase, and of the third.
const LOAD: &str = "load-";
const STEADY: &str = "steady-";
/// Agents started a second.
const AGENTS_A_SECOND: u32 = 30;
/// Everything at rest: what was begun before has been written.
const SETTLED: Duration = Duration::from_secs(15);

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Agents, each on a node of its own.
    pub agents: usize,
    /// Jobs of the second phase.
    pub jobs: usize,
    /// Jobs a second.
    pub rate: u32,
    /// Records of each of those jobs; each takes 0.6 to 5 s.
    pub records: u64,
    /// Length of the first phase.
    pub idle: Duration,
    /// Length of the third phase.
    pub steady: Duration,
    /// How long each record of the third phase's jobs takes.
    pub steady_record: Duration,
    /// Where logs are kept; nowhere when `None`.
    pub dir: Option<PathBuf>,
    /// More flags for the API server.
    pub api_server_flags: Vec<String>,
}

struct Moment {
    at: Timestamp,
    reading: Reading,
}

struct Soak {
    options: Options,
    begun: Instant,
    client: Client,
    cluster: Cluster,
    fleet: Fleet,
    board: Arc<Board>,
    tally: Arc<Mutex<Tally>>,
    meter: Arc<Meter>,
    observer: JoinHandle<Result<()>>,
}

/// Runs it.
pub async fn run(options: Options) -> Result<Report> {
    let limits = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limits.maximum,
            ..limits
        },
    )?;
    let control = ControlPlane::start(ControlPlaneOptions {
        dir: options.dir.clone(),
        api_server_flags: options.api_server_flags.clone(),
        ..ControlPlaneOptions::default()
    });
    let control = Arc::new(control.await?);
    let outcome = soak(options, Arc::clone(&control)).await;
    // The observer has a share of it.
    control.stop();
    outcome
}

async fn soak(options: Options, control: Arc<ControlPlane>) -> Result<Report> {
    let soak = Soak::start(options, control).await?;
    match soak.phases().await {
        Ok(report) => Ok(report),
        Err(error) => Err(error.context(soak.cluster.log_tails(20))),
    }
}

/// Reads the audit log and looks at the processes twice a second, until one of them has ended.
async fn follow(mut tail: AuditTail, tally: Arc<Mutex<Tally>>, meter: &Meter) -> Result<()> {
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let counts = Arc::clone(&tally);
        let read = move || tail.more(|event| lock(&counts).take(&event)).map(|()| tail);
        tail = tokio::task::spawn_blocking(read).await??;
        meter.look()?;
    }
}

/// Watches, reads the audit log and looks at processes on a thread that a thousand agents don't hold up.
fn observe(
    control: Arc<ControlPlane>,
    board: Arc<Board>,
    tally: Arc<Mutex<Tally>>,
    meter: Arc<Meter>,
) -> Result<JoinHandle<Result<()>>> {
    let tail = control.audit_tail()?;
    let thread = std::thread::Builder::new().name("observer".into());
    Ok(thread.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let jobs: Api<InferenceJob> = Api::namespaced(control.admin_client().await?, TEAM);
            tokio::select! {
                ended = board.watch(jobs) => ended,
                ended = follow(tail, tally, &meter) => ended,
            }
        })
    })?)
}

impl Soak {
    async fn start(options: Options, control: Arc<ControlPlane>) -> Result<Self> {
        let begun = Instant::now();
        let quick = ClusterOptions::quick(0);
        let cluster_options = ClusterOptions {
            lease_seconds: u32::try_from(LeaseTiming::default().lease().0 / 1000)?,
            model_roots: vec![MODEL_ROOT.into()],
            ..quick
        };
        let cluster = Cluster::install(Arc::clone(&control), cluster_options).await?;
        let client = control.admin_client().await?;
        // No kubelet would ever run its pods, and a thousand of them are a load of their own.
        let sets: Api<DaemonSet> = Api::namespaced(client.clone(), NAMESPACE);
        sets.delete(chart::AGENT, &DeleteParams::default()).await?;
        control.ensure_namespace(TEAM).await?;
        say(begun, &format!("admitting {} nodes", options.agents));
        let admitted = fleet::admit(&control, options.agents).await?;
        let operator = cluster.start_operator(&[])?;
        cluster.until_presets().await?;
        let [etcd, server, controllers] = *control.pids() else {
            bail!("the control plane has no controllers");
        };
        let mut processes = vec![("this program", std::process::id())];
        let children = [
            ("operator", operator.pid()),
            ("kube-apiserver", server),
            ("etcd", etcd),
            ("kube-controller-manager", controllers),
        ];
        for (name, pid) in children {
            processes.push((name, u32::try_from(pid)?));
        }
        let (board, tally, meter) = (
            Arc::<Board>::default(),
            Arc::<Mutex<Tally>>::default(),
            Arc::new(Meter::new(processes)),
        );
        let observer = observe(
            Arc::clone(&control),
            Arc::clone(&board),
            Arc::clone(&tally),
            Arc::clone(&meter),
        )?;
        let spread = Duration::from_secs(1) * u32::try_from(options.agents)? / AGENTS_A_SECOND;
        say(begun, &format!("starting agents over {} s", spread.as_secs()));
        let fleet = Fleet::start(admitted, spread).await?;
        let soak = Self {
            options,
            begun,
            client,
            cluster,
            fleet,
            board,
            tally,
            meter,
            observer,
        };
        soak.until_ready().await?;
        tokio::time::sleep(SETTLED).await;
        Ok(soak)
    }

    async fn until_ready(&self) -> Result<()> {
        let nodes: Api<GpuNode> = Api::all(self.client.clone());
        let within = Duration::from_secs(300);
        eventually(within, "every GpuNode to be Ready", || async {
            // A list of them all is a load as well.
            tokio::time::sleep(Duration::from_secs(2)).await;
            let all = nodes.list(&ListParams::default()).await?.items;
            let ready = |node: &&GpuNode| {
                let status = node.status.as_ref();
                status.is_some_and(|s| condition::is_true(&s.conditions, "Ready"))
            };
            let ready = all.iter().filter(ready).count();
            ensure!(ready == self.options.agents, "{ready} are");
            Ok(())
        })
        .await
        .with_context(|| self.cluster.log_tails(20))
    }

    fn healthy(&self) -> Result<()> {
        ensure!(!self.observer.is_finished(), "the observer ended: a program has");
        Ok(())
    }

    async fn moment(&self) -> Result<Moment> {
        Ok(Moment {
            reading: self.meter.read(&self.client).await?,
            at: Timestamp::now(),
        })
    }

    async fn phase(&self, name: &'static str, from: &Moment, until: &Moment) -> Result<Phase> {
        // The log is behind by as much as it takes to read it.
        tokio::time::sleep(Duration::from_secs(2)).await;
        self.healthy()?;
        let used = meter::used(&from.reading, &until.reading);
        let tally = lock(&self.tally);
        let writes = tally.between(from.at, until.at);
        let (all, one) = tally.worst(from.at, until.at);
        let beats: u64 = writes.iter().filter(|w| w.0.of_a_node()).map(|w| w.1).sum();
        let nodes = number(u64::try_from(self.options.agents)?);
        let window = number(u64::try_from(WINDOW)?);
        let pace = worst_pace(&self.board.progress(from.reading.at, until.reading.at));
        say(self.begun, &format!("{name}: {used:?}"));
        Ok(Phase {
            name,
            agent_writes: number(beats) / nodes / (used.seconds / window),
            agent_writes_worst_window: number(all) / nodes,
            agent_writes_worst_node: one,
            progress_worst: pace,
            progress: self.board.progress(from.reading.at, until.reading.at).len(),
            writes: named(&writes),
            used,
        })
    }

    async fn idle(&self) -> Result<Phase> {
        say(self.begun, "idle");
        let from = self.moment().await?;
        tokio::time::sleep(self.options.idle).await;
        let until = self.moment().await?;
        self.phase("idle", &from, &until).await
    }

    /// Also what a job's life cost in writes, without progress and Events, and Events alone.
    async fn load(&self) -> Result<(Phase, f64, f64)> {
        let Options {
            jobs, rate, records, ..
        } = self.options;
        say(self.begun, &format!("{jobs} jobs at {rate} a second"));
        let from = self.moment().await?;
        let made = (1..=jobs).map(|n| {
            let name = format!("{LOAD}{n:05}");
            let lines: Vec<String> = (1..=records).map(|r| record(&name, r, 1, None)).collect();
            job(&name, &lines)
        });
        let made = made.collect::<Result<_, _>>()?;
        let all = until(
            self.begun,
            &self.board,
            LOAD,
            "jobs",
            || self.healthy(),
            |c| c.over == jobs,
        );
        tokio::try_join!(submit(&self.client, &self.board, made, rate), all)?;
        self.until_tidy().await?;
        let end = self.moment().await?;
        let phase = self.phase("load", &from, &end).await?;
        let writes = lock(&self.tally).between(from.at, end.at);
        let sum = |of: fn(&Kind) -> bool| -> u64 { writes.iter().filter(|w| of(w.0)).map(|w| w.1).sum() };
        let progress = u64::try_from(phase.progress)?;
        let per_job = |count: u64| number(count) / number(u64::try_from(jobs).unwrap_or(u64::MAX).max(1));
        let life = sum(Kind::of_a_job).saturating_sub(progress);
        let events = sum(|kind| kind.who == Who::Operator && kind.resource() == "events");
        Ok((phase, per_job(life), per_job(events)))
    }

    /// Nothing that was made for a job is left, but for what the garbage collector removes.
    async fn until_tidy(&self) -> Result<()> {
        let orders: Api<Assignment> = Api::namespaced(self.client.clone(), NAMESPACE);
        let inputs: Api<ConfigMap> = Api::namespaced(self.client.clone(), NAMESPACE);
        eventually(
            Duration::from_secs(120),
            "orders and inputs to be gone",
            || async {
                let one = ListParams::default().limit(1);
                let left = orders.list_metadata(&one).await?.items.len();
                let of_role = one.labels(&format!("{ROLE_LABEL}=input"));
                let left = left + inputs.list_metadata(&of_role).await?.items.len();
                ensure!(left == 0, "some are left");
                Ok(())
            },
        )
        .await
    }

    async fn steady(&self) -> Result<Phase> {
        let Options {
            agents,
            rate,
            steady_record,
            ..
        } = self.options;
        say(self.begun, &format!("{agents} long jobs"));
        let millis = u64::try_from(steady_record.as_millis())?;
        // Enough for ten minutes, whatever it takes until all run.
        let records = 600_000_u64.div_ceil(millis.max(1)).clamp(2, 1_000);
        let made = (1..=agents).map(|n| {
            let name = format!("{STEADY}{n:05}");
            let lines: Vec<String> = (1..=records).map(|r| record(&name, r, 1, Some(millis))).collect();
            job(&name, &lines)
        });
        submit(&self.client, &self.board, made.collect::<Result<_, _>>()?, rate).await?;
        until(
            self.begun,
            &self.board,
            STEADY,
            "long jobs",
            || self.healthy(),
            |c| c.running == agents,
        )
        .await?;
        tokio::time::sleep(SETTLED).await;
        say(self.begun, "steady");
        let from = self.moment().await?;
        tokio::time::sleep(self.options.steady).await;
        let until = self.moment().await?;
        self.phase("steady", &from, &until).await
    }

    async fn phases(&self) -> Result<Report> {
        let idle = self.idle().await?;
        let (load, writes_per_job, events_per_job) = self.load().await?;
        let steady = self.steady().await?;
        let placements = self.board.placements(LOAD);
        let memory = self.meter.peaks();
        let operator = memory.get("operator").copied();
        let operator = operator.ok_or_else(|| anyhow!("the operator was never seen"))?;
        let latency = Latency::of(&placements);
        let bars = vec![
            Bar::new(
                "agent writes per node and 10 s, steady",
                1.4,
                steady.agent_writes,
                "",
            ),
            Bar::new("writes per job's life besides progress", 8.0, writes_per_job, ""),
            Bar::new(
                "progress writes, worst 10 s",
                20.0,
                load.progress_worst.max(steady.progress_worst),
                "/s",
            ),
            Bar::new("placement p99", 1_000.0, latency.p99, "ms"),
            Bar::new("operator's memory, peak", 150.0, operator, "MiB"),
        ];
        let mut wrong = self.fleet.wrong();
        let again = self.board.counts("").again;
        if again > 0 {
            wrong.push(format!("{again} times a job was placed again"));
        }
        let failed = self.board.counts("").failed;
        if failed > 0 {
            wrong.push(format!("{failed} jobs failed"));
        }
        let refused = lock(&self.tally).refused();
        Ok(Report {
            agents: self.options.agents,
            jobs: self.options.jobs,
            rate: self.options.rate,
            bars,
            latency,
            events_per_job,
            phases: vec![idle, load, steady],
            memory_mib: memory,
            turns: self.board.turns(),
            refused,
            wrong,
        })
    }
}

fn named(writes: &BTreeMap<Kind, u64>) -> BTreeMap<String, u64> {
    let name = |kind: &Kind| format!("{:?} {}", kind.who, kind.what);
    writes.iter().map(|(kind, count)| (name(kind), *count)).collect()
}

/// The most of these moments that lie within one window, a second.
fn worst_pace(moments: &[Instant]) -> f64 {
    let window = Duration::from_secs(u64::try_from(WINDOW).unwrap_or(10));
    let mut sorted = moments.to_vec();
    sorted.sort();
    let within = |(n, first): (usize, &Instant)| {
        let later = sorted.get(n..).unwrap_or_default();
        later.partition_point(|at| at.duration_since(*first) < window)
    };
    let most = sorted.iter().enumerate().map(within).max().unwrap_or(0);
    number(u64::try_from(most).unwrap_or(u64::MAX)) / window.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_pace_is_that_of_the_fullest_window() {
        let begun = Instant::now();
        let moments = [0, 1, 15, 16, 17, 24, 26].map(|s| begun + Duration::from_secs(s));
        assert!((worst_pace(&moments) - 0.4).abs() < 1e-9);
        assert!(worst_pace(&[]).abs() < 1e-9);
    }
}
