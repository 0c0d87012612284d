//! A real agent beside the simulated driver: what the GpuNode says, what goes on, what it costs.

use std::path::PathBuf;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gogrid_api::node::{Device, Health};
use gogrid_api::{Bytes, Condition, GpuNode, GpuNodeStatus, InferenceJob, ResourceProfile, condition, names};
use gogrid_simnvml::{Lost, SCENARIO_VARIABLE, Scenario};
use gogrid_tests::cluster::{Cluster, ClusterOptions, on_runtime};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, spec};
use gogrid_tests::ports;
use gogrid_tests::procfs;
use gogrid_tests::prometheus::get;
use gogrid_tests::wait::{eventually, throughout};
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::library;

const SOON: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(120);

/// A GoGrid of one node whose driver is simulated.
pub(crate) struct Bench {
    pub(crate) cluster: Cluster,
    pub(crate) node: String,
    metrics: u16,
    dir: tempfile::TempDir,
}

impl Bench {
    pub(crate) async fn start(
        node: &str,
        scenario: &Scenario,
        lease_seconds: u32,
        args: &[&str],
    ) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("scenario.json");
        scenario.write(&path)?;
        let mut options = ClusterOptions::quick(0);
        options.nodes = vec![(node.to_owned(), Some("conservative".to_owned()))];
        options.lease_seconds = lease_seconds;
        options.agent_args = vec!["--nvml-library".into(), library()?.display().to_string()];
        options.agent_args.extend(args.iter().map(|&arg| arg.to_owned()));
        let metrics = ports::fixed()?;
        options.metrics.insert(node.to_owned(), metrics);
        options.agent_env = vec![(SCENARIO_VARIABLE.into(), path.display().to_string())];
        let cluster = Cluster::start(ControlPlane::shared().await?, options).await?;
        Ok(Self {
            cluster,
            node: node.to_owned(),
            metrics: metrics.port(),
            dir,
        })
    }

    pub(crate) fn set(&self, scenario: &Scenario) -> Result<()> {
        Ok(scenario.write(&self.path())?)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("scenario.json")
    }

    pub(crate) async fn status(&self) -> Result<GpuNodeStatus> {
        let nodes: Api<GpuNode> = Api::all(self.cluster.client.clone());
        Ok(nodes.get(&self.node).await?.status.unwrap_or_default())
    }

    async fn driver(&self) -> Result<Condition> {
        let status = self.status().await?;
        condition::find(&status.conditions, "DriverReady")
            .cloned()
            .with_context(|| format!("{:?}", status.conditions))
    }

    async fn until_driver(&self, reason: &str) -> Result<Condition> {
        eventually(SOON, &format!("DriverReady/{reason}"), || async {
            let found = self.driver().await?;
            ensure!(found.reason == reason, "{found:?}");
            Ok(found)
        })
        .await
        .with_context(|| self.cluster.log_tails(15))
    }

    pub(crate) async fn until_devices(
        &self,
        what: &str,
        accept: impl Fn(&[Device]) -> bool,
    ) -> Result<Vec<Device>> {
        eventually(SOON, what, || async {
            let devices: Vec<Device> = self.status().await?.devices.into_iter().skip(1).collect();
            ensure!(accept(&devices), "{devices:?}");
            Ok(devices)
        })
        .await
        .with_context(|| self.cluster.log_tails(15))
    }

    fn agent(&self) -> Result<u32> {
        Ok(u32::try_from(self.cluster.process(&self.node)?.pid())?)
    }

    /// The agent's probe of the driver, if one runs.
    pub(crate) fn probe(&self) -> Result<Option<u32>> {
        let agent = self.agent()?;
        let all = procfs::processes()?;
        Ok(all
            .iter()
            .find(|p| p.parent == agent && p.command.contains("probe-nvml"))
            .map(|p| p.pid))
    }
}

#[test]
fn sixteen_cards_with_calls_of_4_ms_are_all_listed_at_under_1_percent_of_a_core() -> Result<()> {
    on_runtime(async {
        let mut scenario = Scenario::cards(16);
        scenario.slow_millis = 4;
        scenario.devices[15].lost = Lost::Calls;
        // Leases and rounds at the pace of production.
        let bench = Bench::start("sixteen", &scenario, 40, &[]).await?;
        let devices = bench
            .until_devices("15 cards as measured", |d| {
                d.len() == 15 && d.iter().all(|d| d.memory_total.bytes() == Ok(Bytes(24 << 30)))
            })
            .await?;
        for (index, device) in devices.iter().enumerate() {
            ensure!(device.uuid.starts_with(&format!("GPU-{index:08x}")), "{device:?}");
            ensure!(
                device.name == "NVIDIA GeForce RTX 4090"
                    && device.compute_capability.as_deref() == Some("8.9")
            );
            ensure!(
                device.memory_reserved.bytes()? == Bytes(1 << 30)
                    && device.memory_foreign.bytes()? == Bytes(2 << 30)
            );
            ensure!(device.memory_free.bytes()? == Bytes(21 << 30));
            // No build has a CUDA worker yet: shown, and never used.
            ensure!(device.health == Health::Unhealthy);
            ensure!(
                device.message.as_deref() == Some("this build has no CUDA worker"),
                "{device:?}"
            );
        }
        let found = bench.until_driver("DevicesLost").await?;
        ensure!(
            found.message.contains("GPU 15") && found.message.contains("580.95.05"),
            "{found:?}"
        );
        // The lost card comes back: seen by a driver that is loaded anew.
        let log = bench.path().with_file_name("calls");
        scenario.devices[15].lost = Lost::No;
        scenario.calls = Some(log.clone());
        bench.set(&scenario)?;
        bench.until_devices("16 cards", |d| d.len() == 16).await?;
        bench.until_driver("DriverAnswers").await?;

        let (agent, probe) = (bench.agent()?, bench.probe()?.context("no probe runs")?);
        let ticks = || anyhow::Ok((procfs::cpu_ticks(agent)?, procfs::cpu_ticks(probe)?));
        std::fs::write(&log, "")?;
        let (began, before) = (Instant::now(), ticks()?);
        // One round at least, wherever it begins.
        tokio::time::sleep(Duration::from_secs(12)).await;
        let (seconds, after) = (began.elapsed().as_secs_f64(), ticks()?);
        let calls = std::fs::read_to_string(&log)?;
        let percent = |ticks: i64| anyhow::Ok(f64::from(i32::try_from(ticks)?) / seconds);
        let (of_agent, of_probe) = (percent(after.0 - before.0)?, percent(after.1 - before.1)?);
        let count = |wanted: fn(&str) -> bool| calls.lines().filter(|line| wanted(line)).count();
        let memory = count(|call| call == "nvmlDeviceGetMemoryInfo_v2");
        let lists = count(|call| call.contains("Processes") || call.contains("ProcessUtil"));
        let kib = procfs::resident_kib(agent)?;
        println!(
            "16 cards over {seconds:.1} s: agent {of_agent:.2} %, probe {of_probe:.2} % of a core; agent {kib} KiB, probe {} \
             KiB resident; {memory} memory calls, {lists} process lists",
            procfs::resident_kib(probe)?
        );
        // Debug builds, and both together.
        ensure!(
            of_agent + of_probe <= 1.0,
            "{of_agent:.2} % and {of_probe:.2} % of a core"
        );
        ensure!(
            (16..=16 * 2).contains(&memory) && lists == 0,
            "{memory} memory calls, {lists} lists"
        );
        ensure!(kib <= 30 << 10, "{kib} KiB");
        Ok(())
    })
}

#[test]
fn a_driver_that_hangs_vanishes_or_is_released_is_a_condition_and_jobs_on_the_cpu_go_on() -> Result<()> {
    on_runtime(async {
        let mut scenario = Scenario::cards(2);
        let bench = Bench::start("moody", &scenario, 4, &["--driver-second-millis", "100"]).await?;
        bench.until_driver("DriverAnswers").await?;
        let questions = Questions::new(41, 60);
        let job = bench
            .cluster
            .create_job(
                "default",
                "beside-a-driver",
                spec(&questions.lines(), "beside-a-driver")?,
            )
            .await?;
        bench.cluster.until_reason(&job, "Loaded", "Loaded", LONG).await?;

        scenario.hang = vec!["nvmlDeviceGetMemoryInfo_v2".into()];
        bench.set(&scenario)?;
        let found = bench.until_driver("DriverUnresponsive").await?;
        ensure!(
            found.message.contains("200 ms") && found.message.contains("GPU-0000000"),
            "{found:?}"
        );
        let devices = bench.until_devices("sick cards", |d| d.len() == 2).await?;
        ensure!(
            devices.iter().all(|d| d.health == Health::Unhealthy),
            "{devices:?}"
        );
        ensure!(
            devices[0].message.as_deref() == Some("the driver does not answer"),
            "{devices:?}"
        );

        scenario.hang.clear();
        bench.set(&scenario)?;
        bench.until_driver("DriverAnswers").await?;

        // Asked to let go, as before an upgrade of the driver: no process of ours has its library open.
        let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(bench.cluster.client.clone());
        let label = |value: Option<&str>| json!({"metadata": {"labels": {names::DRIVER_NODE_LABEL: value}}});
        let patch = label(Some(names::DRIVER_RELEASED));
        nodes
            .patch(&bench.node, &PatchParams::default(), &Patch::Merge(&patch))
            .await?;
        bench.until_driver("DriverReleased").await?;
        throughout(Duration::from_secs(1), "no probe", || async {
            ensure!(bench.probe()?.is_none());
            Ok(())
        })
        .await?;
        scenario.driver = "610.10".into();
        scenario.resets += 1;
        bench.set(&scenario)?;
        nodes
            .patch(&bench.node, &PatchParams::default(), &Patch::Merge(&label(None)))
            .await?;
        let found = bench.until_driver("DriverAnswers").await?;
        ensure!(found.message.contains("610.10"), "{found:?}");

        // Reset under our hands.
        scenario.resets += 1;
        scenario.driver = "610.20".into();
        bench.set(&scenario)?;
        eventually(SOON, "the driver loaded anew", || async {
            let found = bench.driver().await?;
            ensure!(found.message.contains("610.20"), "{found:?}");
            Ok(())
        })
        .await?;
        // Unloaded: whoever asks again finds none.
        scenario.codes.insert("nvmlInit_v2".into(), 9);
        scenario.resets += 1;
        bench.set(&scenario)?;
        let found = bench.until_driver("NoDriver").await?;
        ensure!(
            found.message.contains("not loaded") && found.message.contains("CPU only"),
            "{found:?}"
        );
        bench.until_devices("no cards", <[Device]>::is_empty).await?;

        let job = bench.cluster.until_finished(&job, LONG).await?;
        let status = job.status.clone().unwrap_or_default();
        ensure!(
            condition::is_true(&status.conditions, "Succeeded") && status.epoch == 1,
            "{status:?}"
        );
        questions.right(&bench.cluster.results(&job).await?)?;
        Ok(())
    })
}

#[test]
fn a_card_lost_under_a_job_ends_only_that_job_which_goes_on_when_the_card_is_back() -> Result<()> {
    on_runtime(async {
        let mut scenario = Scenario::cards(2);
        let args = ["--driver-second-millis", "100", "--cuda-on-cpu"];
        let bench = Bench::start("losing", &scenario, 4, &args).await?;
        bench
            .until_devices("two healthy cards", |d| {
                d.len() == 2 && d.iter().all(|d| d.health == Health::Healthy)
            })
            .await?;
        let questions = Questions::new(42, 120);
        let mut jobs: Vec<InferenceJob> = vec![];
        for (name, fallback) in [
            ("on-card-a", "Never"),
            ("on-card-b", "Never"),
            ("on-cpu", "IfNeeded"),
        ] {
            let mut spec = spec(&questions.lines(), name)?;
            if fallback == "Never" {
                // One of them fills what conservative gives of a card.
                spec["memory"] = json!({"vram": "11Gi"});
                spec["placement"] = json!({"cpuFallback": "Never"});
            }
            let job = bench.cluster.create_job("default", name, spec).await?;
            let running = |job: &InferenceJob| {
                let status = job.status.clone().unwrap_or_default();
                ensure!(
                    condition::is_true(&status.conditions, "Loaded"),
                    "{:?}",
                    status.conditions
                );
                Ok(())
            };
            jobs.push(
                bench
                    .cluster
                    .until(&job, "the job to be Loaded", LONG, running)
                    .await?,
            );
        }
        let device = |job: &InferenceJob| {
            let placement = job.status.as_ref().and_then(|s| s.placement.clone());
            placement.and_then(|p| p.stages.first().map(|s| s.gpu_uuid.clone()))
        };
        let devices: Vec<_> = jobs.iter().filter_map(device).collect();
        ensure!(devices[0].starts_with("GPU-") && devices[1].starts_with("GPU-") && devices[0] != devices[1]);
        ensure!(devices[2] == names::CPU_DEVICE, "{devices:?}");

        let lost = scenario.devices.iter_mut().find(|d| d.part.uuid == devices[0]);
        lost.context("no such card")?.lost = Lost::Calls;
        bench.set(&scenario)?;
        let first = bench
            .cluster
            .until(&jobs[0], "the job on the lost card to fail once", LONG, |job| {
                let status = job.status.clone().unwrap_or_default();
                let failure = status.last_failure.clone().context("no failure yet")?;
                ensure!(failure.reason == "DeviceLost", "{failure:?}");
                ensure!(failure.message.contains("fell off the bus"), "{failure:?}");
                Ok(())
            })
            .await?;
        ensure!(
            first.status.as_ref().is_some_and(|s| s.attempts == 1),
            "{:?}",
            first.status
        );
        for job in &jobs[1..] {
            let job = bench.cluster.until_finished(job, LONG).await?;
            let status = job.status.clone().unwrap_or_default();
            let untouched = condition::is_true(&status.conditions, "Succeeded") && status.epoch == 1;
            ensure!(
                untouched && status.last_failure.is_none(),
                "{}: {status:?}",
                job.name_any()
            );
            questions.right(&bench.cluster.results(&job).await?)?;
        }
        for card in &mut scenario.devices {
            card.lost = Lost::No;
        }
        bench.set(&scenario)?;
        let job = bench.cluster.until_finished(&jobs[0], LONG).await?;
        let status = job.status.clone().unwrap_or_default();
        ensure!(condition::is_true(&status.conditions, "Succeeded"), "{status:?}");
        questions.right(&bench.cluster.results(&job).await?)?;
        Ok(())
    })
}

#[test]
fn a_job_yields_to_others_on_its_card_has_its_share_again_afterwards_and_yields_to_heat() -> Result<()> {
    on_runtime(async {
        let mut scenario = Scenario::cards(1);
        let args = ["--driver-second-millis", "100", "--cuda-on-cpu"];
        let bench = Bench::start("yielding", &scenario, 4, &args).await?;
        let profiles: Api<ResourceProfile> = Api::all(bench.cluster.client.clone());
        let adaptive = json!({"mode": "ForeignLoad", "foreignLoadPercent": 20, "floorPercent": 5});
        let patch = Patch::Merge(json!({"spec": {"adaptive": adaptive}}));
        profiles
            .patch("conservative", &PatchParams::default(), &patch)
            .await?;
        let mut spec = spec(&[], "yields")?;
        let lines = Questions::new(43, 4000).lines();
        spec["input"] = bench
            .cluster
            .create_input("default", "yields-input", &lines)
            .await?;
        spec["placement"] = json!({"cpuFallback": "Never"});
        let job = bench.cluster.create_job("default", "yields", spec).await?;
        bench
            .cluster
            .until_reason(&job, "Succeeded", "Running", LONG)
            .await?;
        let uuid = scenario.devices[0].part.uuid.clone();
        let share = |what: &'static str, wanted: f64| {
            let name = format!("gogrid_device_share_ratio{{device=\"{uuid}\"}}");
            let bench = &bench;
            async move {
                let seen = || async {
                    let shown = get(bench.metrics, "/metrics").await?;
                    let value = shown.lines().find_map(|line| line.strip_prefix(name.as_str()));
                    let value: f64 = value.context("no share")?.trim().parse()?;
                    ensure!((value - wanted).abs() < 0.005, "{value}");
                    Ok(())
                };
                eventually(SOON, what, seen).await
            }
        };
        share("the whole share", 0.6).await?;

        // Somebody starts a game.
        let game = gogrid_simnvml::Process {
            pid: 1,
            bytes: Some(1 << 30),
            busy: 95,
        };
        scenario.devices[0].part.processes = vec![game];
        scenario.devices[0].part.busy = Some(100);
        bench.set(&scenario)?;
        let yields = |job: &InferenceJob| {
            let status = job.status.clone().unwrap_or_default();
            let throttled = condition::find(&status.conditions, "Throttled").context("not throttled")?;
            ensure!(throttled.reason == "ForeignLoad", "{throttled:?}");
            Ok(())
        };
        bench
            .cluster
            .until(&job, "the job to be Throttled", LONG, yields)
            .await?;
        share("the floor", 0.05).await?;
        eventually(SOON, "the node to say so of the card", || async {
            let rows = bench.status().await?.enforcement;
            let yields = |device: &str| {
                let row = rows.iter().find(|r| r.device == device && r.limit == "adaptive");
                row.map(|row| row.effective.clone())
            };
            ensure!(yields(&uuid).as_deref() == Some("Yielding"), "{rows:?}");
            ensure!(yields(names::CPU_DEVICE).is_some(), "{rows:?}");
            ensure!(
                rows.iter().any(|r| r.device == uuid && r.limit == "vram"),
                "{rows:?}"
            );
            Ok(())
        })
        .await?;
        scenario.devices[0].part.processes.clear();
        bench.set(&scenario)?;
        share("the whole share after the game", 0.6).await?;

        // SW_THERMAL_SLOWDOWN, though nobody else is there.
        scenario.devices[0].part.throttle = 0x20;
        bench.set(&scenario)?;
        share("the floor of a hot card", 0.05).await
    })
}

#[test]
fn outside_a_pod_cards_are_lent_without_asking_a_kubelet_and_a_wrong_clock_is_told_and_nothing_else()
-> Result<()> {
    on_runtime(async {
        let args = ["--cuda-on-cpu", "--wall-offset-seconds=-90"];
        let bench = Bench::start("slow-clock", &Scenario::cards(1), 4, &args).await?;
        bench
            .until_devices("a healthy card", |d| {
                d.len() == 1 && d[0].health == Health::Healthy
            })
            .await?;
        let status = eventually(SOON, "the clock to be compared", || async {
            let status = bench.status().await?;
            let clock = condition::find(&status.conditions, "ClockAgrees");
            let clock = clock.with_context(|| format!("{:?}", status.conditions))?;
            ensure!(
                clock.reason == "ClockOff" && clock.message.contains("90 s behind"),
                "{clock:?}"
            );
            Ok(status)
        })
        .await?;
        let kubelet = condition::find(&status.conditions, "PodGPUsKnown");
        ensure!(
            kubelet.is_some_and(|c| c.reason == "KubeletNotAsked"),
            "{kubelet:?}"
        );
        ensure!(
            condition::is_true(&status.conditions, "Ready"),
            "{:?}",
            status.conditions
        );
        Ok(())
    })
}

#[test]
fn before_the_kubelet_was_ever_heard_cards_are_not_lent_and_the_node_says_which_value_to_set() -> Result<()> {
    on_runtime(async {
        let args = ["--cuda-on-cpu", "--pod-resources-socket=/nowhere/kubelet.sock"];
        let bench = Bench::start("deaf", &Scenario::cards(1), 4, &args).await?;
        let cards = bench
            .until_devices("a card that is not lent", |d| {
                d.len() == 1
                    && d[0]
                        .message
                        .as_deref()
                        .is_some_and(|m| m.contains("PodGPUsKnown"))
            })
            .await?;
        ensure!(cards[0].health == Health::Unhealthy, "{cards:?}");
        let status = bench.status().await?;
        ensure!(
            status.devices[0].health == Health::Healthy,
            "the CPU is lent all the same"
        );
        let found = condition::find(&status.conditions, "PodGPUsKnown");
        ensure!(
            found.is_some_and(|c| c.reason == "KubeletUnreadable"
                && c.message.contains("/nowhere/kubelet.sock")
                && c.message.contains("agent.podResourcesDir")),
            "{found:?}"
        );
        Ok(())
    })
}
