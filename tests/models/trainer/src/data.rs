//! Batches of questions and answers, tokenised and laid one after another without padding.

use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};
use gogrid_testmodels::rng::Rng;
use gogrid_testmodels::tasks::{Fact, Split, Task};
use gogrid_testmodels::vocab::{BOS, EOS, Encoder};

/// How often each task comes in a training batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// All tasks. A word to spell has five tokens to learn from and a weekday only one, so weekdays come more often
    /// and words less.
    Even,
    /// Weekdays alone: they are the slowest to turn from memory into a rule, and quickest at it undisturbed.
    Weekdays,
    /// Half differences, the slowest task of the rest.
    Differences,
    /// As many, but half of them with a result below 20: two-digit numbers that close are rare when drawn evenly,
    /// and what is hardest about them (borrowing, and whether the answer has one digit or two) is then seldom seen.
    CloseDifferences,
}

impl Mix {
    /// The order in which tasks take turns in a batch.
    pub fn turns(self) -> &'static [Task] {
        use Task::{Difference, Reverse, Sum, Weekday};
        match self {
            Self::Even => &[
                Sum, Difference, Weekday, Weekday, Sum, Difference, Weekday, Reverse,
            ],
            Self::Weekdays => &[Weekday],
            Self::Differences | Self::CloseDifferences => &[
                Sum, Difference, Difference, Weekday, Sum, Difference, Difference, Reverse,
            ],
        }
    }
}

/// Sequences ready for the model.
pub struct Batch {
    pub tokens: Tensor,
    /// Where each sequence starts, and at the end the number of tokens.
    pub starts: Arc<Vec<usize>>,
    /// The rows whose next token is part of an answer.
    pub asked: Tensor,
    /// Those next tokens.
    pub targets: Tensor,
    /// Where each sequence's targets start, and at the end their number.
    pub target_starts: Vec<usize>,
}

impl Batch {
    pub fn new(encoder: &Encoder, questions: &[(String, String)]) -> Result<Self> {
        let (mut tokens, mut asked, mut targets) = (Vec::new(), Vec::<u32>::new(), Vec::new());
        let (mut starts, mut target_starts) = (vec![0], vec![0]);
        for (question, answer) in questions {
            tokens.push(BOS);
            tokens.extend(encoder.encode(&format!("{question}\n")));
            let answer = encoder.encode(answer);
            // The first answer token is predicted at the line end, EOS at the last answer token.
            asked.extend((0..=answer.len()).map(|i| (tokens.len() - 1 + i) as u32));
            tokens.extend(&answer);
            targets.extend(answer);
            targets.push(EOS);
            starts.push(tokens.len());
            target_starts.push(targets.len());
        }
        let tensor = |data: Vec<u32>| {
            let count = data.len();
            Tensor::from_vec(data, count, &Device::Cpu)
        };
        Ok(Self {
            tokens: tensor(tokens)?,
            starts: Arc::new(starts),
            asked: tensor(asked)?,
            targets: tensor(targets)?,
            target_starts,
        })
    }

    /// The training batch of a step: it depends on the seed and the step alone, so a resumed run sees the same.
    pub fn training(encoder: &Encoder, seed: u64, step: usize, size: usize, mix: Mix) -> Result<Self> {
        let mut rng = Rng::part(seed ^ 0x7472_6169_6e, step as u64);
        let turns = mix.turns();
        let questions: Vec<_> = (0..size)
            .map(|index| {
                let mut draw = || Fact::draw_from(turns[index % turns.len()], Split::Train, &mut rng);
                let mut fact = draw();
                // Of the four differences in eight turns, two have an odd number.
                while mix == Mix::CloseDifferences && index % 2 == 1 && is_wide_difference(&fact) {
                    fact = draw();
                }
                (fact.question(rng.below(2) == 1), fact.answer())
            })
            .collect();
        Self::new(encoder, &questions)
    }
}

fn is_wide_difference(fact: &Fact) -> bool {
    matches!(fact, Fact::Difference(a, b) if a - b >= 20)
}
