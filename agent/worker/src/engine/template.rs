//! Chat templates: messages to the text the model was trained on.
//!
//! Owns the limits that a template runs under: it comes with the model and is hostile until shown otherwise. Must not
//! touch files, clocks or the network; minijinja is given no loader.

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use serde::{Deserialize, Serialize};
use std::io::Write;

/// Most instructions a template may execute.
const FUEL: u64 = 2_000_000;
/// Most bytes it may write.
const MAX_OUTPUT: usize = 1 << 20;
/// Longest template in bytes.
const MAX_SOURCE: usize = 256 << 10;
const RECURSION: usize = 64;

/// One message of a conversation.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: String,
}

/// A compiled chat template.
pub(crate) struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat";

impl Template {
    /// Compiles a template.
    pub(crate) fn new(source: &str, bos: String, eos: String) -> Result<Self, Error> {
        if source.len() > MAX_SOURCE {
            let text = format!("{} bytes exceed the limit of {MAX_SOURCE}", source.len());
            return Err(Error::new(ErrorKind::InvalidOperation, text));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", tojson);
        environment.set_unknown_method_callback(method);
        environment.add_template_owned(NAME, source.to_owned())?;
        Ok(Self {
            environment,
            bos,
            eos,
        })
    }

    /// The prompt of a conversation, ending where the answer begins.
    pub(crate) fn render(&self, messages: &[Message]) -> Result<String, Error> {
        let mut output = Bounded(Vec::new());
        let template = self.environment.get_template(NAME)?;
        let values = context! {
            messages, add_generation_prompt => true, bos_token => self.bos, eos_token => self.eos
        };
        template.render_captured_to(values, &mut output)?;
        String::from_utf8(output.0)
            .map_err(|_| Error::new(ErrorKind::BadSerialization, "output is not UTF-8"))
    }
}

/// Refuses to grow beyond [`MAX_OUTPUT`].
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len().saturating_add(bytes.len()) > MAX_OUTPUT {
            return Err(std::io::Error::other(format!(
                "output exceeds {MAX_OUTPUT} bytes"
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// JSON as Python's `json.dumps` separates it, without escaping for HTML.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands options to filters by value"
)]
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<Value> = options.get("separators")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let bad = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let value = serde_json::to_value(value).map_err(bad)?;
    let mut out = Vec::new();
    if let Some(indent) = indent {
        let indent = " ".repeat(indent.min(8));
        let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
        value
            .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
            .map_err(bad)?;
    } else {
        value
            .serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced))
            .map_err(bad)?;
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// `", "` and `": "` between parts.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Methods of Python's `str` and `dict` that templates in the wild call.
fn method(_: &State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::from(ErrorKind::UnknownMethod);
    let text_argument = |place: usize| arguments.get(place).and_then(Value::as_str);
    if let Some(text) = value.as_str() {
        let letters: Option<Vec<char>> = text_argument(0).map(|set| set.chars().collect());
        let strip = |c: char| {
            letters
                .as_ref()
                .map_or_else(|| c.is_whitespace(), |set| set.contains(&c))
        };
        let found = |test: &dyn Fn(&str) -> bool| -> Result<Value, Error> {
            let first = arguments.first().ok_or_else(unknown)?;
            match first.as_str() {
                Some(one) => Ok(Value::from(test(one))),
                None => Ok(Value::from(
                    first.try_iter()?.any(|one| one.as_str().is_some_and(test)),
                )),
            }
        };
        return match name {
            "strip" => Ok(text.trim_matches(strip).into()),
            "lstrip" => Ok(text.trim_start_matches(strip).into()),
            "rstrip" => Ok(text.trim_end_matches(strip).into()),
            "upper" => Ok(text.to_uppercase().into()),
            "lower" => Ok(text.to_lowercase().into()),
            "startswith" => found(&|start| text.starts_with(start)),
            "endswith" => found(&|end| text.ends_with(end)),
            "replace" => {
                let (from, to) = text_argument(0).zip(text_argument(1)).ok_or_else(unknown)?;
                Ok(text.replace(from, to).into())
            }
            "split" => Ok(match text_argument(0) {
                Some(mark) if !mark.is_empty() => text.split(mark).map(Value::from).collect(),
                _ => text.split_whitespace().map(Value::from).collect(),
            }),
            "find" => {
                let at = text.find(text_argument(0).ok_or_else(unknown)?);
                let place = at.map(|at| text.get(..at).unwrap_or("").chars().count());
                Ok(place
                    .and_then(|place| i64::try_from(place).ok())
                    .unwrap_or(-1)
                    .into())
            }
            _ => Err(unknown()),
        };
    }
    if let Some(object) = value
        .as_object()
        .filter(|_| value.kind() == minijinja::value::ValueKind::Map)
    {
        let mut pairs = object.try_iter_pairs().ok_or_else(unknown)?;
        return match name {
            "items" => Ok(pairs.map(|(key, value)| Value::from(vec![key, value])).collect()),
            "keys" => Ok(pairs.map(|(key, _)| key).collect()),
            "values" => Ok(pairs.map(|(_, value)| value).collect()),
            "get" => {
                let wanted = arguments.first().ok_or_else(unknown)?;
                let found = pairs.find(|(key, _)| key == wanted).map(|(_, value)| value);
                Ok(found
                    .or_else(|| arguments.get(1).cloned())
                    .unwrap_or(Value::from(())))
            }
            _ => Err(unknown()),
        };
    }
    Err(unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message {
            role: role.into(),
            content: content.into(),
        }
    }

    fn render(source: &str) -> Result<String, Error> {
        let messages = [message("system", " be brief "), message("user", "<hi> \"you\"")];
        Template::new(source, "<s>".into(), "</s>".into())?.render(&messages)
    }

    #[test]
    fn blocks_leave_no_blank_lines_and_nothing_is_escaped() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'] }}]\n  {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source).unwrap(), "<s>\n[<hi> \"you\"]\n");
    }

    #[test]
    fn python_methods_and_json_work() {
        let source = "{{ messages[0].content.strip() }}|{{ messages[1] | tojson }}|{{ 'a,b'.split(',') | length }}|{% for k, v in messages[1].items() %}{{ k }};{% endfor %}";
        let text = render(source).unwrap();
        assert!(text.starts_with("be brief|{"), "{text}");
        assert!(text.contains("\"content\": \"<hi> \\\"you\\\"\""), "{text}");
        assert!(text.contains("}|2|") && text.contains("role;"), "{text}");
    }

    #[test]
    fn a_template_may_refuse_a_conversation() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn an_endless_template_is_stopped() {
        assert!(
            render("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}")
                .is_err()
        );
        assert!(render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
        assert!(render("{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% if a > 20 %}{{ ns.s }}{% endif %}{% endfor %}").is_err());
    }
}
