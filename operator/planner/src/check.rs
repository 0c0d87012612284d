//! A second opinion on plans.
//!
//! Owns: the rules of placement, written again from the design and not from `plan`. Must not: share code with it
//! beyond the types and the API's own functions.

use crate::plan::{Decision, Planned};
use crate::request::JobRequest;
use crate::world::{Heartbeat, World};
use gogrid_api::effective::effective_profile;
use gogrid_api::job::{CpuFallback, TaintEffect, TolerationOperator};
use gogrid_api::node::Backend;

/// A rule that a plan breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breach(pub String);

/// Rules that the decision breaks in that world; empty when it is sound.
pub fn check(world: &World, request: &JobRequest, decision: &Decision) -> Vec<Breach> {
    match decision {
        Decision::Place(planned) => check_place(world, request, planned),
        Decision::Unplaced(unplaced) => {
            let mut breaches = vec![];
            if unplaced.candidates.len() > 8 {
                breaches.push(Breach(format!(
                    "{} candidates, at most 8",
                    unplaced.candidates.len()
                )));
            }
            if unplaced.reason.message().is_empty() || unplaced.reason.word().is_empty() {
                breaches.push(Breach("an unplaced job has no reason".into()));
            }
            breaches
        }
    }
}

fn check_place(world: &World, request: &JobRequest, planned: &Planned) -> Vec<Breach> {
    let mut breaches = vec![];
    let mut must = |holds: bool, rule: String| {
        if !holds {
            breaches.push(Breach(rule));
        }
    };
    let Some(node) = world.nodes().iter().find(|n| n.name == planned.node) else {
        return vec![Breach(format!("node {:?} does not exist", planned.node))];
    };
    must(
        node.heartbeat == Heartbeat::Fresh,
        "the node's heartbeat is not fresh".into(),
    );
    must(node.ready, "the node is not ready".into());
    must(!node.unschedulable, "the node is cordoned".into());
    must(
        node.skew.is_none(),
        "the agent's version doesn't go with the operator's".into(),
    );
    must(
        planned.session == node.session && !node.session.is_empty(),
        "the session is not the node's".into(),
    );
    for (key, value) in &request.node_selector {
        must(
            node.labels.get(key) == Some(value),
            format!("label {key}={value} is missing"),
        );
    }
    for taint in node
        .taints
        .iter()
        .filter(|t| t.effect != TaintEffect::PreferNoSchedule)
    {
        let mut borne = false;
        for t in &request.tolerations {
            let same_effect = t.effect.is_none() || t.effect == Some(taint.effect);
            let same_key = match (&t.key, t.operator) {
                (None, TolerationOperator::Exists) => true,
                (None, TolerationOperator::Equal) => false,
                (Some(key), TolerationOperator::Exists) => *key == taint.key,
                (Some(key), TolerationOperator::Equal) => {
                    *key == taint.key && t.value.clone().unwrap_or_default() == taint.value
                }
            };
            borne |= same_effect && same_key;
        }
        must(borne, format!("taint {} is not tolerated", taint.key));
    }
    if request.model_uri.starts_with("file:") && !node.models_cut {
        must(
            node.models.contains(&request.model_uri),
            "the file is not on the node".into(),
        );
    }
    must(
        planned.stages.len() == 1,
        "this version places on one device".into(),
    );
    let Ok(profile) = effective_profile(world.profiles(), &node.labels, request.profile_name.as_deref())
    else {
        return vec![Breach("the node has no effective profile".into())];
    };
    for stage in &planned.stages {
        let Some(device) = node.devices.iter().find(|d| d.uuid == stage.device) else {
            must(false, format!("device {:?} does not exist", stage.device));
            continue;
        };
        must(device.healthy, "the device is unhealthy".into());
        must(device.holder.is_none(), "a pod holds the device".into());
        let cpu = device.backend == Backend::Cpu;
        must(
            !(cpu && request.cpu_fallback == CpuFallback::Never),
            "the job refuses the CPU".into(),
        );
        must(
            planned.on_cpu == cpu,
            "the plan misstates whether the CPU serves".into(),
        );
        // An inspection takes nothing, so it exceeds nothing, however full the device is.
        if stage.bytes.0 == 0 {
            continue;
        }
        must(
            stage.bytes <= profile.limits.vram_cap(device.total, device.reserved),
            "the job's own cap is exceeded".into(),
        );
        let after = u128::from(device.used.0) + u128::from(stage.bytes.0);
        let cap = profile.ceiling.vram_cap(device.total, device.reserved);
        must(after <= u128::from(cap.0), "the node's cap is exceeded".into());
        let others = u128::from(device.foreign.0) + u128::from(device.reserved.0);
        must(
            after + others <= u128::from(device.total.0),
            "more than the device has is promised".into(),
        );
    }
    breaches
}
