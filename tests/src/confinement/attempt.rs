//! One request and how it ended: went through, refused by a role, refused by admission.

use std::fmt;

use kube::Client;
use serde_json::Value;

/// What is asked of the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Reads one object or a list.
    Get,
    /// Posts a new object.
    Create,
    /// Replaces an object.
    Update,
    /// Merges fields into an object.
    Merge,
    /// Applies fields as one manager.
    Apply,
    /// Deletes an object.
    Delete,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Admission let it pass.
    Allowed,
    /// RBAC refused it.
    RefusedByRole,
    /// A policy refused it.
    RefusedByPolicy,
    /// There is no such object.
    NotFound,
    /// Anything else, in words.
    Other(String),
}

/// A request, as a dry run unless said otherwise: admission judges it and nothing is stored.
#[derive(Clone, Debug)]
pub struct Attempt {
    verb: Verb,
    path: String,
    body: Value,
    dry_run: bool,
    note: &'static str,
}

impl Attempt {
    /// A request without a body.
    pub fn new(verb: Verb, path: impl Into<String>) -> Self {
        Self {
            verb,
            path: path.into(),
            body: Value::Null,
            dry_run: true,
            note: "",
        }
    }

    /// A request with a body.
    pub fn with(verb: Verb, path: impl Into<String>, body: Value) -> Self {
        Self {
            body,
            ..Self::new(verb, path)
        }
    }

    /// Says what is special about it.
    #[must_use]
    pub fn noted(self, note: &'static str) -> Self {
        Self { note, ..self }
    }

    /// Stores what it writes.
    #[must_use]
    pub fn for_good(self) -> Self {
        Self {
            dry_run: false,
            ..self
        }
    }

    /// Sends it.
    pub async fn outcome(&self, client: &Client) -> Outcome {
        match self.answer(client).await {
            Ok(_) => Outcome::Allowed,
            Err(kube::Error::Api(status)) => {
                if status.message.contains("ValidatingAdmissionPolicy") {
                    // An expression that fails to evaluate refuses, too, but proves nothing.
                    if status.message.contains("must") {
                        Outcome::RefusedByPolicy
                    } else {
                        Outcome::Other(status.message.clone())
                    }
                } else if status.code == 403 && status.message.contains(" cannot ") {
                    Outcome::RefusedByRole
                } else if status.reason == "AlreadyExists" {
                    // The store says so after admission has let it pass.
                    Outcome::Allowed
                } else if status.code == 404 {
                    Outcome::NotFound
                } else {
                    Outcome::Other(format!("{} {}", status.code, status.message))
                }
            }
            Err(error) => Outcome::Other(error.to_string()),
        }
    }

    /// Sends it and returns the object that came back.
    pub async fn answer(&self, client: &Client) -> Result<Value, kube::Error> {
        let (method, content_type) = match self.verb {
            Verb::Get => ("GET", ""),
            Verb::Create => ("POST", "application/json"),
            Verb::Update => ("PUT", "application/json"),
            Verb::Merge => ("PATCH", "application/merge-patch+json"),
            Verb::Apply => ("PATCH", "application/apply-patch+yaml"),
            Verb::Delete => ("DELETE", "application/json"),
        };
        let mut query = Vec::new();
        if self.dry_run && self.verb != Verb::Get {
            query.push("dryRun=All");
        }
        if self.verb == Verb::Apply {
            query.extend(["fieldManager=gogrid-agent", "force=true"]);
        }
        let separator = if self.path.contains('?') { '&' } else { '?' };
        let uri = if query.is_empty() {
            self.path.clone()
        } else {
            format!("{}{separator}{}", self.path, query.join("&"))
        };
        let body = if self.body.is_null() {
            Vec::new()
        } else {
            self.body.to_string().into_bytes()
        };
        let mut request = http::Request::builder().method(method).uri(uri);
        if !content_type.is_empty() {
            request = request.header("content-type", content_type);
        }
        client
            .request(request.body(body).map_err(kube::Error::HttpError)?)
            .await
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.verb, self.path)?;
        if self.note.is_empty() {
            Ok(())
        } else {
            write!(f, " ({})", self.note)
        }
    }
}
