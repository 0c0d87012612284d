//! Operators that are killed or stand still while they lead.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::{InferenceJob, condition, names};
use gogrid_tests::cluster::{lease_seconds, on_runtime, tenths_of_lease};
use gogrid_tests::controlplane::AuditEvent;
use gogrid_tests::jobs::{Questions, spec, succeeded};
use gogrid_tests::process::Process;
use gogrid_tests::procfs;
use gogrid_tests::wait::eventually;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams};
use rustix::process::Signal;
use serde_json::json;

use crate::world::{World, long, world};

/// Who holds the leader Lease; the middle of a holder's name is its process's number.
async fn leader(world: &World) -> Result<Option<i32>> {
    let leases: Api<Lease> = Api::namespaced(world.cluster.client.clone(), names::LEADER_NAMESPACE);
    let lease = leases.get(names::LEADER_LEASE).await?;
    let holder = lease.spec.and_then(|s| s.holder_identity).unwrap_or_default();
    let pid = holder
        .rsplit_once('_')
        .and_then(|(_, unique)| unique.split_once('-'));
    pid.map(|(pid, _)| Ok(pid.parse()?)).transpose()
}

async fn until_leads(world: &World, operator: &Process) -> Result<()> {
    eventually(long(), &format!("{} to lead", operator.name()), || async {
        let found = leader(world).await?;
        ensure!(
            found == Some(operator.pid()),
            "process {found:?} leads; {}",
            operator.log_tail(5)
        );
        Ok(())
    })
    .await
}

/// Waits until an operator that does not lead is ready to: it has looked at the Lease since it came up.
async fn until_waits(world: &World, operator: &Process) -> Result<()> {
    let control = &world.cluster.control;
    let from = control.now();
    let leader = last_leader(world, from - jiff::SignedDuration::try_from(tenths_of_lease(10))?)?;
    eventually(
        long(),
        &format!("{} to wait for the lease", operator.name()),
        || async {
            let looks = control.audit_requests(from, control.now())?;
            let others = looks
                .iter()
                .filter(|e| is_leader_lease(e) && e.verb == "get" && e.credential != leader);
            ensure!(others.count() > 0, "it has not looked; {}", operator.log_tail(5));
            Ok(())
        },
    )
    .await
}

/// Starts an operator with a token of its own.
async fn start(world: &World, name: &str, more: &[&str]) -> Result<Arc<Process>> {
    world.cluster.admit_operator(name).await?;
    world.cluster.start_operator_as(name, more)
}

/// Ends these operators and leaves the usual one.
async fn back_to_one(world: &World) -> Result<()> {
    world.cluster.kill_operators();
    let operator = world.cluster.start_operator(&[])?;
    until_leads(world, &operator).await
}

fn is_leader_lease(event: &AuditEvent) -> bool {
    event.resource == "leases" && event.name == names::LEADER_LEASE
}

/// Writes that only a leader may send. Events tell, and the Leases are how it is chosen.
fn is_gated(event: &AuditEvent) -> bool {
    let operator = event
        .user
        .ends_with(&format!(":{}", gogrid_tests::chart::OPERATOR));
    let tells = event.resource == "events" || event.resource.starts_with("selfsubject");
    operator && event.resource != "leases" && !tells
}

/// What the log says of terms.
#[derive(Debug, Default)]
struct Terms {
    /// When each leader took the Lease.
    takeovers: Vec<Timestamp>,
    /// Writes of a leader that were taken after the next one's first.
    late: Vec<AuditEvent>,
}

/// Reads accepted writes in the log's order. A leader is whoever's token wrote the Lease last.
fn terms(accepted: &[AuditEvent]) -> Result<Terms> {
    let mut terms = Terms::default();
    let (mut current, mut former) = (String::new(), BTreeSet::new());
    let mut first_write = false;
    let mut by_arrival = accepted.to_vec();
    by_arrival.sort_by_key(|e| e.at);
    for event in &by_arrival {
        ensure!(!event.credential.is_empty(), "a token without a mark: {event:?}");
        if is_leader_lease(event) && event.credential != current {
            former.insert(std::mem::replace(&mut current, event.credential.clone()));
            former.remove(&current);
            terms.takeovers.push(event.at);
            first_write = false;
        } else if is_gated(event) {
            first_write |= event.credential == current;
            if first_write && former.contains(&event.credential) {
                terms.late.push(event.clone());
            }
        }
    }
    Ok(terms)
}

/// Kills: each takes some two seconds, ten times that with leases of 40.
fn kills() -> usize {
    if lease_seconds() > 4 {
        5
    } else if std::env::var_os("GOGRID_SOAK").is_some() {
        50
    } else {
        8
    }
}

async fn small_job(world: &World, name: &str) -> Result<(InferenceJob, Questions)> {
    let questions = Questions::new(5, 4);
    let job = world
        .cluster
        .create_job("default", name, spec(&questions.lines(), name)?)
        .await?;
    Ok((job, questions))
}

/// As [`small_job`], of a few seconds.
async fn slow_job(world: &World, name: &str) -> Result<(InferenceJob, Questions)> {
    let questions = Questions::new(6, 90);
    let mut spec = spec(&questions.lines(), name)?;
    spec["profileName"] = json!("conservative");
    Ok((world.cluster.create_job("default", name, spec).await?, questions))
}

/// Waits for its end: every record is there once, and it was placed again only after the agent had refused the order of a
/// leader that was no more.
async fn done_once(world: &World, job: &InferenceJob, questions: &Questions, since: Timestamp) -> Result<()> {
    let job = world.cluster.until_finished(job, long()).await?;
    let status = job.status.clone().unwrap_or_default();
    let name = job.name_any();
    succeeded(&job)?;
    questions.right(&world.cluster.results(&job).await?)?;
    ensure!(
        status.attempts == 0,
        "{name}: {} attempts of its own",
        status.attempts
    );
    let uid = job.uid().context("no uid")?;
    let control = &world.cluster.control;
    let written = control.audit_writes(since, control.now())?;
    let of = |epoch: i64| {
        let name = names::assignment(&uid, epoch);
        written
            .iter()
            .filter(move |e| e.resource == "assignments" && e.name == name)
    };
    for epoch in 1..=status.epoch {
        // What the API server stored for a leader that was gone when it came to answer reads as a gateway's timeout.
        let creations = || of(epoch).filter(|e| e.verb == "create" && (e.code < 300 || e.code == 504));
        let taken = creations().filter(|e| e.code < 300).count();
        ensure!(taken <= 1, "{name}: epoch {epoch} was created {taken} times");
        let first = creations().next();
        let first = first.with_context(|| format!("{name}: epoch {epoch} was never created"))?;
        let late = of(epoch - 1).find(|e| e.subresource == "status" && e.code < 300 && e.at > first.received);
        ensure!(
            late.is_none(),
            "{name}: epoch {epoch} was created before {late:?}"
        );
    }
    if status.epoch > 1 {
        let why = status.last_failure.map(|f| f.reason);
        println!("{name}: placed {} times, for {why:?}", status.epoch);
        ensure!(
            why.as_deref() == Some("StaleTerm"),
            "{name}: placed again for {why:?}"
        );
    }
    let jobs = world.cluster.jobs("default");
    jobs.delete(&name, &DeleteParams::default()).await?;
    Ok(())
}

#[test]
fn a_leader_killed_again_and_again_is_followed_in_time_and_writes_nothing_after_its_follower_and_no_job_is_placed_twice()
-> Result<()> {
    on_runtime(async {
        let world = world().await?;
        world.cluster.kill_operators();
        let kills = kills();
        let mut operators = vec![
            start(&world, "leader-a", &[]).await?,
            start(&world, "leader-b", &[]).await?,
        ];
        let first = eventually(long(), "one of the new operators to lead", || async {
            let pid = leader(&world).await?;
            let found = operators.iter().find(|o| pid == Some(o.pid()));
            found.cloned().with_context(|| format!("process {pid:?} leads"))
        });
        let mut leading = first.await?;
        let since = world.cluster.control.now();
        let (mut jobs, mut killed_at) = (vec![], vec![]);
        for kill in 0..kills {
            let next = operators.iter().find(|o| o.pid() != leading.pid());
            until_waits(&world, next.context("no other operator")?).await?;
            // In the middle of its work, and with work for the next.
            jobs.push(small_job(&world, &format!("before-kill-{kill}")).await?);
            leading.kill();
            killed_at.push(world.cluster.control.now());
            jobs.push(small_job(&world, &format!("after-kill-{kill}")).await?);
            operators.retain(|o| o.pid() != leading.pid());
            operators.push(start(&world, &format!("leader-{kill}"), &[]).await?);
            let followed = eventually(long(), "another to lead", || async {
                let pid = leader(&world).await?;
                let found = operators.iter().find(|o| pid == Some(o.pid()));
                found.cloned().with_context(|| format!("process {pid:?} leads"))
            });
            leading = followed.await?;
        }
        for (job, questions) in &jobs {
            done_once(&world, job, questions, since).await?;
        }
        let accepted = world.accepted(since)?;
        let terms = terms(&accepted)?;
        let mut waits: Vec<Duration> = vec![];
        for killed in &killed_at {
            let taken = terms
                .takeovers
                .iter()
                .find(|at| *at > killed)
                .context("no takeover")?;
            let first = accepted
                .iter()
                .filter(|e| is_gated(e) && e.at > *taken)
                .map(|e| e.at)
                .min();
            waits.push(
                first
                    .context("no write after it")?
                    .duration_since(*killed)
                    .unsigned_abs(),
            );
        }
        waits.sort();
        println!(
            "{kills} kills: another wrote after {} ms (median), {} ms (longest)",
            waits[kills / 2].as_millis(),
            waits[kills - 1].as_millis()
        );
        back_to_one(&world).await?;
        ensure!(
            terms.takeovers.len() >= kills,
            "only {} terms",
            terms.takeovers.len()
        );
        ensure!(terms.late.is_empty(), "late writes: {:#?}", terms.late);
        // 15 of the 40 seconds of a lease.
        let most = tenths_of_lease(10) * 15 / 40;
        ensure!(waits[kills - 1] <= most, "another wrote only after {waits:?}");
        Ok(())
    })
}

/// Writes about a job, up to its run, before which the leader stands still: all of them under `GOGRID_SOAK`.
fn moments() -> Vec<u32> {
    if std::env::var_os("GOGRID_SOAK").is_some() {
        (1..=5).collect()
    } else {
        vec![1, 2, 3]
    }
}

#[test]
fn what_a_leader_that_stood_still_between_check_and_send_sends_after_its_follower_is_refused() -> Result<()> {
    on_runtime(async {
        let world = world().await?;
        let mut refused = vec![];
        for moment in moments() {
            let fault = format!("work:pause-before={moment}");
            world.cluster.kill_operators();
            let started = world.cluster.control.now();
            let paused = start(&world, &format!("paused-{moment}"), &["--fault", &fault]).await?;
            until_leads(&world, &paused).await?;
            let credential = last_leader(&world, started)?;
            // Long enough to run still when the leader goes on.
            let (job, questions) = slow_job(&world, &format!("paused-{moment}")).await?;
            let stands = eventually(long(), "the leader to stand still", || async {
                let status = world.cluster.jobs("default").get(&job.name_any()).await?.status;
                let over = status.is_some_and(|s| condition::is_true(&s.conditions, "Finished"));
                let state = procfs::state(u32::try_from(paused.pid())?)?;
                ensure!(over || state == 'T', "it is in state {state}");
                Ok(state == 'T')
            })
            .await?;
            if !stands {
                paused.kill();
            }
            let next = start(&world, &format!("follower-{moment}"), &[]).await?;
            if !stands {
                println!("a small job takes fewer than {moment} writes");
                until_leads(&world, &next).await?;
                done_once(&world, &job, &questions, started).await?;
                break;
            }
            until_leads(&world, &next).await?;
            let control = &world.cluster.control;
            eventually(long(), "the follower to have the job in hand", || async {
                let writes = control.audit_accepted(started, control.now())?;
                let theirs = |e: &&AuditEvent| e.resource == "inferencejobs" && e.name == job.name_any();
                let theirs = writes
                    .iter()
                    .filter(theirs)
                    .filter(|e| e.credential != credential);
                let status = world.cluster.jobs("default").get(&job.name_any()).await?.status;
                let loaded = status.is_some_and(|s| condition::is_true(&s.conditions, "Loaded"));
                ensure!(theirs.count() > 0 && loaded, "loaded: {loaded}");
                Ok(())
            })
            .await?;
            let went_on = control.now();
            paused.signal(Signal::CONT)?;
            let of_jobs = ["inferencejobs", "assignments", "configmaps"];
            let late = eventually(long(), "the write that was held back", || async {
                let writes = control.audit_writes(went_on, control.now())?;
                let late: Vec<_> = writes
                    .into_iter()
                    .filter(|e| of_jobs.contains(&e.resource.as_str()) && e.credential == credential)
                    .collect();
                ensure!(!late.is_empty(), "none; {}", paused.log_tail(5));
                Ok(late)
            })
            .await?;
            for event in &late {
                println!(
                    "{fault}: {} {} {}: {}",
                    event.verb, event.resource, event.name, event.code
                );
            }
            let taken: Vec<_> = late.iter().filter(|e| e.code < 300).collect();
            ensure!(taken.is_empty(), "{fault}: taken: {taken:#?}");
            done_once(&world, &job, &questions, started).await?;
            refused.push(late.len());
        }
        ensure!(
            !refused.is_empty(),
            "nothing was held back: is the fault layer in?"
        );
        back_to_one(&world).await
    })
}

/// The token of whoever wrote the leader Lease last.
fn last_leader(world: &World, since: Timestamp) -> Result<String> {
    let last = world.accepted(since)?.into_iter().rfind(is_leader_lease);
    Ok(last.context("nobody led")?.credential)
}
