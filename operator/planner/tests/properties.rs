//! Random worlds, judged by the independent checker.

use gogrid_api::effective::NamedProfile;
use gogrid_api::job::{CpuFallback, Split, TaintEffect, Toleration, TolerationOperator};
use gogrid_api::node::Backend;
use gogrid_api::{Bytes, profile};
use gogrid_planner::check::check;
use gogrid_planner::{Decision, Demand, Device, Heartbeat, JobRequest, Node, Reason, Taint, World, plan};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const GIB: u64 = 1 << 30;

fn device() -> impl Strategy<Value = Device> {
    (
        any::<bool>(),
        0..64_u64,
        0..4_u64,
        0..40_u64,
        0..40_u64,
        0..4_u32,
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(cpu, total, reserved, foreign, used, jobs, well, held)| Device {
            uuid: String::new(),
            backend: if cpu { Backend::Cpu } else { Backend::Cuda },
            total: Bytes(total * GIB),
            reserved: Bytes(reserved * GIB),
            foreign: Bytes(foreign * GIB),
            used: Bytes(used * GIB),
            jobs,
            healthy: well && !held,
            holder: (well && held).then(|| "lab/train".into()),
        })
}

fn node() -> impl Strategy<Value = Node> {
    let heartbeat =
        prop_oneof![4 => Just(Heartbeat::Fresh), 1 => Just(Heartbeat::Waiting), 1 => Just(Heartbeat::Lost)];
    let taint = prop::option::weighted(
        0.3,
        prop_oneof![
            Just(TaintEffect::NoSchedule),
            Just(TaintEffect::NoExecute),
            Just(TaintEffect::PreferNoSchedule)
        ],
    );
    (
        any::<bool>(),
        taint,
        prop::bool::weighted(0.1),
        heartbeat,
        prop::collection::vec(device(), 0..4),
        any::<bool>(),
        prop::bool::weighted(0.1),
    )
        .prop_map(
            |(fast, taint, unschedulable, heartbeat, mut devices, model, skewed)| {
                for (i, d) in devices.iter_mut().enumerate() {
                    d.uuid = format!("d{i}");
                }
                Node {
                    name: String::new(),
                    labels: if fast {
                        BTreeMap::from([("disk".into(), "fast".into())])
                    } else {
                        BTreeMap::new()
                    },
                    taints: taint
                        .map(|effect| Taint {
                            key: "team".into(),
                            value: "ml".into(),
                            effect,
                        })
                        .into_iter()
                        .collect(),
                    unschedulable,
                    heartbeat,
                    ready: true,
                    skew: skewed.then(|| "versions 3 and 1".into()),
                    session: "s".into(),
                    devices,
                    models: if model {
                        BTreeSet::from(["file:/m".to_owned()])
                    } else {
                        BTreeSet::new()
                    },
                    models_cut: false,
                }
            },
        )
}

fn nodes() -> impl Strategy<Value = Vec<Node>> {
    prop::collection::vec(node(), 0..8).prop_map(|mut nodes| {
        for (i, n) in nodes.iter_mut().enumerate() {
            n.name = format!("n{i}");
            n.session = format!("s{i}");
        }
        nodes
    })
}

fn profiles() -> impl Strategy<Value = Vec<NamedProfile>> {
    (1..=100_i32, 1..=100_i32, any::<bool>()).prop_map(|(fast, own, stored)| {
        let [(_, base), ..] = profile::presets();
        let mut governs = base.clone();
        governs.vram.max_percent = fast;
        governs.node_selector = Some(BTreeMap::from([("disk".into(), "fast".into())]));
        let mut tight = base;
        tight.vram.max_percent = own;
        tight.node_selector = None;
        let named = |name: &str, spec| NamedProfile {
            name: name.into(),
            generation: 1,
            spec,
        };
        if stored {
            vec![named("fast", governs), named("own", tight)]
        } else {
            vec![]
        }
    })
}

fn request() -> impl Strategy<Value = JobRequest> {
    (
        0..48_u64,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        prop::option::of(0..8_usize),
    )
        .prop_map(|(need, file, never, selects, bears, own, prefer)| JobRequest {
            name: "j".into(),
            demand: Demand::Fixed(Bytes(need * GIB)),
            layers: 8,
            model_uri: if file { "file:/m" } else { "https://m" }.into(),
            model_sha256: None,
            node_selector: if selects {
                BTreeMap::from([("disk".into(), "fast".into())])
            } else {
                BTreeMap::new()
            },
            tolerations: if bears {
                vec![Toleration {
                    key: Some("team".into()),
                    operator: TolerationOperator::Equal,
                    value: Some("ml".into()),
                    effect: None,
                }]
            } else {
                vec![]
            },
            cpu_fallback: if never {
                CpuFallback::Never
            } else {
                CpuFallback::IfNeeded
            },
            split: Split::Auto,
            profile_name: own.then(|| "own".into()),
            preferred_node: prefer.map(|n| format!("n{n}")),
        })
}

proptest! {
    #[test]
    fn no_plan_breaks_a_rule_and_the_order_of_inputs_makes_no_difference(
        nodes in nodes(), profiles in profiles(), request in request(), turn in 0..8_usize,
    ) {
        let world = World::new(nodes.clone(), profiles.clone()).unwrap();
        let decision = plan(&world, &request);
        prop_assert_eq!(check(&world, &request, &decision), vec![]);
        prop_assert_eq!(&plan(&world, &request), &decision);
        let (mut turned, mut reversed) = (nodes, profiles);
        let middle = turn % turned.len().max(1);
        turned.rotate_left(middle);
        reversed.reverse();
        let other = World::new(turned, reversed).unwrap();
        prop_assert_eq!(&plan(&other, &request), &decision);
    }

    #[test]
    fn many_jobs_one_after_the_other_never_exceed_a_cap(
        nodes in nodes(), profiles in profiles(), requests in prop::collection::vec(request(), 0..12),
    ) {
        let mut world = World::new(nodes, profiles).unwrap();
        for request in requests {
            let decision = plan(&world, &request);
            prop_assert_eq!(check(&world, &request, &decision), vec![]);
            if let Decision::Place(planned) = decision {
                world.take(&planned);
            }
        }
    }

    #[test]
    fn a_job_that_a_bigger_job_could_replace_is_never_left_out(nodes in nodes(), profiles in profiles(), request in request()) {
        // Fitting is monotone: whoever finds a place with more bytes finds one with fewer.
        let world = World::new(nodes, profiles).unwrap();
        let mut smaller = request.clone();
        smaller.demand = Demand::Fixed(Bytes(0));
        if matches!(plan(&world, &request), Decision::Place(_)) {
            prop_assert!(matches!(plan(&world, &smaller), Decision::Place(_)));
        }
    }

    #[test]
    fn the_reason_says_never_only_when_every_cap_is_too_small(nodes in nodes(), profiles in profiles(), request in request()) {
        let mut empty = nodes.clone();
        for device in empty.iter_mut().flat_map(|n| &mut n.devices) {
            device.used = Bytes(0);
            device.foreign = Bytes(0);
            device.healthy |= device.holder.take().is_some();
        }
        let full = World::new(nodes, profiles.clone()).unwrap();
        let world = World::new(empty, profiles).unwrap();
        if let Decision::Unplaced(unplaced) = plan(&full, &request)
            && matches!(unplaced.reason, Reason::ExceedsClusterVram { .. })
        {
            prop_assert!(matches!(plan(&world, &request), Decision::Unplaced(_)));
        }
    }

    #[test]
    fn a_job_that_is_told_to_wait_for_other_pods_fits_a_cap_once_they_are_gone(
        nodes in nodes(), profiles in profiles(), request in request(),
    ) {
        let mut freed = nodes.clone();
        for device in freed.iter_mut().flat_map(|n| &mut n.devices) {
            device.healthy |= device.holder.take().is_some();
        }
        let (before, after) = (World::new(nodes, profiles.clone()).unwrap(), World::new(freed, profiles).unwrap());
        if let Decision::Unplaced(unplaced) = plan(&before, &request)
            && let Reason::DevicesHeld { devices, .. } = unplaced.reason
        {
            prop_assert!(devices > 0);
            match plan(&after, &request) {
                Decision::Place(_) => {}
                Decision::Unplaced(other) =>
                    prop_assert!(matches!(other.reason, Reason::InsufficientVram { .. }), "{other:?}"),
            }
        }
    }
}
