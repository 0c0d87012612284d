//! The API server of this test binary, and what it says about an object.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use gogrid_tests::controlplane::{ControlPlane, apply_yaml_documents};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::cel::Try;
use crate::samples::Sample;

/// Which half of an object is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Area {
    Spec,
    Status,
}

/// One of the reasons that a refusal gives.
#[derive(Clone, Debug)]
pub(crate) struct Cause {
    pub(crate) field: String,
    pub(crate) message: String,
}

/// What the API server said.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    pub(crate) accepted: bool,
    pub(crate) causes: Vec<Cause>,
    text: String,
}

impl Verdict {
    /// Whether this field's own bound is a reason given, and every other reason is about this field, too: the format of
    /// a number, a rule that speaks of the field, or that rules were left unchecked.
    pub(crate) fn is_only_about(&self, field: &str) -> bool {
        self.causes.iter().any(|cause| cause.is_at(field))
            && self
                .causes
                .iter()
                .all(|cause| cause.is_at(field) || cause.speaks_of(field))
    }
}

impl Cause {
    fn is_at(&self, field: &str) -> bool {
        // Of two equal keys the second is named.
        self.field == field || self.field.strip_prefix(field) == Some("[1]")
    }

    fn speaks_of(&self, field: &str) -> bool {
        let below_status = field.strip_prefix("status.").unwrap_or(field);
        self.message.contains(field)
            || self.message.ends_with(&format!(" in {below_status}"))
            || self.message.contains("some validation rules were not checked")
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.accepted {
            f.write_str("accepted")
        } else {
            write!(f, "refused: {}", self.text.chars().take(600).collect::<String>())
        }
    }
}

/// A client of the one control plane, with the CRDs in it.
pub(crate) struct Server {
    client: Client,
}

static NEXT: AtomicUsize = AtomicUsize::new(0);

impl Server {
    /// Starts the control plane if nobody has, and puts the CRDs into it.
    pub(crate) async fn get() -> Server {
        static CRDS: OnceCell<()> = OnceCell::const_new();
        let plane = ControlPlane::shared().await.unwrap();
        let client = plane.admin_client().await.unwrap();
        CRDS.get_or_init(|| async {
            let documents = gogrid_api::crds().map(|crd| serde_json::to_string(&crd).unwrap());
            apply_yaml_documents(&client, &documents.join("\n---\n"))
                .await
                .unwrap();
        })
        .await;
        Server { client }
    }

    async fn send(&self, method: &str, uri: String, content_type: &str, body: &Value) -> (Verdict, Value) {
        let request = http::Request::builder()
            .method(method)
            .uri(uri)
            .header("content-type", content_type);
        let request = request.body(body.to_string().into_bytes()).unwrap();
        match self.client.request::<Value>(request).await {
            Ok(answer) => (
                Verdict {
                    accepted: true,
                    causes: vec![],
                    text: String::new(),
                },
                answer,
            ),
            Err(kube::Error::Api(status)) => {
                assert!(
                    status.code == 422 || status.code == 404,
                    "{} {}: neither accepted nor invalid",
                    status.code,
                    status.message
                );
                let causes = status.details.iter().flat_map(|details| &details.causes);
                let causes = causes
                    .map(|cause| Cause {
                        field: cause.field.clone(),
                        message: cause.message.clone(),
                    })
                    .collect();
                (
                    Verdict {
                        accepted: false,
                        causes,
                        text: status.message.clone(),
                    },
                    Value::Null,
                )
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn path(sample: &Sample) -> String {
        let namespace = if sample.namespaced {
            "/namespaces/default"
        } else {
            ""
        };
        format!("/apis/gogrid.dev/v1alpha1{namespace}/{}", sample.plural)
    }

    fn object(sample: &Sample, name: &str, mut body: Value) -> Value {
        body["apiVersion"] = json!("gogrid.dev/v1alpha1");
        body["kind"] = json!(sample.kind);
        body["metadata"] = json!({ "name": name });
        body
    }

    /// The name that an object of this kind must have, or some free one.
    fn name_for(sample: &Sample, spec: &Value, wish: &str) -> String {
        match (sample.kind, spec["nodeName"].as_str()) {
            ("GpuNode", Some(node)) if !node.is_empty() && node.len() <= 253 => node.to_owned(),
            _ => wish.to_owned(),
        }
    }

    /// Whether it would create the object.
    pub(crate) async fn creates(&self, sample: &Sample, body: Value) -> Verdict {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = Self::name_for(sample, &body["spec"], &format!("new-{number}"));
        self.creates_named(sample, &name, body).await
    }

    async fn creates_named(&self, sample: &Sample, name: &str, body: Value) -> Verdict {
        let uri = format!("{}?dryRun=All&fieldValidation=Strict", Self::path(sample));
        self.send("POST", uri, "application/json", &Self::object(sample, name, body))
            .await
            .0
    }

    /// Whether it would take this status of the object that [`Self::store`] named `stored`.
    pub(crate) async fn reports(&self, sample: &Sample, body: Value) -> Verdict {
        let uri = format!(
            "{}/stored/status?dryRun=All&fieldValidation=Strict",
            Self::path(sample)
        );
        self.send("PATCH", uri, "application/merge-patch+json", &body)
            .await
            .0
    }

    /// Stores an object, and then its status unless that is null; returns its name.
    pub(crate) async fn store(&self, sample: &Sample, name: &str, spec: Value, status: Value) -> String {
        let name = Self::name_for(sample, &spec, name);
        let object = Self::object(sample, &name, json!({ "spec": spec }));
        let uri = format!(
            "{}/{name}?fieldManager=gogrid-tests&force=true",
            Self::path(sample)
        );
        let (verdict, _) = self
            .send("PATCH", uri, "application/apply-patch+yaml", &object)
            .await;
        assert!(verdict.accepted, "{name}: {verdict}");
        if !status.is_null() {
            let verdict = self
                .writes_status(sample, &name, json!({ "status": status }))
                .await;
            assert!(verdict.accepted, "status of {name}: {verdict}");
        }
        name
    }

    /// Merges into the object.
    pub(crate) async fn writes(&self, sample: &Sample, name: &str, patch: Value) -> Verdict {
        self.send(
            "PATCH",
            format!("{}/{name}", Self::path(sample)),
            "application/merge-patch+json",
            &patch,
        )
        .await
        .0
    }

    /// Merges into the object's status.
    pub(crate) async fn writes_status(&self, sample: &Sample, name: &str, patch: Value) -> Verdict {
        self.send(
            "PATCH",
            format!("{}/{name}/status", Self::path(sample)),
            "application/merge-patch+json",
            &patch,
        )
        .await
        .0
    }

    /// The stored object.
    pub(crate) async fn read(&self, sample: &Sample, name: &str) -> Value {
        self.send(
            "GET",
            format!("{}/{name}", Self::path(sample)),
            "application/json",
            &Value::Null,
        )
        .await
        .1
    }

    /// Names of the objects that a field selector finds.
    pub(crate) async fn names(&self, sample: &Sample, selector: &str) -> Vec<String> {
        let uri = format!(
            "{}?fieldSelector={}",
            Self::path(sample),
            selector.replace('=', "%3D")
        );
        let (_, list) = self.send("GET", uri, "application/json", &Value::Null).await;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items
            .iter()
            .filter_map(|item| item["metadata"]["name"].as_str().map(str::to_owned))
            .collect()
    }

    /// GoGrid's CRDs as stored.
    pub(crate) async fn stored_crds(&self) -> Vec<CustomResourceDefinition> {
        let api: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let all = api.list(&ListParams::default()).await.unwrap().items;
        all.into_iter()
            .filter(|crd| crd.name_any().ends_with(".gogrid.dev"))
            .collect()
    }

    /// Carries out what a row of the rules' table says.
    pub(crate) async fn tries(&self, sample: &Sample, attempt: &Try) -> Verdict {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        match attempt {
            Try::Create(spec) => self.creates(sample, json!({ "spec": spec })).await,
            Try::CreateNamed(name, spec) => self.creates_named(sample, name, json!({ "spec": spec })).await,
            Try::Change { spec, status, patch } => {
                let name = self
                    .store(sample, &format!("changed-{number}"), spec.clone(), status.clone())
                    .await;
                let uri = format!("{}/{name}?dryRun=All", Self::path(sample));
                self.send("PATCH", uri, "application/merge-patch+json", patch)
                    .await
                    .0
            }
            Try::ChangeStatus { spec, status, patch } => {
                let name = self
                    .store(sample, &format!("changed-{number}"), spec.clone(), status.clone())
                    .await;
                let uri = format!("{}/{name}/status?dryRun=All", Self::path(sample));
                self.send("PATCH", uri, "application/merge-patch+json", patch)
                    .await
                    .0
            }
        }
    }
}
