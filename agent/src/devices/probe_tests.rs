use super::*;
use gogrid_agent_core::driver::Ask;
use std::cell::Cell;
use std::time::Duration;

const LONG: Nanos = 30_000_000_000;
/// The question `List` as a frame has this many bytes.
const LIST_BYTES: usize = 10;

/// What a child made of a shell does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Child {
    /// Answers every question.
    Good,
    /// Answers nothing.
    Hangs,
    /// Answers half.
    HangsHalfway,
    /// Ends by a signal.
    Crashes,
    /// Ends before it is asked.
    EndsAtOnce,
    /// Says something else.
    Babbles,
    /// Promises four gigabytes.
    Floods,
}

fn octal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\{byte:03o}")).collect()
}

fn answer() -> Answer {
    Answer::NoDriver {
        message: "none here".into(),
    }
}

fn shell(child: Child) -> Command {
    let good = octal(&frame(&answer()).unwrap());
    let half = octal(&frame(&answer()).unwrap()[..9]);
    let script = match child {
        Child::Good => {
            format!(r#"while [ "$(head -c {LIST_BYTES} | wc -c)" = {LIST_BYTES} ]; do printf '{good}'; done"#)
        }
        Child::Hangs => "exec sleep 1000".into(),
        Child::HangsHalfway => format!("printf '{half}'; exec sleep 1000"),
        Child::Crashes => format!("head -c {LIST_BYTES} >/dev/null; kill -SEGV $$"),
        Child::EndsAtOnce => "exit 3".into(),
        Child::Babbles => r"printf '\006\000\000\000hello!'; exec sleep 1000".into(),
        Child::Floods => r"printf '\377\377\377\377hello!'; exec sleep 1000".into(),
    };
    let mut command = Command::new("sh");
    command.args(["-c", &script]);
    command
}

fn ask(child: Child, limit: Nanos) -> Result<Answer, Silence> {
    Probe::new(|| shell(child)).ask(&Ask::List, limit)
}

#[test]
fn a_probe_that_answers_is_asked_again_and_again_without_a_second_one() {
    let starts = Cell::new(0);
    let mut probe = Probe::new(|| {
        starts.set(starts.get() + 1);
        shell(Child::Good)
    });
    assert_eq!(frame(&Ask::List).unwrap().len(), LIST_BYTES);
    for _ in 0..20 {
        assert_eq!(probe.ask(&Ask::List, LONG), Ok(answer()));
    }
    assert_eq!(starts.get(), 1);
    probe.end();
    assert_eq!(probe.ask(&Ask::List, LONG), Ok(answer()));
    assert_eq!(starts.get(), 2);
}

#[test]
fn a_probe_that_hangs_is_killed_at_the_deadline_and_a_good_one_follows_it() {
    let kind = Cell::new(Child::Hangs);
    let mut probe = Probe::new(|| shell(kind.get()));
    for hanging in [Child::Hangs, Child::HangsHalfway] {
        kind.set(hanging);
        let began = Machine.boottime();
        assert_eq!(
            probe.ask(&Ask::List, 50_000_000),
            Err(Silence::Late),
            "{hanging:?}"
        );
        let took = Machine.boottime() - began;
        assert!((50_000_000..5_000_000_000).contains(&took), "{took} ns");
        kind.set(Child::Good);
        assert_eq!(probe.ask(&Ask::List, LONG), Ok(answer()));
        probe.end();
    }
}

#[test]
fn every_way_to_end_or_to_lie_is_a_silence_that_says_how() {
    let how = |child| match ask(child, LONG) {
        Err(Silence::Ended(how)) => how,
        other => panic!("{child:?}: {other:?}"),
    };
    assert!(
        how(Child::Crashes).contains("signal: 11"),
        "{}",
        how(Child::Crashes)
    );
    let early = how(Child::EndsAtOnce);
    assert!(
        early.contains("exit status: 3") || early.contains("roken pipe"),
        "{early}"
    );
    assert!(
        how(Child::Babbles).contains("expected"),
        "{}",
        how(Child::Babbles)
    );
    assert!(
        how(Child::Floods).contains("4294967295"),
        "{}",
        how(Child::Floods)
    );
    let nothing = Probe::new(|| Command::new("/nowhere/at/all")).ask(&Ask::List, LONG);
    assert!(matches!(nothing, Err(Silence::Ended(how)) if how.contains("could not be started")));
}

/// Descriptors of pipes and processes that this process has open.
fn descriptors() -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let names = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
    names
        .filter(|name| {
            let name = name.to_string_lossy();
            name.starts_with("pipe:") || name.contains("pidfd")
        })
        .count()
}

/// Whether a process with that number is there, be it a zombie, and a child of this one: the kernel gives numbers again.
fn is_ours(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let parent = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(1));
    parent.is_some_and(|parent| parent == std::process::id().to_string())
}

#[test]
fn a_thousand_runs_with_children_that_hang_crash_and_lie_leave_no_descriptor_and_no_child() {
    let before = descriptors();
    let kind = Cell::new(Child::Good);
    let mut probe = Probe::new(|| shell(kind.get()));
    let mut random = 1_u64;
    let mut pids = vec![];
    for run in 0..1000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let child = match (random >> 33) % 16 {
            0 => Child::Good,
            1..=9 => Child::Hangs,
            10 | 11 => Child::HangsHalfway,
            12 => Child::Crashes,
            13 => Child::EndsAtOnce,
            14 => Child::Babbles,
            _ => Child::Floods,
        };
        kind.set(child);
        let late = matches!(child, Child::Hangs | Child::HangsHalfway);
        let outcome = probe.ask(&Ask::List, if late { 1_000_000 } else { LONG });
        match child {
            Child::Good => assert_eq!(outcome, Ok(answer()), "run {run}"),
            _ if late => assert_eq!(outcome, Err(Silence::Late), "run {run}"),
            _ => assert!(
                matches!(outcome, Err(Silence::Ended(_))),
                "run {run}: {child:?} {outcome:?}"
            ),
        }
        // Nothing holds a shell, but a busy machine takes its time.
        if let Some((_, exit)) = &probe.stuck {
            assert!(ended(exit, LONG), "run {run}");
        }
        if let Some(running) = &probe.running {
            pids.push(running.child.id());
        }
        probe.end();
        assert!(probe.running.is_none());
    }
    assert!(!pids.is_empty());
    // Other tests of this process come and go with descriptors of their own.
    let gone = (0..500).any(|_| {
        std::thread::park_timeout(Duration::from_millis(10));
        // The last child may take a moment to end.
        descriptors() <= before && !pids.iter().any(|pid| is_ours(*pid))
    });
    assert!(gone, "{} descriptors, {before} before", descriptors());
}
