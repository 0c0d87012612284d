//! Every bound in a schema, each with values just inside and just outside.
//!
//! Owns: walking a schema and making values that break one bound and no other. A pattern or a format that it can't
//! write texts for is a panic: it must be taught here.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use serde_json::{Map, Value, json};

/// A step into an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A property, or a key of a map.
    Key(String),
    /// The first item of a list.
    First,
}

/// Where something is: below `spec` or `status`.
pub(crate) type Place = Vec<Step>;

/// `spec.generation.stop[0]`, as the API server writes it.
pub(crate) fn field(place: &[Step]) -> String {
    let mut text = String::new();
    for step in place {
        match step {
            Step::Key(key) if text.is_empty() => text.push_str(key),
            Step::Key(key) => text = format!("{text}.{key}"),
            Step::First => text.push_str("[0]"),
        }
    }
    text
}

/// One bound and what to try at it.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    /// Where the values go.
    pub(crate) place: Place,
    /// Such as `maximum 100`.
    pub(crate) name: String,
    /// Values that it must let through.
    pub(crate) inside: Vec<Value>,
    /// Values that it must refuse; none at all stands for the field's absence.
    pub(crate) outside: Vec<Option<Value>>,
}

/// A sample as far as it reaches a place.
pub(crate) fn at<'a>(sample: &'a Value, place: &[Step]) -> Option<&'a Value> {
    place.iter().try_fold(sample, |value, step| match step {
        Step::Key(key) => value.get(key),
        Step::First => value.get(0),
    })
}

/// The sample with another value, or none, at the place.
pub(crate) fn with(sample: &Value, place: &[Step], value: Option<Value>) -> Value {
    let mut changed = sample.clone();
    let Some((last, parents)) = place.split_last() else {
        return value.unwrap_or_default();
    };
    let mut parent = &mut changed;
    for step in parents {
        parent = match step {
            Step::Key(key) => &mut parent[key.as_str()],
            Step::First => &mut parent[0],
        };
    }
    match (last, value) {
        (Step::Key(key), Some(value)) => parent[key.as_str()] = value,
        (Step::Key(key), None) => drop(parent.as_object_mut().and_then(|map| map.remove(key))),
        (Step::First, Some(value)) => parent[0] = value,
        (Step::First, None) => drop(parent.as_array_mut().map(Vec::clear)),
    }
    changed
}

/// All bounds at and below `place`. `samples` are whole objects: each place must be in one of them.
pub(crate) fn bounds(schema: &JSONSchemaProps, place: &Place, samples: &[Value]) -> Vec<Bound> {
    let mut found = Vec::new();
    let known = samples.iter().find_map(|sample| at(sample, place));
    let known = known.unwrap_or_else(|| panic!("no sample reaches {}", field(place)));
    let bound = |name: String, inside: Vec<Value>, outside: Vec<Value>| Bound {
        place: place.clone(),
        name,
        inside,
        outside: outside.into_iter().map(Some).collect(),
    };
    if let Some(values) = &schema.enum_ {
        found.push(bound(
            "enum".into(),
            values.iter().map(|v| v.0.clone()).collect(),
            vec![json!("NoSuchWord"), json!("")],
        ));
    } else if schema.x_kubernetes_int_or_string == Some(true) {
        found.extend(numbers(schema, &bound));
        found.extend(texts(schema, &bound));
    } else {
        match schema.type_.as_deref() {
            Some("integer") => found.extend(numbers(schema, &bound)),
            Some("string") => found.extend(texts(schema, &bound)),
            Some("array") => found.extend(lists(schema, known, &bound)),
            Some("object") => found.extend(maps(schema, &bound)),
            Some("boolean") => {}
            other => panic!("{}: type {other:?}", field(place)),
        }
    }
    let below = |step: Step| place.iter().cloned().chain([step]).collect::<Place>();
    for name in schema.required.iter().flatten() {
        found.push(Bound {
            place: below(Step::Key(name.clone())),
            name: "required".into(),
            inside: vec![],
            outside: vec![None],
        });
    }
    for (name, property) in schema.properties.iter().flatten() {
        found.extend(bounds(property, &below(Step::Key(name.clone())), samples));
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        found.extend(bounds(items, &below(Step::First), samples));
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
        let key = known.as_object().and_then(|map| map.keys().next());
        let key = key.unwrap_or_else(|| panic!("no sample has a pair in {}", field(place)));
        found.extend(bounds(values, &below(Step::Key(key.clone())), samples));
    }
    found
}

type Make<'a> = &'a dyn Fn(String, Vec<Value>, Vec<Value>) -> Bound;

fn numbers(schema: &JSONSchemaProps, bound: Make<'_>) -> Vec<Bound> {
    let mut found = Vec::new();
    if let Some(minimum) = schema.minimum.map(whole) {
        found.push(bound(
            format!("minimum {minimum}"),
            vec![json!(minimum)],
            vec![json!(minimum - 1)],
        ));
    }
    if let Some(maximum) = schema.maximum.map(whole) {
        found.push(bound(
            format!("maximum {maximum}"),
            vec![json!(maximum)],
            vec![json!(maximum + 1)],
        ));
    }
    if schema.format.as_deref() == Some("int32") {
        found.push(bound(
            "format int32".into(),
            vec![],
            vec![json!(i64::from(i32::MAX) + 1), json!(i64::from(i32::MIN) - 1)],
        ));
    }
    found
}

fn whole(bound: f64) -> i64 {
    let text = format!("{bound:.0}");
    text.parse().unwrap_or_else(|_| panic!("a bound of {bound}"))
}

fn texts(schema: &JSONSchemaProps, bound: Make<'_>) -> Vec<Bound> {
    let form = Form::of(schema);
    let mut found = Vec::new();
    if let Some(most) = schema.max_length {
        found.push(bound(
            format!("maxLength {most}"),
            vec![form.text(most)],
            vec![form.text(most + 1)],
        ));
    }
    if let Some(least) = schema.min_length.filter(|least| *least > 0) {
        found.push(bound(
            format!("minLength {least}"),
            vec![form.text(least.max(form.shortest))],
            vec![form.text(least - 1)],
        ));
    }
    if !form.wrong.is_empty() {
        let wrong = form.wrong.iter().map(|text| json!(text)).collect();
        found.push(bound(
            format!("form {}", form.name),
            vec![form.text(form.shortest)],
            wrong,
        ));
    }
    found
}

/// How texts of one pattern or format are written.
struct Form {
    name: String,
    start: &'static str,
    fill: char,
    end: &'static str,
    shortest: i64,
    wrong: &'static [&'static str],
}

const NO_DNS: &[&str] = &["-a", "a-", "A", "a_b", "a b", "ü"];

impl Form {
    fn of(schema: &JSONSchemaProps) -> Self {
        let name = schema
            .pattern
            .clone()
            .or(schema.format.clone())
            .unwrap_or_default();
        let (start, fill, end, shortest, wrong): (_, _, _, _, &[&str]) = match name.as_str() {
            "" => ("", 'a', "", 0, &[]),
            "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$" => ("", 'a', "", 1, NO_DNS),
            "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$" => ("", 'a', "", 1, &["-a", "a-", "A", "a.b", "a b"]),
            "^[-._a-zA-Z0-9]+$" => ("", 'a', "", 1, &["a/b", "a b", "ü"]),
            "^[0-9a-f]{64}$" => (
                "",
                'a',
                "",
                64,
                &[
                    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
                    "ggggggggggggggggggggggggggggggggggggggggggggggggggggggggggggggg0",
                ],
            ),
            "^[A-Z][A-Za-z0-9]*$" => ("", 'A', "", 1, &["a", "1A", "A b", "A-b"]),
            "^[A-Z][A-Za-z]*$" => ("", 'A', "", 1, &["a", "A1", "A b"]),
            r"^(file|https?|s3|oci|hf):\S+$" => (
                "file:",
                'a',
                "",
                6,
                &["ftp:a", "file:", "file:a b", "File:a", "/a"],
            ),
            "^[0-9]{1,16}(k|M|G|T|Ki|Mi|Gi|Ti)?$" => (
                "1",
                '0',
                "Gi",
                3,
                &["-1", "1.5Gi", "1 Gi", "Gi", "1Zi", "12345678901234567"],
            ),
            "date-time" => (
                "2026-11-23T10:00:00.",
                '0',
                "Z",
                22,
                &["yesterday", "2026-11-23", "2026-13-01T00:00:00Z", ""],
            ),
            other => panic!("say in Form how a text of {other:?} is written"),
        };
        Self {
            name,
            start,
            fill,
            end,
            shortest,
            wrong,
        }
    }

    fn text(&self, length: i64) -> Value {
        let count = |text: &str| i64::try_from(text.chars().count()).unwrap_or(i64::MAX);
        let filled = usize::try_from(length - count(self.start) - count(self.end)).unwrap_or(0);
        if length < self.shortest {
            return json!(String::from(self.fill).repeat(usize::try_from(length).unwrap_or(0)));
        }
        json!(format!(
            "{}{}{}",
            self.start,
            String::from(self.fill).repeat(filled),
            self.end
        ))
    }
}

/// A word that fits every key field: capitals first, letters only, another for each number.
fn word(number: i64) -> String {
    let letters = (0..4).scan(number, |rest, _| {
        let letter = char::from(b'a' + u8::try_from(*rest % 26).unwrap_or(0));
        *rest /= 26;
        Some(letter)
    });
    std::iter::once('W').chain(letters).collect()
}

fn lists(schema: &JSONSchemaProps, known: &Value, bound: Make<'_>) -> Vec<Bound> {
    let item = known
        .get(0)
        .cloned()
        .unwrap_or_else(|| panic!("the sample's list is empty: {known}"));
    let keys: Vec<String> = schema.x_kubernetes_list_map_keys.clone().unwrap_or_default();
    let of_length = |length: i64| {
        let items = (0..length).map(|number| {
            let mut one = item.clone();
            for key in &keys {
                one[key.as_str()] = json!(word(number));
            }
            one
        });
        Value::Array(items.collect())
    };
    let mut found = Vec::new();
    if let Some(most) = schema.max_items {
        found.push(bound(
            format!("maxItems {most}"),
            vec![of_length(most)],
            vec![of_length(most + 1)],
        ));
    }
    if let Some(least) = schema.min_items.filter(|least| *least > 0) {
        found.push(bound(
            format!("minItems {least}"),
            vec![of_length(least)],
            vec![of_length(least - 1)],
        ));
    }
    if !keys.is_empty() {
        // The second of two equal keys is the one that is refused.
        found.push(bound(
            format!("keyed by {}", keys.join(", ")),
            vec![of_length(2)],
            vec![json!([item, item])],
        ));
    }
    found
}

fn maps(schema: &JSONSchemaProps, bound: Make<'_>) -> Vec<Bound> {
    let of_size = |size: i64| {
        Value::Object(
            (0..size)
                .map(|number| (format!("k{number}"), json!("v")))
                .collect::<Map<_, _>>(),
        )
    };
    let sized = schema.max_properties.map(|most| {
        bound(
            format!("maxProperties {most}"),
            vec![of_size(most)],
            vec![of_size(most + 1)],
        )
    });
    sized.into_iter().collect()
}
