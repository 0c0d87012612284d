//! The demo model: where its files are, and prompts with the one right answer to each.

use std::path::{Path, PathBuf};

use crate::rng::Rng;
pub use crate::tasks::{Fact, Split, Task};

/// The formats in which the demo model is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quant {
    /// 16-bit floats.
    F16,
    /// 8-bit blocks.
    Q8_0,
    /// 4-bit K-quant blocks.
    Q4K,
}

impl Quant {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F16, Self::Q8_0, Self::Q4K];

    /// The file's name in `tests/models`.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::F16 => "gogrid-demo-f16.gguf",
            Self::Q8_0 => "gogrid-demo-q8_0.gguf",
            Self::Q4K => "gogrid-demo-q4_k.gguf",
        }
    }
}

/// The demo model's file in this checkout.
pub fn demo_model_path(quant: Quant) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(quant.file_name())
}

/// `n` questions and answers, the tasks taking turns. A question goes to the model as one user message; the chat
/// template adds the line end behind it.
pub fn prompts(seed: u64, n: usize, split: Split) -> Vec<(String, String)> {
    let mut rng = Rng::part(seed, 0x6465_6d6f);
    let turns = Task::ALL.into_iter().cycle().take(n);
    turns.map(|task| prompt(task, split, &mut rng)).collect()
}

/// `n` questions and answers of one task.
pub fn task_prompts(task: Task, seed: u64, n: usize, split: Split) -> Vec<(String, String)> {
    let mut rng = Rng::part(seed, 0x7461_736b);
    (0..n).map(|_| prompt(task, split, &mut rng)).collect()
}

fn prompt(task: Task, split: Split, rng: &mut Rng) -> (String, String) {
    let fact = Fact::draw_from(task, split, rng);
    (fact.question(rng.below(2) == 1), fact.answer())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_follow_from_the_seed_and_visit_every_task() {
        let list = prompts(1, 8, Split::HeldOut);
        assert_eq!(list, prompts(1, 8, Split::HeldOut));
        assert_ne!(list, prompts(2, 8, Split::HeldOut));
        assert_eq!(list.len(), 8);
        assert!(list[2].0.contains("day"), "{list:?}");
    }
}
