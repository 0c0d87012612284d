//! The modelled store against the real API server: the same random operations must come to the same end on both.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

use gogrid_tests::controlplane::{ControlPlane, apply_yaml_documents};
use gogrid_tests::sim::kind::{Kind, Place, Selector};
use gogrid_tests::sim::rng::Rng;
use gogrid_tests::sim::store::{Store, Verb, What};
use kube::Client;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const NAMESPACE: &str = "store-model";
const NOW: &str = "2026-11-23T10:00:00Z";

/// Operations in `make test`; more where time does not matter.
fn operations() -> usize {
    #[expect(
        clippy::disallowed_methods,
        reason = "the length of a test is set from outside"
    )]
    let asked = std::env::var("GOGRID_STORE_OPERATIONS");
    asked.ok().and_then(|text| text.parse().ok()).unwrap_or(500)
}

/// One object's history on both sides: versions by the number of the write, and the uid of the last life.
#[derive(Default)]
struct Known {
    versions: Vec<(String, String)>,
    uid: Option<(String, String)>,
}

struct Twins {
    model: Store,
    client: Client,
    rng: Rng,
    known: BTreeMap<(Kind, String), Known>,
    /// The newest version on both sides after each write that changed something.
    marks: Vec<(u64, String)>,
}

/// What an answer says, whichever side gave it.
#[derive(Clone, Debug, PartialEq)]
enum Answer {
    Refused(u16),
    Done(Value),
}

fn text(object: &Value, pointer: &str) -> Option<String> {
    object.pointer(pointer).and_then(Value::as_str).map(str::to_owned)
}

/// An object without what each server makes up for itself.
fn projected(object: &Value) -> Value {
    let mut object = object.clone();
    let fields = object.as_object_mut().unwrap();
    fields.remove("apiVersion");
    fields.remove("kind");
    let metadata = fields.get_mut("metadata").and_then(Value::as_object_mut).unwrap();
    metadata.retain(|field, _| ["name", "labels", "annotations", "generation"].contains(&field.as_str()));
    object
}

/// Which version a write names.
#[derive(Clone, Copy, Debug)]
enum Named {
    None,
    Newest,
    Older,
    Foreign,
}

impl Twins {
    fn named(&self, kind: Kind, name: &str, named: Named) -> Option<(String, String)> {
        let known = self.known.get(&(kind, name.to_owned()))?;
        match named {
            Named::None => None,
            Named::Newest => known.versions.last().cloned(),
            Named::Older => known.versions.iter().rev().nth(1).cloned(),
            Named::Foreign => Some(("999999999".into(), "999999999".into())),
        }
    }

    /// Does one thing on both sides; `fill` makes the verb for the model (`true`) or the real server.
    async fn both(&mut self, place: &Place, fill: impl Fn(bool) -> Verb) -> (Answer, Answer) {
        let model = match self.model.act(place, fill(true), NOW) {
            Ok(object) => Answer::Done(object.value.clone()),
            Err(refused) => Answer::Refused(refused.code),
        };
        let real = self.real(place, fill(false)).await;
        let key = (place.kind, place.name.clone().unwrap());
        if let (Answer::Done(model), Answer::Done(real)) = (&model, &real) {
            let known = self.known.entry(key).or_default();
            let both = |pointer: &str| Some((text(model, pointer)?, text(real, pointer)?));
            if let Some(uid) = both("/metadata/uid") {
                known.uid = Some(uid);
            }
            if let Some(version) = both("/metadata/resourceVersion")
                && known.versions.last() != Some(&version)
            {
                self.marks.push((self.model.version(), version.1.clone()));
                known.versions.push(version);
            }
        }
        (model, real)
    }

    async fn real(&self, place: &Place, verb: Verb) -> Answer {
        let mut path = place.path();
        let (method, content, body) = match verb {
            Verb::Get => ("GET", "application/json", None),
            Verb::Create(object) => {
                path = Place {
                    name: None,
                    ..place.clone()
                }
                .path();
                ("POST", "application/json", Some(object))
            }
            Verb::Replace(object) => ("PUT", "application/json", Some(object)),
            Verb::Merge(patch) => ("PATCH", "application/merge-patch+json", Some(patch)),
            Verb::Apply {
                wanted,
                manager,
                force,
            } => {
                path.push_str(&format!("?fieldManager={manager}&force={force}"));
                ("PATCH", "application/apply-patch+yaml", Some(wanted))
            }
            Verb::Delete { uid, version } => {
                let mut preconditions = json!({});
                for (field, value) in [("uid", uid), ("resourceVersion", version)] {
                    if let Some(value) = value {
                        preconditions[field] = json!(value);
                    }
                }
                let options =
                    json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions});
                ("DELETE", "application/json", Some(options))
            }
        };
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content);
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        match self.client.request::<Value>(request.body(body).unwrap()).await {
            Ok(answer) => Answer::Done(answer),
            Err(kube::Error::Api(status)) => Answer::Refused(status.code),
            Err(error) => panic!("{method} {}: {error}", place.path()),
        }
    }

    /// What of the log of a kind comes after a mark, on both sides.
    async fn events(&self, kind: Kind, mark: &(u64, String)) -> (Vec<String>, Vec<String>) {
        let line = |what: &str, object: &Value| format!("{what} {}", projected(object));
        let selector = Selector::within(NAMESPACE);
        let changes = self.model.after(mark.0).filter(|c| c.kind == kind);
        let model: Vec<String> = changes
            .filter(|c| selector.takes(&c.object.namespace, &c.object.value))
            .map(|c| {
                let what = match c.what {
                    What::Added => "ADDED",
                    What::Modified => "MODIFIED",
                    What::Deleted => "DELETED",
                };
                line(what, &c.object.value)
            })
            .collect();
        let place = Place {
            kind,
            namespace: NAMESPACE.into(),
            name: None,
            status: false,
        };
        let path = format!(
            "{}?watch=true&resourceVersion={}&timeoutSeconds=1",
            place.path(),
            mark.1
        );
        let request = http::Request::builder().uri(path).body(vec![]).unwrap();
        let said = self.client.request_text(request).await.unwrap();
        let real = said
            .lines()
            .map(|event| serde_json::from_str::<Value>(event).unwrap());
        let real = real
            .map(|event| line(event["type"].as_str().unwrap(), &event["object"]))
            .collect();
        (model, real)
    }

    /// A random operation, in words, and what both sides made of it.
    async fn step(&mut self) -> (String, Answer, Answer) {
        let kind = *self
            .rng
            .pick(&[
                Kind::Job,
                Kind::Job,
                Kind::Assignment,
                Kind::Assignment,
                Kind::ConfigMap,
                Kind::Lease,
            ])
            .unwrap();
        let choice = self.rng.between(0, 9);
        // Objects that are applied are written in no other way, as in GoGrid: its programs never mix the two.
        let applied = kind == Kind::ConfigMap && choice >= 7;
        let name = if applied {
            format!("applied{}", self.rng.between(0, 1))
        } else {
            format!("{}{}", kind.name().to_lowercase(), self.rng.between(0, 2))
        };
        let named = *self
            .rng
            .pick(&[
                Named::None,
                Named::Newest,
                Named::Newest,
                Named::Newest,
                Named::Older,
                Named::Foreign,
            ])
            .unwrap();
        let version = self.named(kind, &name, named);
        let mut place = Place {
            kind,
            namespace: NAMESPACE.into(),
            name: Some(name.clone()),
            status: false,
        };
        let stamp = |mut object: Value, model: bool| {
            object["apiVersion"] = json!(kind.api_version());
            object["kind"] = json!(kind.name());
            object["metadata"]["name"] = json!(name);
            if let Some((of_model, of_real)) = &version {
                object["metadata"]["resourceVersion"] = json!(if model { of_model } else { of_real });
            }
            object
        };
        let what = format!("{choice} on {} with {named:?}", place.path());
        let (model, real) = match (kind, choice) {
            (_, 0) => self.both(&place, |_| Verb::Get).await,
            (_, 1) => {
                let uid = self.rng.permille(700);
                let known = self
                    .known
                    .get(&(kind, name.clone()))
                    .and_then(|known| known.uid.clone());
                let right = self.rng.permille(800);
                self.both(&place, |model| {
                    let side = |pair: &(String, String)| if model { pair.0.clone() } else { pair.1.clone() };
                    let of = known.as_ref().filter(|_| uid).map(side);
                    Verb::Delete {
                        uid: if right {
                            of
                        } else {
                            of.map(|_| "00000000-0000-4000-8000-ffffffffffff".into())
                        },
                        version: version.as_ref().map(side),
                    }
                })
                .await
            }
            (_, 2 | 3) => {
                let object = make::object(kind, &mut self.rng);
                self.both(&place, |_| {
                    let mut object = object.clone();
                    object["metadata"]["name"] = json!(name);
                    Verb::Create(object)
                })
                .await
            }
            (Kind::ConfigMap, _) if applied => {
                let object = make::object(kind, &mut self.rng);
                let verb = |model| Verb::Apply {
                    wanted: stamp(object.clone(), model),
                    manager: "one".into(),
                    force: true,
                };
                self.both(&place, verb).await
            }
            (Kind::ConfigMap | Kind::Lease, _) => {
                let object = make::object(kind, &mut self.rng);
                self.both(&place, |model| Verb::Replace(stamp(object.clone(), model)))
                    .await
            }
            (_, 4..=7) => {
                place.status = true;
                let old = self
                    .model
                    .get(kind, NAMESPACE, &name)
                    .map(|object| object.value.clone());
                let status = make::status(kind, &old.unwrap_or_default(), &mut self.rng);
                let verb = |model| Verb::Apply {
                    wanted: stamp(json!({"metadata": {}, "status": status}), model),
                    manager: "gogrid".into(),
                    force: true,
                };
                self.both(&place, verb).await
            }
            _ => {
                let patch = make::patch(kind, &mut self.rng);
                self.both(&place, |model| {
                    let mut patch = patch.clone();
                    patch["metadata"] = stamp(json!({"metadata": {}}), model)["metadata"].clone();
                    Verb::Merge(patch)
                })
                .await
            }
        };
        (what, model, real)
    }
}

mod make {
    use super::{Kind, Rng, Value, json};
    use gogrid_api::{Assignment, InferenceJob};
    use serde_json::{from_value, to_value};

    pub(super) fn object(kind: Kind, rng: &mut Rng) -> Value {
        let some = rng.between(1, 3);
        match kind {
            Kind::Job => {
                let job: InferenceJob = from_value(json!({
                    "apiVersion": kind.api_version(), "kind": kind.name(), "metadata": {"name": "x"},
                    "spec": {"model": {"uri": "file:///m/a", "sha256": "0".repeat(64)}, "input": {"inline": ["{}"]},
                        "output": {"configMap": "o"}, "backoffLimit": some},
                }))
                .unwrap();
                to_value(job).unwrap()
            }
            Kind::Assignment => {
                let assignment: Assignment = from_value(json!({
                    "apiVersion": kind.api_version(), "kind": kind.name(), "metadata": {"name": "x"},
                    "spec": {"kind": "Run", "job": {"namespace": "n", "name": "j", "uid": "u"}, "epoch": some, "term": 1,
                        "nodeName": "a", "session": "s", "model": {"uri": "file:///m/a", "sha256": "0".repeat(64)},
                        "stages": [{"gpuUUID": "cpu", "firstLayer": 0, "lastLayer": 3, "vram": "1Gi"}],
                        "contextTokens": 16, "parallelSequences": 1},
                }))
                .unwrap();
                to_value(assignment).unwrap()
            }
            Kind::ConfigMap => {
                let mut map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"labels": {"l": format!("v{some}")}},
                    "data": {"a": format!("v{some}")}});
                if rng.permille(500) {
                    map["data"]["b"] = json!(format!("v{}", rng.between(1, 2)));
                }
                map
            }
            _ => json!({"apiVersion": kind.api_version(), "kind": kind.name(), "metadata": {},
                "spec": {"holderIdentity": format!("h{some}"), "leaseDurationSeconds": 40, "leaseTransitions": rng.between(0, 2)}}),
        }
    }

    pub(super) fn status(kind: Kind, old: &Value, rng: &mut Rng) -> Value {
        if kind == Kind::Assignment {
            let states = ["Claimed", "Running", "Running", "Stopped", "Failed"];
            let mut status = json!({"state": states[rng.index(states.len())]});
            if rng.permille(500) {
                status["session"] = json!(format!("s{}", rng.between(1, 2)));
            }
            return status;
        }
        let number = |pointer: &str| old.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
        let (epoch, term) = (number("/status/epoch"), number("/status/term"));
        let step = [0, 0, 0, 1, 1, 2, -1][rng.index(7)];
        let mut status = json!({"epoch": (epoch + step).max(0), "attempts": 0, "suspendedSeconds": 0,
            "term": (term + [0, 0, 1, -1][rng.index(4)]).max(0)});
        if rng.permille(700) {
            let node = if step == 0 && rng.permille(700) {
                old.pointer("/status/placement/nodeName")
                    .and_then(Value::as_str)
                    .unwrap_or("a")
                    .to_owned()
            } else {
                format!("n{}", rng.between(1, 2))
            };
            status["placement"] = json!({"nodeName": node, "stages": [{"gpuUUID": "cpu", "firstLayer": 0, "lastLayer": 3, "vram": "1Gi"}]});
        }
        if rng.permille(400) {
            let time = "2026-11-23T10:00:00Z";
            status["conditions"] = json!([{"type": "Placed", "status": "True", "reason": "Placed",
                "message": format!("m{}", rng.between(1, 2)), "observedGeneration": 1, "lastTransitionTime": time}]);
        }
        status
    }

    pub(super) fn patch(kind: Kind, rng: &mut Rng) -> Value {
        if kind == Kind::Assignment {
            return match rng.between(0, 3) {
                0 => json!({"spec": {"epoch": rng.between(1, 3)}}),
                1 => json!({"spec": {"stop": null}}),
                _ => {
                    json!({"spec": {"stop": {"reason": rng.pick(&["Suspended", "JobDeleted"]), "graceSeconds": 30}}})
                }
            };
        }
        match rng.between(0, 4) {
            0 => json!({"spec": {"backoffLimit": rng.between(1, 3)}}),
            1 => json!({"spec": {"placement": {"nodeSelector": {"a": format!("v{}", rng.between(1, 2))}}}}),
            2 => json!({"spec": {"ttlSecondsAfterFinished": rng.between(1, 2)}}),
            _ => json!({"spec": {"suspend": rng.permille(500)}}),
        }
    }
}

fn same(model: &Answer, real: &Answer) -> bool {
    match (model, real) {
        (Answer::Refused(model), Answer::Refused(real)) => model == real,
        // The answer to a delete says nothing of the object.
        (Answer::Done(_), Answer::Done(real)) if real["kind"] == "Status" => true,
        (Answer::Done(model), Answer::Done(real)) => projected(model) == projected(real),
        _ => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_operations_come_to_the_same_end_on_the_model_and_on_the_real_server() {
    let plane = ControlPlane::shared().await.unwrap();
    let client = plane.admin_client().await.unwrap();
    plane.ensure_namespace(NAMESPACE).await.unwrap();
    let documents = gogrid_api::crds().map(|crd| serde_json::to_string(&crd).unwrap());
    apply_yaml_documents(&client, &documents.join("\n---\n"))
        .await
        .unwrap();
    let mut twins = Twins {
        model: Store::default(),
        client,
        rng: Rng::new(7),
        known: BTreeMap::new(),
        marks: vec![],
    };
    let (mut outcomes, mut differing) = (BTreeMap::<String, u64>::new(), vec![]);
    for number in 0..operations() {
        let (what, model, real) = twins.step().await;
        let kind = match &real {
            Answer::Refused(code) => code.to_string(),
            Answer::Done(_) => "done".into(),
        };
        *outcomes.entry(kind).or_default() += 1;
        if !same(&model, &real) {
            differing.push(format!("{number}: {what}\n  model {model:?}\n  real  {real:?}"));
        }
        assert!(differing.len() < 12, "{}", differing.join("\n"));
        if number % 50 == 49 && twins.marks.len() > 3 {
            let kind = [Kind::Job, Kind::Assignment, Kind::ConfigMap, Kind::Lease][number / 50 % 4];
            let back = twins.rng.between(2, 60);
            let at = twins.marks.len().saturating_sub(usize::try_from(back).unwrap());
            let mark = twins.marks[at].clone();
            let (model, real) = twins.events(kind, &mark).await;
            let first = model.iter().zip(&real).position(|(model, real)| model != real);
            let at = first.unwrap_or(model.len().min(real.len()));
            if model.get(at) != real.get(at) {
                differing.push(format!(
                    "event {at} of the watch of {kind:?} from {mark:?}\n  model {:?}\n  real  {:?}",
                    model.get(at),
                    real.get(at)
                ));
            }
        }
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
    println!("{} operations: {outcomes:?}", operations());
    for wanted in ["done", "404", "409", "422"] {
        assert!(
            outcomes.contains_key(wanted),
            "no operation ended with {wanted}: {outcomes:?}"
        );
    }
    // What is forgotten can't be watched from: 410 on both sides.
    twins.model.compact();
    assert!(twins.marks[0].0 < twins.model.compacted());
    let path = format!(
        "/apis/gogrid.dev/v1alpha1/namespaces/{NAMESPACE}/inferencejobs?watch=true&resourceVersion=1&timeoutSeconds=1"
    );
    let request = http::Request::builder().uri(path).body(vec![]).unwrap();
    let gone = match twins.client.request_text(request).await {
        Ok(said) => said.contains("\"code\":410"),
        Err(error) => matches!(error, kube::Error::Api(status) if status.code == 410),
    };
    assert!(gone, "the real server watched from version 1");
}
