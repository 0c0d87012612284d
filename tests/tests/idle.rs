//! A cluster with nothing to do writes nothing but Leases and takes little memory and time.

use std::time::Duration;

use anyhow::{Result, ensure};
use gogrid_tests::cluster::{Cluster, ClusterOptions, NAMESPACE, lease_seconds, on_runtime, tenths_of_lease};
use gogrid_tests::controlplane::{AuditEvent, ControlPlane};
use gogrid_tests::jobs::{Questions, spec};
use gogrid_tests::procfs;
use gogrid_tests::wait::eventually;

const AGENTS: [&str; 3] = ["node-1", "node-2", "node-3"];

fn ours(events: Vec<AuditEvent>) -> Vec<AuditEvent> {
    let prefix = format!("system:serviceaccount:{NAMESPACE}:");
    events
        .into_iter()
        .filter(|e| e.user.starts_with(&prefix) && e.resource != "leases")
        .collect()
}

#[test]
fn three_idle_agents_and_five_finished_jobs_cause_no_write_but_leases_and_take_little_memory_and_time()
-> Result<()> {
    on_runtime(async {
        let control = ControlPlane::shared().await?;
        let cluster = Cluster::start(control.clone(), ClusterOptions::quick(3)).await?;
        for n in 0..5 {
            let name = format!("idle-{n}");
            let questions = Questions::new(n, 5);
            let job = cluster
                .create_job("default", &name, spec(&questions.lines(), &name)?)
                .await?;
            cluster.until_finished(&job, Duration::from_secs(60)).await?;
        }
        let quiet = tenths_of_lease(15);
        eventually(tenths_of_lease(225), "a quiet moment", || async {
            let from = control.now();
            tokio::time::sleep(quiet).await;
            let writes = ours(control.audit_writes(from, control.now())?);
            ensure!(
                writes.is_empty(),
                "{} writes, first {:?}",
                writes.len(),
                writes.first()
            );
            Ok(())
        })
        .await?;
        // With leases of 40 s these are 200 s.
        let span = tenths_of_lease(50);
        let pid = |name: &str| anyhow::Ok(u32::try_from(cluster.process(name)?.pid())?);
        let ticks = |name: &str| procfs::cpu_ticks(pid(name)?);
        let before = AGENTS.map(ticks);
        let from = control.now();
        tokio::time::sleep(span).await;
        let after = AGENTS.map(ticks);
        let all = control.audit_writes(from, control.now())?;
        let leases = all.iter().filter(|e| e.resource == "leases").count();
        let writes = ours(all);
        println!("{leases} lease writes and {} others in {span:?}", writes.len());
        ensure!(leases > 0, "the audit log saw no lease: is it on?");
        ensure!(writes.is_empty(), "{writes:#?}");
        for ((name, before), after) in AGENTS.into_iter().zip(before).zip(after) {
            // A tick is a hundredth of a second.
            let percent = f64::from(i32::try_from(after? - before?)?) / span.as_secs_f64();
            println!("{name}: {percent:.2} % of a core");
            // With leases of 4 s it renews ten times as often as it would.
            let most = if lease_seconds() < 40 { 1.0 } else { 0.5 };
            ensure!(percent <= most, "{name}: {percent:.2} % of a core while it idles");
        }
        for (name, limit_mib) in [("operator", 40), ("node-1", 30), ("node-2", 30), ("node-3", 30)] {
            let kib = procfs::resident_kib(pid(name)?)?;
            println!("{name}: {kib} KiB resident");
            ensure!(
                kib <= limit_mib * 1024,
                "{name}: {kib} KiB resident, more than {limit_mib} MiB"
            );
        }
        Ok(())
    })
}
