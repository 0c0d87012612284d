//! The request gate among many callers: by simulated time with cancellation, under many schedules of three threads, and
//! once on the real clock.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test ends by panicking, and one of these measures real time"
)]

use gogrid_agent_core::throttle::{RequestGate, Slot};
use std::collections::BTreeMap;

const MILLI: u64 = 1_000_000;
const INTERVAL: u64 = 50 * MILLI;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % bound
    }
}

/// Callers that arrive together, wake up to `oversleep` late, and of whom `cancel` percent give up before their turn.
/// Returns (slot, start) in the order of starts, and how many gave up.
fn run(callers: u64, oversleep: u64, cancel: u64, seed: u64) -> (Vec<(Slot, u64)>, u64) {
    let mut random = Random(seed);
    let mut gate = RequestGate::new(INTERVAL);
    let begin = 1_000_000 * MILLI;
    let mut asleep: BTreeMap<(u64, u64), Slot> = BTreeMap::new();
    let mut doomed = BTreeMap::new();
    let mut number = 0;
    for _ in 0..callers {
        let reservation = gate.reserve(begin);
        if random.below(100) < cancel {
            doomed.insert(reservation.slot, begin + random.below(callers * INTERVAL));
        }
        number += 1;
        asleep.insert((reservation.start_at, number), reservation.slot);
    }
    let (mut now, mut starts, mut cancelled) = (begin, vec![], 0);
    while let Some(((wake, _), slot)) = asleep.pop_first() {
        now = now.max(wake + if oversleep > 0 { random.below(oversleep) } else { 0 });
        if doomed.get(&slot).is_some_and(|at| *at <= now) {
            gate.cancel(slot);
            cancelled += 1;
            if oversleep == 0 {
                // Whoever is told of it moves up.
                let moved = std::mem::take(&mut asleep).into_iter();
                asleep = moved
                    .map(|((_, number), slot)| ((gate.start_at(slot, now).unwrap(), number), slot))
                    .collect();
            }
            continue;
        }
        match gate.start(slot, now) {
            Ok(()) => starts.push((slot, now)),
            Err(Some(at)) => {
                number += 1;
                // Whoever is not in front yet looks again a moment later.
                asleep.insert((at.max(now + MILLI / 100), number), slot);
            }
            Err(None) => panic!("a waiting place is gone"),
        }
    }
    assert_eq!(gate.waiting(), 0);
    (starts, cancelled)
}

fn gaps_and_order_hold(starts: &[(Slot, u64)]) {
    for pair in starts.windows(2) {
        assert!(pair[1].1 - pair[0].1 >= INTERVAL, "{pair:?}");
        assert!(pair[1].0 > pair[0].0, "overtaken: {pair:?}");
    }
}

#[test]
fn one_a_hundred_and_a_thousand_callers_start_in_turn_fifty_milliseconds_apart_and_lose_nothing() {
    for callers in [1, 100, 1_000] {
        let (starts, _) = run(callers, 0, 0, callers);
        gaps_and_order_hold(&starts);
        let last = starts.last().unwrap().1 - starts[0].1;
        assert_eq!(u64::try_from(starts.len()).unwrap(), callers);
        assert_eq!(last, (callers - 1) * INTERVAL);
    }
}

#[test]
fn under_random_cancellation_and_oversleeping_callers_no_two_starts_are_nearer_and_nobody_overtakes() {
    for seed in 0..20 {
        for callers in [1, 100, 1_000] {
            let (starts, cancelled) = run(callers, 70 * MILLI, 30, seed);
            gaps_and_order_hold(&starts);
            assert_eq!(u64::try_from(starts.len()).unwrap() + cancelled, callers);
        }
    }
}

#[test]
fn the_place_of_a_cancelled_caller_is_used_by_the_next() {
    let (starts, cancelled) = run(200, 0, 30, 7);
    assert!(cancelled > 20, "{cancelled}");
    let took = starts.last().unwrap().1 - starts[0].1;
    let least = (u64::try_from(starts.len()).unwrap() - 1) * INTERVAL;
    // Who gives up is noticed when he wakes, at his own turn at the latest.
    assert!(
        took >= least && took <= least + 2 * INTERVAL,
        "{took} for {least}"
    );
}

/// The gate, the time and the starts so far.
type State = (RequestGate, u64, Vec<(Slot, u64)>);

/// The gate behind a lock and a clock that only waiting moves.
struct Shared {
    state: shuttle::sync::Mutex<State>,
    moved: shuttle::sync::Condvar,
}

impl Shared {
    fn enter(&self, give_up: bool) {
        let mut state = self.state.lock().unwrap();
        let now = state.1;
        let slot = state.0.reserve(now).slot;
        // Between taking a place and the turn, anything may happen.
        drop(state);
        let mut state = self.state.lock().unwrap();
        if give_up {
            state.0.cancel(slot);
            self.moved.notify_all();
            return;
        }
        loop {
            let now = state.1;
            match state.0.start(slot, now) {
                Ok(()) => {
                    state.2.push((slot, now));
                    self.moved.notify_all();
                    return;
                }
                // Only whoever is in front moves the clock: for the others there is always more to wait for.
                Err(Some(at)) if at == state.0.ready_at(now) => state.1 = at,
                Err(Some(_)) => state = self.moved.wait(state).unwrap(),
                Err(None) => panic!("a waiting place is gone"),
            }
        }
    }
}

fn three_callers(one_gives_up: bool) {
    let shared = shuttle::sync::Arc::new(Shared {
        state: shuttle::sync::Mutex::new((RequestGate::new(INTERVAL), 1, vec![])),
        moved: shuttle::sync::Condvar::new(),
    });
    let threads: Vec<_> = (0..3)
        .map(|caller| {
            let shared = shuttle::sync::Arc::clone(&shared);
            shuttle::thread::spawn(move || shared.enter(one_gives_up && caller == 1))
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let state = shared.state.lock().unwrap();
    gaps_and_order_hold(&state.2);
    assert_eq!(state.2.len(), if one_gives_up { 2 } else { 3 });
    assert_eq!(state.0.waiting(), 0);
}

#[test]
fn under_twelve_thousand_schedules_of_three_threads_starts_keep_distance_and_order_and_nobody_is_left_waiting()
 {
    for one_gives_up in [false, true] {
        shuttle::check_random(move || three_callers(one_gives_up), 3_000);
        shuttle::check_pct(move || three_callers(one_gives_up), 3_000, 3);
    }
}

#[test]
fn a_hundred_threads_on_the_real_clock_take_at_least_ninety_nine_intervals() {
    use std::sync::{Condvar, Mutex};
    use std::time::{Duration, Instant};
    let begin = Instant::now();
    let now = || u64::try_from(begin.elapsed().as_nanos()).unwrap();
    let state = Mutex::new((RequestGate::new(INTERVAL), Vec::new()));
    let moved = Condvar::new();
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let mut state = state.lock().unwrap();
                let slot = state.0.reserve(now()).slot;
                loop {
                    let at = now();
                    match state.0.start(slot, at) {
                        Ok(()) => {
                            state.1.push((slot, at));
                            moved.notify_all();
                            return;
                        }
                        Err(next) => {
                            let wait = next.unwrap().saturating_sub(at).max(MILLI / 10);
                            state = moved.wait_timeout(state, Duration::from_nanos(wait)).unwrap().0;
                        }
                    }
                }
            });
        }
    });
    let (_, starts) = state.into_inner().unwrap();
    gaps_and_order_hold(&starts);
    let took = starts[99].1 - starts[0].1;
    println!("100 callers took {} ms", took / MILLI);
    assert!(took >= 99 * INTERVAL, "{took}");
}
