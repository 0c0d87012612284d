//! A real agent beside the simulated driver: what the GpuNode says, what goes on, what it costs.

use std::path::PathBuf;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::node::{Device, Health};
use gogrid_api::{Condition, GpuNode, GpuNodeStatus, InferenceJob, condition, names};
use gogrid_simnvml::{Lost, SCENARIO_VARIABLE, Scenario};
use gogrid_tests::cluster::{Cluster, ClusterOptions, on_runtime};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, spec};
use gogrid_tests::procfs;
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
        options.agent_env = vec![(SCENARIO_VARIABLE.into(), path.display().to_string())];
        let cluster = Cluster::start(ControlPlane::shared().await?, options).await?;
        Ok(Self {
            cluster,
            node: node.to_owned(),
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
        bench
            .cluster
            .until(&job, "the job to be Loaded", LONG, |job| {
                let status = job.status.clone().unwrap_or_default();
                ensure!(
                    condition::is_true(&status.conditions, "Loaded"),
                    "{:?}",
                    status.conditions
                );
                Ok(())
            })
            .await?;

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
        let questions = Questions::new(42, 50);
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
