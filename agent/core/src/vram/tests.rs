//! The ledger by itself, under a million random operations, and against a device that behaves as devices do.

use super::*;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const SECOND: Nanos = 1_000_000_000;

/// xorshift64*: good enough to pick operations, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound.max(1)
    }

    fn within_ten_percent(&mut self, of: u64) -> u64 {
        of * (90 + self.below(21)) / 100
    }
}

fn reading(total: u64, foreign: u64) -> Reading {
    Reading {
        at: 0,
        total: Bytes(total),
        reserved: Bytes(0),
        used: Bytes(foreign),
        own: Some(Own::default()),
        free_at_exit: true,
    }
}

fn ledger(total: u64, cap: u64) -> Ledger {
    let mut ledger = Ledger::default();
    ledger.observe("cpu", reading(total, 0));
    ledger.set_cap("cpu", Bytes(cap));
    ledger
}

fn too_little(shortage: &Shortage) -> bool {
    matches!(shortage, Shortage::TooLittle { .. })
}

#[test]
fn a_refused_reservation_tells_all_numbers_and_changes_nothing() {
    let mut ledger = ledger(1000, 500);
    ledger.reserve("cpu", "a", Bytes(300)).unwrap();
    let shortage = ledger.reserve("cpu", "b", Bytes(201)).unwrap_err();
    assert_eq!(
        shortage,
        Shortage::TooLittle {
            needed: Bytes(201),
            free: Bytes(200),
            cap: Bytes(500),
            held: Bytes(300),
            foreign: Bytes(0),
            total: Bytes(1000)
        }
    );
    assert_eq!(ledger.held("cpu"), Bytes(300));
    assert_eq!(
        ledger.reserve("cpu", "a", Bytes(1)),
        Err(Shortage::Held("a".into()))
    );
    let absent = Err(Shortage::NoDevice("gpu".into()));
    assert_eq!(ledger.reserve("gpu", "a", Bytes(1)), absent);
    assert_eq!(ledger.load("gpu", "a"), absent);
    assert_eq!(ledger.commit("gpu", "a", Bytes(1)), absent);
    let unknown = Err(Shortage::NotHeld("b".into()));
    assert_eq!(ledger.load("cpu", "b"), unknown);
    assert_eq!(ledger.commit("cpu", "b", Bytes(1)), unknown);
    assert_eq!(ledger.devices().collect::<Vec<_>>(), ["cpu"]);
    assert_eq!((ledger.cap("cpu"), ledger.cap("gpu")), (Bytes(500), Bytes(0)));
    assert_eq!(
        (ledger.held("gpu"), ledger.free("gpu"), ledger.foreign("gpu")),
        (Bytes(0), Bytes(0), Bytes(0))
    );
    assert!(ledger.own_known("cpu") && !ledger.own_known("gpu"));
}

#[test]
fn of_two_that_race_for_the_last_bytes_exactly_one_gets_them() {
    let mut ledger = ledger(1000, 500);
    let given = ["a", "b"].map(|name| ledger.reserve("cpu", name, Bytes(500)).is_ok());
    assert_eq!(given, [true, false]);
    assert_eq!(ledger.free("cpu"), Bytes(0));
}

#[test]
fn memory_of_others_is_never_promised() {
    let mut ledger = ledger(1000, 900);
    let mut seen = reading(1000, 700);
    seen.reserved = Bytes(100);
    ledger.observe("cpu", seen);
    assert_eq!(
        (ledger.free("cpu"), ledger.foreign("cpu")),
        (Bytes(200), Bytes(700))
    );
    assert!(ledger.reserve("cpu", "a", Bytes(201)).is_err());
    assert!(ledger.reserve("cpu", "a", Bytes(200)).is_ok());
}

#[test]
fn committing_less_gives_back_and_committing_more_needs_room() {
    let mut ledger = ledger(1000, 500);
    ledger.reserve("cpu", "a", Bytes(300)).unwrap();
    ledger.commit("cpu", "a", Bytes(100)).unwrap();
    assert_eq!(ledger.free("cpu"), Bytes(400));
    assert!(too_little(&ledger.commit("cpu", "a", Bytes(501)).unwrap_err()));
    assert_eq!(ledger.held("cpu"), Bytes(100));
    assert_eq!(ledger.commit("cpu", "a", Bytes(500)), Ok(()));
    ledger.release(0, "a");
    assert_eq!(ledger.held("cpu"), Bytes(0));
}

#[test]
fn under_a_fallen_cap_what_is_held_stays_may_shrink_and_nothing_more_is_given() {
    let mut ledger = ledger(1000, 800);
    ledger.reserve("cpu", "a", Bytes(600)).unwrap();
    ledger.set_cap("cpu", Bytes(300));
    assert_eq!((ledger.held("cpu"), ledger.free("cpu")), (Bytes(600), Bytes(0)));
    assert!(ledger.reserve("cpu", "b", Bytes(1)).is_err());
    assert!(
        too_little(&ledger.load("cpu", "a").unwrap_err()),
        "a promise above the cap must not be loaded"
    );
    assert_eq!(ledger.commit("cpu", "a", Bytes(500)), Ok(()));
    assert_eq!(ledger.commit("cpu", "a", Bytes(500)), Ok(()));
    assert!(ledger.commit("cpu", "a", Bytes(501)).is_err());
}

#[test]
fn others_that_grew_after_the_promise_are_found_out_before_the_load() {
    let mut ledger = ledger(1000, 800);
    ledger.reserve("cpu", "a", Bytes(600)).unwrap();
    ledger.observe("cpu", reading(1000, 400));
    assert_eq!(ledger.load("cpu", "a"), Ok(()), "exactly enough is enough");
    ledger.release(0, "a");
    ledger.observe("cpu", reading(1000, 0));
    ledger.reserve("cpu", "b", Bytes(600)).unwrap();
    ledger.observe("cpu", reading(1000, 401));
    assert!(too_little(&ledger.load("cpu", "b").unwrap_err()));
}

#[test]
fn while_anything_of_ours_loads_what_others_use_stays_at_its_last_value() {
    let mut ledger = ledger(10_000, 10_000);
    ledger.observe("cpu", reading(10_000, 1_000));
    ledger.reserve("cpu", "a", Bytes(3_000)).unwrap();
    ledger.observe("cpu", reading(10_000, 1_100));
    assert_eq!(
        ledger.foreign("cpu"),
        Bytes(1_100),
        "a promise alone freezes nothing"
    );
    ledger.load("cpu", "a").unwrap();
    ledger.observe("cpu", reading(10_000, 3_000));
    assert_eq!(ledger.foreign("cpu"), Bytes(1_100));
    ledger.commit("cpu", "a", Bytes(2_000)).unwrap();
    let own = Some(Own {
        live: Bytes(1_900),
        ended: Bytes(0),
    });
    ledger.observe(
        "cpu",
        Reading {
            own,
            ..reading(10_000, 3_100)
        },
    );
    assert_eq!(ledger.foreign("cpu"), Bytes(1_200));
}

fn late(at: Nanos, used: u64, live: u64, ended: u64) -> Reading {
    let own = Some(Own {
        live: Bytes(live),
        ended: Bytes(ended),
    });
    Reading {
        at,
        own,
        free_at_exit: false,
        ..reading(1000, used)
    }
}

#[test]
fn bytes_of_an_ended_worker_stay_reserved_until_the_device_shows_them_free() {
    let mut ledger = Ledger::default();
    ledger.observe("gpu", late(0, 0, 0, 0));
    ledger.set_cap("gpu", Bytes(600));
    ledger.reserve("gpu", "a", Bytes(500)).unwrap();
    ledger.load("gpu", "a").unwrap();
    ledger.commit("gpu", "a", Bytes(500)).unwrap();
    ledger.release(10, "a");
    assert_eq!(
        ledger.reserve("gpu", "b", Bytes(600)),
        Err(Shortage::Leaving {
            needed: Bytes(600),
            leaving: Bytes(500)
        })
    );
    assert!(
        too_little(&ledger.reserve("gpu", "b", Bytes(601)).unwrap_err()),
        "waiting would not help"
    );
    // Read before it ended, told after.
    ledger.observe("gpu", late(10, 500, 500, 0));
    assert_eq!(ledger.held("gpu"), Bytes(500));
    ledger.observe("gpu", late(11, 550, 0, 500));
    assert_eq!(
        (ledger.held("gpu"), ledger.foreign("gpu")),
        (Bytes(500), Bytes(50))
    );
    // A second release changes nothing.
    ledger.release(SECOND, "a");
    ledger.observe("gpu", late(12, 50, 0, 0));
    assert_eq!((ledger.held("gpu"), ledger.foreign("gpu")), (Bytes(0), Bytes(50)));
    assert_eq!(ledger.reserve("gpu", "b", Bytes(600)), Ok(()));
    assert!(!matches!(
        ledger.reserve("gpu", "c", Bytes(1)),
        Err(Shortage::Leaving { .. })
    ));
}

#[test]
fn a_promise_that_never_reached_the_device_is_free_again_at_once() {
    let mut ledger = Ledger::default();
    ledger.observe("gpu", late(0, 0, 0, 0));
    ledger.set_cap("gpu", Bytes(600));
    ledger.reserve("gpu", "a", Bytes(500)).unwrap();
    ledger.release(1, "a");
    assert_eq!(ledger.held("gpu"), Bytes(0));
}

#[test]
fn what_a_device_can_not_tell_from_others_is_theirs_ten_seconds_after_our_worker_ended() {
    let blind = |at, used| Reading {
        own: None,
        ..late(at, used, 0, 0)
    };
    let blind = |at, used| Reading {
        total: Bytes(8 * GIB),
        ..blind(at, used)
    };
    let mut ledger = Ledger::default();
    ledger.observe("gpu", blind(0, 0));
    ledger.set_cap("gpu", Bytes(6 * GIB));
    ledger.reserve("gpu", "a", Bytes(5 * GIB)).unwrap();
    ledger.load("gpu", "a").unwrap();
    ledger.release(SECOND, "a");
    ledger.observe("gpu", blind(11 * SECOND - 1, 5 * GIB));
    assert_eq!(
        (ledger.held("gpu"), ledger.foreign("gpu")),
        (Bytes(5 * GIB), Bytes(0))
    );
    ledger.observe("gpu", blind(11 * SECOND, 5 * GIB));
    assert_eq!(
        (ledger.held("gpu"), ledger.foreign("gpu")),
        (Bytes(0), Bytes(5 * GIB))
    );
}

#[test]
fn where_own_use_can_not_be_read_a_job_is_only_taken_while_nobody_else_is_there() {
    let blind = |at, used| Reading {
        at,
        own: None,
        free_at_exit: false,
        ..reading(8 * GIB, used)
    };
    let mut ledger = Ledger::default();
    ledger.observe("gpu", blind(0, 65 * MIB));
    ledger.set_cap("gpu", Bytes(4 * GIB));
    assert!(!ledger.own_known("gpu"));
    let refused = Err(Shortage::NotClean {
        foreign: Bytes(65 * MIB),
    });
    assert_eq!(ledger.reserve("gpu", "a", Bytes(1)), refused);
    assert_eq!(ledger.free("gpu"), Bytes(0));
    ledger.observe("gpu", blind(1, 64 * MIB));
    ledger.reserve("gpu", "a", Bytes(2 * GIB)).unwrap();
    ledger.load("gpu", "a").unwrap();
    ledger.commit("gpu", "a", Bytes(2 * GIB)).unwrap();
    // As much as ours may hold proves nobody else; more does.
    ledger.observe("gpu", blind(2, 2 * GIB + 64 * MIB));
    assert_eq!(ledger.foreign("gpu"), Bytes(64 * MIB));
    assert_eq!(ledger.free("gpu"), Bytes(2 * GIB));
    ledger.observe("gpu", blind(3, 2 * GIB + 65 * MIB));
    assert_eq!(
        ledger.reserve("gpu", "b", Bytes(1)),
        Err(Shortage::NotClean {
            foreign: Bytes(65 * MIB)
        })
    );
    ledger.observe("gpu", blind(4, 2 * GIB));
    ledger.release(5, "a");
    ledger.observe("gpu", blind(6, 65 * MIB));
    assert_eq!(
        (ledger.held("gpu"), ledger.foreign("gpu")),
        (Bytes(2 * GIB), Bytes(0)),
        "not given back yet"
    );
    ledger.observe("gpu", blind(7, 64 * MIB));
    assert_eq!(
        (ledger.held("gpu"), ledger.foreign("gpu")),
        (Bytes(0), Bytes(64 * MIB))
    );
}

#[test]
fn two_looks_at_our_own_use_tell_what_held_between_only_while_they_agree() {
    let own = |live, ended| {
        Some(Own {
            live: Bytes(live),
            ended: Bytes(ended),
        })
    };
    assert_eq!(
        Own::between(own(0, 64 * MIB), own(64 * MIB, 0)),
        own(64 * MIB, 64 * MIB)
    );
    assert_eq!(Own::between(own(0, 0), own(64 * MIB + 1, 0)), None);
    assert_eq!(Own::between(own(0, 0), own(0, 64 * MIB + 1)), None);
    assert_eq!(Own::between(None, own(0, 0)), None);
    assert_eq!(Own::between(own(0, 0), None), None);
}

#[test]
fn what_an_old_session_held_counts_until_the_device_shows_it_gone() {
    let mut ledger = Ledger::default();
    ledger.observe("gpu", late(0, 700, 0, 600));
    ledger.set_cap("gpu", Bytes(800));
    assert_eq!(
        (ledger.held("gpu"), ledger.foreign("gpu"), ledger.free("gpu")),
        (Bytes(600), Bytes(100), Bytes(200))
    );
    let shortage = ledger.reserve("gpu", "a", Bytes(201)).unwrap_err();
    assert_eq!(
        shortage,
        Shortage::Leaving {
            needed: Bytes(201),
            leaving: Bytes(600)
        }
    );
    assert!(too_little(&ledger.reserve("gpu", "a", Bytes(801)).unwrap_err()));
    ledger.reserve("gpu", "a", Bytes(200)).unwrap();
    ledger.observe("gpu", late(1, 300, 200, 0));
    assert_eq!((ledger.held("gpu"), ledger.free("gpu")), (Bytes(200), Bytes(600)));
}

#[test]
fn a_job_that_ended_in_whatever_way_leaves_nothing_behind() {
    let mut ledger = ledger(1000, 800);
    ledger.observe("late", late(0, 0, 0, 0));
    ledger.set_cap("late", Bytes(1000));
    for device in ["cpu", "late"] {
        ledger.reserve(device, "a", Bytes(60)).unwrap();
        ledger.reserve(device, "b", Bytes(70)).unwrap();
        ledger.load(device, "b").unwrap();
    }
    ledger.keep_only(3, |name| name == "a");
    assert_eq!((ledger.held("cpu"), ledger.held("late")), (Bytes(60), Bytes(130)));
    // Asking again does not begin its wait anew.
    ledger.keep_only(9 * SECOND, |_| false);
    assert_eq!((ledger.held("cpu"), ledger.held("late")), (Bytes(0), Bytes(70)));
    ledger.observe("late", late(10 * SECOND + 3, 70, 0, 70));
    assert_eq!(
        ledger.held("late"),
        Bytes(70),
        "still shown: it counts as an old session's"
    );
    ledger.observe("late", late(10 * SECOND + 4, 0, 0, 0));
    assert_eq!(ledger.held("late"), Bytes(0));
}

#[test]
fn what_a_worker_holds_beyond_its_reservation_is_promised_to_nobody_else() {
    let mut ledger = ledger(1000, 500);
    ledger.reserve("cpu", "a", Bytes(300)).unwrap();
    ledger.overrun("cpu", "a", Bytes(400));
    assert_eq!(ledger.held("cpu"), Bytes(300), "not loaded yet");
    ledger.load("cpu", "a").unwrap();
    ledger.commit("cpu", "a", Bytes(300)).unwrap();
    ledger.overrun("cpu", "a", Bytes(200));
    assert_eq!(ledger.held("cpu"), Bytes(300), "less is no overrun");
    ledger.overrun("cpu", "a", Bytes(600));
    assert_eq!((ledger.held("cpu"), ledger.free("cpu")), (Bytes(600), Bytes(0)));
    ledger.overrun("cpu", "b", Bytes(1));
    assert_eq!(ledger.held("cpu"), Bytes(600));
}

/// What the operations should have left, kept as a plain list.
struct Model {
    cap: u64,
    foreign: u64,
    /// Held by workers of an agent before this one.
    old: u64,
    held: BTreeMap<usize, (u64, bool)>,
}

impl Model {
    fn sum(&self) -> u64 {
        self.held.values().map(|(bytes, _)| bytes).sum::<u64>() + self.old
    }

    fn reading(&self, total: u64) -> Reading {
        let own = Own {
            live: Bytes(0),
            ended: Bytes(self.old),
        };
        Reading {
            own: Some(own),
            ..reading(total, self.foreign + self.old)
        }
    }
}

#[test]
fn a_million_random_operations_never_lift_a_device_above_its_cap_and_leave_nothing_behind() {
    const TOTAL: u64 = 1_000;
    let mut random = Random(7);
    let names: Vec<String> = (0..12).map(|n| format!("job-{n}")).collect();
    let (mut operations, mut given, mut refused, mut restarts) = (0_u32, 0_u32, 0_u32, 0_u32);
    while operations < 1_000_000 {
        let devices: Vec<String> = (0..=random.below(8)).map(|d| format!("gpu-{d}")).collect();
        let mut ledger = Ledger::default();
        let mut models: Vec<Model> = vec![];
        for device in &devices {
            let cap = random.below(TOTAL + 1);
            ledger.observe(device, reading(TOTAL, 0));
            ledger.set_cap(device, Bytes(cap));
            models.push(Model {
                cap,
                foreign: 0,
                old: 0,
                held: BTreeMap::new(),
            });
        }
        for _ in 0..500 {
            operations += 1;
            let d = usize::try_from(random.below(u64::try_from(devices.len()).unwrap())).unwrap();
            let who = usize::try_from(random.below(12)).unwrap();
            let (device, name, bytes) = (&devices[d], &names[who], 1 + random.below(400));
            let model = &mut models[d];
            let room = model.cap.min(TOTAL - model.foreign);
            match random.below(9) {
                0..=2 => {
                    let fits = !model.held.contains_key(&who) && model.sum() + bytes <= room;
                    let got = ledger.reserve(device, name, Bytes(bytes));
                    assert_eq!(got.is_ok(), fits, "{got:?}");
                    if fits {
                        model.held.insert(who, (bytes, false));
                        given += 1;
                    } else {
                        refused += 1;
                    }
                    // Another one races for what is left, and a byte more.
                    let rival = (who + 1) % 12;
                    if !model.held.contains_key(&rival) {
                        let left = room.saturating_sub(model.sum());
                        assert!(ledger.reserve(device, &names[rival], Bytes(left + 1)).is_err());
                        assert_eq!(ledger.free(device), Bytes(left));
                    }
                }
                3 => {
                    let fits = model.held.contains_key(&who) && model.sum() <= room;
                    assert_eq!(ledger.load(device, name).is_ok(), fits);
                    if let Some(holding) = model.held.get_mut(&who).filter(|_| fits) {
                        holding.1 = true;
                    }
                }
                4 => {
                    let old = model.held.get(&who).map(|h| h.0);
                    let fits = old.is_some_and(|old| bytes <= old || model.sum() - old + bytes <= room);
                    assert_eq!(ledger.commit(device, name, Bytes(bytes)).is_ok(), fits);
                    if fits {
                        model.held.insert(who, (bytes, false));
                    }
                }
                5 => {
                    ledger.release(0, name);
                    for model in &mut models {
                        model.held.remove(&who);
                    }
                }
                6 => {
                    let known = model.foreign;
                    model.foreign = random.below(TOTAL);
                    if random.below(3) == 0 {
                        model.old = 0;
                    }
                    ledger.observe(device, model.reading(TOTAL));
                    if model.held.values().any(|(_, loading)| *loading) {
                        model.foreign = known;
                    }
                }
                7 => {
                    model.cap = random.below(TOTAL + 1);
                    ledger.set_cap(device, Bytes(model.cap));
                }
                _ if operations.is_multiple_of(16) => {
                    // The agent starts anew: the old session's bytes count until the device shows them gone.
                    restarts += 1;
                    let mut fresh = Ledger::default();
                    for (device, model) in devices.iter().zip(&mut models) {
                        model.old = model.sum();
                        model.held.clear();
                        fresh.observe(device, model.reading(TOTAL));
                        fresh.set_cap(device, Bytes(model.cap));
                    }
                    ledger = fresh;
                }
                _ => {}
            }
            for (device, model) in devices.iter().zip(&models) {
                assert_eq!(ledger.held(device), Bytes(model.sum()));
            }
        }
        ledger.keep_only(0, |_| false);
        for device in &devices {
            ledger.observe(device, reading(TOTAL, 0));
        }
        assert!(
            devices.iter().all(|device| ledger.held(device) == Bytes(0)),
            "leaked"
        );
    }
    assert!(
        given > 50_000 && refused > 50_000 && restarts > 1_000,
        "{given} given, {refused} refused, {restarts} restarts"
    );
}

/// A device with granules, contexts and frees that take their time.
struct Device {
    total: u64,
    foreign: u64,
    cap: u64,
    /// Name and bytes of live workers.
    live: BTreeMap<String, u64>,
    /// Bytes of ended ones and when they are given back.
    ended: Vec<(u64, Nanos)>,
}

impl Device {
    const GRANULE: u64 = 2 * MIB;

    fn granules(bytes: u64) -> u64 {
        bytes.div_ceil(Self::GRANULE) * Self::GRANULE
    }

    fn own(&self) -> Own {
        Own {
            live: Bytes(self.live.values().sum()),
            ended: Bytes(self.ended.iter().map(|(bytes, _)| bytes).sum()),
        }
    }

    fn used(&self) -> u64 {
        let Own { live, ended } = self.own();
        live.0 + ended.0 + self.foreign
    }

    fn read(&self, at: Nanos) -> Reading {
        Reading {
            at,
            total: Bytes(self.total),
            reserved: Bytes(0),
            used: Bytes(self.used()),
            own: Own::between(Some(self.own()), Some(self.own())),
            free_at_exit: false,
        }
    }

    /// Allocates for a worker; nothing where the device has no more.
    fn allocate(&mut self, name: &str, bytes: u64) -> bool {
        let fits = self.used() + bytes <= self.total;
        if fits {
            *self.live.entry(name.to_owned()).or_default() += bytes;
        }
        fits
    }

    fn end(&mut self, name: &str, at: Nanos) {
        if let Some(bytes) = self.live.remove(name) {
            self.ended.push((bytes, at));
        }
    }
}

#[test]
fn ten_thousand_runs_on_a_device_with_wrong_estimates_and_late_frees_never_pass_the_cap_or_leak() {
    let mut random = Random(11);
    let (mut loaded, mut out_of_memory, mut over_budget, mut waited) = (0_u32, 0_u32, 0_u32, 0_u32);
    for run in 0..10_000 {
        let total = Device::granules((4 + random.below(21)) * GIB);
        let mut device = Device {
            total,
            foreign: random.below(total / 2),
            cap: total * (50 + random.below(46)) / 100,
            live: BTreeMap::new(),
            ended: vec![],
        };
        let mut now = SECOND;
        let mut ledger = Ledger::default();
        ledger.observe("gpu", device.read(now));
        ledger.set_cap("gpu", Bytes(device.cap));
        // Estimate of the model, estimate of its context, whether it was loaded.
        let mut jobs: BTreeMap<String, (u64, u64, bool)> = BTreeMap::new();
        for step in 0..40 {
            now += random.below(2 * SECOND);
            device.ended.retain(|(_, at)| *at > now);
            let name = format!("job-{step}");
            let some = jobs
                .keys()
                .nth(usize::try_from(random.below(4)).unwrap())
                .cloned();
            match (random.below(8), some) {
                (0..=2, _) => {
                    let (model, context) = (64 * MIB + random.below(total), 300 * MIB);
                    match ledger.reserve("gpu", &name, Bytes(model + context)) {
                        Ok(()) => drop(jobs.insert(name, (model, context, false))),
                        Err(Shortage::Leaving { .. }) => waited += 1,
                        Err(_) => {}
                    }
                }
                (3..=4, Some(name)) if !jobs[&name].2 => {
                    if ledger.load("gpu", &name).is_err() {
                        ledger.release(now, &name);
                        jobs.remove(&name);
                        continue;
                    }
                    if random.below(4) == 0 {
                        device.foreign = random.below(total - device.used() + device.foreign + 1);
                    }
                    let (model, context, _) = jobs[&name];
                    let reserved = model + context;
                    let context = Device::granules(random.within_ten_percent(context));
                    let need = Device::granules(random.within_ten_percent(model));
                    // The worker's pool takes what its context has left of the reservation.
                    let pool = reserved.saturating_sub(context) / Device::GRANULE * Device::GRANULE;
                    let fits = context <= reserved && device.allocate(&name, context);
                    let fits = fits && need <= pool && device.allocate(&name, need);
                    if random.below(2) == 0 {
                        ledger.observe("gpu", device.read(now));
                    }
                    if fits {
                        loaded += 1;
                        ledger.commit("gpu", &name, Bytes(context + need)).unwrap();
                        jobs.insert(name, (model, context, true));
                    } else {
                        *(if need > pool {
                            &mut over_budget
                        } else {
                            &mut out_of_memory
                        }) += 1;
                        device.end(&name, now + random.below(8 * SECOND));
                        ledger.release(now, &name);
                        jobs.remove(&name);
                    }
                }
                (5, Some(name)) => {
                    device.end(&name, now + random.below(8 * SECOND));
                    ledger.release(now, &name);
                    jobs.remove(&name);
                }
                (6, _) if random.below(8) == 0 => {
                    // The agent starts anew: its workers end with it, the device gives back when it likes.
                    for name in std::mem::take(&mut jobs).into_keys() {
                        device.end(&name, now + random.below(8 * SECOND));
                    }
                    let mut fresh = Ledger::default();
                    fresh.observe("gpu", device.read(now));
                    fresh.set_cap("gpu", Bytes(device.cap));
                    ledger = fresh;
                }
                (7, _) => {
                    let most = total - (device.used() - device.foreign);
                    device.foreign = random.below(most + 1);
                }
                _ => ledger.observe("gpu", device.read(now)),
            }
            let Own { live, ended } = device.own();
            assert!(
                live.0 + ended.0 <= device.cap,
                "run {run}, step {step}: {} + {} of {}",
                live.0,
                ended.0,
                device.cap
            );
        }
        for name in jobs.keys() {
            device.end(name, now);
            ledger.release(now, name);
        }
        device.ended.clear();
        ledger.observe("gpu", device.read(now + 1));
        assert_eq!(
            (ledger.held("gpu"), ledger.foreign("gpu").0),
            (Bytes(0), device.foreign),
            "run {run} leaked"
        );
    }
    println!(
        "{loaded} loaded, {out_of_memory} out of memory, {over_budget} over their budget, {waited} waited"
    );
    assert!(loaded > 5_000 && out_of_memory > 100 && over_budget > 1_000 && waited > 100);
}
