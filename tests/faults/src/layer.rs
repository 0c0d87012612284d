//! The tower layer that strikes.
//!
//! Owns: the counters and each fault's effect on one request.

use crate::{Act, Calls, Fault};
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use kube::client::{Body, DynBody};
use rustix::process::{Signal, getpid, kill_process};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tower::{BoxError, Layer, Service};

/// What all layers of one process share.
#[derive(Debug, Default)]
struct Shared {
    faults: Vec<Fault>,
    writes: AtomicU64,
    work: AtomicU64,
    leases: AtomicU64,
    any: AtomicU64,
}

/// Makes the service; clones count together.
#[derive(Clone, Debug, Default)]
pub struct FaultLayer {
    shared: Arc<Shared>,
    beats: bool,
}

impl FaultLayer {
    /// Strikes these faults.
    pub fn new(faults: Vec<Fault>) -> Self {
        let shared = Arc::new(Shared {
            faults,
            ..Shared::default()
        });
        Self { shared, beats: false }
    }

    /// The same for a client that does nothing but keep a Lease: what it sends is none of [`Calls::Any`].
    #[must_use]
    pub fn beats(&self) -> Self {
        Self {
            beats: true,
            ..self.clone()
        }
    }

    /// Counts a request; what is to happen to it.
    fn count(&self, method: &Method, path: &str, query: &str) -> Option<Act> {
        let counted = |calls: &&Calls| !(self.beats && **calls == Calls::Any);
        kinds(method, path, query)
            .iter()
            .filter(counted)
            .find_map(|calls| {
                let shared = &self.shared;
                let counter = match calls {
                    Calls::Writes => &shared.writes,
                    Calls::Work => &shared.work,
                    Calls::Leases => &shared.leases,
                    Calls::Any => &shared.any,
                };
                let number = counter.fetch_add(1, Ordering::SeqCst) + 1;
                let fault = shared.faults.iter().find(|f| f.strikes(*calls, number))?;
                tracing::warn!(%fault, number, %method, path, "fault");
                Some(fault.act)
            })
    }
}

/// What a request counts as.
fn kinds(method: &Method, path: &str, query: &str) -> &'static [Calls] {
    if query.contains("watch=") {
        return &[];
    }
    if path.starts_with("/apis/coordination.k8s.io/") {
        return &[Calls::Any, Calls::Leases];
    }
    let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    let changes_nothing = reads || path.contains("/selfsubject") || query.contains("dryRun=All");
    let work = ["/inferencejobs", "/assignments", "/configmaps"];
    if changes_nothing {
        &[Calls::Any]
    } else if work.iter().any(|plural| path.contains(plural)) {
        &[Calls::Any, Calls::Work, Calls::Writes]
    } else {
        &[Calls::Any, Calls::Writes]
    }
}

impl<S> Layer<S> for FaultLayer {
    type Service = Faulty<S>;

    fn layer(&self, inner: S) -> Faulty<S> {
        Faulty {
            inner,
            layer: self.clone(),
        }
    }
}

/// The service that strikes.
#[derive(Clone, Debug)]
pub struct Faulty<S> {
    inner: S,
    layer: FaultLayer,
}

/// A request or its answer was lost on purpose.
#[derive(Debug, thiserror::Error)]
#[error("fault: {0} was lost")]
struct Lost(&'static str);

impl<S> Service<Request<Body>> for Faulty<S>
where
    S: Service<Request<Body>, Response = Response<Box<DynBody>>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<S::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let query = request.uri().query().unwrap_or("");
        let act = self.layer.count(request.method(), request.uri().path(), query);
        match act {
            None | Some(Act::Note) => Box::pin(self.inner.call(request)),
            Some(Act::KillBefore) => {
                signal(Signal::KILL);
                Box::pin(std::future::pending())
            }
            Some(Act::PauseBefore) => {
                stand_still();
                Box::pin(self.inner.call(request))
            }
            Some(Act::Drop) => Box::pin(async { Err(BoxError::from(Lost("the request"))) }),
            Some(Act::Answer(status)) => Box::pin(async move { refusal(status) }),
            Some(Act::Hang) => Box::pin(std::future::pending()),
            Some(Act::Delay(time)) => {
                // The connection does nothing before it is polled.
                let answer = self.inner.call(request);
                Box::pin(async move {
                    tokio::time::sleep(time).await;
                    answer.await
                })
            }
            Some(Act::Drip) => {
                let answer = self.inner.call(request);
                Box::pin(async move { drip(answer.await?).await })
            }
            Some(Act::Duplicate) => {
                let (parts, body) = request.into_parts();
                let copy = body.try_clone();
                let again = copy.map(|copy| self.inner.call(Request::from_parts(parts.clone(), copy)));
                let first = self.inner.call(Request::from_parts(parts, body));
                Box::pin(async move {
                    let answer = first.await;
                    match again {
                        Some(again) => again.await,
                        None => answer,
                    }
                })
            }
            Some(act @ (Act::KillAfter | Act::LoseAnswer | Act::Swallow)) => {
                let answer = self.inner.call(request);
                Box::pin(async move {
                    answer.await?;
                    match act {
                        Act::KillAfter => signal(Signal::KILL),
                        Act::Swallow => std::future::pending().await,
                        _ => {}
                    }
                    Err(BoxError::from(Lost("the answer")))
                })
            }
        }
    }
}

/// How long a thread may still run after its process was told to stop: the signal may have gone to another of its threads.
const STOPS_WITHIN: Duration = Duration::from_millis(50);

/// Stops this process; comes back when somebody has woken it.
fn stand_still() {
    signal(Signal::STOP);
    #[expect(
        clippy::disallowed_methods,
        reason = "nothing must be sent until the stop has come"
    )]
    std::thread::sleep(STOPS_WITHIN);
}

fn signal(signal: Signal) {
    if let Err(error) = kill_process(getpid(), signal) {
        tracing::error!(%error, "fault: the process could not signal itself");
    }
}

/// Between two bytes of an answer that drips.
const DRIP: Duration = Duration::from_millis(20);

/// The same answer, slowly.
async fn drip(answer: Response<Box<DynBody>>) -> Result<Response<Box<DynBody>>, BoxError> {
    let (parts, body) = answer.into_parts();
    let whole = body.collect().await?.to_bytes();
    let drops = futures::stream::unfold(whole, |mut left| async move {
        if left.is_empty() {
            return None;
        }
        tokio::time::sleep(DRIP).await;
        let drop = left.split_to(1);
        Some((Ok::<_, BoxError>(Frame::data(drop)), left))
    });
    let body: Box<DynBody> = Box::new(StreamBody::new(Box::pin(drops)));
    Ok(Response::from_parts(parts, body))
}

/// What an API server under stress says.
fn refusal(code: u16) -> Result<Response<Box<DynBody>>, BoxError> {
    let status = StatusCode::from_u16(code)?;
    let reason = match code {
        409 => "Conflict",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    let body = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": format!("fault: {status}"),
    });
    let mut answer = Response::builder()
        .status(status)
        .header("content-type", "application/json");
    if matches!(code, 429 | 503) {
        answer = answer.header("retry-after", "3600");
    }
    let body = Full::from(serde_json::to_vec(&body)?).map_err(|never| match never {});
    let body: Box<DynBody> = Box::new(body);
    Ok(answer.body(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_counts_as_any_but_watches_and_what_keeps_a_lease() {
        let layer = FaultLayer::new(vec!["any:note=1..".parse().unwrap()]);
        let lease = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/gogrid-leader";
        let counted = |layer: &FaultLayer, method: Method, path: &str, query: &str| {
            layer.count(&method, path, query).is_some()
        };
        assert!(counted(&layer, Method::GET, "/api/v1/configmaps/a", ""));
        assert!(counted(&layer, Method::GET, lease, ""));
        assert!(counted(&layer, Method::PATCH, "/api/v1/configmaps/a", ""));
        assert!(!counted(&layer, Method::GET, "/api/v1/configmaps", "watch=true"));
        let beats = layer.beats();
        assert!(!counted(&beats, Method::PUT, lease, ""));
        assert!(!counted(&beats, Method::GET, "/api/v1/nodes/n", ""));
    }
}
