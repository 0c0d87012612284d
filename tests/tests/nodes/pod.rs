//! What the agent's pod may do, as the kernel says it and not as the chart does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use gogrid_tests::chart;
use gogrid_tests::cluster::NAMESPACE;
use gogrid_tests::confinement::{Attempt, Outcome, Verb, furnish, make, matrix, surprises};
use gogrid_tests::installed::Installed;
use gogrid_tests::jobs::Questions;
use gogrid_tests::procfs::{self, Seen};
use gogrid_tests::wait::eventually;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams};
use rustix::process::{Pid, Signal, kill_process};

use crate::{LONG, on_real_nodes, submit, until_answering};

/// Where the token of a process's pod lies, seen from outside.
fn token(pid: u32) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    root.join("var/run/secrets/kubernetes.io/serviceaccount/token")
}

/// The line `key:` of a process's status.
fn status(pid: u32, key: &str) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {key}"))?.trim().to_owned())
}

fn one(found: &[Seen], what: &str) -> Result<Seen> {
    let mut of_this = found.iter().filter(|p| p.command.contains(what));
    let first = of_this
        .next()
        .with_context(|| format!("no {what} in {found:?}"))?;
    Ok(first.clone())
}

/// What a mount of the process looks like: its options.
fn mount_options(pid: u32, at: &str) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/mounts"))?;
    let mut last = text.lines().filter(|l| l.split(' ').nth(1) == Some(at));
    let line = last
        .next_back()
        .with_context(|| format!("nothing is mounted at {at}"))?;
    Ok(line.split(' ').nth(3).unwrap_or_default().to_owned())
}

async fn running_worker(installed: &Installed, node: &str) -> Result<Seen> {
    eventually(LONG, "a worker in the pod", || async {
        one(&installed.nodes.node(node)?.processes()?, "gogrid-worker worker")
    })
    .await
}

#[test]
fn agent_pool_and_worker_have_no_capability_no_writable_root_and_a_system_call_filter() -> Result<()> {
    on_real_nodes(|installed| async move {
        let questions = Questions::new(1, 200);
        let job = submit(&installed, "looked-at", &questions, Some("node-1"), true).await?;
        until_answering(&installed, &job).await?;
        let worker = running_worker(&installed, "node-1").await?;
        let all = installed.nodes.node("node-1")?.processes()?;
        let agent = one(&all, "gogrid-agent --namespace")?;
        let pool = one(&all, "gogrid-worker pool")?;
        for process in [&agent, &pool, &worker] {
            let of = |key| status(process.pid, key).with_context(|| process.command.clone());
            for set in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
                ensure!(
                    of(set)? == "0000000000000000",
                    "{}: {set} {}",
                    process.command,
                    of(set)?
                );
            }
            ensure!(
                of("Seccomp")? == "2",
                "{}: seccomp mode {}",
                process.command,
                of("Seccomp")?
            );
            ensure!(
                of("NoNewPrivs")? == "1",
                "{} may gain privileges",
                process.command
            );
            let root = mount_options(process.pid, "/")?;
            ensure!(
                root.split(',').any(|o| o == "ro"),
                "{}: root is {root}",
                process.command
            );
        }
        for process in [&pool, &worker] {
            let uid = status(process.pid, "Uid")?;
            ensure!(
                uid.split_whitespace().all(|id| id == "65532"),
                "{}: {uid}",
                process.command
            );
            // One filter is the container runtime's, one the pool's own.
            ensure!(
                status(process.pid, "Seccomp_filters")? == "2",
                "{} lacks a filter",
                process.command
            );
            let root = format!("/proc/{}/root", process.pid);
            for secret in ["var/run/secrets", "run/secrets", "var/lib/kubelet"] {
                let path = Path::new(&root).join(secret);
                ensure!(!path.exists(), "{} sees {secret}", process.command);
            }
        }
        ensure!(
            token(agent.pid).exists(),
            "the check of tokens looks at the wrong place"
        );
        let kubelet = mount_options(agent.pid, "/var/lib/kubelet/pod-resources")?;
        ensure!(
            kubelet.split(',').any(|o| o == "ro"),
            "the kubelet's directory is {kubelet}"
        );

        let threads = procfs::threads(worker.pid)?;
        for thread in &threads {
            let nice = procfs::niceness(worker.pid, *thread)?;
            ensure!(nice == 15, "thread {thread} of {}: nice {nice}", threads.len());
        }
        // Whatever the machine gives to everything that is started from here.
        let usual = procfs::niceness(std::process::id(), std::process::id())?;
        let found = procfs::niceness(agent.pid, agent.pid)?;
        ensure!(
            found == usual,
            "the agent must answer at once: nice {found}, not {usual}"
        );
        ensure!(
            procfs::oom_score_adj(worker.pid)? == 1000,
            "the worker is not first to go"
        );
        ensure!(
            procfs::oom_score_adj(agent.pid)? < 1000,
            "the agent is as likely to go as a worker"
        );
        let jobs: Api<gogrid_api::InferenceJob> = Api::namespaced(installed.client.clone(), "default");
        jobs.delete("looked-at", &DeleteParams::default()).await?;
        Ok(())
    })
}

#[test]
fn from_the_workers_container_neither_a_network_nor_the_api_server_nor_a_foreign_folder_can_be_reached()
-> Result<()> {
    on_real_nodes(|installed| async move {
        let pod = installed.agent_pod("node-1").await?.name_any();
        let exec = ["exec", "-n", NAMESPACE, &pod, "-c", "workers", "--"];
        let confined = ["/usr/bin/gogrid-worker", "confined", "10.96.0.1:443"];
        // Its exit code says whether anything succeeded.
        let said = installed
            .nodes
            .control
            .kubectl(&[&exec[..], &confined].concat())
            .await?;
        let refused = said.lines().filter(|line| line.starts_with("refused: ")).count();
        ensure!(refused == 8, "{said}");
        ensure!(
            said.contains("connect to 10.96.0.1:443: Permission denied"),
            "{said}"
        );
        ensure!(said.contains("write to /: Read-only file system"), "{said}");
        Ok(())
    })
}

/// With the tokens that lie in the running pods. Operator and agents stand still meanwhile, so that nobody else writes.
#[test]
fn the_token_in_an_agents_pod_writes_for_that_pods_node_and_for_no_other() -> Result<()> {
    on_real_nodes(|installed| async move {
        let control = &installed.nodes.control;
        let admin = &installed.client;
        let mut still = vec![];
        let mut agents = BTreeMap::new();
        for node in installed.nodes.all() {
            let processes = node.processes()?;
            let agent = one(&processes, "gogrid-agent --namespace")?;
            let of_operator = processes.iter().filter(|p| p.command.contains("gogrid-operator"));
            still.extend(of_operator.map(|p| p.pid).chain([agent.pid]));
            let token = std::fs::read_to_string(token(agent.pid))?;
            agents.insert(
                node.name().to_owned(),
                control.client_for_token(token.trim()).await?,
            );
        }
        let operator = control.token_for_sa(NAMESPACE, chart::OPERATOR).await?;
        let operator = control.client_for_token(&operator).await?;
        let stopped = Stopped::these(&still)?;
        furnish(admin).await?;
        for (node, agent) in &agents {
            make(&operator, &matrix::assignments(), matrix::assignment(node)).await?;
            let chunk = matrix::chunk(admin, node, 0).await?;
            make(agent, &matrix::config_maps(), chunk).await?;
        }
        let (mut cells, mut found) = (0, vec![]);
        for (own, agent) in &agents {
            for node in agents.keys() {
                let writes = matrix::writes(admin, node).await?;
                let wanted = if node == own {
                    Outcome::Allowed
                } else {
                    Outcome::RefusedByPolicy
                };
                found.extend(surprises(agent, own, &writes, &wanted).await);
                cells += writes.len();
                if node != own {
                    let disguises = matrix::disguises(admin, own, node).await?;
                    found.extend(surprises(agent, own, &disguises, &Outcome::RefusedByPolicy).await);
                    cells += disguises.len();
                }
            }
        }
        for node in agents.keys() {
            Attempt::new(Verb::Delete, matrix::assignment_path(node))
                .for_good()
                .answer(&operator)
                .await?;
        }
        drop(stopped);
        for node in agents.keys() {
            installed.until_node_ready(node).await?;
        }
        ensure!(found.is_empty(), "{} of {cells} cells: {found:#?}", found.len());
        println!("{cells} cells");
        Ok(())
    })
}

/// Processes that stand still until this is dropped.
struct Stopped(Vec<Pid>);

impl Stopped {
    fn these(pids: &[u32]) -> Result<Self> {
        let mut stopped = Self(vec![]);
        for pid in pids {
            let pid = Pid::from_raw(i32::try_from(*pid)?).context("process 0")?;
            kill_process(pid, Signal::STOP)?;
            stopped.0.push(pid);
        }
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            // It may have been killed meanwhile.
            let _ = kill_process(*pid, Signal::CONT);
        }
    }
}
