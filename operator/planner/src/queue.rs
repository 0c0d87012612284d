//! The order in which jobs are looked at.
//!
//! Owns: priority first, then age, then name. Must not: place anything.

/// What orders a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Value of its PriorityClass, 0 without one.
    pub priority: i32,
    /// When it was created, in seconds.
    pub created: i64,
    /// `namespace/name`.
    pub name: String,
}

impl Waiting {
    fn key(&self) -> (std::cmp::Reverse<i32>, i64, &str) {
        (std::cmp::Reverse(self.priority), self.created, &self.name)
    }
}

/// Indices into `waiting`, first in the queue first.
pub fn order(waiting: &[Waiting]) -> Vec<usize> {
    let mut keyed: Vec<_> = waiting.iter().enumerate().map(|(i, w)| (w.key(), i)).collect();
    keyed.sort();
    keyed.into_iter().map(|(_, i)| i).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_higher_priority_goes_first_then_the_older_then_the_name() {
        let job = |priority, created, name: &str| Waiting {
            priority,
            created,
            name: name.into(),
        };
        let jobs = [
            job(0, 5, "c"),
            job(10, 9, "d"),
            job(0, 5, "b"),
            job(0, 1, "z"),
            job(-1, 0, "a"),
        ];
        assert_eq!(order(&jobs), [1, 3, 2, 0, 4]);
    }
}
