//! One turn over all jobs.
//!
//! Owns: from the store and what this process remembers to the work to be done now: the plan step. Pure but for the
//! arguments `now` and `wall`. Must not: call the API server.

use crate::apply::{Fact, Op};
use crate::config::Config;
use crate::housing::{Homeless, ToInspect, ToPlace};
use crate::models::{self, Models};
use crate::order;
use crate::orphans;
use crate::status::{Draft, urgent};
use crate::store::{Claim, Store};
use crate::validate;
use gogrid_api::assignment::{JobReference, Kind, StagedInput, State, Stop, StopReason};
use gogrid_api::{Assignment, InferenceJob, InferenceJobStatus, Millis, effective_profile, names};
use gogrid_planner::lifecycle::{self, InputState, Publication, Refusal, RunsOn, Step, View};
use gogrid_planner::{Heartbeat, must_leave};
use std::collections::{BTreeMap, BTreeSet};

/// How often an input that can't be used is looked at again.
const INPUT_AGAIN: u64 = 3_000;
/// An agent's word for a staged input that is not there.
const INPUT_MISSING: &str = "InputMissing";

/// What this process remembers of a job; all of it can be found again after a crash.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    /// Its input, until an order carries it.
    pub(crate) staged: Option<Vec<StagedInput>>,
    pub(crate) refused: Option<(Refusal, Millis)>,
    pub(crate) published: Option<Publication>,
    pub(crate) failures: u32,
    pub(crate) objection: Option<String>,
    pub(crate) not_before: Millis,
    pub(crate) written: Option<Millis>,
}

impl Memory {
    /// Takes in what doing a step has shown.
    pub(crate) fn learn(&mut self, now: Millis, step: &str, fact: &Fact) {
        match fact {
            Fact::Job(_) => {
                self.written = Some(now);
                if step == "Requeue" || step == "Finish" {
                    self.published = None;
                }
            }
            // It carries the input, for all orders after it as well.
            Fact::Assignment(_) if matches!(step, "Place" | "CreateAssignment") => self.staged = None,
            Fact::Staged(inputs) => {
                self.refused = None;
                self.staged = Some(inputs.clone());
            }
            Fact::InputRefused(refusal) => {
                self.refused = Some((refusal.clone(), Millis(now.0 + INPUT_AGAIN)));
            }
            Fact::Published(publication) => self.published = Some(publication.clone()),
            Fact::Assignment(_)
            | Fact::AssignmentGone { .. }
            | Fact::JobGone
            | Fact::Silent
            | Fact::InputsGone => {}
        }
    }
}

/// Work for one job.
pub(crate) struct Work {
    pub(crate) uid: String,
    pub(crate) job: Option<InferenceJob>,
    /// The job must really be gone.
    pub(crate) only_if_gone: Option<JobReference>,
    pub(crate) step: &'static str,
    pub(crate) ops: Vec<Op>,
    /// Memory promised by it until it is seen in the store.
    pub(crate) claim: Option<Claim>,
}

impl Work {
    /// Whether it does nothing but show how far its job is.
    pub(crate) fn only_shows(&self) -> bool {
        let old = self.job.as_ref().and_then(|job| job.status.as_ref());
        matches!(self.ops.as_slice(), [Op::WriteStatus(new)] if !urgent(old, new))
    }
}

/// Everything a turn depends on.
pub(crate) struct Round<'a> {
    pub(crate) store: &'a Store,
    pub(crate) memory: &'a BTreeMap<String, Memory>,
    pub(crate) busy: &'a BTreeMap<String, Option<Claim>>,
    /// Jobs that ConfigMaps with inputs may be there for.
    pub(crate) has_inputs: &'a BTreeSet<String>,
    /// Since when jobs are missing that something was made for.
    pub(crate) missing_since: &'a BTreeMap<String, Millis>,
    pub(crate) config: &'a Config,
    pub(crate) now: Millis,
    pub(crate) wall: i64,
    pub(crate) term: i64,
}

pub(crate) fn over(a: &Assignment) -> bool {
    a.status
        .as_ref()
        .and_then(|s| s.state)
        .is_some_and(State::is_over)
}

impl<'a> Round<'a> {
    /// All work that can be begun now.
    pub(crate) fn works(&self) -> Vec<Work> {
        let by_job = self.store.by_job();
        let models = Models::new(self.store, self.now);
        let none = vec![];
        let (mut works, mut homeless) = (vec![], Homeless::default());
        // Those that are over are looked at for as long as anything made for them is left.
        let mut awake: BTreeSet<&str> = self.store.jobs.awake(self.wall).collect();
        awake.extend(by_job.keys());
        awake.extend(self.has_inputs.iter().map(String::as_str));
        for uid in awake {
            let Some(job) = self.store.jobs.get(uid) else {
                continue;
            };
            let resting = self.memory.get(uid).is_some_and(|m| m.not_before > self.now);
            if resting || self.busy.contains_key(uid) {
                continue;
            }
            let assignments = by_job.get(uid).unwrap_or(&none);
            self.look(uid, job, assignments, &models, &mut works, &mut homeless);
        }
        self.house(&homeless, &mut works);
        self.orphans(&by_job, &mut works);
        works
    }

    fn look(
        &self,
        uid: &str,
        job: &'a InferenceJob,
        assignments: &[&'a Assignment],
        models: &Models<'a>,
        works: &mut Vec<Work>,
        homeless: &mut Homeless<'a>,
    ) {
        let empty = Memory::default();
        let remembered = self.memory.get(uid);
        let memory = remembered.unwrap_or(&empty);
        let mut runs: Vec<&'a Assignment> = assignments
            .iter()
            .copied()
            .filter(|a| a.spec.kind == Kind::Run)
            .collect();
        runs.sort_by_key(|a| a.spec.epoch);
        // Not copied: there may be many jobs, and this is done for each in every round.
        let staged: Option<&'a [StagedInput]> = remembered
            .and_then(|m| m.staged.as_deref())
            .or_else(|| runs.last().map(|a| a.spec.inputs.as_slice()));
        let input = match (staged, &memory.refused) {
            (Some(_), _) => InputState::Staged,
            (None, Some((refusal, until))) if *until > self.now => InputState::Refused(refusal.clone()),
            (None, _) => InputState::ToStage,
        };
        let refusal = validate::refusal(&job.spec, &self.config.model_roots);
        let (model, facts) = models.of(self.store, self.now, job, assignments);
        let placed_on = job
            .status
            .as_ref()
            .and_then(|s| s.placement.as_ref())
            .map(|p| p.node_name.clone());
        let runs_on = placed_on.map(|node| {
            let (heartbeat, session) = self.store.heartbeat(self.now, &node);
            let kube_node = self.store.nodes.get(&node);
            let leave = kube_node
                .is_some_and(|n| n.drained || must_leave(&job.spec.placement.tolerations, &n.taints));
            RunsOn {
                node,
                heartbeat,
                session,
                leave,
            }
        });
        let class = job.spec.priority_class_name.as_deref();
        let current = lifecycle::current_run(job, &runs);
        let view = View {
            job,
            runs: &runs,
            now: self.wall,
            refusal: refusal.as_ref(),
            runs_on: runs_on.clone(),
            may_run: runs.iter().copied().find(|run| {
                Some(&run.metadata.name) != current.map(|c| &c.metadata.name)
                    && !over(run)
                    && !models::lost(self.store, self.now, run)
            }),
            priority_missing: class.filter(|name| !self.store.priorities.contains_key(*name)),
            model,
            input,
            claimed: self
                .store
                .claimed(uid, job.status.as_ref().map_or(0, |s| s.epoch)),
            published: memory.published.as_ref(),
            leftovers: !assignments.is_empty() || self.has_inputs.contains(uid),
        };
        let draft = || Draft::new(job, self.wall);
        let kept = || draft().keeping(current);
        let step = lifecycle::next(&view).step;
        let (name, ops) = match step {
            Step::Rest => return,
            Step::Refuse(refusal) => ("Refuse", self.write(job, memory, draft().refuse(&refusal).done())),
            Step::Wait(reason) => ("Wait", self.write(job, memory, draft().wait(&reason).done())),
            Step::Mirror => {
                let node = current.and_then(|run| self.store.gpu_nodes.get(&run.spec.node_name));
                (
                    "Mirror",
                    current.map_or(vec![], |run| {
                        self.write(job, memory, draft().mirror(run, node).done())
                    }),
                )
            }
            Step::Inspect => {
                let assignments = assignments.to_vec();
                homeless.to_inspect.push(ToInspect { job, assignments });
                return;
            }
            Step::Stage => ("Stage", vec![Op::Stage]),
            Step::Place => {
                if let (Some(facts), Some(inputs)) = (facts, staged) {
                    homeless.to_place.push(ToPlace {
                        job,
                        runs,
                        facts,
                        inputs,
                    });
                }
                return;
            }
            Step::CreateAssignment => ("CreateAssignment", self.create_again(job, &runs, staged, runs_on)),
            Step::Stop { assignment, reason } => ("Stop", self.stop(&assignment, reason)),
            Step::Suspend => ("Suspend", self.write(job, memory, kept().suspend().done())),
            Step::Resume => ("Resume", self.write(job, memory, draft().resume().done())),
            Step::Requeue { failure, counted } => {
                let write = self.write(job, memory, kept().requeue(&failure, counted).done());
                let epoch = job.status.as_ref().map_or(0, |s| s.epoch);
                let absent = (current.is_none() && !write.is_empty())
                    .then(|| Op::EnsureAbsent(names::assignment(uid, epoch)));
                // What the agent did not find is made again before anybody looks for it a second time.
                let stage = (failure.reason == INPUT_MISSING && !write.is_empty()).then_some(Op::Stage);
                ("Requeue", absent.into_iter().chain(stage).chain(write).collect())
            }
            Step::Publish => {
                let records = current.map_or(0, |r| r.spec.inputs.iter().map(|i| i64::from(i.records)).sum());
                let publish = Op::Publish(runs.into_iter().cloned().collect(), records);
                ("Publish", vec![publish])
            }
            Step::Finish(outcome) => (
                "Finish",
                self.write(job, memory, draft().finish(&outcome, current).done()),
            ),
            Step::CleanUp => {
                let staged = self.has_inputs.contains(uid);
                ("CleanUp", orphans::clean_up(uid, assignments, staged))
            }
            Step::DeleteJob => ("DeleteJob", vec![Op::DeleteJob]),
        };
        if !ops.is_empty() {
            works.push(Work {
                uid: uid.into(),
                job: Some(job.clone()),
                only_if_gone: None,
                step: name,
                ops,
                claim: None,
            });
        }
    }

    /// A write where the status differs in a word, or in a number and the last write is old enough.
    pub(crate) fn write(&self, job: &InferenceJob, memory: &Memory, new: InferenceJobStatus) -> Vec<Op> {
        let old = job.status.as_ref();
        let interval = self.config.timing.lease().0 * 3 / 2;
        let due = memory
            .written
            .is_none_or(|at| self.now.0.saturating_sub(at.0) >= interval);
        if old != Some(&new) && (due || urgent(old, &new)) {
            vec![Op::WriteStatus(Box::new(new))]
        } else {
            vec![]
        }
    }

    /// The order that a status promises and that is not there: a crash came between the two writes.
    fn create_again(
        &self,
        job: &InferenceJob,
        runs: &[&Assignment],
        staged: Option<&[StagedInput]>,
        on: Option<RunsOn>,
    ) -> Vec<Op> {
        let (Some(status), Some(on)) = (&job.status, on) else {
            return vec![];
        };
        if on.heartbeat == Heartbeat::Lost {
            let message = format!("node {} stopped renewing its lease", on.node);
            let failure = gogrid_api::job::Failure {
                reason: lifecycle::NODE_LOST.into(),
                message,
                retryable: true,
            };
            return vec![Op::WriteStatus(Box::new(
                Draft::new(job, self.wall).requeue(&failure, false).done(),
            ))];
        }
        let Some(inputs) = staged else {
            return vec![Op::Stage];
        };
        let Some(session) = on.session else { return vec![] };
        let labels = self
            .store
            .nodes
            .get(&on.node)
            .map(|n| n.labels.clone())
            .unwrap_or_default();
        let effective = effective_profile(
            &self.store.named_profiles(),
            &labels,
            job.spec.profile_name.as_deref(),
        );
        let parallel_limit = effective.map_or(1, |e| e.limits.max_batch);
        let order = order::run(
            job,
            status,
            order::Run {
                session,
                term: self.term,
                parallel_limit,
                inputs: inputs.to_vec(),
                runs,
            },
        );
        order
            .map(|o| Op::CreateIfStill(Box::new(o)))
            .into_iter()
            .collect()
    }

    pub(crate) fn stop_order(&self, reason: StopReason) -> Stop {
        let seconds = (self.config.timing.checkpoint().0 / 1000).max(1);
        Stop {
            reason,
            grace_seconds: i32::try_from(seconds).unwrap_or(30),
        }
    }

    fn stop(&self, assignment: &str, reason: StopReason) -> Vec<Op> {
        let found = self.store.assignments.get(assignment);
        found
            .map(|a| Op::Stop(Box::new(a.clone()), self.stop_order(reason)))
            .into_iter()
            .collect()
    }
}
