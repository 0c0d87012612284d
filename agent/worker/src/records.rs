//! One line of input: an OpenAI batch record.
//!
//! Owns: what a record may say and the words for what is wrong with it. Unknown fields of the body are tolerated, wrong
//! ones are not. Must not know about models; a message never repeats more of the line than a name.

use crate::engine::template::Message;
use gogrid_agent_core::protocol::Sampling;
use serde_json::{Map, Value};

/// A record that can be answered.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) custom_id: String,
    pub(crate) input: Input,
    pub(crate) sampling: Sampling,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Input {
    /// `/v1/chat/completions`
    Messages(Vec<Message>),
    /// `/v1/completions`
    Prompt(String),
}

/// A record that can't be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub(crate) struct InvalidRecord {
    pub(crate) line: u64,
    pub(crate) custom_id: Option<String>,
    problem: String,
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";
const MAX_ID: usize = 256;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;

/// Reads a record; sampling that it doesn't mention comes from the job, and so does the most it may ask for.
pub(crate) fn parse(line: u64, text: &str, job: &Sampling) -> Result<Record, InvalidRecord> {
    let value: Value = serde_json::from_str(text).map_err(|error| InvalidRecord {
        line,
        custom_id: None,
        problem: format!("not JSON at column {}: {}", error.column(), kind(&error)),
    })?;
    let custom_id = value
        .get("custom_id")
        .and_then(Value::as_str)
        .filter(|id| id.len() <= MAX_ID)
        .map(str::to_owned);
    read(&value, custom_id.as_deref(), job).map_err(|problem| InvalidRecord {
        line,
        custom_id,
        problem,
    })
}

fn kind(error: &serde_json::Error) -> &'static str {
    if error.is_eof() {
        "the line ends too early"
    } else {
        "wrong syntax"
    }
}

fn read(value: &Value, custom_id: Option<&str>, job: &Sampling) -> Result<Record, String> {
    let record = value.as_object().ok_or("not a JSON object")?;
    let custom_id = custom_id.ok_or_else(|| format!("custom_id must be a text of at most {MAX_ID} bytes"))?;
    match record.get("method").and_then(Value::as_str) {
        Some("POST") => {}
        _ => return Err("method must be \"POST\"".into()),
    }
    let body = record
        .get("body")
        .and_then(Value::as_object)
        .ok_or("body must be an object")?;
    let input = match record.get("url").and_then(Value::as_str) {
        Some(CHAT) => Input::Messages(messages(body)?),
        Some(COMPLETION) => {
            let prompt = body
                .get("prompt")
                .and_then(Value::as_str)
                .filter(|prompt| !prompt.is_empty());
            Input::Prompt(
                prompt
                    .ok_or("body.prompt must be a text that is not empty")?
                    .to_owned(),
            )
        }
        _ => return Err(format!("url must be {CHAT:?} or {COMPLETION:?}")),
    };
    Ok(Record {
        custom_id: custom_id.to_owned(),
        input,
        sampling: sampling(body, job)?,
    })
}

fn messages(body: &Map<String, Value>) -> Result<Vec<Message>, String> {
    let list = body
        .get("messages")
        .and_then(Value::as_array)
        .filter(|list| !list.is_empty());
    let list = list.ok_or("body.messages must be a list that is not empty")?;
    list.iter()
        .enumerate()
        .map(|(place, message)| {
            let role = message.get("role").and_then(Value::as_str);
            let role = role.ok_or_else(|| format!("body.messages[{place}].role must be a text"))?;
            let content = match message.get("content") {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(parts)) => parts
                    .iter()
                    .map(|part| {
                        part.get("text")
                            .and_then(Value::as_str)
                            .filter(|_| part["type"] == "text")
                    })
                    .collect::<Option<String>>()
                    .ok_or_else(|| {
                        format!("body.messages[{place}].content may hold parts of type \"text\" only")
                    })?,
                _ => return Err(format!("body.messages[{place}].content must be a text")),
            };
            Ok(Message {
                role: role.to_owned(),
                content,
            })
        })
        .collect()
}

fn sampling(body: &Map<String, Value>, job: &Sampling) -> Result<Sampling, String> {
    let mut sampling = job.clone();
    let given = |name: &str| body.get(name).filter(|value| !value.is_null());
    for name in ["max_completion_tokens", "max_tokens"] {
        if let Some(value) = given(name) {
            let tokens = value.as_u64().filter(|tokens| *tokens >= 1);
            let tokens = tokens.ok_or_else(|| format!("body.{name} must be a whole number of at least 1"))?;
            sampling.max_tokens = u32::try_from(tokens).unwrap_or(u32::MAX).min(job.max_tokens);
        }
    }
    if let Some(value) = given("temperature") {
        sampling.temperature_milli = thousandths(value, 2.0).ok_or("body.temperature must be 0 to 2")?;
    }
    if let Some(value) = given("top_p") {
        sampling.top_p_milli = thousandths(value, 1.0).ok_or("body.top_p must be 0 to 1")?.max(1);
    }
    if let Some(value) = given("top_k") {
        let top_k = value.as_u64().and_then(|k| u32::try_from(k).ok());
        sampling.top_k = top_k.ok_or("body.top_k must be a whole number of at least 0")?;
    }
    if let Some(value) = given("seed") {
        let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        sampling.seed = seed.ok_or("body.seed must be a whole number")?;
    }
    if let Some(value) = given("stop") {
        let stops = match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) => list.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        let fits =
            |stops: &Vec<String>| stops.len() <= MAX_STOPS && stops.iter().all(|s| s.len() <= MAX_STOP_BYTES);
        sampling.stop = stops.filter(fits).ok_or_else(|| {
            format!("body.stop must be a text or a list of at most {MAX_STOPS}, each of at most {MAX_STOP_BYTES} bytes")
        })?;
    }
    if given("n").is_some_and(|n| n.as_u64() != Some(1)) {
        return Err("body.n must be 1".into());
    }
    Ok(sampling)
}

/// A number from 0 to `most` in thousandths, rounded.
fn thousandths(value: &Value, most: f64) -> Option<u32> {
    let number = value.as_f64().filter(|number| (0.0..=most).contains(number))?;
    format!("{number:.3}").replace('.', "").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Sampling {
        Sampling {
            max_tokens: 100,
            temperature_milli: 0,
            top_p_milli: 1000,
            top_k: 0,
            seed: 5,
            stop: vec!["X".into()],
        }
    }

    fn error(text: &str) -> String {
        parse(7, text, &job()).unwrap_err().to_string()
    }

    #[test]
    fn a_chat_record_overrides_what_it_mentions_and_nothing_else() {
        let text = r#"{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":
            [{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"h"},{"type":"text","text":"i"}]}],
            "temperature":0.7,"top_p":0.95,"max_tokens":10,"seed":-1,"stop":"\n","logit_bias":{}}}"#;
        let record = parse(1, text, &job()).unwrap();
        let messages = vec![
            Message {
                role: "system".into(),
                content: "s".into(),
            },
            Message {
                role: "user".into(),
                content: "hi".into(),
            },
        ];
        assert_eq!(record.input, Input::Messages(messages));
        let expected = Sampling {
            max_tokens: 10,
            temperature_milli: 700,
            top_p_milli: 950,
            top_k: 0,
            seed: u64::MAX,
            stop: vec!["\n".into()],
        };
        assert_eq!(record.sampling, expected);
    }

    #[test]
    fn a_record_never_gets_more_tokens_than_the_job_allows() {
        let text = r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"p","max_tokens":5000}}"#;
        let record = parse(1, text, &job()).unwrap();
        assert_eq!(record.sampling, job());
        assert_eq!(record.input, Input::Prompt("p".into()));
    }

    #[test]
    fn a_wrong_record_is_refused_with_its_line_and_what_is_wrong() {
        assert_eq!(
            error("{"),
            "line 7: not JSON at column 1: the line ends too early"
        );
        assert_eq!(error("[]"), "line 7: not a JSON object");
        assert!(error(r#"{"custom_id":"a","method":"GET"}"#).contains("method"));
        assert!(
            error(r#"{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{}}"#).contains("url")
        );
        let with = |body: &str| {
            error(&format!(
                r#"{{"custom_id":"a","method":"POST","url":"/v1/completions","body":{{"prompt":"p",{body}}}}}"#
            ))
        };
        assert!(with(r#""max_tokens":0"#).contains("max_tokens"));
        assert!(with(r#""temperature":3"#).contains("0 to 2"));
        assert!(with(r#""temperature":"hot""#).contains("temperature"));
        assert!(with(r#""stop":[1]"#).contains("stop"));
        assert!(with(r#""n":2"#).contains("body.n must be 1"));
    }

    #[test]
    fn the_id_of_a_wrong_record_is_kept_where_it_can_be_read() {
        let wrong = parse(7, r#"{"custom_id":"a"}"#, &job()).unwrap_err();
        assert_eq!(wrong.custom_id.as_deref(), Some("a"));
    }
}
