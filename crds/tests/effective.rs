//! The node's profile is a ceiling and a job's own only tightens it, whatever the profiles say.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

use gogrid_api::effective::{EffectiveProfileError, Limits, NamedProfile, Yielding, effective_profile};
use gogrid_api::profile::{AdaptiveMode, CONSERVATIVE, IoClass, ResourceProfileSpec, presets};
use gogrid_api::{ByteQuantity, Bytes, Percent};
use proptest::prelude::*;
use std::collections::BTreeMap;

type Labels = BTreeMap<String, String>;

fn spec() -> impl Strategy<Value = ResourceProfileSpec> {
    let io = prop_oneof![
        Just(IoClass::None),
        Just(IoClass::BestEffort),
        Just(IoClass::Idle)
    ];
    let bytes = || prop::option::of((0_u64..1 << 40).prop_map(|b| ByteQuantity::from(Bytes(b))));
    let selector = prop::option::of(prop::collection::btree_map("[ab]", "[xy]", 0..2));
    (
        1..=100_i32,
        bytes(),
        bytes(),
        1..=100_i32,
        0..10_000_i64,
        -20..=19_i32,
        io,
        0..=7_i32,
        1..=256_i32,
        selector,
        (0..3_i32, any::<bool>(), 1..=100_i32, 1..=100_i32),
    )
        .prop_map(
            |(vram, max, reserve, compute, interval, niceness, class, level, batch, selector, rest)| {
                let (precedence, yields, foreign, floor) = rest;
                let [(_, mut spec), ..] = presets();
                spec.vram.max_percent = vram;
                spec.vram.max = max;
                spec.vram.reserve = reserve;
                spec.compute.max_percent = compute;
                spec.compute.min_request_interval_millis = interval;
                spec.cpu.niceness = niceness;
                spec.io.class = class;
                spec.io.level = level;
                spec.max_batch_size = batch;
                spec.node_selector = selector;
                spec.precedence = precedence;
                spec.adaptive.mode = if yields {
                    AdaptiveMode::ForeignLoad
                } else {
                    AdaptiveMode::Disabled
                };
                spec.adaptive.foreign_load_percent = foreign;
                spec.adaptive.floor_percent = floor;
                spec
            },
        )
}

fn profiles() -> impl Strategy<Value = Vec<NamedProfile>> {
    prop::collection::btree_map("[a-d]", spec(), 0..4).prop_map(|map| {
        map.into_iter()
            .map(|(name, spec)| NamedProfile {
                name,
                generation: 1,
                spec,
            })
            .collect()
    })
}

/// Whether `a` takes no more than `b` in any field.
fn at_most(a: &Limits, b: &Limits) -> bool {
    let devices = [(0, 0), (1 << 30, 0), (24 << 30, 1 << 29)];
    devices.iter().all(|(total, reserved)| {
        a.vram_cap(Bytes(*total), Bytes(*reserved)) <= b.vram_cap(Bytes(*total), Bytes(*reserved))
    }) && a.compute_percent <= b.compute_percent
        && a.request_interval >= b.request_interval
        && a.niceness >= b.niceness
        && a.io_class >= b.io_class
        && (a.io_class != b.io_class || a.io_level >= b.io_level)
        && a.max_batch <= b.max_batch
        && match (a.yielding, b.yielding) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(a), Some(b)) => a.foreign <= b.foreign && a.floor <= b.floor,
        }
}

proptest! {
    #[test]
    fn a_jobs_profile_only_ever_tightens_the_nodes(profiles in profiles(), labels in prop::collection::btree_map("[ab]", "[xy]", 0..3), pick in 0_usize..4) {
        let job = profiles.get(pick).map(|p| p.name.as_str());
        let with = effective_profile(&profiles, &labels, job).unwrap();
        let without = effective_profile(&profiles, &labels, None).unwrap();
        prop_assert_eq!(&with.ceiling, &without.ceiling);
        prop_assert_eq!(&without.limits, &without.ceiling);
        prop_assert!(at_most(&with.limits, &with.ceiling));
        if let Some(own) = job.and_then(|n| profiles.iter().find(|p| p.name == n)) {
            prop_assert!(at_most(&with.limits, &Limits::try_from(&own.spec).unwrap()));
        }
    }

    #[test]
    fn the_order_in_which_profiles_are_listed_changes_nothing(profiles in profiles(), labels in prop::collection::btree_map("[ab]", "[xy]", 0..3)) {
        let mut reversed = profiles.clone();
        reversed.reverse();
        prop_assert_eq!(effective_profile(&profiles, &labels, None), effective_profile(&reversed, &labels, None));
    }

    #[test]
    fn tightening_is_idempotent_and_takes_no_sides(a in spec(), b in spec()) {
        let (a, b) = (Limits::try_from(&a).unwrap(), Limits::try_from(&b).unwrap());
        prop_assert_eq!(a.tightened_by(&b), b.tightened_by(&a));
        prop_assert_eq!(a.tightened_by(&a), a);
    }
}

fn stored() -> Vec<NamedProfile> {
    presets()
        .into_iter()
        .map(|(name, spec)| NamedProfile {
            name: name.into(),
            generation: 3,
            spec,
        })
        .collect()
}

#[test]
fn a_node_that_no_profile_matches_is_conservative_stored_or_not() {
    for profiles in [stored(), vec![]] {
        let effective = effective_profile(&profiles, &Labels::new(), None).unwrap();
        assert_eq!(effective.sources[0].0, CONSERVATIVE);
        assert_eq!(effective.limits.vram_percent, Percent(50));
        assert_eq!(effective.limits.max_batch, 2);
    }
}

#[test]
fn the_highest_precedence_governs_and_of_equals_the_first_name() {
    let mut profiles = stored();
    for profile in &mut profiles {
        profile.spec.node_selector = Some(Labels::new());
    }
    let governing = |profiles: &[NamedProfile]| {
        effective_profile(profiles, &Labels::new(), None).unwrap().sources[0]
            .0
            .clone()
    };
    assert_eq!(governing(&profiles), "aggressive");
    profiles[1].spec.precedence = 1;
    assert_eq!(governing(&profiles), "default");
}

#[test]
fn a_job_that_names_a_missing_profile_is_told_its_name() {
    let error = effective_profile(&stored(), &Labels::new(), Some("gentle")).unwrap_err();
    assert_eq!(error, EffectiveProfileError::NotFound("gentle".into()));
    assert!(error.to_string().contains("\"gentle\""));
}

#[test]
fn what_is_not_enforced_yet_is_refused_by_name_and_value() {
    let mut profiles = stored();
    profiles[0].spec.cpu.weight = Some(7);
    let error = effective_profile(&profiles, &Labels::new(), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("conservative"), "{error}");
    let EffectiveProfileError::Invalid { source, .. } =
        effective_profile(&profiles, &Labels::new(), None).unwrap_err()
    else {
        panic!("not refused");
    };
    assert!(source.to_string().contains("spec.cpu.weight = 7"), "{source}");
}

#[test]
fn a_profile_yields_to_others_only_where_it_asks_to() {
    let yielding = presets().map(|(_, spec)| Limits::try_from(&spec).unwrap().yielding);
    assert_eq!(yielding, [None; 3]);
    let [(_, mut spec), ..] = presets();
    spec.adaptive.mode = AdaptiveMode::ForeignLoad;
    let yields = Yielding {
        foreign: Percent(20),
        floor: Percent(5),
    };
    assert_eq!(Limits::try_from(&spec).unwrap().yielding, Some(yields));
}

#[test]
fn the_memory_cap_is_a_percentage_of_what_the_driver_leaves_less_the_reserve() {
    let [(_, mut spec), ..] = presets();
    spec.vram.reserve = Some(ByteQuantity("1Gi".into()));
    let limits = Limits::try_from(&spec).unwrap();
    assert_eq!(limits.vram_cap(Bytes(24 << 30), Bytes(2 << 30)), Bytes(10 << 30));
    spec.vram.max = Some(ByteQuantity("4Gi".into()));
    assert_eq!(
        Limits::try_from(&spec)
            .unwrap()
            .vram_cap(Bytes(24 << 30), Bytes(0)),
        Bytes(3 << 30)
    );
}
