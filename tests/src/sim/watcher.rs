//! Who reads along: every accepted write, turned into protocol steps and findings.
//!
//! Owns: the steps that show in the store, writes of a leader that was followed by another, and publications that change.
//! Judges from the outside: it knows no more of GoGrid than its objects' meaning.

use super::kind::Kind;
use super::schedule::Step;
use super::server::{Heard, Sender};
use super::store::{Change, Stored, What};
use super::time::{Nanos, SECOND, lock};
use gogrid_api::names::{LEADER_LEASE, RESULTS_KEY};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// A step that was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Which.
    pub step: Step,
    /// On which node, where it is about one.
    pub node: Option<String>,
}

/// What was found.
#[derive(Default)]
pub struct Findings {
    /// Steps since they were last taken.
    pub steps: Vec<Seen>,
    /// Whether a new leader has begun to write since this was last taken.
    pub followed: bool,
    /// Writes of a leader that had been followed by another.
    pub stale: u64,
    /// What was wrong, in words.
    pub wrong: Vec<String>,
    /// Records whose published answer changed.
    pub changed: u64,
    /// Lines for people, where a trace is wanted.
    pub trace: Option<Vec<String>>,
    terms: BTreeMap<Sender, i64>,
    newest: i64,
    newest_since: Nanos,
    late: BTreeSet<String>,
    published: BTreeMap<String, String>,
    states: BTreeMap<String, String>,
    /// How long the answers in each order's status were.
    answers: BTreeMap<String, usize>,
    epochs: BTreeMap<String, (i64, bool)>,
}

/// Shared findings.
pub type Shared = Arc<Mutex<Findings>>;

/// The ear that fills them.
pub fn ear(findings: Shared) -> super::server::Ear {
    Box::new(move |heard| lock(&findings).hear(&heard))
}

fn number(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

impl Findings {
    /// Nothing yet; with every line for people where a trace is wanted.
    pub fn new(trace: bool) -> Self {
        Self {
            trace: trace.then(Vec::new),
            ..Self::default()
        }
    }

    fn hear(&mut self, heard: &Heard<'_>) {
        let Heard {
            now,
            sent,
            sender,
            change,
        } = *heard;
        let Change {
            kind, what, object, ..
        } = change;
        let name = object.text_at("/metadata/name").to_owned();
        if *kind != Kind::Lease && *kind != Kind::Event && self.trace.is_some() {
            let line = Self::told(now, sender, change, &name);
            if let Some(trace) = &mut self.trace {
                trace.push(line);
            }
        }
        if *kind == Kind::Lease && name == LEADER_LEASE {
            let term = number(&object.value, "/spec/leaseTransitions");
            let held = object.value.pointer("/spec/holderIdentity").is_some();
            if held && self.terms.insert(sender.clone(), term) != Some(term) {
                self.say(now, &format!("{sender:?} leads in term {term}"));
            }
            return;
        }
        self.fenced((now, sent), sender, change, &name);
        match (kind, what) {
            (Kind::Assignment, What::Added) => self.step(Step::Order, object.text_at("/spec/nodeName")),
            (Kind::Assignment, What::Deleted) => self.step(Step::CleanUp, ""),
            (Kind::Assignment, What::Modified) => {
                self.state(&name, &object.value);
                self.taken_up(now, &name, object);
                self.kept(&name, object);
            }
            (Kind::Job, What::Modified) => self.job(&name, &object.value),
            (Kind::ConfigMap, What::Added) if name.starts_with("result-") => self.step(Step::Save, ""),
            (Kind::ConfigMap, What::Added | What::Modified) if name.starts_with("out-") => {
                self.step(Step::Publish, "");
                self.output(now, &name, &object.value);
            }
            _ => {}
        }
    }

    fn step(&mut self, step: Step, node: &str) {
        self.steps.push(Seen {
            step,
            node: (!node.is_empty()).then(|| node.to_owned()),
        });
    }

    /// Writes of an operator count against the newest term in which anything was written. No store can refuse to make an
    /// object because another one has changed: one whose
    /// making was on its way already counts when an agent takes it up.
    fn fenced(&mut self, (now, sent): (Nanos, Nanos), sender: &Sender, change: &Change, name: &str) {
        let kind = change.kind;
        // What is told, and how many nodes a profile has, orders nobody to do anything.
        let tells = matches!(kind, Kind::Event | Kind::Profile);
        if !matches!(sender, Sender::Operator(_)) || tells {
            return;
        }
        let term = self.terms.get(sender).copied().unwrap_or(-1);
        let late = term < self.newest;
        if late && change.what == What::Added && sent < self.newest_since {
            self.late
                .insert(change.object.text_at("/metadata/uid").to_owned());
        } else if late {
            self.stale += 1;
            let text = format!(
                "{sender:?} of term {term} wrote {} {name} after term {} had",
                kind.name(),
                self.newest
            );
            self.wrong.push(text.clone());
            self.say(now, &text);
        }
        if term > self.newest {
            (self.newest, self.newest_since) = (term, now);
            self.followed = true;
        }
    }

    /// Whether an agent takes an order up that a leader gave after it had been followed by another.
    fn taken_up(&mut self, now: Nanos, name: &str, object: &Stored) {
        let begun = ["Claimed", "Fetching", "Loading", "Running"].contains(&object.text_at("/status/state"));
        if begun && self.late.remove(object.text_at("/metadata/uid")) {
            self.stale += 1;
            let text = format!("order {name} of a leader that was followed by another was taken up");
            self.wrong.push(text.clone());
            self.say(now, &text);
        }
    }

    /// Whether an order's status has got more answers.
    fn kept(&mut self, name: &str, object: &Stored) {
        let long = object.text_at("/status/checkpoint/text").len();
        if long > self.answers.insert(name.to_owned(), long).unwrap_or(0) {
            self.step(Step::Save, "");
        }
    }

    fn state(&mut self, name: &str, object: &Value) {
        let text = |pointer: &str| {
            object
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or("")
                .to_owned()
        };
        let (node, state) = (text("/spec/nodeName"), text("/status/state"));
        if self.states.insert(name.to_owned(), state.clone()).as_deref() == Some(&state) {
            return;
        }
        let step = match state.as_str() {
            "Claimed" => Step::Claim,
            "Fetching" => Step::Fetch,
            "Loading" => Step::Load,
            "Running" => Step::Run,
            "Stopping" => Step::Stop,
            "Stopped" | "Succeeded" | "Failed" => Step::Report,
            _ => return,
        };
        self.step(step, &node);
    }

    fn job(&mut self, name: &str, object: &Value) {
        let epoch = number(object, "/status/epoch");
        let done = over(object).is_some();
        let before = self
            .epochs
            .insert(name.to_owned(), (epoch, done))
            .unwrap_or_default();
        if epoch > before.0 {
            let node = object
                .pointer("/status/placement/nodeName")
                .and_then(Value::as_str);
            self.step(Step::Place, node.unwrap_or(""));
        }
        if done && !before.1 {
            self.step(Step::Finish, "");
        }
    }

    fn output(&mut self, now: Nanos, name: &str, object: &Value) {
        let text = object
            .pointer(&format!("/data/{RESULTS_KEY}"))
            .and_then(Value::as_str)
            .unwrap_or("");
        if let Some(before) = self.published.insert(name.to_owned(), text.to_owned()) {
            let differing = before.lines().zip(text.lines()).filter(|(a, b)| a != b).count();
            if differing > 0 {
                self.changed += u64::try_from(differing).unwrap_or(u64::MAX);
                let what = format!("{differing} published answers of {name} changed");
                self.wrong.push(what.clone());
                self.say(now, &what);
            }
        }
    }

    /// Adds a line to the trace.
    pub fn say(&mut self, now: Nanos, text: &str) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{} {text}", clock(now)));
        }
    }

    fn told(now: Nanos, sender: &Sender, change: &Change, name: &str) -> String {
        let object = &change.object;
        let detail = match change.kind {
            Kind::Job => format!(
                "epoch {} on {:?} {}",
                number(&object.value, "/status/epoch"),
                object.text_at("/status/placement/nodeName"),
                summary(&object.value)
            ),
            Kind::Assignment => format!(
                "on {:?} for {:?} is {:?} stop {:?} failure {:?}, {} chunks and {} bytes of answers",
                object.text_at("/spec/nodeName"),
                object.text_at("/spec/session"),
                object.text_at("/status/state"),
                object.text_at("/spec/stop/reason"),
                object.text_at("/status/failure/reason"),
                number(&object.value, "/status/checkpoint/chunks"),
                object.text_at("/status/checkpoint/text").len(),
            ),
            _ => String::new(),
        };
        format!(
            "{} {sender:?}: {:?} {} {name} {detail}",
            clock(now),
            change.what,
            change.kind.name()
        )
    }
}

/// Minutes, seconds and milliseconds.
pub fn clock(now: Nanos) -> String {
    let seconds = now / SECOND;
    format!(
        "{:02}:{:02}.{:03}",
        seconds / 60,
        seconds % 60,
        now % SECOND / 1_000_000
    )
}

fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    let all = object.pointer("/status/conditions").and_then(Value::as_array)?;
    all.iter().find(|c| c["type"] == type_)
}

fn summary(object: &Value) -> String {
    condition(object, "Succeeded").map_or_else(String::new, |c| {
        format!(
            "{}: {}",
            c["reason"].as_str().unwrap_or(""),
            c["message"].as_str().unwrap_or("")
        )
    })
}

/// Whether a job that is over succeeded.
pub fn over(object: &Value) -> Option<bool> {
    let all = object.get("status")?.get("conditions")?.as_array()?;
    let is = |type_: &str| {
        let found = all
            .iter()
            .find(|c| c.get("type").and_then(Value::as_str) == Some(type_));
        found.and_then(|c| c.get("status")).and_then(Value::as_str) == Some("True")
    };
    is("Finished").then(|| is("Succeeded"))
}

/// How a job ended, if it did: whether it succeeded, and its last word.
pub fn finished(object: &Value) -> Option<(bool, String)> {
    over(object).map(|good| (good, summary(object)))
}
