//! The law against a device that behaves as devices do: time-sliced, seen a second late, in whole percents.

use super::*;
use gogrid_api::profile::{AdaptiveMode, presets};
use std::collections::VecDeque;

const MILLI: Nanos = 1_000_000;
const SECOND: Nanos = 1_000 * MILLI;
/// The plant's own step.
const STEP: Nanos = 50 * MILLI;

fn settings(ceiling: u16) -> Settings {
    Settings {
        ceiling,
        floor: 50,
        threshold: 200,
    }
}

fn ceilings() -> Vec<u16> {
    presets()
        .iter()
        .map(|(_, spec)| u16::try_from(spec.compute.max_percent).unwrap() * 10)
        .collect()
}

/// A device that slices its time: who wants more than half of a full device gets what the other leaves, at least half.
/// Its sensor tells the others' use only, a second late, in whole percents.
struct Plant {
    now: Nanos,
    /// Others' use in permille, a value per step, newest last.
    used: VecDeque<u64>,
    jitter: u64,
}

impl Plant {
    fn new() -> Self {
        Self {
            now: 10 * SECOND,
            used: VecDeque::from(vec![0; 64]),
            jitter: 1,
        }
    }

    /// One step in which we want `own` permille and the others `wanted`.
    fn step(&mut self, own: u64, wanted: u64) {
        let used = if own + wanted <= 1000 {
            wanted
        } else {
            wanted.min(500.max(1000_u64.saturating_sub(own)))
        };
        self.used.push_back(used);
        self.used.pop_front();
        self.now += STEP;
    }

    /// What the sensor says, with up to `noise` permille of noise.
    fn read(&mut self, noise: u64) -> Sample {
        let delay = usize::try_from(SECOND / STEP).unwrap();
        let used = self.used[self.used.len() - delay];
        self.jitter = self
            .jitter
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let noisy = (used + (self.jitter >> 33) % (2 * noise + 1)).saturating_sub(noise);
        Sample {
            at: self.now,
            foreign: Some(u16::try_from(noisy.min(1000) / 10 * 10).unwrap()),
            strained: false,
        }
    }
}

/// Runs the loop; `own` of what is granted is used. Returns (time since the start, share) after each step.
fn run(
    law: &mut Law,
    plant: &mut Plant,
    seconds: u64,
    noise: u64,
    wanted: impl Fn(u64) -> u64,
) -> Vec<(Nanos, u16)> {
    let begin = plant.now;
    let mut shares = vec![];
    while plant.now < begin + seconds * SECOND {
        let share = law.share(plant.now);
        plant.step(u64::from(share), wanted((plant.now - begin) / SECOND));
        if (plant.now / STEP).is_multiple_of(10) {
            let sample = plant.read(noise);
            law.observe(sample);
        }
        shares.push((plant.now - begin, law.share(plant.now)));
    }
    shares
}

/// Changes of direction: a fall after a rise or a rise after a fall.
fn reversals(shares: &[(Nanos, u16)]) -> usize {
    let moves: Vec<bool> = shares
        .windows(2)
        .filter(|pair| pair[0].1 != pair[1].1)
        .map(|pair| pair[1].1 > pair[0].1)
        .collect();
    moves.windows(2).filter(|pair| pair[0] != pair[1]).count()
}

#[test]
fn a_profile_with_a_fixed_share_has_no_law_and_another_has_its_own_figures() {
    let mut spec = presets()[0].1.clone();
    spec.adaptive.mode = AdaptiveMode::Disabled;
    assert_eq!(Settings::of(&Limits::try_from(&spec).unwrap()), None);
    spec.adaptive.mode = AdaptiveMode::ForeignLoad;
    (spec.adaptive.foreign_load_percent, spec.adaptive.floor_percent) = (30, 7);
    let wanted = Settings {
        ceiling: 600,
        floor: 70,
        threshold: 300,
    };
    assert_eq!(Settings::of(&Limits::try_from(&spec).unwrap()), Some(wanted));
}

#[test]
fn foreign_load_of_95_percent_puts_every_preset_on_its_floor_within_2_seconds_and_keeps_it_there() {
    for ceiling in ceilings() {
        // The load may begin anywhere between two samples.
        for phase in 0..10 {
            let (mut law, mut plant) = (Law::new(settings(ceiling)), Plant::new());
            run(&mut law, &mut plant, 5, 0, |_| 0);
            for _ in 0..phase {
                plant.step(u64::from(ceiling), 0);
            }
            assert_eq!(law.share(plant.now), ceiling);
            let shares = run(&mut law, &mut plant, 60, 30, |_| 950);
            let fell = shares.iter().find(|(_, share)| *share == 50).unwrap().0;
            assert!(fell <= 2 * SECOND, "ceiling {ceiling}, phase {phase}: {fell} ns");
            let rest: Vec<u16> = shares
                .iter()
                .filter(|(at, _)| *at >= fell)
                .map(|(_, s)| *s)
                .collect();
            assert!(
                rest.iter().all(|share| *share == 50),
                "ceiling {ceiling}, phase {phase}"
            );
            assert_eq!(law.mood(), Mood::Yielding);
        }
    }
}

#[test]
fn every_preset_is_back_at_its_ceiling_within_15_seconds_after_the_load_ends() {
    for ceiling in ceilings() {
        let (mut law, mut plant) = (Law::new(settings(ceiling)), Plant::new());
        run(&mut law, &mut plant, 60, 30, |_| 950);
        let shares = run(&mut law, &mut plant, 20, 30, |_| 0);
        let back = shares.iter().find(|(_, share)| *share == ceiling).unwrap().0;
        assert!(back <= 15 * SECOND, "ceiling {ceiling}: {back} ns");
        assert!(
            back >= 4 * SECOND,
            "ceiling {ceiling}: {back} ns is no quiet spell"
        );
        assert_eq!(law.mood(), Mood::Full);
        assert_eq!(reversals(&shares), 0);
    }
}

#[test]
fn own_load_alone_never_trips_whatever_it_does() {
    for ceiling in ceilings() {
        let (mut law, mut plant) = (Law::new(settings(ceiling)), Plant::new());
        let begin = plant.now;
        while plant.now < begin + 600 * SECOND {
            // Ours comes and goes: full for 7 s, idle for 3.
            let busy = (plant.now - begin) / SECOND % 10 < 7;
            plant.step(if busy { u64::from(law.share(plant.now)) } else { 0 }, 0);
            if (plant.now / STEP).is_multiple_of(10) {
                law.observe(plant.read(30));
            }
            assert_eq!(law.share(plant.now), ceiling);
        }
    }
}

#[test]
fn under_any_constant_load_the_share_changes_direction_at_most_once_a_minute() {
    for ceiling in ceilings() {
        for load in (0..=1000).step_by(20) {
            let (mut law, mut plant) = (Law::new(settings(ceiling)), Plant::new());
            let shares = run(&mut law, &mut plant, 600, 30, |_| load);
            for (minute, shares) in shares
                .chunks(usize::try_from(60 * SECOND / STEP).unwrap())
                .enumerate()
            {
                let count = reversals(shares);
                assert!(
                    count <= 1,
                    "ceiling {ceiling}, load {load}, minute {minute}: {count}"
                );
            }
            assert!(reversals(&shares) <= 10);
        }
    }
}

#[test]
fn a_lost_sensor_is_waited_for_5_seconds_and_then_counts_as_load() {
    let mut law = Law::new(settings(600));
    law.observe(Sample {
        at: SECOND,
        foreign: Some(0),
        strained: false,
    });
    assert_eq!(law.share(6 * SECOND - 1), 600);
    assert_eq!(law.mood(), Mood::Full);
    assert_eq!(law.share(6 * SECOND), 50);
    assert_eq!(law.mood(), Mood::Blind);
    // It comes back: a whole quiet spell, counted from there.
    for step in 0..=6 {
        let at = 20 * SECOND + step * 500 * MILLI;
        law.observe(Sample {
            at,
            foreign: Some(0),
            strained: false,
        });
        assert_eq!(law.share(at), 50, "{step}");
        assert_eq!(
            law.mood(),
            if step == 6 { Mood::Climbing } else { Mood::Yielding }
        );
    }
    assert_eq!(law.share(24 * SECOND), 150);
}

#[test]
fn a_device_that_can_not_be_sensed_keeps_its_static_share_and_says_so() {
    let mut law = Law::new(settings(800));
    law.observe(Sample {
        at: SECOND,
        foreign: None,
        strained: false,
    });
    assert_eq!(law.share(3_600 * SECOND), 800);
    assert_eq!((law.mood(), law.mood().word()), (Mood::Unsensed, "Unsensed"));
}

#[test]
fn a_single_sample_above_the_threshold_is_no_load_and_the_threshold_itself_is_none_either() {
    let mut law = Law::new(settings(600));
    for (at, foreign) in [(1, 201), (2, 200), (3, 201), (4, 200), (5, 200)] {
        law.observe(Sample {
            at,
            foreign: Some(foreign),
            strained: false,
        });
        assert_eq!(law.share(at), 600, "at {at}");
    }
    law.observe(Sample {
        at: 6,
        foreign: Some(201),
        strained: false,
    });
    assert_eq!(law.share(6), 600);
    law.observe(Sample {
        at: 7,
        foreign: Some(201),
        strained: false,
    });
    assert_eq!(law.share(7), 50);
}

#[test]
fn strain_counts_as_load_even_where_foreign_load_can_not_be_read() {
    let mut law = Law::new(settings(600));
    for at in 1..=2 {
        law.observe(Sample {
            at,
            foreign: None,
            strained: true,
        });
    }
    assert_eq!(law.share(2), 50);
    assert_eq!(law.mood(), Mood::Yielding);
    let calm = |at| Sample {
        at,
        foreign: None,
        strained: false,
    };
    law.observe(calm(10 * SECOND));
    law.observe(calm(13 * SECOND - 1));
    assert_eq!(law.share(13 * SECOND), 50);
    law.observe(calm(13 * SECOND));
    assert_eq!(law.share(14 * SECOND), 150);
}

#[test]
fn a_load_that_hovers_below_the_threshold_is_not_taken_for_its_end() {
    let mut law = Law::new(settings(600));
    for at in 0..=2 {
        law.observe(Sample {
            at,
            foreign: Some(900),
            strained: false,
        });
    }
    let hover = |at: u64, foreign| Sample {
        at: at * SECOND,
        foreign: Some(foreign),
        strained: false,
    };
    for at in 1..60 {
        law.observe(hover(at, 151));
        assert_eq!(law.share(at * SECOND), 50);
    }
    // One hovering sample begins the quiet spell anew.
    for (at, foreign) in [(60, 150), (61, 150), (62, 151), (63, 150), (64, 150), (65, 150)] {
        law.observe(hover(at, foreign));
        assert_eq!(law.mood(), Mood::Yielding, "at {at}");
    }
    law.observe(hover(66, 150));
    assert_eq!(law.mood(), Mood::Climbing);
}

/// Trips the law, then keeps it quiet; how long until it climbs, in seconds.
fn trip_and_wait(law: &mut Law, at: &mut u64) -> u64 {
    for _ in 0..2 {
        *at += 1;
        law.observe(Sample {
            at: *at * SECOND,
            foreign: Some(900),
            strained: false,
        });
    }
    assert_eq!(law.share(*at * SECOND), 50);
    let begin = *at + 1;
    loop {
        *at += 1;
        law.observe(Sample {
            at: *at * SECOND,
            foreign: Some(0),
            strained: false,
        });
        law.share(*at * SECOND);
        if law.mood() == Mood::Climbing {
            return *at - begin;
        }
    }
}

#[test]
fn a_load_that_comes_back_doubles_the_quiet_that_is_waited_for_up_to_a_minute() {
    let (mut law, mut at) = (Law::new(settings(950)), 0);
    let waits: Vec<u64> = (0..7).map(|_| trip_and_wait(&mut law, &mut at)).collect();
    assert_eq!(waits, [3, 6, 12, 24, 48, 60, 60]);
    // A minute without load, counted from the climb's beginning, and the next is the first again.
    let climbed = at;
    while at < climbed + 58 {
        at += 1;
        law.observe(Sample {
            at: at * SECOND,
            foreign: Some(0),
            strained: false,
        });
    }
    assert_eq!(trip_and_wait(&mut law, &mut at), 3);
}

#[test]
fn a_load_that_comes_back_a_moment_before_the_minute_is_over_still_doubles() {
    let (mut law, mut at) = (Law::new(settings(950)), 0);
    assert_eq!(trip_and_wait(&mut law, &mut at), 3);
    let climbed = at;
    while at < climbed + 57 {
        at += 1;
        law.observe(Sample {
            at: at * SECOND,
            foreign: Some(0),
            strained: false,
        });
    }
    assert_eq!(trip_and_wait(&mut law, &mut at), 6);
}

#[test]
fn the_climb_is_ten_points_a_second_from_the_floor_and_ends_at_the_ceiling() {
    let (mut law, mut at) = (Law::new(settings(600)), 0);
    trip_and_wait(&mut law, &mut at);
    let begin = at * SECOND;
    assert_eq!(law.share(begin + 10 * MILLI - 1), 50);
    assert_eq!(law.share(begin + 10 * MILLI), 51);
    law.observe(Sample {
        at: begin + 4 * SECOND,
        foreign: Some(0),
        strained: false,
    });
    assert_eq!(law.share(begin + 5 * SECOND), 550);
    assert_eq!(law.mood(), Mood::Climbing);
    assert_eq!(law.share(begin + 5_500 * MILLI - 1), 599);
    assert_eq!(law.mood(), Mood::Climbing);
    assert_eq!(law.share(begin + 5_500 * MILLI), 600);
    assert_eq!(law.mood(), Mood::Full);
}

#[test]
fn an_edited_profile_holds_at_once_and_forgets_nothing() {
    let (mut law, mut at) = (Law::new(settings(950)), 0);
    law.set(settings(600));
    assert_eq!(law.share(0), 600);
    trip_and_wait(&mut law, &mut at);
    law.set(Settings {
        ceiling: 30,
        floor: 50,
        threshold: 200,
    });
    assert_eq!(law.share(at * SECOND), 30);
    assert_eq!(law.settings().ceiling, 30);
    for _ in 0..2 {
        at += 1;
        law.observe(Sample {
            at: at * SECOND,
            foreign: Some(900),
            strained: false,
        });
    }
    law.set(Settings {
        ceiling: 900,
        floor: 80,
        threshold: 200,
    });
    assert_eq!(law.share(at * SECOND), 80);
    assert_eq!(law.mood(), Mood::Yielding);
}

#[test]
fn what_is_forgotten_is_neither_an_old_load_nor_a_lost_sensor() {
    let mut law = Law::new(settings(600));
    let load = |at| Sample {
        at,
        foreign: Some(950),
        strained: false,
    };
    law.observe(load(SECOND));
    law.observe(load(2 * SECOND));
    assert_eq!((law.share(2 * SECOND), law.mood()), (50, Mood::Yielding));
    law.forget();
    // Long after the last sample: nobody looked, nothing was lost.
    assert_eq!((law.share(60 * SECOND), law.mood()), (600, Mood::Unsensed));
    law.observe(load(61 * SECOND));
    assert_eq!(law.share(61 * SECOND), 600);
    law.observe(load(62 * SECOND));
    assert_eq!(law.share(62 * SECOND), 50);
}

#[test]
fn a_sample_that_comes_late_changes_nothing() {
    let mut law = Law::new(settings(600));
    law.observe(Sample {
        at: 10,
        foreign: Some(0),
        strained: false,
    });
    for at in [8, 9] {
        law.observe(Sample {
            at,
            foreign: Some(900),
            strained: false,
        });
    }
    assert_eq!(law.share(10), 600);
    // Of two taken at the same moment both count.
    for _ in 0..2 {
        law.observe(Sample {
            at: 10,
            foreign: Some(900),
            strained: false,
        });
    }
    assert_eq!(law.share(10), 50);
    assert_eq!(
        [Mood::Full, Mood::Yielding, Mood::Climbing, Mood::Blind].map(Mood::word),
        ["Full", "Yielding", "Climbing", "Blind"]
    );
}

#[test]
fn strain_alone_does_not_keep_a_lost_sensor_alive() {
    let mut law = Law::new(settings(600));
    law.observe(Sample {
        at: 0,
        foreign: Some(0),
        strained: false,
    });
    law.observe(Sample {
        at: 4 * SECOND,
        foreign: None,
        strained: false,
    });
    assert_eq!(law.share(5 * SECOND), 50);
    assert_eq!(law.mood(), Mood::Blind);
}
