//! How far behind other sessions the session of all workers stands.
//!
//! Owns: the nice value of an autogroup that gives way as single threads of a nice value would. Must not do I/O.

/// The kindest nice value there is.
const KINDEST: i8 = 19;

/// Nice value for the autogroup in which all threads of that nice value live, on a machine of so many logical processors.
///
/// An autogroup's weight is spread over the processors on which its threads are ready: somebody who keeps all of them busy
/// counts on each with an nth of it, and a lone thread of ours beside them with all of ours. A step of nice is a quarter
/// of weight, so as many steps more as make up for a factor of n leave that thread, where it runs, no more than it would
/// have had beside theirs in one session. Who asks for no kindness stands level with other sessions.
pub fn session_rank(niceness: i8, processors: u16) -> i8 {
    if niceness <= 0 {
        return niceness;
    }
    let (mut rank, mut made_up) = (niceness, 1_000_u64);
    while rank < KINDEST && made_up < u64::from(processors).saturating_mul(1_000) {
        rank = rank.saturating_add(1);
        made_up = made_up.saturating_mul(5) / 4;
    }
    rank
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's `sched_prio_to_weight` for nice values from 0 on.
    const WEIGHTS: [u64; 20] = [
        1024, 820, 655, 526, 423, 335, 272, 215, 172, 137, 110, 87, 70, 56, 45, 36, 29, 23, 18, 15,
    ];

    fn weight(niceness: i8) -> u64 {
        WEIGHTS[usize::try_from(niceness).unwrap()]
    }

    #[test]
    fn one_processor_needs_no_more_than_the_threads_say() {
        for niceness in -20..=19 {
            assert_eq!(session_rank(niceness, 1), niceness);
        }
        assert_eq!(session_rank(15, 0), 15);
    }

    #[test]
    fn who_asks_for_no_kindness_stands_level() {
        assert_eq!(session_rank(0, 64), 0);
        assert_eq!(session_rank(-5, 64), -5);
    }

    #[test]
    fn beside_a_session_on_all_processors_a_lone_thread_has_what_it_would_have_beside_its_threads() {
        for niceness in 1..=19 {
            for processors in 1..=64_u16 {
                let rank = session_rank(niceness, processors);
                let ours = weight(rank) * u64::from(processors);
                // The kernel's table is rounded.
                let level = ours * 100 <= weight(niceness) * 103;
                assert!(level || rank == 19, "nice {niceness} on {processors}: {rank}");
                assert!(rank >= niceness);
            }
        }
        assert_eq!(session_rank(15, 2), 19);
        assert_eq!(session_rank(10, 4), 17);
    }
}
