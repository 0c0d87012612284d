//! Merging what all epochs of a job answered.
//!
//! Owns: which answer of which epoch counts, exactly one a line, in line order. Must not: read or write objects.

use gogrid_api::assignment::LineRange;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Most bytes of a published result: what a ConfigMap takes with everything around it.
pub(crate) const OUTPUT_BYTES: usize = 900 << 10;
const PREVIEW_CHARS: usize = 1024;

/// What one assignment answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct EpochChunks {
    /// Its epoch.
    pub(crate) epoch: i64,
    /// Lines it was told to leave out.
    pub(crate) skip: Vec<LineRange>,
    /// Texts of its chunks, and the one in its status.
    pub(crate) chunks: Vec<String>,
}

/// What is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Merged {
    /// The lines, in input order.
    pub(crate) text: String,
    /// Records.
    pub(crate) records: i64,
    /// Failed records among them.
    pub(crate) failed: i64,
}

/// Why the answers can't be merged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MergeError {
    /// A line is no answer.
    #[error("a result of epoch {epoch} can't be read: {cause}")]
    Unreadable {
        /// Whose.
        epoch: i64,
        /// What is wrong with it.
        cause: String,
    },
    /// Answers are missing or too many.
    #[error("{found} of {expected} records have an answer")]
    Incomplete {
        /// Answers.
        found: i64,
        /// Records of the input.
        expected: i64,
    },
}

#[derive(Deserialize)]
struct Line {
    line: i64,
    #[serde(default)]
    error: Option<serde_json::Value>,
}

fn within(ranges: &[LineRange], line: i64) -> bool {
    ranges.iter().any(|r| r.first <= line && line <= r.last)
}

/// Merges chunks of all epochs; `expected` is the number of records of the input.
///
/// The last epoch was told which lines the earlier ones had answered: of those, only these lines count, so that an
/// answer that a lost node wrote later can never stand beside another one; unless `one_answer` is taken away.
pub(crate) fn merge(
    mut epochs: Vec<EpochChunks>,
    expected: i64,
    one_answer: bool,
) -> Result<Merged, MergeError> {
    epochs.sort_by_key(|e| e.epoch);
    let last_epoch = epochs.last().map_or(0, |e| e.epoch);
    let skip = epochs.last().map(|e| e.skip.clone()).unwrap_or_default();
    let mut by_line: BTreeMap<(i64, i64), (String, bool)> = BTreeMap::new();
    for EpochChunks {
        epoch,
        skip: _,
        chunks,
    } in epochs
    {
        for text in chunks
            .iter()
            .flat_map(|c| c.lines())
            .filter(|l| !l.trim().is_empty())
        {
            let line: Line = serde_json::from_str(text).map_err(|e| MergeError::Unreadable {
                epoch,
                cause: e.to_string(),
            })?;
            if !one_answer || (epoch == last_epoch) != within(&skip, line.line) {
                let failed = line.error.is_some_and(|e| !e.is_null());
                by_line
                    .entry((line.line, if one_answer { 0 } else { epoch }))
                    .or_insert_with(|| (text.to_owned(), failed));
            }
        }
    }
    let found = i64::try_from(by_line.len()).unwrap_or(i64::MAX);
    if found < expected || (one_answer && found > expected) {
        return Err(MergeError::Incomplete { found, expected });
    }
    let failed = i64::try_from(by_line.values().filter(|(_, failed)| *failed).count()).unwrap_or(i64::MAX);
    let mut text = String::new();
    for (line, _) in by_line.values() {
        text.push_str(line);
        text.push('\n');
    }
    Ok(Merged {
        text,
        records: found,
        failed,
    })
}

/// The beginning of a result, cut at a whole line where one fits.
pub(crate) fn preview(text: &str) -> String {
    let cut = text
        .char_indices()
        .nth(PREVIEW_CHARS)
        .map_or(text.len(), |(at, _)| at);
    let head = text.get(..cut).unwrap_or("");
    match head.rfind('\n') {
        Some(at) => head.get(..=at).unwrap_or(head).to_owned(),
        None => head.to_owned(),
    }
}

/// Sorted, touching ranges merged, at most `most` of them (the lines beyond are run again).
pub(crate) fn union(ranges: impl Iterator<Item = LineRange>, most: usize) -> Vec<LineRange> {
    let mut sorted: Vec<_> = ranges.filter(|r| r.first <= r.last).collect();
    sorted.sort_by_key(|r| (r.first, r.last));
    let mut merged: Vec<LineRange> = vec![];
    for range in sorted {
        match merged
            .last_mut()
            .filter(|l| range.first <= l.last.saturating_add(1))
        {
            Some(last) => last.last = last.last.max(range.last),
            None => merged.push(range),
        }
    }
    merged.truncate(most);
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: i64, last: i64) -> LineRange {
        LineRange { first, last }
    }

    fn answers(who: &str, lines: &[i64]) -> String {
        let answer = |l: &i64| format!("{{\"line\":{l},\"who\":\"{who}\",\"error\":null}}\n");
        lines.iter().map(answer).collect::<Vec<_>>().concat()
    }

    #[test]
    fn every_line_appears_once_in_order_and_a_late_zombie_answer_is_left_out() {
        let first = EpochChunks {
            epoch: 1,
            skip: vec![],
            chunks: vec![answers("old", &[2, 1]), answers("zombie", &[3])],
        };
        let second = EpochChunks {
            epoch: 2,
            skip: vec![range(1, 2)],
            chunks: vec![answers("new", &[4, 3])],
        };
        let merged = merge(vec![second, first], 4, true).unwrap();
        let whos: Vec<_> = merged
            .text
            .lines()
            .map(|l| l.split('"').nth(5).unwrap().to_owned())
            .collect();
        assert_eq!(whos, ["old", "old", "new", "new"]);
        assert_eq!((merged.records, merged.failed), (4, 0));
    }

    #[test]
    fn a_missing_or_unreadable_answer_is_an_error_with_numbers() {
        let one = EpochChunks {
            epoch: 1,
            skip: vec![],
            chunks: vec![answers("a", &[1])],
        };
        assert_eq!(
            merge(vec![one], 2, true),
            Err(MergeError::Incomplete {
                found: 1,
                expected: 2
            })
        );
        let bad = EpochChunks {
            epoch: 1,
            skip: vec![],
            chunks: vec!["{}".into()],
        };
        assert!(matches!(
            merge(vec![bad], 1, true),
            Err(MergeError::Unreadable { epoch: 1, .. })
        ));
    }

    #[test]
    fn failed_records_are_counted_and_the_preview_ends_at_a_line() {
        let chunk = "{\"line\":1,\"error\":{\"code\":\"x\"}}\n{\"line\":2}\n";
        let merged = merge(
            vec![EpochChunks {
                epoch: 1,
                skip: vec![],
                chunks: vec![chunk.into()],
            }],
            2,
            true,
        )
        .unwrap();
        assert_eq!(merged.failed, 1);
        let long = format!("{}\n{}\n", "a".repeat(1000), "b".repeat(100));
        assert_eq!(preview(&long).len(), 1001);
        assert!(preview(&"c".repeat(5000)).len() == 1024);
    }

    #[test]
    fn ranges_that_touch_become_one_and_the_number_of_ranges_is_bounded() {
        let all = [range(5, 6), range(1, 2), range(3, 3), range(9, 9), range(6, 7)];
        assert_eq!(
            union(all.into_iter(), 10),
            [range(1, 3), range(5, 7), range(9, 9)]
        );
        assert_eq!(union(all.into_iter(), 1), [range(1, 3)]);
    }
}
