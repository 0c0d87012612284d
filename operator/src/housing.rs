//! Nodes for jobs that have none.
//!
//! Owns: what is asked of the planner, and what its answer makes of a job: an order to look at its model, a placement with
//! its order, or the reason why there is neither. Pure, like the round it is part of. Must not: call the API server.

use crate::apply::Op;
use crate::order;
use crate::round::{Memory, Round, Work, over};
use crate::status::Draft;
use crate::store::Claim;
use crate::validate;
use gogrid_api::assignment::{Kind, ModelFacts, StagedInput};
use gogrid_api::{Assignment, Bytes, InferenceJob, names};
use gogrid_planner::lifecycle::AGENT_RESTARTED;
use gogrid_planner::queue::{self, Waiting};
use gogrid_planner::{Decision, Demand, JobRequest, World, plan};
use kube::ResourceExt as _;
use std::collections::BTreeMap;

/// A job whose model must be looked at, and the inspections that were ordered for it before.
pub(crate) struct ToInspect<'a> {
    pub(crate) job: &'a InferenceJob,
    pub(crate) assignments: Vec<&'a Assignment>,
}

/// A job that may run.
pub(crate) struct ToPlace<'a> {
    pub(crate) job: &'a InferenceJob,
    pub(crate) runs: Vec<&'a Assignment>,
    pub(crate) facts: &'a ModelFacts,
    pub(crate) inputs: &'a [StagedInput],
}

/// Jobs that need a node.
#[derive(Default)]
pub(crate) struct Homeless<'a> {
    pub(crate) to_inspect: Vec<ToInspect<'a>>,
    pub(crate) to_place: Vec<ToPlace<'a>>,
}

impl<'a> Round<'a> {
    /// Finds nodes. The world is drawn only for those who need it: in most rounds nobody does.
    pub(crate) fn house(&self, homeless: &Homeless<'a>, works: &mut Vec<Work>) {
        let Homeless { to_inspect, to_place } = homeless;
        if to_inspect.is_empty() && to_place.is_empty() {
            return;
        }
        let pending = self
            .busy
            .iter()
            .filter_map(|(uid, claim)| Some((uid.clone(), claim.clone()?)))
            .collect();
        let mut world = match self.store.world(self.now, &self.config.version, &pending) {
            Ok(world) => world,
            Err(error) => {
                tracing::error!(
                    error = crate::error_text(&error),
                    "the world contradicts itself, nothing is placed"
                );
                return;
            }
        };
        for inspection in to_inspect {
            self.inspect(inspection, &world, works);
        }
        self.place(&mut world, to_place, works);
    }

    fn request(job: &InferenceJob, demand: Demand, layers: i32) -> JobRequest {
        let spec = &job.spec;
        let restarted = job.status.as_ref().filter(|s| {
            s.last_failure
                .as_ref()
                .is_some_and(|f| f.reason == AGENT_RESTARTED)
        });
        JobRequest {
            name: gogrid_api::names::job_key(job),
            demand,
            layers,
            model_uri: validate::canonical(&spec.model.uri),
            model_sha256: spec.model.sha256.clone(),
            node_selector: spec.placement.node_selector.clone(),
            tolerations: spec.placement.tolerations.clone(),
            cpu_fallback: spec.placement.cpu_fallback,
            split: spec.placement.split,
            profile_name: spec.profile_name.clone(),
            preferred_node: restarted
                .and_then(|s| s.placement.as_ref())
                .map(|p| p.node_name.clone()),
        }
    }

    fn inspect(&self, inspection: &ToInspect<'a>, world: &World, works: &mut Vec<Work>) {
        let ToInspect { job, assignments } = inspection;
        let uid = job.uid().unwrap_or_default();
        let ops = match plan(world, &Self::request(job, Demand::Fixed(Bytes(0)), 1)) {
            Decision::Place(planned) => {
                let last = assignments
                    .iter()
                    .filter(|a| a.spec.kind == Kind::Inspect)
                    .map(|a| order::attempt(a))
                    .max();
                let attempt = last.map_or(0, |n| n.saturating_add(1));
                vec![Op::Create(Box::new(order::inspection(
                    job,
                    attempt,
                    self.term,
                    &planned.node,
                    &planned.session,
                )))]
            }
            Decision::Unplaced(unplaced) => {
                let empty = Memory::default();
                let memory = self.memory.get(&uid).unwrap_or(&empty);
                let draft = Draft::new(job, self.wall).unplaced(&unplaced, 1);
                self.write(job, memory, draft.done())
            }
        };
        if !ops.is_empty() {
            works.push(Work {
                uid,
                job: Some((*job).clone()),
                only_if_gone: None,
                step: "Inspect",
                ops,
                claim: None,
            });
        }
    }

    /// Before an epoch is raised: each earlier run of a silent node, already told to stop, must still be silent. If it is,
    /// its agent will find the order to stop before it may wake the worker.
    fn silence(&self, runs: &[&Assignment]) -> Vec<Op> {
        let mut ops = BTreeMap::new();
        if !self.config.layers.observed_change {
            return vec![];
        }
        for run in runs.iter().filter(|run| !over(run)) {
            let name = names::node_lease(&run.spec.node_name);
            let lease = self.store.leases.get(&name);
            let holder = lease.and_then(|l| l.holder.as_deref());
            if holder.is_none_or(|holder| holder == run.spec.session) {
                let mark = lease.map(|l| l.mark.clone());
                ops.insert(name.clone(), Op::EnsureSilent { lease: name, mark });
            }
        }
        ops.into_values().collect()
    }

    fn place(&self, world: &mut World, jobs: &[ToPlace<'a>], works: &mut Vec<Work>) {
        let waiting: Vec<Waiting> = jobs
            .iter()
            .map(|p| Waiting {
                priority: p
                    .job
                    .spec
                    .priority_class_name
                    .as_ref()
                    .and_then(|n| self.store.priorities.get(n))
                    .copied()
                    .unwrap_or(0),
                created: p
                    .job
                    .metadata
                    .creation_timestamp
                    .as_ref()
                    .map_or(0, |t| t.0.as_second()),
                name: gogrid_api::names::job_key(p.job),
            })
            .collect();
        let mut position = 0;
        for index in queue::order(&waiting) {
            let Some(ToPlace {
                job,
                runs,
                facts,
                inputs,
            }) = jobs.get(index)
            else {
                continue;
            };
            let spec = &job.spec;
            let demand = match spec.memory.as_ref().and_then(|m| m.vram.bytes().ok()) {
                Some(bytes) => Demand::Fixed(bytes),
                None => Demand::Facts {
                    facts: (*facts).clone(),
                    context_tokens: spec.context_tokens,
                    parallel_sequences: spec.parallel_sequences,
                },
            };
            let uid = job.uid().unwrap_or_default();
            let empty = Memory::default();
            let draft = Draft::new(job, self.wall);
            let (ops, claim) = match plan(world, &Self::request(job, demand, facts.layers)) {
                Decision::Place(planned) => {
                    world.take(&planned);
                    let file = spec.model.uri.rsplit('/').next().unwrap_or(&spec.model.uri);
                    let name = if facts.name.is_empty() { file } else { &facts.name };
                    let status = draft.place(&planned, self.term, name).done();
                    let run = order::Run {
                        session: planned.session.clone(),
                        term: self.term,
                        parallel_limit: planned.parallel_limit,
                        inputs: inputs.to_vec(),
                        runs,
                    };
                    let order = order::run(job, &status, run);
                    let claim = status.placement.as_ref().map(|p| Claim {
                        node: p.node_name.clone(),
                        stages: p.stages.clone(),
                    });
                    let mut ops = self.silence(runs);
                    ops.push(Op::WriteStatus(Box::new(status)));
                    ops.extend(order.map(|o| Op::Create(Box::new(o))));
                    (ops, claim)
                }
                Decision::Unplaced(unplaced) => {
                    position += 1;
                    let memory = self.memory.get(&uid).unwrap_or(&empty);
                    (
                        self.write(job, memory, draft.unplaced(&unplaced, position).done()),
                        None,
                    )
                }
            };
            if !ops.is_empty() {
                works.push(Work {
                    uid,
                    job: Some((*job).clone()),
                    only_if_gone: None,
                    step: if claim.is_some() { "Place" } else { "Wait" },
                    ops,
                    claim,
                });
            }
        }
    }
}
