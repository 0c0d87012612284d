//! GPUs of real kubelets that other pods hold: GoGrid is a guest there. The driver is simulated, in the agent's container,
//! and jobs on its devices are computed on the CPU; kubelet, device plugin and the pods that hold devices are real.

#![allow(
    clippy::disallowed_methods,
    reason = "the test measures real time from outside"
)]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gogrid_api::node::{Device, Health};
use gogrid_api::{Condition, GpuNode, GpuNodeStatus, InferenceJob, condition, names};
use gogrid_simnvml::{LIBRARY_FILE, SCENARIO_FILE, Scenario};
use gogrid_tests::cluster::program;
use gogrid_tests::installed::{Installed, spec};
use gogrid_tests::jobs::{self, Questions};
use gogrid_tests::process::Process;
use gogrid_tests::wait::{eventually, throughout};
use k8s_openapi::api::core::v1::{Event, Node, Pod};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::lifecycle::{checkpoints, last_checkpoints, run_again};
use crate::{LONG, on_real_nodes, until_answering, until_right};

/// Where agents look for the driver's library, beneath the one directory that they share with their node.
pub(crate) const DRIVER: &str = "/var/lib/gogrid/simnvml";
/// What a guest is given to leave, and to come back.
const SOON: Duration = Duration::from_secs(10);
const CARDS: u32 = 4;

/// A node with four cards: a driver that the agent finds, and a plugin that offers them to the kubelet.
struct Cards<'a> {
    installed: &'a Installed,
    node: &'static str,
    scenario: Scenario,
    plugin: Process,
}

impl<'a> Cards<'a> {
    async fn put(installed: &'a Installed, node: &'static str) -> Result<Self> {
        let real = installed.nodes.node(node)?;
        let scenario = Scenario::cards(CARDS);
        let dir = real.path(DRIVER);
        std::fs::create_dir_all(&dir)?;
        scenario.write(&dir.join(SCENARIO_FILE))?;
        std::fs::copy(program(LIBRARY_FILE)?, dir.join(LIBRARY_FILE))?;
        let uuids: Vec<&str> = scenario
            .devices
            .iter()
            .map(|card| card.part.uuid.as_str())
            .collect();
        let plugin = real.start_program("fakegpu", &uuids)?;
        let cards = Self {
            installed,
            node,
            scenario,
            plugin,
        };
        let nodes: Api<Node> = Api::all(installed.client.clone());
        eventually(LONG, "the kubelet to offer four cards", || async {
            let allocatable = nodes
                .get(node)
                .await?
                .status
                .and_then(|s| s.allocatable)
                .unwrap_or_default();
            let offered = allocatable.get("nvidia.com/gpu").map(|q| q.0.clone());
            ensure!(offered.as_deref() == Some("4"), "{offered:?}");
            Ok(())
        })
        .await
        .with_context(|| cards.plugin.log_tail(5))?;
        cards.until_free(4, LONG).await?;
        Ok(cards)
    }

    fn set(&self, scenario: &Scenario) -> Result<()> {
        let file = self
            .installed
            .nodes
            .node(self.node)?
            .path(DRIVER)
            .join(SCENARIO_FILE);
        Ok(scenario.write(&file)?)
    }

    async fn status(&self) -> Result<GpuNodeStatus> {
        let nodes: Api<GpuNode> = Api::all(self.installed.client.clone());
        Ok(nodes.get(self.node).await?.status.unwrap_or_default())
    }

    async fn condition(&self, type_: &str) -> Result<Condition> {
        let conditions = self.status().await?.conditions;
        let found = condition::find(&conditions, type_).cloned();
        found.with_context(|| jobs::short(&conditions))
    }

    /// Waits until so many cards may be used and all others are held; returns how long that took, and all cards.
    async fn until_free(&self, free: usize, within: Duration) -> Result<(Duration, Vec<Device>)> {
        let began = Instant::now();
        let what = format!("{free} free cards");
        let found = eventually(within, &what, || async {
            let cards: Vec<Device> = self.status().await?.devices.into_iter().skip(1).collect();
            let healthy = cards.iter().filter(|c| c.health == Health::Healthy).count();
            let held = cards.iter().filter(|c| c.holder.is_some()).count();
            ensure!(healthy == free && healthy + held == 4, "{cards:?}");
            Ok(cards)
        })
        .await;
        match found {
            Ok(cards) => Ok((began.elapsed(), cards)),
            Err(error) => Err(error.context(self.installed.pod_logs(15).await)),
        }
    }

    /// Takes the cards away again without anything going wrong: the driver is released before.
    async fn take_away(self) -> Result<()> {
        let nodes: Api<Node> = Api::all(self.installed.client.clone());
        let label = async |value: Option<&str>| {
            let patch = json!({"metadata": {"labels": {names::DRIVER_NODE_LABEL: value}}});
            nodes
                .patch(self.node, &PatchParams::default(), &Patch::Merge(&patch))
                .await
        };
        let until = async |reason: &str| {
            eventually(LONG, reason, || async {
                let found = self.condition("DriverReady").await?;
                ensure!(found.reason == reason, "{found:?}");
                Ok(())
            })
            .await
        };
        label(Some(names::DRIVER_RELEASED)).await?;
        until("DriverReleased").await?;
        std::fs::remove_dir_all(self.installed.nodes.node(self.node)?.path(DRIVER))?;
        label(None).await?;
        until("NoDriver").await
    }
}

/// Starts a pod that holds so many cards of that node, and waits until it runs.
async fn holder(installed: &Installed, name: &str, node: &str, cards: u32) -> Result<Pod> {
    let pods: Api<Pod> = Api::namespaced(installed.client.clone(), "default");
    let pod = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node}, "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "holder", "image": "gogrid.test/pause:1", "imagePullPolicy": "Never",
                "resources": {"limits": {"nvidia.com/gpu": cards.to_string()}},
            }],
        },
    }))?;
    pods.create(&PostParams::default(), &pod).await?;
    eventually(LONG, "the pod to run", || async {
        let pod = pods.get(name).await?;
        let status = pod.status.clone().unwrap_or_default();
        ensure!(status.phase.as_deref() == Some("Running"), "{status:?}");
        Ok(pod)
    })
    .await
}

async fn delete(installed: &Installed, pod: &Pod) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(installed.client.clone(), "default");
    pods.delete(&pod.name_any(), &DeleteParams::default()).await?;
    Ok(())
}

/// A job of 100 ms and more a record that needs a card of its own on that node.
async fn submit(
    installed: &Installed,
    name: &str,
    questions: &Questions,
    node: &str,
) -> Result<InferenceJob> {
    let mut spec = spec(&questions.lines(), name)?;
    spec["placement"] = json!({"nodeSelector": {"kubernetes.io/hostname": node}, "cpuFallback": "Never"});
    spec["profileName"] = json!("conservative");
    // Two of them are more than a card has.
    spec["memory"] = json!({"vram": "11Gi"});
    jobs::create(&installed.client, "default", name, spec).await
}

fn card_of(job: &InferenceJob) -> Result<String> {
    let placement = job.status.clone().and_then(|s| s.placement);
    let stage = placement.and_then(|p| p.stages.into_iter().next());
    Ok(stage.context("the job has no placement")?.gpu_uuid)
}

#[test]
fn jobs_keep_off_cards_that_another_pod_holds_and_have_them_within_ten_seconds_of_its_end() -> Result<()> {
    on_real_nodes(|installed| async move {
        let cards = Cards::put(&installed, "node-1").await?;
        let known = cards.condition("PodGPUsKnown").await?;
        ensure!(known.reason == "KubeletAnswers", "{known:?}");
        let pod = holder(&installed, "holds-two", "node-1", 2).await?;
        let (_, all) = cards.until_free(2, SOON).await?;
        let held: BTreeSet<String> = all
            .iter()
            .filter(|card| card.holder.as_deref() == Some("default/holds-two"))
            .map(|card| card.uuid.clone())
            .collect();
        ensure!(held.len() == 2, "{all:?}");

        let long = Questions::new(71, 250);
        let mut used = BTreeSet::new();
        let mut guests = vec![];
        for name in ["guest-a", "guest-b"] {
            let job = submit(&installed, name, &long, "node-1").await?;
            let job = until_answering(&installed, &job).await?;
            used.insert(card_of(&job)?);
            guests.push(job);
        }
        ensure!(
            used.len() == 2 && used.is_disjoint(&held),
            "held {held:?}, used {used:?}"
        );
        let short = Questions::new(72, 5);
        let third = submit(&installed, "guest-c", &short, "node-1").await?;
        jobs::until(
            &installed.client,
            &third,
            "the reason of the third job",
            LONG,
            |job| {
                let conditions = job.status.clone().unwrap_or_default().conditions;
                let placed = condition::find(&conditions, "Placed").context("not looked at")?;
                ensure!(
                    placed.reason == "InsufficientVRAM" && placed.message.contains("hold 2 GPUs"),
                    "{placed:?}"
                );
                Ok(())
            },
        )
        .await?;

        delete(&installed, &pod).await?;
        let (took, _) = cards.until_free(4, SOON).await?;
        println!("placeable again {took:?} after the pod's end");
        let third = until_right(&installed, &third, &short).await?;
        ensure!(
            held.contains(&card_of(&third)?),
            "it was not placed on a card that came free"
        );
        let all: Api<InferenceJob> = Api::namespaced(installed.client.clone(), "default");
        for job in guests {
            all.delete(&job.name_any(), &DeleteParams::default()).await?;
        }
        cards.take_away().await
    })
}

#[test]
fn a_pod_that_is_given_a_jobs_card_has_it_within_ten_seconds_and_the_job_goes_on_later_where_it_was()
-> Result<()> {
    on_real_nodes(|installed| async move {
        let cards = Cards::put(&installed, "node-1").await?;
        let questions = Questions::new(73, 120);
        let job = submit(&installed, "claimed", &questions, "node-1").await?;
        let job = until_answering(&installed, &job).await?;
        let seen: Api<InferenceJob> = Api::namespaced(installed.client.clone(), "default");
        throughout(
            Duration::from_secs(3),
            "a job that nobody asks to leave",
            || async {
                let status = seen.get(&job.name_any()).await?.status.unwrap_or_default();
                ensure!(status.epoch == 1 && status.last_failure.is_none(), "{status:?}");
                Ok(())
            },
        )
        .await?;
        let made = Instant::now();
        let pod = holder(&installed, "takes-all", "node-1", 4).await?;
        let ran = made.elapsed();
        eventually(SOON, "the job's worker to be gone", || async {
            let processes = installed.nodes.node("node-1")?.processes()?;
            let worker = processes
                .iter()
                .find(|p| p.command.contains("gogrid-worker worker"));
            ensure!(worker.is_none(), "{worker:?}");
            Ok(())
        })
        .await?;
        println!(
            "vacated within {:?} of the pod's making; it ran after {ran:?}",
            made.elapsed()
        );
        ensure!(made.elapsed() < SOON, "too late for a pod that waits");
        let waiting = jobs::until(
            &installed.client,
            &job,
            "the job to wait for the pod",
            LONG,
            |job| {
                let status = job.status.clone().unwrap_or_default();
                let placed = condition::find(&status.conditions, "Placed").context("not placed yet")?;
                let failure = status.last_failure.clone().map(|f| f.reason).unwrap_or_default();
                ensure!(
                    placed.reason == "DevicesHeld"
                        && placed.message.contains("default/takes-all")
                        && failure == "DeviceClaimed"
                        && status.attempts == 0
                        && status.epoch == 1,
                    "{} {failure}, {} attempts, epoch {}",
                    jobs::short(&status.conditions),
                    status.attempts,
                    status.epoch
                );
                Ok(())
            },
        )
        .await?;
        let kept: usize = checkpoints(&installed, &waiting)
            .await?
            .values()
            .map(Vec::len)
            .sum();
        println!("{kept} of 120 records kept");
        ensure!((10..120).contains(&kept), "{kept} records kept");
        let events: Api<Event> = Api::namespaced(installed.client.clone(), "default");
        let told = ListParams::default().fields("reason=DeviceClaimed,involvedObject.name=claimed");
        let told = events.list(&told).await?.items;
        let message = told
            .first()
            .and_then(|event| event.message.clone())
            .unwrap_or_default();
        ensure!(message.contains("default/takes-all"), "{message:?}");

        delete(&installed, &pod).await?;
        let last = last_checkpoints(&installed, &waiting).await?;
        let again = run_again(&last);
        ensure!(again.is_none(), "{again:?} was run again");
        let job = until_right(&installed, &waiting, &questions).await?;
        let status = job.status.unwrap_or_default();
        ensure!(status.attempts == 0 && status.epoch == 2, "{status:?}");
        cards.take_away().await
    })
}

/// As when the container runtime takes the devices out of a running container's cgroup: only a new one gets them back.
#[test]
fn an_agent_whose_driver_went_away_is_restarted_by_its_liveness_probe_and_finds_it_again() -> Result<()> {
    on_real_nodes(|installed| async move {
        let cards = Cards::put(&installed, "node-2").await?;
        let restarts = async || {
            let pod = installed.agent_pod("node-2").await?;
            let all = pod.status.and_then(|s| s.container_statuses).unwrap_or_default();
            let agent = all.into_iter().find(|c| c.name == "agent").context("no agent")?;
            anyhow::Ok(agent.restart_count)
        };
        let before = restarts().await?;
        let mut gone = cards.scenario.clone();
        gone.codes.insert("nvmlInit_v2".into(), 9);
        gone.resets += 1;
        cards.set(&gone)?;
        let began = Instant::now();
        eventually(LONG, "the container to be restarted", || async {
            ensure!(restarts().await? == before + 1, "not yet");
            Ok(())
        })
        .await
        .with_context(|| installed.nodes.log_tails(5))?;
        println!("restarted {:?} after the driver went", began.elapsed());
        cards.set(&cards.scenario)?;
        cards.until_free(4, LONG).await?;
        installed.until_node_ready("node-2").await?;
        ensure!(restarts().await? == before + 1, "it was restarted again");
        cards.take_away().await
    })
}
