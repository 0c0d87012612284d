//! The last door before the connection.
//!
//! Owns: refusing writes while this process does not lead (or is about to stop leading), deadlines of calls that are
//! not watches, counting calls; and what the election knows that others need: the term, and gaps in what it hears. Must
//! not: know what the calls mean.

use crate::clock::{Host, within};
use crate::metrics::Metrics;
use gogrid_api::Millis;
use http::{Method, Request, Response};
use kube::client::Body;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tower::{BoxError, Layer, Service};

/// Until when this process may write, and under which term; how often the API server was out of its reach.
#[derive(Debug, Default)]
pub struct Leadership {
    valid_until: AtomicU64,
    term: AtomicI64,
    unheard: AtomicBool,
    gaps: AtomicU64,
}

impl Leadership {
    /// Leads until then.
    pub fn hold(&self, until: Millis, term: i64) {
        self.term.store(term, Ordering::SeqCst);
        self.valid_until.store(until.0, Ordering::SeqCst);
    }

    /// Leads no more.
    pub(crate) fn drop_now(&self) {
        self.valid_until.store(0, Ordering::SeqCst);
    }

    /// The API server answered the election, or did not.
    pub(crate) fn heard(&self, answered: bool) {
        if self.unheard.swap(!answered, Ordering::SeqCst) && answered {
            self.gaps.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// How often it has answered again after it did not. Counted before leadership is held again: who leads after a gap
    /// knows of it, though a watch may not have noticed it yet.
    pub(crate) fn gaps(&self) -> u64 {
        self.gaps.load(Ordering::SeqCst)
    }

    /// The term, while writing is allowed.
    pub(crate) fn term(&self, now: Millis) -> Option<i64> {
        (now.0 < self.valid_until.load(Ordering::SeqCst)).then(|| self.term.load(Ordering::SeqCst))
    }
}

/// The gate refused a write.
#[derive(Debug, thiserror::Error)]
#[error("not leading: {method} {path} was not sent")]
pub(crate) struct NotLeading {
    method: Method,
    path: String,
}

/// A call took too long.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
pub(crate) struct TimedOut(Duration);

/// What the gate needs.
#[derive(Clone)]
pub struct GateLayer {
    /// Clocks and waiting.
    pub host: Arc<dyn Host>,
    /// Who may write.
    pub leadership: Arc<Leadership>,
    /// Longest time of a call that is no watch.
    pub deadline: Duration,
    /// Where calls are counted.
    pub metrics: Arc<Metrics>,
}

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;

    fn layer(&self, inner: S) -> Gate<S> {
        Gate {
            inner,
            layer: self.clone(),
        }
    }
}

/// The door itself.
pub struct Gate<S> {
    inner: S,
    layer: GateLayer,
}

fn mutates(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// Leases are how leadership is won, self-reviews and dry runs change nothing, and Events only tell: also why a process
/// does not lead.
fn exempt(path: &str, query: &str) -> bool {
    path.starts_with("/apis/coordination.k8s.io/")
        || path.starts_with("/apis/events.k8s.io/")
        || path.contains("/selfsubject")
        || query.contains("dryRun=All")
}

fn watches(query: &str) -> bool {
    query
        .split('&')
        .any(|pair| pair == "watch=true" || pair == "watch=1")
}

impl<S, B> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<B>, Error = BoxError>,
    S::Future: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let query = request.uri().query().unwrap_or("").to_owned();
        let gated = mutates(request.method()) && !exempt(&path, &query);
        if gated && self.layer.leadership.term(self.layer.host.mono()).is_none() {
            let method = request.method().clone();
            return Box::pin(async move { Err(BoxError::from(NotLeading { method, path })) });
        }
        let verb = request.method().as_str().to_lowercase();
        self.layer.metrics.api_calls.with_label_values(&[&verb]).inc();
        let answer = self.inner.call(request);
        let (host, deadline) = (Arc::clone(&self.layer.host), self.layer.deadline);
        let watch = watches(&query);
        Box::pin(async move {
            if watch {
                answer.await
            } else {
                within(&*host, deadline, answer)
                    .await
                    .unwrap_or_else(|| Err(BoxError::from(TimedOut(deadline))))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_counted_once_when_the_api_server_answers_again() {
        let leadership = Leadership::default();
        let mut gaps = vec![];
        for answered in [true, false, false, true, true, false, true] {
            leadership.heard(answered);
            gaps.push(leadership.gaps());
        }
        assert_eq!(gaps, [0, 0, 0, 1, 1, 1, 2]);
    }

    #[test]
    fn only_leases_reviews_dry_runs_and_events_pass_a_closed_gate() {
        assert!(exempt(
            "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/gogrid-leader",
            ""
        ));
        assert!(exempt(
            "/apis/gogrid.dev/v1alpha1/namespaces/a/inferencejobs/b/status",
            "dryRun=All"
        ));
        assert!(exempt("/apis/events.k8s.io/v1/namespaces/a/events", ""));
        assert!(!exempt(
            "/apis/gogrid.dev/v1alpha1/namespaces/a/inferencejobs/b/status",
            ""
        ));
        assert!(mutates(&Method::DELETE) && mutates(&Method::PATCH) && !mutates(&Method::GET));
    }

    #[test]
    fn leadership_ends_by_itself_when_it_is_not_renewed() {
        let l = Leadership::default();
        assert_eq!(l.term(Millis(0)), None);
        l.hold(Millis(100), 7);
        assert_eq!(l.term(Millis(99)), Some(7));
        assert_eq!(l.term(Millis(100)), None);
    }
}
