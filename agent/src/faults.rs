//! Crash points for tests: the process kills itself before or after its N-th mutating request.
//!
//! Owns: counting requests right above the connection. Built only with the `faults` feature; must not change requests.

use http::{Method, Request, Response};
use kube::client::Body;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

/// Where to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Before the N-th request is sent.
    Before(u64),
    /// After its answer has come.
    After(u64),
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} must be kill-before=N or kill-after=N");
        let (what, n) = text.split_once('=').ok_or_else(bad)?;
        let n = n.parse().map_err(|_| bad())?;
        match what {
            "kill-before" => Ok(Fault::Before(n)),
            "kill-after" => Ok(Fault::After(n)),
            _ => Err(bad()),
        }
    }
}

/// Layer that carries the counter.
#[derive(Clone)]
pub(crate) struct FaultLayer(pub(crate) Option<Fault>, pub(crate) Arc<AtomicU64>);

impl<S> tower::Layer<S> for FaultLayer {
    type Service = Faulty<S>;
    fn layer(&self, inner: S) -> Faulty<S> {
        Faulty {
            inner,
            layer: self.clone(),
        }
    }
}

/// The service beneath it.
#[derive(Clone)]
pub(crate) struct Faulty<S> {
    inner: S,
    layer: FaultLayer,
}

impl<S, B> tower::Service<Request<Body>> for Faulty<S>
where
    S: tower::Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = futures::future::BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let FaultLayer(fault, counter) = &self.layer;
        let counts = *request.method() != Method::GET && !request.uri().path().contains("/leases");
        let n = if counts {
            counter.fetch_add(1, Ordering::SeqCst) + 1
        } else {
            0
        };
        let fault = fault.filter(|_| counts);
        if fault == Some(Fault::Before(n)) {
            die();
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            if fault == Some(Fault::After(n)) {
                die();
            }
            answer
        })
    }
}

fn die() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}
