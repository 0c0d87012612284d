//! A first install: jobs on both nodes, and `helm test`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use gogrid_tests::chart::RELEASE;
use gogrid_tests::cluster::NAMESPACE;
use gogrid_tests::installed::Installed;
use gogrid_tests::jobs::Questions;
use gogrid_tests::rbac;
use gogrid_tests::wait::eventually;
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, ListParams};

use crate::{LONG, node_of, on_real_nodes, submit, until_right};

#[test]
fn ten_jobs_on_two_nodes_all_end_with_the_right_answers() -> Result<()> {
    on_real_nodes(|installed| async move {
        let mut jobs = vec![];
        for n in 0..10 {
            let questions = Questions::new(500 + n, 20);
            let job = submit(&installed, &format!("ten-{n}"), &questions, None, false).await?;
            jobs.push((job, questions));
        }
        let mut by_node = BTreeMap::new();
        for (job, questions) in &jobs {
            let job = until_right(&installed, job, questions).await?;
            *by_node.entry(node_of(&job)?).or_insert(0) += 1;
        }
        println!("jobs by node: {by_node:?}");
        ensure!(by_node.len() == 2, "only {by_node:?} were used");
        Ok(())
    })
}

async fn helm_test(installed: &Installed) -> Result<String> {
    let control = &installed.nodes.control;
    let test = [
        "test",
        RELEASE,
        "--namespace",
        NAMESPACE,
        "--logs",
        "--timeout",
        "100s",
    ];
    match control.helm(&test).await {
        Ok(said) => Ok(said),
        Err(error) => {
            let log = control.kubectl(&["logs", "gogrid-trial", "-n", NAMESPACE]).await;
            Err(error.context(format!("{log:?}")))
        }
    }
}

/// The line about node-2 of a `helm test` that ran its job on the other node.
async fn line_of_node_2(installed: &Installed) -> Result<String> {
    let said = helm_test(installed).await?;
    let line = said.lines().find(|line| line.contains("node node-2: "));
    Ok(line.with_context(|| said.clone())?.to_owned())
}

#[test]
fn a_missing_runtime_class_and_an_image_that_cannot_be_pulled_are_named_by_helm_test() -> Result<()> {
    on_real_nodes(|installed| async move {
        let label = async |flavour: &str| {
            let label = ["label", "--overwrite", "node", "node-2", flavour];
            installed.nodes.control.kubectl(&label).await
        };
        let events: Api<Event> = Api::namespaced(installed.client.clone(), NAMESPACE);
        label("gogrid.dev/flavour=no-runtime").await?;
        eventually(LONG, "the agent to leave and no other to come", || async {
            ensure!(installed.agent_pod("node-2").await.is_err(), "it is there");
            let failed = ListParams::default().fields("reason=FailedCreate");
            ensure!(
                !events.list(&failed).await?.items.is_empty(),
                "nothing failed yet"
            );
            Ok(())
        })
        .await?;
        let line = line_of_node_2(&installed).await?;
        println!("{line}");
        for word in [
            "no agent",
            "DaemonSet gogrid-agent-no-runtime",
            "RuntimeClass \"nowhere\" not found",
        ] {
            ensure!(line.contains(word), "{word} is missing in: {line}");
        }

        label("gogrid.dev/flavour=no-image").await?;
        eventually(LONG, "a container to wait for its image", || async {
            let status = installed.agent_pod("node-2").await?.status.unwrap_or_default();
            let containers = status.container_statuses.unwrap_or_default();
            let waits = containers
                .iter()
                .filter_map(|c| c.state.as_ref()?.waiting.as_ref()?.reason.as_deref());
            let waits: Vec<&str> = waits.collect();
            ensure!(waits.iter().any(|why| why.contains("ImagePull")), "{waits:?}");
            Ok(())
        })
        .await?;
        let line = line_of_node_2(&installed).await?;
        println!("{line}");
        for word in ["workers: ", "ImagePull", "gogrid/nowhere:"] {
            ensure!(line.contains(word), "{word} is missing in: {line}");
        }
        label("gogrid.dev/flavour-").await?;
        // It came and went, so it is trusted a little later than it is ready.
        let questions = Questions::new(600, 5);
        let job = submit(&installed, "trusted-again", &questions, Some("node-2"), false).await?;
        until_right(&installed, &job, &questions).await?;
        Ok(())
    })
}

#[test]
fn helm_test_runs_a_real_job_and_prints_every_nodes_devices() -> Result<()> {
    on_real_nodes(|installed| async move {
        let control = &installed.nodes.control;
        let begun = control.now();
        let said = helm_test(&installed).await?;
        let requests = control.audit_requests(begun, control.now())?;
        println!("{}", rbac::check(&requests, NAMESPACE, rbac::HELM_TEST)?);
        for expected in [
            "node node-1: ",
            "node node-2: ",
            "What is 50 minus 4? -> 46",
            "Phase:          Succeeded",
        ] {
            ensure!(said.contains(expected), "{expected:?} is missing in: {said}");
        }
        // It is deleted with what it made, which the garbage collector deletes first.
        eventually(LONG, "the trial to leave nothing", || async {
            let list = ["get", "inferencejobs,configmaps", "-n", NAMESPACE, "-o", "name"];
            let left = control.kubectl(&list).await?;
            ensure!(!left.contains("gogrid-trial"), "{left}");
            Ok(())
        })
        .await?;
        Ok(())
    })
}
