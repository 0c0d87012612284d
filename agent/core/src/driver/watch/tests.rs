use super::*;
use crate::driver::Throttle;
use gogrid_api::Bytes;
use gogrid_api::node::Health;
use proptest::prelude::*;
use std::collections::BTreeMap;

const SECOND: Nanos = 1_000_000_000;
const GIB: u64 = 1 << 30;

fn found(index: u32) -> Found {
    Found {
        index,
        mig: None,
        device: Ok(Identity {
            uuid: format!("GPU-{index}"),
            name: "RTX".into(),
            capability: Some((8, 9)),
            unusable: None,
        }),
    }
}

fn nameless(index: u32) -> Found {
    Found {
        index,
        mig: None,
        device: Err(Trouble {
            lost: true,
            message: "fell off the bus".into(),
        }),
    }
}

fn reading(used: u64, own: Own) -> Reading {
    Reading {
        total: 24 * GIB,
        reserved: GIB,
        used,
        free: 23 * GIB - used,
        own,
        busy_percent: Some(30),
        foreign_busy_percent: Some(20),
        celsius: Some(60),
        throttle: Some(Throttle::default()),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "an outcome, as the watch takes it")]
fn list(devices: impl IntoIterator<Item = u32>) -> Result<Answer, Silence> {
    Ok(Answer::Listed {
        version: "580.95".into(),
        devices: devices.into_iter().map(found).collect(),
    })
}

/// Answers every question with `answer` until `end`; returns what was asked and when.
fn drive(
    watch: &mut Watch,
    now: &mut Nanos,
    end: Nanos,
    mut answer: impl FnMut(&Ask, Nanos) -> Result<Answer, Silence>,
) -> Vec<(Nanos, Ask)> {
    let mut asked = vec![];
    while *now < end {
        match watch.next(*now) {
            Next::Ask(ask, limit) => {
                let outcome = answer(&ask, *now);
                *now += if outcome == Err(Silence::Late) {
                    limit
                } else {
                    1_000_000
                };
                asked.push((*now, ask));
                watch.heard(outcome, *now);
            }
            Next::End => {}
            Next::Wait(until) => *now = until.min(end),
        }
    }
    asked
}

fn good(devices: u32) -> impl FnMut(&Ask, Nanos) -> Result<Answer, Silence> {
    move |ask, _| match ask {
        Ask::List => list(0..devices),
        Ask::Read { .. } => Ok(Answer::Read(reading(GIB, Own::NotAsked))),
    }
}

fn watch() -> Watch {
    Watch::new(Timing::default(), true)
}

#[test]
fn a_device_is_read_once_a_second_while_a_job_has_one_and_every_ten_seconds_otherwise() {
    for (busy, most, least) in [(true, 601, 560), (false, 61, 56)] {
        let (mut watch, mut now) = (watch(), 0);
        watch.set_own([], busy);
        let asked = drive(&mut watch, &mut now, 600 * SECOND, good(8));
        let reads = asked
            .iter()
            .filter(|(_, a)| matches!(a, Ask::Read { uuid, .. } if uuid == "GPU-3"));
        let reads = reads.count();
        assert!((least..=most).contains(&reads), "{reads} readings in 600 s");
        let lists = asked.iter().filter(|(_, a)| *a == Ask::List).count();
        assert!((9..=11).contains(&lists), "{lists} lists in 600 s");
    }
}

#[test]
fn processes_are_asked_for_at_most_once_in_five_seconds_however_the_memory_moves_and_never_without_any_of_ours()
 {
    for (own, moving, most) in [(vec![7], false, 61), (vec![7], true, 121), (vec![], true, 0)] {
        let (mut watch, mut now, mut used) = (watch(), 0, GIB);
        watch.set_own(own, true);
        let asked = drive(&mut watch, &mut now, 600 * SECOND, |ask, _| {
            used = if moving {
                (used + 200 * (1 << 20)) % (8 * GIB)
            } else {
                used
            };
            match ask {
                Ask::List => list(0..1),
                Ask::Read { .. } => Ok(Answer::Read(reading(used, Own::Bytes(0)))),
            }
        });
        let looks: Vec<Nanos> = asked
            .iter()
            .filter(|(_, a)| matches!(a, Ask::Read { processes: true, .. }))
            .map(|(at, _)| *at)
            .collect();
        assert!(looks.len() <= most, "{} looks", looks.len());
        assert!(looks.len() >= most * 8 / 10, "{} looks", looks.len());
        assert!(looks.windows(2).all(|w| w[1] - w[0] >= 5 * SECOND));
    }
}

#[test]
fn memory_of_others_is_what_is_used_without_ours_and_stays_as_it_was_while_ours_moves() {
    let (mut watch, mut now) = (watch(), 0);
    watch.set_own([7], true);
    let mut own = Own::Bytes(3 * GIB);
    let round = |watch: &mut Watch, now: &mut Nanos, used: u64, own: Own| {
        let end = *now + 12 * SECOND;
        drive(watch, now, end, |ask, _| match ask {
            Ask::List => list(0..1),
            Ask::Read { processes, .. } => {
                let own = if *processes { own } else { Own::NotAsked };
                Ok(Answer::Read(reading(used, own)))
            }
        });
        watch.news().unwrap().devices[0].memory_foreign.bytes().unwrap()
    };
    assert_eq!(round(&mut watch, &mut now, 5 * GIB, own), Bytes(2 * GIB));
    own = Own::Moved;
    assert_eq!(round(&mut watch, &mut now, 9 * GIB, own), Bytes(2 * GIB));
    own = Own::Unreadable;
    assert_eq!(round(&mut watch, &mut now, 9 * GIB, own), Bytes(2 * GIB));
    watch.set_own([], false);
    assert_eq!(
        round(&mut watch, &mut now, 4 * GIB, Own::NotAsked),
        Bytes(4 * GIB)
    );
}

#[test]
fn a_hang_is_told_within_two_seconds_and_tried_again_after_pauses_that_double_to_a_minute() {
    let (mut watch, mut now) = (watch(), 0);
    let asked = drive(&mut watch, &mut now, 20 * SECOND, good(2));
    assert_eq!(
        watch.news().unwrap().state.clone(),
        DriverState::Answering {
            version: "580.95".into(),
            nameless: None
        }
    );
    assert!(asked.len() > 2);
    // From now on nothing is answered.
    let began = now;
    let mut told = None;
    let mut starts = vec![];
    while now < began + 900 * SECOND {
        match watch.next(now) {
            Next::Ask(ask, limit) => {
                if ask == Ask::List {
                    starts.push(now);
                }
                now += limit;
                watch.heard(Err(Silence::Late), now);
                if let Some(view) = watch.news() {
                    told.get_or_insert((now, view));
                }
            }
            Next::End => {}
            Next::Wait(until) => now = until,
        }
    }
    let (at, view) = told.unwrap();
    // Asked every ten seconds while idle, and two seconds to answer.
    assert!(at - began <= 12 * SECOND, "{} ns", at - began);
    assert!(
        matches!(&view.state, DriverState::Unresponsive(why) if why.contains("2000 ms") && why.contains("GPU-0"))
    );
    assert!(view.devices.iter().all(|d| d.health == Health::Unhealthy));
    assert_eq!(view.lost("GPU-0"), None, "what runs goes on");
    let pauses: Vec<Nanos> = starts.windows(2).map(|w| (w[1] - w[0]) / SECOND - 30).collect();
    assert_eq!(pauses[..6], [2, 4, 8, 16, 32, 64]);
    assert!(pauses[6..].iter().all(|p| *p == 64));
    // It answers again: nothing is good before every device was measured.
    drive(&mut watch, &mut now, began + 2000 * SECOND, good(2));
    let view = watch.news().unwrap();
    assert!(view.devices.iter().all(|d| d.health == Health::Healthy));
}

#[test]
fn one_lost_device_hides_only_itself_and_keeps_its_name_after_the_driver_forgets_it() {
    let (mut watch, mut now) = (watch(), 0);
    drive(&mut watch, &mut now, 5 * SECOND, good(8));
    watch.news();
    drive(&mut watch, &mut now, 600 * SECOND, |ask, at| match ask {
        Ask::List if at < 300 * SECOND => list(0..8),
        Ask::List => {
            let devices = (0..8)
                .map(|i| if i == 5 { nameless(i) } else { found(i) })
                .collect();
            Ok(Answer::Listed {
                version: "580.95".into(),
                devices,
            })
        }
        Ask::Read { uuid, .. } if uuid == "GPU-5" => Ok(Answer::Trouble(Trouble {
            lost: true,
            message: "fell off the bus".into(),
        })),
        Ask::Read { .. } => Ok(Answer::Read(reading(GIB, Own::NotAsked))),
    });
    let view = watch.news().unwrap();
    let sick: Vec<&str> = view
        .devices
        .iter()
        .filter(|d| d.health == Health::Unhealthy)
        .map(|d| d.uuid.as_str())
        .collect();
    assert_eq!((view.devices.len(), sick), (8, vec!["GPU-5"]));
    assert_eq!(view.lost("GPU-4"), None);
    assert!(view.lost("GPU-5").unwrap().contains("fell off the bus"));
    // It comes back after a reset, which only a driver that is loaded anew can see.
    let asked = drive(&mut watch, &mut now, 800 * SECOND, good(8));
    let view = watch.news().unwrap();
    assert!(view.devices.iter().all(|d| d.health == Health::Healthy));
    assert!(asked.iter().any(|(_, a)| *a == Ask::List));
}

#[test]
fn without_a_driver_nothing_is_listed_and_it_is_looked_for_every_thirty_seconds() {
    let (mut watch, mut now) = (watch(), 0);
    assert_eq!(watch.news().unwrap().state, DriverState::Starting);
    let asked = drive(&mut watch, &mut now, 300 * SECOND, |_, _| {
        Ok(Answer::NoDriver {
            message: "libnvidia-ml.so.1: cannot open".into(),
        })
    });
    assert!((9..=11).contains(&asked.len()), "{}", asked.len());
    let view = watch.news().unwrap();
    assert!(matches!(view.state, DriverState::NoDriver(_)) && view.devices.is_empty());
    assert!(view.lost("GPU-0").is_some());
}

#[test]
fn a_driver_that_has_answered_and_goes_is_looked_for_every_two_seconds_and_its_absence_is_dated() {
    let absent = |_: &Ask, _| {
        Ok(Answer::NoDriver {
            message: "none".into(),
        })
    };
    let (mut watch, mut now) = (watch(), 0);
    drive(&mut watch, &mut now, SECOND, absent);
    assert_eq!(watch.view().gone_since, None, "it never was there");
    now = 31 * SECOND;
    drive(&mut watch, &mut now, 40 * SECOND, good(1));
    // Only a probe that is started anew can find that the library is gone.
    watch.heard(Err(Silence::Ended("signal 11".into())), now);
    watch.mode = Mode::Closed { until: now };
    let asked = drive(&mut watch, &mut now, 50 * SECOND, absent);
    let since = watch.view().gone_since.unwrap();
    assert!((40 * SECOND..41 * SECOND).contains(&since), "{since}");
    assert!((4..=6).contains(&asked.len()), "{asked:?}");
    drive(&mut watch, &mut now, 60 * SECOND, good(1));
    assert_eq!(watch.view().gone_since, None, "it is back");
    // One that was let go may be replaced by another before it is there again.
    watch.set_released(true, now);
    watch.set_released(false, now);
    drive(&mut watch, &mut now, 61 * SECOND, absent);
    assert_eq!(watch.view().gone_since, None);
}

#[test]
fn a_released_driver_is_let_go_at_once_and_asked_nothing_until_it_may_be_held_again() {
    let (mut watch, mut now) = (watch(), 0);
    drive(&mut watch, &mut now, 15 * SECOND, good(2));
    watch.news();
    watch.set_released(true, now);
    assert_eq!(watch.next(now), Next::End);
    assert_eq!(watch.next(now), Next::Wait(Nanos::MAX));
    let view = watch.news().unwrap();
    assert_eq!(view.state, DriverState::Released);
    assert!(view.lost("GPU-0").is_some());
    watch.set_released(false, now);
    assert!(matches!(watch.next(now), Next::Ask(Ask::List, _)));
    watch.heard(list(0..2), now);
    let end = now + 5 * SECOND;
    drive(&mut watch, &mut now, end, good(2));
    assert!(
        watch
            .news()
            .unwrap()
            .devices
            .iter()
            .all(|d| d.health == Health::Healthy)
    );
}

#[test]
fn what_a_broken_library_says_is_cut_to_what_a_gpunode_takes() {
    let (mut watch, mut now) = (watch(), 0);
    drive(&mut watch, &mut now, 5 * SECOND, |ask, _| match ask {
        Ask::List => {
            let mut devices: Vec<Found> = (0..200).map(found).collect();
            for found in &mut devices {
                let identity = found.device.as_mut().unwrap();
                identity.name = "x".repeat(5000);
                identity.capability = Some((u32::MAX, 0));
            }
            devices[1].device = devices[0].device.clone();
            devices[2].device.as_mut().unwrap().uuid = String::new();
            devices[3].device = Err(Trouble {
                lost: false,
                message: "y".repeat(5000),
            });
            Ok(Answer::Listed {
                version: "z".repeat(5000),
                devices,
            })
        }
        Ask::Read { .. } => Ok(Answer::Read(Reading {
            busy_percent: Some(255),
            ..reading(0, Own::NotAsked)
        })),
    });
    let view = watch.news().unwrap();
    assert_eq!(view.devices.len(), MAX_DEVICES);
    let uuids: BTreeSet<&str> = view.devices.iter().map(|d| d.uuid.as_str()).collect();
    assert_eq!(uuids.len(), MAX_DEVICES, "no UUID twice");
    assert!(
        view.devices
            .iter()
            .all(|d| d.name.len() <= 128 && d.compute_capability.is_none())
    );
    assert_eq!(view.loads["GPU-0"].busy_percent, Some(100));
    let (_, _, message) = crate::driver::condition(&view, None);
    assert!(message.len() <= 1024 && message.contains("not its own") && message.contains("more than 63"));
}

#[test]
fn devices_without_a_worker_for_them_are_measured_and_never_healthy() {
    let (mut watch, mut now) = (Watch::new(Timing::default(), false), 0);
    drive(&mut watch, &mut now, 5 * SECOND, good(1));
    let device = watch.news().unwrap().devices.remove(0);
    assert_eq!(device.health, Health::Unhealthy);
    assert_eq!(device.message.as_deref(), Some("this build has no CUDA worker"));
    assert_eq!(device.memory_total.bytes().unwrap(), Bytes(24 * GIB));
}

/// What a driver may do to one question.
#[derive(Clone, Copy, Debug)]
enum Mood {
    Good,
    Late,
    Ended,
    Nonsense,
    Lost,
    Absent,
}

fn mood() -> impl Strategy<Value = Mood> {
    prop_oneof![
        6 => Just(Mood::Good),
        1 => Just(Mood::Late),
        1 => Just(Mood::Ended),
        1 => Just(Mood::Nonsense),
        1 => Just(Mood::Lost),
        1 => Just(Mood::Absent),
    ]
}

proptest! {
    #[test]
    fn whatever_a_driver_does_one_probe_at_a_time_is_asked_no_faster_than_agreed_and_all_is_well_once_it_behaves(
        moods in prop::collection::vec((mood(), 0_u8..20), 0..200), busy in any::<bool>(),
    ) {
        let mut watch = watch();
        watch.set_own([1, 2], busy);
        let (mut now, mut running, mut read_at) = (0, false, BTreeMap::<String, Nanos>::new());
        let mut moods = moods.into_iter();
        loop {
            let (mood, release) = moods.next().map_or((Mood::Good, 1), |m| m);
            let devices = watch.view().devices;
            if moods.len() == 0 && devices.len() == 2 && devices.iter().all(|d| d.health == Health::Healthy) {
                break;
            }
            prop_assert!(now < 100_000 * SECOND, "it never answers again: {:?}", watch.state);
            if release == 0 {
                watch.set_released(true, now);
                for _ in 0..2 {
                    match watch.next(now) {
                        Next::End => running = false,
                        Next::Wait(until) => prop_assert_eq!(until, Nanos::MAX),
                        Next::Ask(..) => prop_assert!(false, "asked while released"),
                    }
                }
                prop_assert!(!running);
                watch.set_released(false, now);
                read_at.clear();
            }
            match watch.next(now) {
                Next::Wait(until) => { prop_assert!(until > now); now = until }
                Next::End => { prop_assert!(running); running = false }
                Next::Ask(ask, limit) => {
                    prop_assert!(running || ask == Ask::List, "a probe that was just started knows no device");
                    running = true;
                    if let Ask::Read { uuid, .. } = &ask {
                        let last = read_at.insert(uuid.clone(), now);
                        prop_assert!(last.is_none_or(|at| now - at >= SECOND), "{last:?} {now}");
                    }
                    let outcome = match (mood, &ask) {
                        (Mood::Good, Ask::List) => list(0..2),
                        (Mood::Good, Ask::Read { .. }) => Ok(Answer::Read(reading(GIB, Own::Bytes(0)))),
                        (Mood::Late, _) => { now += limit; running = false; Err(Silence::Late) }
                        (Mood::Ended, _) => { running = false; Err(Silence::Ended("signal 11".into())) }
                        (Mood::Nonsense, Ask::List) => Ok(Answer::Read(reading(0, Own::NotAsked))),
                        (Mood::Nonsense, Ask::Read { .. }) => list([]),
                        (Mood::Lost, Ask::List) => Ok(Answer::Listed {
                            version: String::new(), devices: vec![found(0), nameless(1)],
                        }),
                        (Mood::Lost, Ask::Read { .. }) =>
                            Ok(Answer::Trouble(Trouble { lost: true, message: "lost".into() })),
                        (Mood::Absent, _) => Ok(Answer::NoDriver { message: "none".into() }),
                    };
                    now += 1_000_000;
                    watch.heard(outcome, now);
                }
            }
        }
    }
}
