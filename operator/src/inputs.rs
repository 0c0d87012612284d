//! Cutting a job's input into parts that agents may read.
//!
//! Owns: line numbers, sizes and limits of staged inputs, and which of them are short enough for the order itself. Must
//! not: read or write objects, or look into a record.

use gogrid_api::assignment::{INLINE_BYTES, StagedInput};
use gogrid_planner::lifecycle::Refusal;

/// Most bytes in one staged part: the store takes 1 MiB with everything around it.
const PART_BYTES: usize = 700 << 10;
/// Most bytes of an input.
const INPUT_BYTES: usize = 20 << 20;
/// Most parts of an input: what an assignment can name.
const PARTS: usize = 256;

/// A part: consecutive lines, none of them blank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Number of its first line in the whole input, from 1.
    pub(crate) first_line: i64,
    /// Its lines.
    pub(crate) records: i32,
    /// The lines, each with its line feed.
    pub(crate) text: String,
}

fn refuse(message: String) -> Refusal {
    Refusal {
        word: "InvalidInput",
        message,
    }
}

/// Cuts lines into parts. Blank lines are no records, but they count as lines; a part never spans one.
pub(crate) fn cut<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Vec<Part>, Refusal> {
    let mut parts: Vec<Part> = vec![];
    let mut bytes = 0_usize;
    let mut open = false;
    for (number, line) in (1_i64..).zip(lines) {
        if line.trim().is_empty() {
            open = false;
            continue;
        }
        bytes = bytes.saturating_add(line.len() + 1);
        if line.len() + 1 > PART_BYTES {
            return Err(refuse(format!(
                "line {number} of the input has {} bytes: a record must be at most {PART_BYTES} bytes",
                line.len()
            )));
        }
        if bytes > INPUT_BYTES {
            return Err(refuse(format!(
                "the input is longer than {INPUT_BYTES} bytes (at line {number}): split it over several jobs"
            )));
        }
        let room = |p: &&mut Part| open && p.text.len() + line.len() < PART_BYTES && p.records < 1_000_000;
        if let Some(part) = parts.last_mut().filter(room) {
            part.records += 1;
            push(&mut part.text, line);
        } else {
            let mut text = String::new();
            push(&mut text, line);
            parts.push(Part {
                first_line: number,
                records: 1,
                text,
            });
            open = true;
        }
    }
    match parts.len() {
        0 => Err(refuse(
            "the input holds no record: it must have at least one line that is not blank".into(),
        )),
        n if n > PARTS => Err(refuse(format!(
            "the input falls into {n} parts of at most {PART_BYTES} bytes between blank lines, at most {PARTS} are allowed: remove blank lines or split it over several jobs"
        ))),
        _ => Ok(parts),
    }
}

/// The parts as an order carries them, where they are short enough for that together.
pub(crate) fn inline(parts: &[Part]) -> Option<Vec<StagedInput>> {
    let bytes: usize = parts.iter().map(|part| part.text.len()).sum();
    let carried = |part: &Part| StagedInput {
        config_map: None,
        text: Some(part.text.clone()),
        first_line: part.first_line,
        records: part.records,
    };
    (bytes <= INLINE_BYTES).then(|| parts.iter().map(carried).collect())
}

/// One record is one line, whatever white space it was written with.
fn push(text: &mut String, line: &str) {
    text.extend(
        line.trim_end_matches(['\r', '\n'])
            .chars()
            .map(|c| if matches!(c, '\r' | '\n') { ' ' } else { c }),
    );
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_lines_are_skipped_and_every_record_keeps_the_number_of_its_line() {
        let parts = cut("a\nb\n\n  \nc\n".lines()).unwrap();
        let shape: Vec<_> = parts
            .iter()
            .map(|p| (p.first_line, p.records, p.text.as_str()))
            .collect();
        assert_eq!(shape, [(1, 2, "a\nb\n"), (5, 1, "c\n")]);
    }

    #[test]
    fn a_part_never_grows_beyond_its_limit_and_no_line_is_lost() {
        let line = "x".repeat(100_000);
        let text = vec![line.as_str(); 20].join("\n");
        let parts = cut(text.lines()).unwrap();
        assert!(parts.iter().all(|p| p.text.len() <= PART_BYTES));
        assert_eq!(parts.iter().map(|p| p.records).sum::<i32>(), 20);
        assert_eq!(
            parts.last().map(|p| p.first_line + i64::from(p.records) - 1),
            Some(20)
        );
    }

    #[test]
    fn empty_oversized_and_splintered_inputs_are_refused_with_numbers() {
        assert!(cut(" \n\n".lines()).unwrap_err().message.contains("no record"));
        let long = "y".repeat(PART_BYTES);
        assert!(cut(long.lines()).unwrap_err().message.contains("line 1"));
        let splintered = "a\n\n".repeat(257);
        assert!(cut(splintered.lines()).unwrap_err().message.contains("257 parts"));
        let line = "z".repeat(600_000);
        let huge = vec![line.as_str(); 36];
        assert!(cut(huge.into_iter()).unwrap_err().message.contains("20971520"));
    }

    #[test]
    fn an_input_travels_in_its_order_up_to_the_last_byte_that_fits_and_keeps_its_line_numbers() {
        let line = "x".repeat(INLINE_BYTES / 2 - 1);
        let most = inline(&cut([line.as_str(), "", line.as_str()].into_iter()).unwrap()).unwrap();
        let shape: Vec<_> = most.iter().map(|i| (i.first_line, i.records)).collect();
        assert_eq!(shape, [(1, 1), (3, 1)]);
        assert!(most.iter().all(|i| i.config_map.is_none() && i.text.is_some()));
        let one_more = cut([line.as_str(), "", line.as_str(), ""].into_iter()).unwrap();
        assert!(inline(&one_more).is_some(), "a blank line is no record");
        let longer = format!("{line}x");
        assert_eq!(
            inline(&cut([line.as_str(), longer.as_str()].into_iter()).unwrap()),
            None
        );
    }

    #[test]
    fn an_inline_record_over_several_lines_stays_one_line() {
        let parts = cut(["{\n \"a\": 1\n}\n", "{}"].into_iter()).unwrap();
        assert_eq!(parts[0].text, "{  \"a\": 1 }\n{}\n");
    }
}
