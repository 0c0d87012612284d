//! Driver calls that hang, crash and lie at random while the node's Lease must be renewed as if nothing were.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gogrid_simnvml::{Chaos, Scenario};
use gogrid_tests::cluster::on_runtime;
use gogrid_tests::procfs;
use gogrid_tests::wait::eventually;

use super::agent::Bench;

/// Runs of the probe that end badly: so many in `make test`, 1,000 where GOGRID_SOAK is set.
fn runs() -> usize {
    if std::env::var_os("GOGRID_SOAK").is_some() {
        1000
    } else {
        8
    }
}

fn silences(log: &str) -> usize {
    log.lines()
        .filter(|line| line.contains("the NVIDIA driver does not answer"))
        .count()
}

#[test]
fn however_often_the_driver_hangs_every_heartbeat_is_on_time_and_no_thread_or_descriptor_is_left()
-> Result<()> {
    on_runtime(async {
        let mut scenario = Scenario::cards(4);
        // A renewal every second; a question must be answered in 20 ms.
        let bench = Bench::start("chaos", &scenario, 4, &["--driver-second-millis", "10"]).await?;
        bench.until_devices("four cards", |d| d.len() == 4).await?;
        let process = bench.cluster.process(&bench.node)?;
        let agent = u32::try_from(process.pid())?;
        let open = || -> Result<(usize, usize)> {
            let descriptors = std::fs::read_dir(format!("/proc/{agent}/fd"))?.count();
            Ok((procfs::threads(agent)?.len(), descriptors))
        };
        let before = open()?;
        // On a busy machine a good driver may be late, too.
        let earlier = silences(&process.log());
        let (from, began) = (bench.cluster.control.now(), Instant::now());
        let wanted = runs();
        scenario.chaos = Some(Chaos { seed: 1, within: 60 });
        bench.set(&scenario)?;
        let most = std::cell::Cell::new(before);
        eventually(
            Duration::from_secs(1500),
            &format!("{wanted} silences of the driver"),
            || async {
                ensure!(
                    process.is_running(),
                    "the agent has ended: {}",
                    process.log_tail(10)
                );
                let now = open()?;
                let (threads, descriptors) = most.get();
                most.set((threads.max(now.0), descriptors.max(now.1)));
                let seen = silences(&process.log()) - earlier;
                // Some renewals must fall into it, however soon it is over.
                let long = began.elapsed() >= Duration::from_secs(5);
                ensure!(seen >= wanted && long, "{seen} after {:?}", began.elapsed());
                Ok(())
            },
        )
        .await?;
        let most = most.get();
        let (took, until) = (began.elapsed(), bench.cluster.control.now());
        scenario.chaos = None;
        bench.set(&scenario)?;
        eventually(Duration::from_secs(30), "a good driver again", || async {
            let status = bench.status().await?;
            let ready = gogrid_api::condition::is_true(&status.conditions, "DriverReady");
            ensure!(ready, "{:?}", status.conditions);
            Ok(())
        })
        .await?;
        let lease = gogrid_api::names::node_lease(&bench.node);
        let beats: Vec<_> = bench
            .cluster
            .control
            .audit_writes(from, until)?
            .into_iter()
            .filter(|e| e.resource == "leases" && e.name == lease && e.code == 200)
            .map(|e| e.at)
            .collect();
        let gaps = beats.windows(2).map(|w| w[1].duration_since(w[0]).as_millis());
        let longest = gaps.max().context("no two heartbeats")?;
        // Others' threads may still be on their way out when they are counted, and the runtime keeps one more or fewer for
        // what blocks.
        let after = eventually(Duration::from_secs(10), "no more than before", || async {
            let now = open()?;
            ensure!(
                now.0 <= before.0 + 1 && now.1 <= before.1,
                "{before:?} before, {now:?} after"
            );
            Ok(now)
        })
        .await?;
        let seen = silences(&process.log());
        println!(
            "{seen} probes that hung, crashed or lied in {took:.1?}: {} heartbeats of one a second, longest gap \
             {longest} ms; threads and descriptors {before:?} before, at most {most:?}, {after:?} after",
            beats.len()
        );
        // Half a lease without a beat would be late; a busy machine alone makes half a second.
        ensure!(longest < 2000, "a gap of {longest} ms between heartbeats");
        ensure!(!process.log().contains("panicked"), "{}", process.log_tail(30));
        // Between two probes there is one thread fewer at most, and a probe costs three descriptors.
        ensure!(
            most.0 <= before.0 + 2 && most.1 <= before.1 + 8,
            "{before:?} before, at most {most:?}"
        );
        Ok(())
    })
}
