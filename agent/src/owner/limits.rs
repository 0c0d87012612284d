//! Profiles in force: limits and shares on their way to workers, and their way back as read back.
//!
//! Owns: what each worker may take now, and since when the node's profile is in force. Must not know the profiles'
//! meaning beyond `effective_profile`.

use super::Owner;
use crate::clock::wall_seconds;
use gogrid_agent_core::fetch::Manners;
use gogrid_agent_core::plan::Phase;
use gogrid_agent_core::protocol::{Readback, ToPool, ToWorker, WorkerId, WorkerLimits};
use gogrid_agent_core::rank::session_rank;
use gogrid_agent_core::session::{Nanos, Standing};
use gogrid_agent_core::shares::{Claim, batch_each, divide};
use gogrid_agent_core::vram::{Own, Reading};
use gogrid_agent_core::watchdog::Rung;
use gogrid_api::effective::{EffectiveProfile, EffectiveProfileError};
use gogrid_api::job::Failure;
use gogrid_api::names::CPU_DEVICE;
use gogrid_api::node::ProfileInForce;
use gogrid_api::{Bytes, effective_profile};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How long a share lasts; another worker grows into one that shrank only then.
const SHARE_NANOS: Nanos = 750_000_000;
/// Between two grants that nothing else causes.
const GRANT_NANOS: Nanos = 240_000_000;
/// The fetching child in the division of the CPU device; no worker is ever called so.
const FETCHER: WorkerId = WorkerId::MAX;

/// How the fetching child behaves until the node's profile is known: as under the built-in conservative one, with no
/// share before it has anything to do.
pub(crate) fn first_manners() -> Result<Manners, EffectiveProfileError> {
    let none = BTreeMap::new();
    effective_profile(&[], &none, None).map(|profile| Manners::under(&profile.ceiling, 0))
}

/// The ceiling where no profile is known or the governing one can't be enforced: the built-in conservative one.
pub(super) fn built_in() -> Option<Arc<EffectiveProfile>> {
    effective_profile(&[], &BTreeMap::new(), None).ok().map(Arc::new)
}

/// What the workers of one device share, in permille of its time.
struct DeviceShares {
    device: String,
    ceiling: u16,
    /// Worker, assignment (none: the fetching child), share; those that shrink first.
    workers: Vec<(WorkerId, String, u16)>,
}

impl Owner {
    /// What a job with that profile may take here; the node's own where its profile can't be read.
    fn effective(&self, job_profile: Option<&str>) -> Result<EffectiveProfile, EffectiveProfileError> {
        let labels = self.labels.clone().unwrap_or_default();
        effective_profile(self.profiles.as_deref().unwrap_or_default(), &labels, job_profile)
    }

    /// The node's own ceiling; the built-in conservative one where the governing profile can't be enforced.
    pub(super) fn ceiling(&self) -> Option<Arc<EffectiveProfile>> {
        self.ceiling.clone()
    }

    /// Why a job with that profile can't be run here.
    pub(super) fn obstacle(&self, job_profile: Option<&str>) -> Option<Failure> {
        self.profiles.as_ref()?;
        let error = self.effective(job_profile).err()?;
        let reason = match error {
            EffectiveProfileError::NotFound(_) => "ProfileNotFound",
            EffectiveProfileError::Invalid { .. } => "InvalidProfile",
        };
        Some(Failure {
            reason: reason.into(),
            message: error.to_string(),
            retryable: true,
        })
    }

    /// Profiles or labels have changed.
    pub(super) fn profiles_changed(&mut self) {
        let ceiling = self.effective(None).ok().map(Arc::new);
        self.ceiling = ceiling.or_else(built_in);
        self.find_obstacles();
        self.set_caps();
        self.push_limits();
        self.keep_laws();
        self.limits_applied();
    }

    /// Devices were measured: totals, foreign use and caps follow.
    pub(super) fn measured(&mut self, now: Nanos) {
        for device in &self.cpu {
            let of = |quantity: &gogrid_api::ByteQuantity| quantity.bytes().unwrap_or_default();
            let own = Own {
                live: self.used_by_workers(&device.uuid),
                ended: Bytes(0),
            };
            let reading = Reading {
                at: now,
                total: of(&device.memory_total),
                reserved: of(&device.memory_reserved),
                used: of(&device.memory_foreign),
                own: Some(own),
                free_at_exit: true,
            };
            self.ledger.observe(&device.uuid, reading);
        }
        self.set_caps();
        self.push_limits();
        self.keep_laws();
    }

    /// Memory that our workers really hold on a device, as far as it is known; never more than they reserved.
    pub(super) fn used_by_workers(&self, device: &str) -> Bytes {
        let on = self
            .work
            .iter()
            .filter(|(name, w)| w.device == device && self.workers.values().any(|n| n == *name));
        on.fold(Bytes(0), |sum, (_, w)| {
            sum.saturating_add(Bytes(w.usage.peak_bytes).min(w.bytes))
        })
    }

    pub(super) fn set_caps(&mut self) {
        let Some(effective) = self.ceiling() else { return };
        let driver = self.driver.iter().flat_map(|view| &view.devices);
        for device in self.cpu.iter().chain(driver) {
            let total = device.memory_total.bytes().unwrap_or_default();
            let reserved = device.memory_reserved.bytes().unwrap_or_default();
            self.ledger
                .set_cap(&device.uuid, effective.ceiling.vram_cap(total, reserved));
        }
    }

    /// First limits of a job.
    pub(super) fn set_limits(&mut self, name: &str) {
        let profile = self.work.get(name).and_then(|w| w.spec.profile_name.clone());
        let effective = self.effective(profile.as_deref()).ok();
        if let Some(work) = self.work.get_mut(name) {
            work.effective = effective;
        }
        self.push_limits();
        self.keep_laws();
    }

    /// Tells the pool how to rank its session, where that has changed: as the node's ceiling says, which no job's own profile
    /// makes less kind.
    pub(super) fn rank_pool(&mut self) {
        let Some(node) = self.ceiling() else { return };
        let niceness = session_rank(node.ceiling.niceness.0, self.tools.threads);
        if self.ranked != Some(niceness)
            && let Some(pool) = &self.pool
            && pool.link.pool(&ToPool::Rank { niceness }).is_ok()
        {
            self.ranked = Some(niceness);
        }
    }

    /// Sends every worker its limits where they differ from those it has.
    pub(super) fn push_limits(&mut self) {
        self.rank_pool();
        let live = |owner: &Self, name: &str| {
            owner
                .jobs
                .get(name)
                .is_some_and(|j| !matches!(j.phase, Phase::Over | Phase::Inspecting))
        };
        let names: Vec<String> = self.work.keys().filter(|n| live(self, n)).cloned().collect();
        let mut on_device: BTreeMap<String, usize> = BTreeMap::new();
        for work in names.iter().filter_map(|n| self.work.get(n)) {
            *on_device.entry(work.device.clone()).or_default() += 1;
        }
        for name in names {
            let profile = self.work.get(&name).and_then(|w| w.spec.profile_name.clone());
            // A profile deleted under a running job leaves it with the limits it has.
            let effective = self.effective(profile.as_deref()).ok();
            let threads = self.tools.threads;
            let Some(work) = self.work.get_mut(&name) else {
                continue;
            };
            if let Some(effective) = effective {
                work.effective = Some(effective);
            }
            let Some(effective) = &work.effective else {
                continue;
            };
            let workers = on_device.get(&work.device).copied().unwrap_or(1);
            let threads = if work.device == CPU_DEVICE {
                batch_each(threads, workers)
            } else {
                1
            };
            let sequences = u16::try_from(work.spec.parallel_sequences).unwrap_or(1).max(1);
            let batch = if work.ladder.rung() >= Rung::Shed {
                1
            } else {
                batch_each(effective.limits.max_batch, workers).min(sequences)
            };
            let generation = work.limits.as_ref().map_or(1, |l| l.generation);
            let mut limits = WorkerLimits::under(&effective.limits, generation, batch, threads);
            if work.limits.as_ref() != Some(&limits) {
                if work.limits.is_some() {
                    limits.generation = generation.saturating_add(1);
                }
                work.limits = Some(limits.clone());
            }
            // A worker that was started with older limits learns the newer ones when it connects.
            if let Some(link) = work.link.as_ref().filter(|_| work.told != limits.generation)
                && link.worker(&ToWorker::Limits(limits.clone())).is_ok()
            {
                work.told = limits.generation;
            }
        }
    }

    /// Whether a worker was not read back yet with the limits it was sent last.
    pub(super) fn limits_pending(&self) -> bool {
        self.work.values().any(|w| {
            // A thread may be kinder than asked, which an unprivileged process can't take back; never less kind.
            let same =
                |l: &WorkerLimits, a: &Readback| a.generation == l.generation && a.niceness >= l.niceness;
            let applied = matches!((&w.limits, &w.applied), (Some(l), Some(a)) if same(l, a));
            w.link.is_some() && (!applied || w.outdated())
        })
    }

    /// Whether every worker was read back with its limits, and if so: since now, the profiles are in force.
    pub(super) fn limits_applied(&mut self) {
        let Some(node) = self
            .ceiling()
            .filter(|_| self.profiles.is_some() && self.labels.is_some())
        else {
            return;
        };
        if self.limits_pending() {
            return;
        }
        let mut wanted = node.sources.clone();
        let jobs: BTreeSet<(String, i64)> = self
            .work
            .values()
            .filter(|w| w.link.is_some())
            .filter_map(|w| w.effective.as_ref())
            .flat_map(|e| e.sources.clone())
            .collect();
        wanted.extend(jobs.into_iter().filter(|source| !node.sources.contains(source)));
        wanted.truncate(64);
        let now = wall_seconds(&*self.tools.host);
        let old = std::mem::take(&mut self.in_force);
        self.in_force = wanted
            .into_iter()
            .map(|(name, generation)| {
                let since = old.iter().find(|p| p.name == name && p.generation == generation);
                let effective_at = since.map_or_else(|| now.clone(), |p| p.effective_at.clone());
                ProfileInForce {
                    name,
                    generation,
                    effective_at,
                }
            })
            .collect();
    }

    /// Grants when the last grants grow old.
    pub(super) fn grant(&mut self, now: Nanos) {
        if now >= self.granted_at.saturating_add(GRANT_NANOS) || self.shares_moved() {
            self.grant_now(now);
        }
    }

    /// What the workers of each device are to share, and who gets what of it.
    fn shares(&self) -> Vec<DeviceShares> {
        let mut by_device: BTreeMap<&str, Vec<(&str, Claim)>> = BTreeMap::new();
        if self.tools.models.is_busy() {
            let claim = Claim {
                worker: FETCHER,
                most: 1000,
                active: true,
            };
            by_device.insert(CPU_DEVICE, vec![("", claim)]);
        }
        for (name, work) in &self.work {
            let Some(job) = self.jobs.get(name) else { continue };
            let (Some(worker), Some(effective), true) = (job.worker, &work.effective, work.link.is_some())
            else {
                continue;
            };
            let loading = matches!(job.phase, Phase::Connected | Phase::Loading);
            let active = !job.killed && (loading || work.feed.outstanding() > 0);
            let claim = Claim {
                worker,
                most: Self::job_share(work, &effective.limits),
                active,
            };
            by_device.entry(&work.device).or_default().push((name, claim));
        }
        let Some(node) = self.ceiling() else { return vec![] };
        let mut shares = vec![];
        for (device, claims) in by_device {
            let ceiling = self.device_share(device, &node.ceiling);
            let only: Vec<Claim> = claims.iter().map(|(_, c)| *c).collect();
            let mut divided = divide(ceiling, &only);
            divided.sort_by_key(|(_, share)| *share);
            let named = divided.into_iter().filter_map(|(worker, share)| {
                let (name, _) = claims.iter().find(|(_, c)| c.worker == worker)?;
                Some((worker, (*name).to_owned(), share))
            });
            shares.push(DeviceShares {
                device: device.to_owned(),
                ceiling,
                workers: named.collect(),
            });
        }
        shares
    }

    fn shares_moved(&self) -> bool {
        let shares = self.shares();
        let mut all = shares.iter().flat_map(|device| &device.workers);
        let fetching = all.clone().find(|(worker, ..)| *worker == FETCHER);
        fetching.map_or(0, |(_, _, share)| *share) != self.fetching
            || all.any(|(_, name, share)| self.work.get(name).is_some_and(|w| w.wanted != *share))
    }

    /// The child that fetches and hashes is held like a worker; it wants `wanted` and gets `share`.
    fn grant_fetcher(&mut self, wanted: u16, share: u16) {
        self.fetching = wanted;
        if let Some(node) = self.ceiling() {
            self.tools.models.behave(Manners::under(&node.ceiling, share));
        }
    }

    /// Fence and share to every worker, for as long as the lease is held.
    pub(super) fn grant_now(&mut self, now: Nanos) {
        self.granted_at = now;
        let Some(fence_at) = self
            .renewals
            .fence_at()
            .filter(|_| self.renewals.standing(now) == Standing::Held)
        else {
            return;
        };
        let expires_at = now.saturating_add(SHARE_NANOS);
        let mut fetcher = (0, 0);
        for DeviceShares {
            device,
            ceiling,
            workers: mut shares,
        } in self.shares()
        {
            // One that stands still behind its fence acts on nothing.
            let acts = |name: &String| self.jobs.get(name).is_some_and(|j| !j.fenced || j.confirmed);
            shares.retain(|(worker, name, _)| *worker == FETCHER || acts(name));
            let wanted: Vec<(WorkerId, u16)> = shares.iter().map(|(w, _, share)| (*w, *share)).collect();
            let out = self.out.entry(device).or_default();
            let issued = out.issue(now, expires_at, ceiling, &wanted);
            for ((_, name, wanted), (worker, share)) in shares.iter().zip(issued) {
                if worker == FETCHER {
                    fetcher = (*wanted, share);
                }
                let Some(work) = self.work.get_mut(name) else {
                    continue;
                };
                if let Some(link) = &work.link {
                    // A worker that does not read loses its share and, in the end, its fence: nothing to add here.
                    let _ = link.worker(&ToWorker::Grant {
                        fence_at,
                        share_permille: share,
                        expires_at,
                    });
                }
                (work.share, work.wanted) = (share, *wanted);
            }
        }
        let (wanted, share) = fetcher;
        if wanted == 0
            && let Some(out) = self.out.get_mut(CPU_DEVICE)
        {
            // It has nothing left to use a share for: nobody waits for what it was granted to run out.
            out.ended(FETCHER);
        }
        self.grant_fetcher(wanted, share);
    }
}
