//! What the agent's pod may do, as the kernel says it and not as the chart does.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use gogrid_tests::cluster::NAMESPACE;
use gogrid_tests::installed::Installed;
use gogrid_tests::jobs::Questions;
use gogrid_tests::procfs::{self, Seen};
use gogrid_tests::wait::eventually;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams};

use crate::{LONG, on_real_nodes, submit, until_answering};

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
            for secret in ["var/run/secrets", "run/secrets"] {
                let path = Path::new(&root).join(secret);
                ensure!(!path.exists(), "{} sees {secret}", process.command);
            }
        }
        let token = "var/run/secrets/kubernetes.io/serviceaccount/token";
        ensure!(
            Path::new(&format!("/proc/{}/root/{token}", agent.pid)).exists(),
            "the check of tokens looks at the wrong place"
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
