//! What one job asks of placement.
//!
//! Owns: the request, the bytes it needs on a given device, and what it tolerates.

use crate::estimate::{self, EstimateError, Estimated};
use crate::world::Taint;
use gogrid_api::Bytes;
use gogrid_api::assignment::ModelFacts;
use gogrid_api::job::{CpuFallback, Split, TaintEffect, Toleration, TolerationOperator};
use gogrid_api::node::Backend;
use std::collections::BTreeMap;

/// How much memory the job takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// What the user says.
    Fixed(Bytes),
    /// What the model's header says, for that context and at most so many sequences.
    Facts {
        /// The header's numbers.
        facts: ModelFacts,
        /// Context of one sequence.
        context_tokens: i32,
        /// Sequences decoded together at most.
        parallel_sequences: i32,
    },
}

impl Demand {
    /// Bytes on a device of that backend where at most `max_batch` sequences run together.
    ///
    /// # Errors
    /// The numbers can't be a model that runs.
    pub fn on(&self, backend: Backend, max_batch: u16) -> Result<Estimated, EstimateError> {
        match self {
            Demand::Fixed(total) => Ok(Estimated {
                total: *total,
                ..Estimated::default()
            }),
            Demand::Facts {
                facts,
                context_tokens,
                parallel_sequences,
            } => estimate::estimate(
                facts,
                *context_tokens,
                (*parallel_sequences).min(i32::from(max_batch)),
                backend,
            ),
        }
    }
}

/// One job, as placement sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRequest {
    /// Name for explanations.
    pub name: String,
    /// Memory it takes.
    pub demand: Demand,
    /// Transformer blocks of its model.
    pub layers: i32,
    /// Where its weights come from.
    pub model_uri: String,
    /// Their digest, where known.
    pub model_sha256: Option<String>,
    /// Labels the node must carry.
    pub node_selector: BTreeMap<String, String>,
    /// Taints it bears.
    pub tolerations: Vec<Toleration>,
    /// Whether the CPU may serve.
    pub cpu_fallback: CpuFallback,
    /// How the model may be spread; this version places on one device whatever it says.
    pub split: Split,
    /// The job's own profile.
    pub profile_name: Option<String>,
    /// Node to prefer: where it ran when only its agent's session ended.
    pub preferred_node: Option<String>,
}

/// Whether one of the tolerations bears the taint; the same rules as a pod's.
pub fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|t| {
        let effect = t.effect.is_none_or(|e| e == taint.effect);
        let key = t.key.as_ref().is_none_or(|k| *k == taint.key);
        let value = match t.operator {
            TolerationOperator::Exists => true,
            TolerationOperator::Equal => t.key.is_some() && t.value.as_deref().unwrap_or("") == taint.value,
        };
        effect && key && value
    })
}

/// Taints by which Kubernetes says that it hears nothing from a node's kubelet. GoGrid has the agent's own word for that: the
/// node's Lease. Work that goes on needs no kubelet.
const SILENCE: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];

/// Whether a job with these tolerations may not stay on a node with these taints, though it runs there already.
pub fn must_leave(tolerations: &[Toleration], taints: &[Taint]) -> bool {
    taints.iter().any(|taint| {
        taint.effect == TaintEffect::NoExecute
            && !SILENCE.contains(&taint.key.as_str())
            && !tolerates(tolerations, taint)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_leaves_for_a_taint_that_it_does_not_bear_but_not_because_a_kubelet_is_silent() {
        let taint = |key: &str, effect| Taint {
            key: key.into(),
            value: String::new(),
            effect,
        };
        let bears = [Toleration {
            key: Some("repair".into()),
            operator: TolerationOperator::Exists,
            value: None,
            effect: None,
        }];
        let repair = [taint("repair", TaintEffect::NoExecute)];
        assert!(must_leave(&[], &repair));
        assert!(!must_leave(&bears, &repair));
        assert!(!must_leave(&[], &[taint("repair", TaintEffect::NoSchedule)]));
        for silent in SILENCE {
            assert!(!must_leave(&[], &[taint(silent, TaintEffect::NoExecute)]));
        }
    }
}
