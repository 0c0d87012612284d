//! The demo model's tasks: questions whose answers anyone can check, and which of them training never sees.

use crate::rng::{Rng, mix};
use crate::vocab::WEEKDAYS;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    /// `a + b` of two numbers up to 99.
    Sum,
    /// `a − b` of two numbers up to 99, never below 0.
    Difference,
    /// The weekday 1 to 30 days after or before another.
    Weekday,
    /// A word of 3 to 6 letters backwards.
    Reverse,
}

impl Task {
    /// All tasks, in the order in which prompts take turns.
    pub const ALL: [Self; 4] = [Self::Sum, Self::Difference, Self::Weekday, Self::Reverse];

    /// The name in tables and golden files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Difference => "difference",
            Self::Weekday => "weekday",
            Self::Reverse => "reverse",
        }
    }
}

/// Which side of the fence a fact is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Facts the model was trained on.
    Train,
    /// Facts it never saw in any wording: one in ten by hash, and every word of [`WORDS`].
    HeldOut,
}

/// One fact: a question and its answer apart from the wording.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// The two numbers to add.
    Sum(u32, u32),
    /// The larger number and the smaller one to take away.
    Difference(u32, u32),
    /// The number of days, the day it is (0 is Monday), and whether to go forward.
    Weekday(u32, usize, bool),
    /// The word to reverse, in lower case.
    Reverse(String),
}

/// Words that no training step ever sees; half of the held-out words are taken from here, half are random letters.
pub const WORDS: [&str; 60] = [
    "apple", "bread", "cat", "dog", "eagle", "flower", "garden", "house", "island", "jacket", "king",
    "lemon", "mouse", "needle", "orange", "paper", "queen", "river", "silver", "table", "violet", "window",
    "yellow", "zebra", "anchor", "bridge", "candle", "dream", "engine", "forest", "grape", "honey", "ink",
    "jungle", "kettle", "ladder", "moon", "north", "ocean", "pencil", "quilt", "rocket", "salt", "tiger",
    "uncle", "valley", "winter", "youth", "cloud", "stone", "piano", "music", "train", "sugar", "radio",
    "green", "night", "light", "horse", "bear",
];

impl Fact {
    /// Draws a fact of `task` from either side of the fence.
    pub fn draw(task: Task, rng: &mut Rng) -> Self {
        match task {
            Task::Sum => Self::Sum(rng.below(100), rng.below(100)),
            Task::Difference => {
                let (a, b) = (rng.below(100), rng.below(100));
                Self::Difference(a.max(b), a.min(b))
            }
            Task::Weekday => Self::Weekday(1 + rng.below(30), rng.index(7), rng.below(2) == 0),
            Task::Reverse => {
                let length = 3 + rng.below(4);
                Self::Reverse((0..length).map(|_| letter(rng)).collect())
            }
        }
    }

    /// Draws a fact of `task` from one side of the fence.
    pub fn draw_from(task: Task, split: Split, rng: &mut Rng) -> Self {
        if task == Task::Reverse && split == Split::HeldOut && rng.below(2) == 0 {
            let word = WORDS.get(rng.index(WORDS.len())).copied().unwrap_or("cat");
            return Self::Reverse(word.to_owned());
        }
        loop {
            let fact = Self::draw(task, rng);
            if fact.split() == split && fact.can_be_asked() {
                return fact;
            }
        }
    }

    /// The side of the fence. It is decided by a hash of the fact and not of its wording, so that no other wording
    /// (nor the other order of a sum) gives a held-out answer away.
    pub fn split(&self) -> Split {
        let key = match self {
            Self::Sum(a, b) => (1 << 32) | (u64::from(*a.min(b)) << 8) | u64::from(*a.max(b)),
            Self::Difference(a, b) => (2 << 32) | (u64::from(*a) << 8) | u64::from(*b),
            Self::Weekday(n, day, forward) => {
                (3 << 32)
                    | (u64::from(*n) << 8)
                    | (u64::try_from(*day).unwrap_or(0) << 1)
                    | u64::from(*forward)
            }
            Self::Reverse(word) if WORDS.contains(&word.as_str()) => return Split::HeldOut,
            Self::Reverse(word) => word.bytes().fold(4 << 32, |key, byte| mix(key ^ u64::from(byte))),
        };
        if mix(key ^ 0x676f_6772_6964).is_multiple_of(10) {
            Split::HeldOut
        } else {
            Split::Train
        }
    }

    /// False for the few random words that are one token, whose letters the model cannot see.
    fn can_be_asked(&self) -> bool {
        const ONE_TOKEN: [&str; 16] = [
            "plus", "and", "minus", "from", "day", "days", "after", "before", "later", "was", "ago", "add",
            "take", "what", "spell", "write",
        ];
        !matches!(self, Self::Reverse(word) if ONE_TOKEN.contains(&word.as_str()))
    }

    /// The question in the first or second wording, without the line end that the chat template adds.
    pub fn question(&self, second_wording: bool) -> String {
        match (self, second_wording) {
            (Self::Sum(a, b), false) => format!("What is {a} plus {b}?"),
            (Self::Sum(a, b), true) => format!("Add {a} and {b}."),
            (Self::Difference(a, b), false) => format!("What is {a} minus {b}?"),
            (Self::Difference(a, b), true) => format!("Take {b} from {a}."),
            (Self::Weekday(n, day, forward), false) => {
                let direction = if *forward { "after" } else { "before" };
                format!("What day is {} {direction} {}?", days(*n), weekday(*day))
            }
            (Self::Weekday(n, day, true), true) => {
                format!("It is {}. What day is it {} later?", weekday(*day), days(*n))
            }
            (Self::Weekday(n, day, false), true) => {
                format!("It is {}. What day was it {} ago?", weekday(*day), days(*n))
            }
            (Self::Reverse(word), false) => format!("Spell {word} backwards."),
            (Self::Reverse(word), true) => format!("Write {word} in reverse."),
        }
    }

    /// The one right answer.
    pub fn answer(&self) -> String {
        match self {
            Self::Sum(a, b) => (a + b).to_string(),
            Self::Difference(a, b) => a.saturating_sub(*b).to_string(),
            Self::Weekday(n, day, forward) => {
                let step = usize::try_from(*n).unwrap_or(0) % 7;
                weekday(if *forward { day + step } else { day + 7 - step }).to_owned()
            }
            Self::Reverse(word) => word.chars().rev().collect(),
        }
    }
}

fn weekday(index: usize) -> &'static str {
    WEEKDAYS.get(index % 7).copied().unwrap_or("Monday")
}

fn days(n: u32) -> String {
    if n == 1 {
        "1 day".to_owned()
    } else {
        format!("{n} days")
    }
}

fn letter(rng: &mut Rng) -> char {
    char::from(b'a' + u8::try_from(rng.below(26)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab::Encoder;

    #[test]
    fn answers_are_right_and_read_as_they_should() {
        assert_eq!(Fact::Sum(47, 35).answer(), "82");
        assert_eq!(Fact::Difference(52, 38).answer(), "14");
        assert_eq!(
            Fact::Weekday(10, 1, true).question(false),
            "What day is 10 days after Tuesday?"
        );
        assert_eq!(Fact::Weekday(10, 1, true).answer(), "Friday");
        assert_eq!(
            Fact::Weekday(1, 0, false).question(true),
            "It is Monday. What day was it 1 day ago?"
        );
        assert_eq!(Fact::Weekday(1, 0, false).answer(), "Sunday");
        assert_eq!(Fact::Reverse("stone".into()).answer(), "enots");
    }

    #[test]
    fn both_orders_of_a_sum_are_on_the_same_side() {
        for a in 0..100 {
            for b in 0..100 {
                assert_eq!(Fact::Sum(a, b).split(), Fact::Sum(b, a).split());
            }
        }
    }

    #[test]
    fn about_a_tenth_of_each_task_is_held_out() {
        let mut rng = Rng::new(5);
        for task in Task::ALL {
            let held = (0..20_000)
                .filter(|_| Fact::draw(task, &mut rng).split() == Split::HeldOut)
                .count();
            assert!((1_500..2_500).contains(&held), "{}: {held} of 20000", task.name());
        }
    }

    #[test]
    fn no_word_to_spell_is_one_token() {
        let encoder = Encoder::default();
        let mut rng = Rng::new(3);
        assert!(WORDS.iter().all(|word| !encoder.is_one_token(word)));
        for id in 2..u32::try_from(encoder.len()).unwrap() {
            let word = encoder.decode(&[id]).trim().to_owned();
            let spellable = (3..=6).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_lowercase());
            assert!(!spellable || !Fact::Reverse(word).can_be_asked());
        }
        let fact = Fact::draw_from(Task::Reverse, Split::Train, &mut rng);
        assert_eq!(fact.split(), Split::Train);
    }
}
