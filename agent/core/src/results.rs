//! What a record's answer looks like on disk, and which lines are answered.
//!
//! Owns: the OpenAI Batch output line, merged line ranges, and the cutting of lines into chunks. Must not decide when
//! anything is written.

use crate::protocol::{Finish, Outcome, RecordResult};
use gogrid_api::assignment::LineRange;
use serde_json::{Value, json};

/// Most bytes of results in one ConfigMap: the store takes 1 MiB with everything around it.
pub const MAX_CHUNK_BYTES: usize = 900 << 10;
/// Most ranges that a status can hold.
pub const MAX_RANGES: usize = 1024;

/// The output line of one record, without its line feed. `name` makes its id: the job's uid.
pub fn output_line(name: &str, result: &RecordResult) -> String {
    let id = format!("{name}-{}", result.line);
    let (response, error) = match &result.outcome {
        Outcome::Text {
            text,
            prompt_tokens,
            completion_tokens,
            finish,
            completion,
        } => {
            let finish = match finish {
                Finish::Stop => "stop",
                Finish::Length => "length",
            };
            let (object, choice) = if *completion {
                (
                    "text_completion",
                    json!({"index": 0, "text": text, "finish_reason": finish}),
                )
            } else {
                let message = json!({"role": "assistant", "content": text});
                (
                    "chat.completion",
                    json!({"index": 0, "message": message, "finish_reason": finish}),
                )
            };
            let body = json!({
                "object": object,
                "choices": [choice],
                "usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": completion_tokens,
                    "total_tokens": u64::from(*prompt_tokens) + u64::from(*completion_tokens),
                },
                "gogrid": {
                    "startedMicros": result.started_at / 1000,
                    "finishedMicros": result.finished_at / 1000,
                    "batch": result.batch,
                },
            });
            (
                json!({"status_code": 200, "request_id": id, "body": body}),
                Value::Null,
            )
        }
        Outcome::Error { code, message } => (
            Value::Null,
            json!({"code": clip(code, 64), "message": clip(message, 1024)}),
        ),
    };
    let custom_id = result.custom_id.as_deref().map(|id| clip(id, 512));
    json!({"id": id, "custom_id": custom_id, "line": result.line, "response": response, "error": error})
        .to_string()
}

/// At most that many characters of a text.
pub fn clip(text: &str, characters: usize) -> &str {
    text.char_indices()
        .nth(characters)
        .map_or(text, |(cut, _)| text.get(..cut).unwrap_or(text))
}

/// A word that fits the pattern of failure reasons, or the given one where it does not.
pub fn reason_word<'a>(word: &'a str, otherwise: &'a str) -> &'a str {
    let fits = word.len() <= 64
        && word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.chars().all(|c| c.is_ascii_alphanumeric());
    if fits { word } else { otherwise }
}

/// A set of line numbers as sorted ranges that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lines(Vec<(u64, u64)>);

impl Lines {
    /// Those of an API object; ranges upside down or below 1 are left out.
    pub fn from_ranges(ranges: &[LineRange]) -> Self {
        let mut lines = Self::default();
        for LineRange { first, last } in ranges {
            if let (Ok(first), Ok(last)) = (u64::try_from(*first), u64::try_from(*last)) {
                lines.insert(first, last);
            }
        }
        lines
    }

    /// Adds all lines from `first` to `last`.
    pub fn insert(&mut self, mut first: u64, mut last: u64) {
        if first > last {
            return;
        }
        let from = self.0.partition_point(|(_, end)| end.saturating_add(1) < first);
        let mut to = from;
        while let Some((start, end)) = self.0.get(to).copied() {
            if start > last.saturating_add(1) {
                break;
            }
            first = first.min(start);
            last = last.max(end);
            to += 1;
        }
        self.0.splice(from..to, [(first, last)]);
    }

    /// Whether a line is in the set.
    pub fn contains(&self, line: u64) -> bool {
        let at = self.0.partition_point(|(_, end)| *end < line);
        self.0.get(at).is_some_and(|(start, _)| *start <= line)
    }

    /// Whether all lines from `first` to `last` are in the set.
    pub fn covers(&self, first: u64, last: u64) -> bool {
        let at = self.0.partition_point(|(_, end)| *end < first);
        self.0
            .get(at)
            .is_some_and(|(start, end)| *start <= first && last <= *end)
    }

    /// How many lines from `first` to `last` are in the set.
    pub fn count_within(&self, first: u64, last: u64) -> u64 {
        let overlap = |(start, end): &(u64, u64)| {
            (*end)
                .min(last)
                .saturating_add(1)
                .saturating_sub((*start).max(first))
        };
        self.0.iter().map(overlap).sum()
    }

    /// How many ranges a status would need.
    pub fn ranges(&self) -> usize {
        self.0.len()
    }

    /// For an API object.
    pub fn to_ranges(&self) -> Vec<LineRange> {
        let signed = |line: u64| i64::try_from(line).unwrap_or(i64::MAX);
        self.0
            .iter()
            .map(|(first, last)| LineRange {
                first: signed(*first),
                last: signed(*last),
            })
            .collect()
    }
}

/// A text of whole lines that fits one ConfigMap, and the records it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Output lines, each with its line feed.
    pub text: String,
    /// Input lines they answer.
    pub lines: Vec<u64>,
    /// Failed records among them.
    pub failed: u64,
}

/// One answered record, ready to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its input line.
    pub line: u64,
    /// Its output line, without line feed.
    pub text: String,
    /// Whether it failed.
    pub failed: bool,
}

/// Cuts answers, in their order, into chunks of at most `limit` bytes. An answer longer than that gets its own chunk;
/// the protocol's bounds keep it below [`MAX_CHUNK_BYTES`].
pub fn chunks(answers: &[Answer], limit: usize) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = vec![];
    for Answer { line, text, failed } in answers {
        let fits = chunks.last().is_some_and(|c| c.text.len() + text.len() < limit);
        if !fits {
            chunks.push(Chunk::default());
        }
        if let Some(chunk) = chunks.last_mut() {
            chunk.text.push_str(text);
            chunk.text.push('\n');
            chunk.lines.push(*line);
            chunk.failed += u64::from(*failed);
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn result(outcome: Outcome) -> RecordResult {
        RecordResult {
            line: 7,
            custom_id: Some("q".into()),
            outcome,
            started_at: 5_000,
            finished_at: 9_999,
            batch: 2,
        }
    }

    #[test]
    fn an_answer_is_written_in_the_shape_of_an_openai_batch_output() {
        let outcome = Outcome::Text {
            text: "hi\n".into(),
            prompt_tokens: 3,
            completion_tokens: 4,
            finish: Finish::Length,
            completion: false,
        };
        let line: Value = serde_json::from_str(&output_line("uid", &result(outcome))).unwrap();
        assert_eq!(line["id"], "uid-7");
        assert_eq!(line["custom_id"], "q");
        assert_eq!(line["line"], 7);
        assert_eq!(line["response"]["status_code"], 200);
        let body = &line["response"]["body"];
        assert_eq!(body["object"], "chat.completion");
        assert_eq!(body["choices"][0]["message"]["content"], "hi\n");
        assert_eq!(body["choices"][0]["finish_reason"], "length");
        assert_eq!(body["usage"]["total_tokens"], 7);
        assert_eq!(
            body["gogrid"],
            json!({"startedMicros": 5, "finishedMicros": 9, "batch": 2})
        );
        assert!(line["error"].is_null());
    }

    #[test]
    fn a_failed_record_carries_an_error_and_no_response() {
        let outcome = Outcome::Error {
            code: "InvalidRecord".into(),
            message: "line 7 is no JSON".into(),
        };
        let line: Value = serde_json::from_str(&output_line("uid", &result(outcome))).unwrap();
        assert!(line["response"].is_null());
        assert_eq!(
            line["error"],
            json!({"code": "InvalidRecord", "message": "line 7 is no JSON"})
        );
    }

    #[test]
    fn a_reason_that_would_not_pass_the_api_is_replaced() {
        assert_eq!(reason_word("OutOfMemory", "WorkerFailed"), "OutOfMemory");
        for bad in ["", "out of memory", "Ünder", "a", &"A".repeat(65)] {
            assert_eq!(reason_word(bad, "WorkerFailed"), "WorkerFailed");
        }
    }

    proptest! {
        #[test]
        fn ranges_hold_exactly_the_lines_put_in(
            parts in prop::collection::vec((1_u64..60, 0_u64..9), 0..20), probe in 1_u64..70, to in 0_u64..10,
        ) {
            let (mut lines, mut set) = (Lines::default(), BTreeSet::new());
            for (first, more) in parts {
                lines.insert(first, first + more);
                set.extend(first..=first + more);
            }
            prop_assert_eq!(lines.contains(probe), set.contains(&probe));
            prop_assert_eq!(lines.covers(probe, probe + to), (probe..=probe + to).all(|l| set.contains(&l)));
            let within = u64::try_from((probe..=probe + to).filter(|l| set.contains(l)).count()).unwrap();
            prop_assert_eq!(lines.count_within(probe, probe + to), within);
            let ranges = lines.to_ranges();
            prop_assert!(ranges.windows(2).all(|w| w[0].last + 1 < w[1].first));
            prop_assert_eq!(Lines::from_ranges(&ranges), lines);
        }

        #[test]
        fn chunks_keep_every_answer_once_in_order_and_within_the_limit(
            lengths in prop::collection::vec((1_usize..40, any::<bool>()), 0..60),
        ) {
            let answers: Vec<Answer> = (1..).zip(&lengths)
                .map(|(line, (length, failed))| Answer { line, text: "x".repeat(*length), failed: *failed })
                .collect();
            let cut = chunks(&answers, 64);
            prop_assert!(cut.iter().all(|c| c.text.len() <= 64 && !c.lines.is_empty()));
            let lines: Vec<u64> = cut.iter().flat_map(|c| c.lines.clone()).collect();
            prop_assert_eq!(lines, answers.iter().map(|a| a.line).collect::<Vec<_>>());
            let failed: u64 = cut.iter().map(|c| c.failed).sum();
            prop_assert_eq!(failed, u64::try_from(lengths.iter().filter(|(_, f)| *f).count()).unwrap());
            let text: String = cut.iter().map(|c| c.text.as_str()).collect();
            prop_assert_eq!(text, answers.iter().flat_map(|a| [a.text.as_str(), "\n"]).collect::<String>());
        }
    }
}
