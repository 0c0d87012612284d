//! A first install: jobs on both nodes, and `helm test`.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use gogrid_tests::chart::RELEASE;
use gogrid_tests::cluster::NAMESPACE;
use gogrid_tests::jobs::Questions;

use crate::{node_of, on_real_nodes, submit, until_right};

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

#[test]
fn helm_test_runs_a_real_job_and_prints_every_nodes_devices() -> Result<()> {
    on_real_nodes(|installed| async move {
        let control = &installed.nodes.control;
        let said = control
            .helm(&[
                "test",
                RELEASE,
                "--namespace",
                NAMESPACE,
                "--logs",
                "--timeout",
                "100s",
            ])
            .await?;
        for expected in [
            "node node-1: ",
            "node node-2: ",
            "What is 50 minus 4? -> 46",
            "Phase:          Succeeded",
        ] {
            ensure!(said.contains(expected), "{expected:?} is missing in: {said}");
        }
        let left = control
            .kubectl(&["get", "inferencejobs,configmaps", "-n", NAMESPACE, "-o", "name"])
            .await?;
        ensure!(!left.contains("gogrid-trial"), "the trial left something: {left}");
        Ok(())
    })
}
