//! Which versions of operator and agent work together.
//!
//! Owns: the rule: the same major version, and minor versions at most one apart. Must not: know who runs which.

/// Why an operator gives an agent no work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Skew {
    /// One of them is no version.
    #[error("{0:?} is no version such as 1.2.3")]
    NoVersion(String),
    /// They are too far apart.
    #[error(
        "its agent has version {agent} and the operator {operator}, and they work together one minor version apart at most"
    )]
    TooFar {
        /// The agent's version.
        agent: String,
        /// The operator's.
        operator: String,
    },
}

fn major_and_minor(version: &str) -> Result<(u64, u64), Skew> {
    let mut numbers = version.split('.').map(|part| part.parse().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(Skew::NoVersion(version.to_owned())),
    }
}

/// Whether an operator of that version may give work to an agent of that one.
///
/// # Errors
/// It may not, and why.
pub fn work_together(operator: &str, agent: &str) -> Result<(), Skew> {
    let (ours, theirs) = (major_and_minor(operator)?, major_and_minor(agent)?);
    if ours.0 == theirs.0 && ours.1.abs_diff(theirs.1) <= 1 {
        return Ok(());
    }
    Err(Skew::TooFar {
        agent: agent.to_owned(),
        operator: operator.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_minor_version_apart_works_in_both_directions_and_two_or_another_major_do_not() {
        for agent in ["1.4.0", "1.5.9", "1.6.0-rc.1"] {
            assert_eq!(work_together("1.5.0", agent), Ok(()), "{agent}");
        }
        for agent in ["1.3.9", "1.7.0", "0.5.0", "2.5.0"] {
            let said = work_together("1.5.0", agent).unwrap_err().to_string();
            assert!(said.contains(agent) && said.contains("1.5.0"), "{said}");
        }
    }

    #[test]
    fn what_is_no_version_is_refused_by_name() {
        for agent in ["", "next", "1", "1.x.0"] {
            assert_eq!(
                work_together("1.5.0", agent),
                Err(Skew::NoVersion(agent.to_owned()))
            );
        }
    }
}
