//! The modelled API server: requests in HTTP's words in, answers and watches out.
//!
//! Owns: the store, who watches what, the collection of what lost its owner, and the record of accepted writes that the
//! checker reads. Must not: delay or lose anything; `link` does.

use super::feed::{BOOKMARK, Feed, Frames, PARTIAL, Sent, WatchBody, expired, frame, metadata_only};
use super::kind::{Kind, Place, Selector};
use super::link::Link;
use super::store::{Change, Refusal, Store, Stored, Verb, What};
use super::time::{Nanos, SECOND, Time, lock};
use bytes::Bytes;
use http::{Method, Response};
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, Weak};

/// How long a watch lasts that does not say.
const WATCH: u64 = 300;

/// A request as it arrives.
#[derive(Clone, Debug)]
pub struct Asked {
    /// When it was sent.
    pub sent: Nanos,
    /// Method.
    pub method: Method,
    /// Path.
    pub path: String,
    /// Query as pairs, decoded.
    pub query: Vec<(String, String)>,
    /// Content type.
    pub content: String,
    /// Accepted type.
    pub accept: String,
    /// Body.
    pub body: Bytes,
}

impl Asked {
    /// A value of the query.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.query.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// Whether it is a watch.
    pub fn watches(&self) -> bool {
        matches!(self.value("watch"), Some("true" | "1"))
    }
}

/// Who sent a write.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sender {
    /// The life of an operator.
    Operator(u32),
    /// A life of a node's agent.
    Agent(String, u32),
    /// Somebody with kubectl.
    User,
}

/// What the checker hears of every accepted write.
pub type Ear = Box<dyn FnMut(Heard<'_>) + Send>;

/// One accepted write.
pub struct Heard<'a> {
    /// When it was carried out.
    pub now: Nanos,
    /// When it was sent.
    pub sent: Nanos,
    /// By whom.
    pub sender: &'a Sender,
    /// What it did.
    pub change: &'a Change,
}

struct Inner {
    store: Store,
    told: u64,
    watchers: Vec<Weak<Feed>>,
    ear: Option<Ear>,
    requests: u64,
    sent: Option<Nanos>,
}

/// The server.
#[derive(Clone)]
pub struct Server {
    time: Time,
    inner: Arc<Mutex<Inner>>,
}

/// An answer with a whole body.
pub fn answer(code: u16, body: Bytes) -> Response<Sent> {
    let mut response = Response::new(Sent::Whole(Some(body)));
    *response.status_mut() =
        http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    response
}

/// A refusal as the server writes it.
pub fn refusal(refused: &Refusal) -> Response<Sent> {
    let Refusal {
        code,
        reason,
        message,
    } = refused;
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason,
        "message": message, "code": code});
    answer(*code, Bytes::from(status.to_string()))
}

impl Server {
    /// An empty one.
    pub fn new(time: Time) -> Self {
        let inner = Inner {
            store: Store::default(),
            told: 0,
            watchers: vec![],
            ear: None,
            requests: 0,
            sent: None,
        };
        Self {
            time,
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// Who hears of accepted writes.
    pub fn set_ear(&self, ear: Ear) {
        lock(&self.inner).ear = Some(ear);
    }

    /// Requests that arrived.
    pub fn requests(&self) -> u64 {
        lock(&self.inner).requests
    }

    /// Looks at the store.
    pub fn look<T>(&self, look: impl FnOnce(&Store) -> T) -> T {
        look(&lock(&self.inner).store)
    }

    /// Forgets old versions: every watch that is begun from one of them must list again.
    pub fn compact(&self) {
        let watchers = {
            let mut inner = lock(&self.inner);
            inner.store.compact();
            inner.told = inner.store.version();
            inner.watchers.clone()
        };
        let now = self.time.now();
        for feed in watchers.iter().filter_map(Weak::upgrade) {
            let mut frames = lock(&feed.frames);
            frames.dropped = true;
            frames.ends = frames.ends.min(now);
            drop(frames);
            feed.wake();
        }
    }

    /// Does something as that sender, at once.
    pub fn act(&self, sender: &Sender, place: &Place, verb: Verb) -> Result<Arc<Stored>, Refusal> {
        let now = self.time.now();
        let stamp = format!("{}", jiff_seconds(now));
        let mut inner = lock(&self.inner);
        let inner = &mut *inner;
        let done = inner.store.act(place, verb, &stamp);
        let changes: Vec<Change> = inner.store.after(inner.told).cloned().collect();
        inner.told = inner.store.version();
        for change in changes {
            if let Some(ear) = inner.ear.as_mut() {
                ear(Heard {
                    now,
                    sent: inner.sent.unwrap_or(now),
                    sender,
                    change: &change,
                });
            }
            inner.watchers.retain(|feed| feed.strong_count() > 0);
            let watchers = inner.watchers.iter().filter_map(Weak::upgrade);
            let mut texts = [None, None];
            for feed in watchers.filter(|feed| feed.wants(&change)) {
                let [whole, metadata] = &mut texts;
                let text = if feed.partial { metadata } else { whole };
                let text = text.get_or_insert_with(|| frame(&change, feed.partial));
                feed.push(now, &change, text);
            }
            if change.what == What::Deleted && matches!(change.kind, Kind::Job | Kind::Assignment) {
                self.collect(change.object.text_at("/metadata/uid").to_owned());
            }
        }
        done
    }

    /// Some seconds after an owner is gone, what it owned goes.
    fn collect(&self, owner: String) {
        let server = self.clone();
        tokio::spawn(async move {
            server.time.until(server.time.now() + 3 * SECOND).await;
            let orphans: Vec<Place> = server.look(|store| {
                let owned = |object: &&Arc<Stored>| {
                    let owners = object
                        .value
                        .pointer("/metadata/ownerReferences")
                        .and_then(Value::as_array);
                    owners.is_some_and(|all| all.len() == 1 && all.iter().any(|o| o["uid"] == owner.as_str()))
                };
                store
                    .list(Kind::ConfigMap, &Selector::default())
                    .into_iter()
                    .filter(owned)
                    .map(|object| Place {
                        kind: Kind::ConfigMap,
                        namespace: object.namespace.clone(),
                        name: Some(object.text_at("/metadata/name").to_owned()),
                        status: false,
                    })
                    .collect()
            });
            for place in orphans {
                let verb = Verb::Delete {
                    uid: None,
                    version: None,
                };
                // Gone already is gone.
                let _ = server.act(&Sender::User, &place, verb);
            }
        });
    }

    /// Answers a request.
    pub fn serve(&self, sender: &Sender, link: &Arc<Link>, asked: &Asked) -> Response<Sent> {
        lock(&self.inner).requests += 1;
        let Some(place) = Place::parse(&asked.path) else {
            return refusal(&Refusal {
                code: 404,
                reason: "NotFound",
                message: format!("the server has no {}", asked.path),
            });
        };
        let partial = asked.accept.contains("as=PartialObjectMetadata");
        if asked.method == Method::GET && place.name.is_none() {
            return self.many(link, &place, asked, partial);
        }
        let verb = match verb(asked) {
            Ok(verb) => verb,
            Err(refused) => return refusal(&refused),
        };
        let deletes = matches!(verb, Verb::Delete { .. });
        let creates = matches!(verb, Verb::Create(_));
        if asked.value("dryRun") == Some("All") {
            // Only the operator's probe asks this: what it tries is refused by the rules.
            let refused = Refusal {
                code: 422,
                reason: "Invalid",
                message: "status.epoch must stay or grow by exactly 1".into(),
            };
            return refusal(&refused);
        }
        lock(&self.inner).sent = Some(asked.sent);
        let done = self.act(sender, &place, verb);
        lock(&self.inner).sent = None;
        match done {
            Err(refused) => refusal(&refused),
            Ok(_) if deletes => answer(
                200,
                Bytes::from_static(
                    b"{\"kind\":\"Status\",\"apiVersion\":\"v1\",\"metadata\":{},\"status\":\"Success\"}",
                ),
            ),
            Ok(object) if partial => answer(200, Bytes::from(metadata_only(&object.value))),
            Ok(object) => answer(if creates { 201 } else { 200 }, object.text.clone()),
        }
    }

    fn many(&self, link: &Arc<Link>, place: &Place, asked: &Asked, partial: bool) -> Response<Sent> {
        let mut selector = Selector::within(&place.namespace);
        for (key, text) in &asked.query {
            match key.as_str() {
                "labelSelector" => selector.add(true, text),
                "fieldSelector" => selector.add(false, text),
                _ => {}
            }
        }
        if asked.watches() {
            return self.watch(link, place.kind, selector, asked, partial);
        }
        let inner = lock(&self.inner);
        let store = &inner.store;
        // A server that lags behind answers from the past, as far as its log goes back.
        let version = store.version().saturating_sub(link.lag()).max(store.compacted());
        let objects: Vec<Arc<Stored>> = if version == store.version() {
            store.list(place.kind, &selector).into_iter().cloned().collect()
        } else {
            store.list_at(place.kind, &selector, version)
        };
        let (api, kind) = if partial {
            PARTIAL
        } else {
            (place.kind.api_version(), place.kind.name())
        };
        let mut text =
            format!("{{\"apiVersion\":\"{api}\",\"kind\":\"{kind}List\",\"metadata\":{{\"resourceVersion\":\"{version}\"}},\"items\":[")
                .into_bytes();
        for (number, object) in objects.iter().enumerate() {
            if number > 0 {
                text.push(b',');
            }
            if partial {
                text.extend_from_slice(&metadata_only(&object.value));
            } else {
                text.extend_from_slice(&object.text);
            }
        }
        text.extend_from_slice(b"]}");
        answer(200, Bytes::from(text))
    }

    fn watch(
        &self,
        link: &Arc<Link>,
        kind: Kind,
        selector: Selector,
        asked: &Asked,
        partial: bool,
    ) -> Response<Sent> {
        let number = |key: &str| asked.value(key).and_then(|text| text.parse::<u64>().ok());
        let from = number("resourceVersion").unwrap_or(0);
        let now = self.time.now();
        let mut inner = lock(&self.inner);
        if from < inner.store.compacted() {
            return answer(200, expired());
        }
        let feed = Arc::new(Feed {
            kind,
            selector,
            partial,
            link: Arc::clone(link),
            frames: Mutex::new(Frames {
                ready: VecDeque::new(),
                last: now,
                bookmark: now + BOOKMARK,
                seen: from,
                ends: now + number("timeoutSeconds").unwrap_or(WATCH) * SECOND,
                waker: None,
                dropped: false,
            }),
        });
        for change in inner.store.after(from).filter(|change| feed.wants(change)) {
            feed.push(now, change, &frame(change, partial));
        }
        inner.watchers.push(Arc::downgrade(&feed));
        link.add(Arc::downgrade(&feed));
        let server = self.clone();
        let seen = Arc::clone(&feed);
        let body = WatchBody {
            feed,
            time: self.time.clone(),
            version: Box::new(move || {
                // What the server has, all of which was put on this stream.
                let _ = &seen;
                lock(&server.inner).store.version()
            }),
            timer: None,
            quiet_since: now,
            over: false,
        };
        Response::new(Sent::Watch(Box::new(body)))
    }
}

/// Seconds of true time as a timestamp.
pub fn jiff_seconds(now: Nanos) -> jiff::Timestamp {
    let seconds = 1_700_000_000_i64.saturating_add(i64::try_from(now / SECOND).unwrap_or(0));
    jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
}

fn verb(asked: &Asked) -> Result<Verb, Refusal> {
    let malformed = |error: serde_json::Error| Refusal {
        code: 400,
        reason: "BadRequest",
        message: error.to_string(),
    };
    let body = || -> Result<Value, Refusal> {
        if asked.body.is_empty() {
            return Ok(json!({}));
        }
        serde_json::from_slice(&asked.body).map_err(malformed)
    };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Ok(match asked.method {
        Method::GET => Verb::Get,
        Method::POST => Verb::Create(body()?),
        Method::PUT => Verb::Replace(body()?),
        Method::DELETE => {
            let body = body()?;
            Verb::Delete {
                uid: text(&body["preconditions"]["uid"]),
                version: text(&body["preconditions"]["resourceVersion"]),
            }
        }
        Method::PATCH if asked.content.contains("apply-patch") => Verb::Apply {
            wanted: body()?,
            manager: asked.value("fieldManager").unwrap_or("").to_owned(),
            force: asked.value("force") == Some("true"),
        },
        Method::PATCH => Verb::Merge(body()?),
        _ => {
            return Err(Refusal {
                code: 405,
                reason: "MethodNotAllowed",
                message: asked.method.to_string(),
            });
        }
    })
}

/// The pairs of a query, decoded.
pub fn pairs(query: &str) -> Vec<(String, String)> {
    let decode = |text: &str| {
        let mut out = vec![];
        let mut bytes = text.bytes();
        while let Some(byte) = bytes.next() {
            match byte {
                b'%' => {
                    let hex: String = bytes.by_ref().take(2).map(char::from).collect();
                    out.push(u8::from_str_radix(&hex, 16).unwrap_or(b'?'));
                }
                b'+' => out.push(b' '),
                other => out.push(other),
            }
        }
        String::from_utf8_lossy(&out).into_owned()
    };
    let mut found: BTreeMap<usize, (String, String)> = BTreeMap::new();
    for (number, pair) in query.split('&').enumerate().filter(|(_, pair)| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        found.insert(number, (decode(key), decode(value)));
    }
    found.into_values().collect()
}
