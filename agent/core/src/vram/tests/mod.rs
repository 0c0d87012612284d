//! The ledger by itself; under a million random operations in `random`, on a device that behaves as devices do in
//! `device`.

mod device;
mod random;

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
    // Clean enough, and yet too small.
    assert!(too_little(
        &ledger.reserve("gpu", "a", Bytes(5 * GIB)).unwrap_err()
    ));
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
