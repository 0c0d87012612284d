//! The committed demo model: the files are those that were made, and the golden answers are true.

use gogrid_testmodels::demo::{Quant, Split, demo_model_path, prompts, task_prompts};
use gogrid_testmodels::tasks::Task;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::path::Path;

fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_committed_file_has_its_listed_sha256() {
    let list = std::fs::read_to_string(folder().join("SHA256SUMS")).unwrap();
    for quant in Quant::ALL {
        let bytes = std::fs::read(demo_model_path(quant)).unwrap();
        assert_eq!(bytes[..4], *b"GGUF");
        let digest = Sha256::digest(&bytes)
            .iter()
            .fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        let line = format!("{digest}  {}", quant.file_name());
        assert!(list.lines().any(|listed| listed == line), "{line}");
    }
    assert_eq!(list.lines().count(), Quant::ALL.len());
}

#[test]
fn the_committed_files_stay_within_eight_megabytes() {
    let sizes = Quant::ALL.map(|quant| std::fs::metadata(demo_model_path(quant)).unwrap().len());
    assert!(sizes.iter().sum::<u64>() <= 8_000_000, "{sizes:?}");
}

#[test]
fn golden_answers_are_right_and_their_facts_held_out() {
    let golden = std::fs::read_to_string(folder().join("golden/answers.tsv")).unwrap();
    let known: HashSet<(String, String)> = Task::ALL
        .into_iter()
        .flat_map(|task| task_prompts(task, 1, 4_000, Split::HeldOut))
        .chain(prompts(1, 200, Split::HeldOut))
        .collect();
    let mut count = 0;
    for line in golden.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [question, answer, lead] = fields[..] else {
            panic!("{line}")
        };
        assert!(
            known.contains(&(question.to_owned(), answer.to_owned())),
            "{line}"
        );
        assert!(lead.parse::<f32>().unwrap() >= 2.0, "{line}");
        count += 1;
    }
    assert!(count >= 20, "{count}");
}

#[test]
fn held_out_prompts_share_no_question_with_training_prompts() {
    for task in Task::ALL {
        let train: HashSet<_> = task_prompts(task, 1, 20_000, Split::Train).into_iter().collect();
        assert!(
            task_prompts(task, 2, 2_000, Split::HeldOut)
                .iter()
                .all(|prompt| !train.contains(prompt))
        );
    }
}
