//! Faults between a program and the API server, struck at chosen requests.
//!
//! Owns: counting requests right above the connection and what happens at the k-th. Linked into operator and agent by their
//! feature `faults` only, never into a release. Must not: change a request, or strike unasked.

mod layer;

pub use layer::{FaultLayer, Faulty};

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Which requests are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// Everything that changes something, Leases, dry runs and reviews of own rights apart.
    Writes,
    /// Those of them that are about jobs: to InferenceJobs, Assignments and ConfigMaps.
    Work,
    /// Everything about Leases, reads too.
    Leases,
    /// Every call, reads too, but what goes on for ever whether there is work or not: watches, and all that goes through
    /// [`FaultLayer::beats`].
    Any,
}

/// What happens at a chosen request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The process dies before the request is sent.
    KillBefore,
    /// The process dies after the answer has come and before anyone saw it.
    KillAfter,
    /// The process stands still (SIGSTOP to itself) before the request is sent; who wakes it sends it.
    PauseBefore,
    /// The request is lost: an error at once.
    Drop,
    /// It is carried out, its answer is lost: an error.
    LoseAnswer,
    /// It is sent that much later.
    Delay(Duration),
    /// It is carried out twice; the second answer counts.
    Duplicate,
    /// It is not sent; this status is the answer, for 429 and 503 with `Retry-After: 3600`.
    Answer(u16),
    /// It is not sent, and no answer ever comes.
    Hang,
    /// It is carried out, and no answer ever comes.
    Swallow,
    /// It is carried out, and its answer comes a byte at a time, which takes seconds.
    Drip,
    /// Nothing but a line in the log, as for every other fault: which requests there are.
    Note,
}

/// One fault: what happens, at which requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is counted.
    pub calls: Calls,
    /// What happens.
    pub act: Act,
    /// First request it happens to; 1 is the first of all.
    pub first: u64,
    /// Last one.
    pub last: u64,
}

impl Fault {
    fn strikes(&self, calls: Calls, number: u64) -> bool {
        self.calls == calls && (self.first..=self.last).contains(&number)
    }
}

/// The flag is malformed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} must be [any:|leases:|work:]WHAT=N, N.. or N..M, where WHAT is kill-before, kill-after, pause-before, drop, \
     lose-answer, delay-MILLIS, duplicate, answer-STATUS, hang, swallow, drip or note"
)]
pub struct FaultError(String);

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        parse(text).ok_or_else(|| FaultError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Fault> {
    let (calls, rest) = match text.split_once(':') {
        Some(("any", rest)) => (Calls::Any, rest),
        Some(("leases", rest)) => (Calls::Leases, rest),
        Some(("work", rest)) => (Calls::Work, rest),
        Some(_) => return None,
        None => (Calls::Writes, text),
    };
    let (word, range) = rest.split_once('=')?;
    let (first, last) = match range.split_once("..") {
        Some((first, "")) => (first.parse().ok()?, u64::MAX),
        Some((first, last)) => (first.parse().ok()?, last.parse().ok()?),
        None => (range.parse().ok()?, range.parse().ok()?),
    };
    let act = match word {
        "kill-before" => Act::KillBefore,
        "kill-after" => Act::KillAfter,
        "pause-before" => Act::PauseBefore,
        "drop" => Act::Drop,
        "lose-answer" => Act::LoseAnswer,
        "duplicate" => Act::Duplicate,
        "hang" => Act::Hang,
        "swallow" => Act::Swallow,
        "drip" => Act::Drip,
        "note" => Act::Note,
        _ => match word.split_once('-')? {
            ("delay", millis) => Act::Delay(Duration::from_millis(millis.parse().ok()?)),
            ("answer", status) => Act::Answer(status.parse().ok().filter(|s| (400..600).contains(s))?),
            _ => return None,
        },
    };
    (first >= 1 && first <= last).then_some(Fault {
        calls,
        act,
        first,
        last,
    })
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            calls,
            act,
            first,
            last,
        } = self;
        write!(f, "{act:?} at {calls:?} {first}..{last}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_read_from_its_flag_and_nonsense_is_refused_with_what_would_do() {
        let fault = |calls, act, first, last| Fault {
            calls,
            act,
            first,
            last,
        };
        for (text, wanted) in [
            ("kill-before=3", fault(Calls::Writes, Act::KillBefore, 3, 3)),
            ("leases:hang=2..", fault(Calls::Leases, Act::Hang, 2, u64::MAX)),
            ("work:pause-before=2", fault(Calls::Work, Act::PauseBefore, 2, 2)),
            ("any:note=1..", fault(Calls::Any, Act::Note, 1, u64::MAX)),
            ("answer-429=1..4", fault(Calls::Writes, Act::Answer(429), 1, 4)),
            (
                "delay-250=9",
                fault(Calls::Writes, Act::Delay(Duration::from_millis(250)), 9, 9),
            ),
            ("pause-before=1", fault(Calls::Writes, Act::PauseBefore, 1, 1)),
        ] {
            assert_eq!(text.parse(), Ok(wanted), "{text}");
        }
        for text in [
            "",
            "kill",
            "kill-before",
            "kill-before=0",
            "kill-before=x",
            "answer-200=1",
            "drop=3..2",
            "reads:drop=1",
        ] {
            let error = text.parse::<Fault>().unwrap_err().to_string();
            assert!(
                error.contains("must be") && error.contains(&format!("{text:?}")),
                "{error}"
            );
        }
    }
}
