//! What can be measured of the operator.
//!
//! Owns: every metric, and the HTTP server for them and for probes.

use crate::store::Store;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use gogrid_api::condition;
use gogrid_api::job::conditions;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// All metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    /// Time of one turn of the owner.
    pub(crate) round_seconds: Histogram,
    /// Time of one job's calls.
    pub(crate) work_seconds: Histogram,
    /// Jobs by the reason of their summary condition.
    pub(crate) jobs: IntGaugeVec,
    /// Failed steps by step and cause.
    pub(crate) errors: IntCounterVec,
    /// Calls by method.
    pub(crate) api_calls: IntCounterVec,
    /// Stored objects that can't be read, by kind.
    pub(crate) malformed: IntCounterVec,
    /// Interruptions of watches, by kind.
    pub(crate) watch_errors: IntCounterVec,
    /// Steps taken, by step.
    pub(crate) steps: IntCounterVec,
    /// Whether this process leads.
    pub(crate) leader: IntGauge,
    /// Term of leadership.
    pub(crate) term: IntGauge,
    /// Whether the CRDs carry the fence rules.
    pub(crate) fence_rules: IntGauge,
    ready: AtomicBool,
}

impl Metrics {
    /// Registers everything.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let buckets = vec![0.0005, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 30.0];
        let histogram = |name: &str, help: &str| {
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.clone()))
        };
        let counters =
            |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let new = Self {
            round_seconds: histogram("gogrid_operator_round_seconds", "Time of one turn over all jobs.")?,
            work_seconds: histogram(
                "gogrid_operator_reconcile_seconds",
                "Time of the API calls of one step of a job.",
            )?,
            jobs: IntGaugeVec::new(
                Opts::new(
                    "gogrid_jobs",
                    "InferenceJobs by the reason of their summary condition.",
                ),
                &["state"],
            )?,
            errors: counters(
                "gogrid_operator_errors_total",
                "Failed steps by step and cause.",
                &["step", "cause"],
            )?,
            api_calls: counters(
                "gogrid_operator_api_calls_total",
                "Calls to the API server by method.",
                &["verb"],
            )?,
            malformed: counters(
                "gogrid_operator_malformed_objects_total",
                "Stored objects that can't be read.",
                &["kind"],
            )?,
            watch_errors: counters(
                "gogrid_operator_watch_errors_total",
                "Interruptions of watches.",
                &["kind"],
            )?,
            steps: counters("gogrid_operator_steps_total", "Steps taken.", &["step"])?,
            leader: IntGauge::new("gogrid_operator_leader", "1 while this process leads.")?,
            term: IntGauge::new(
                "gogrid_operator_term",
                "Term of the last leadership of this process.",
            )?,
            fence_rules: IntGauge::new(
                "gogrid_operator_fence_rules",
                "1 when the CRDs carry the fence rules, 0 when leading is refused.",
            )?,
            registry,
            ready: AtomicBool::new(false),
        };
        let r = &new.registry;
        r.register(Box::new(new.round_seconds.clone()))?;
        r.register(Box::new(new.work_seconds.clone()))?;
        r.register(Box::new(new.jobs.clone()))?;
        for counter in [
            &new.errors,
            &new.api_calls,
            &new.malformed,
            &new.watch_errors,
            &new.steps,
        ] {
            r.register(Box::new(counter.clone()))?;
        }
        for gauge in [&new.leader, &new.term, &new.fence_rules] {
            r.register(Box::new(gauge.clone()))?;
        }
        Ok(new)
    }

    /// Every watch has brought its first list.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
    }

    fn text(&self) -> Result<String, prometheus::Error> {
        let mut out = vec![];
        TextEncoder::new().encode(&self.registry.gather(), &mut out)?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }
}

/// The server could not be started or ended badly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The address is taken or not ours.
    #[error("--metrics-addr {0} can't be bound")]
    Bind(SocketAddr, #[source] std::io::Error),
    /// It broke.
    #[error("the metrics server ended")]
    Serve(#[source] std::io::Error),
}

/// Serves until `stop`.
pub(crate) async fn serve(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .map_err(|e| ServeError::Bind(address, e))?;
    let bound = listener.local_addr().map_err(|e| ServeError::Bind(address, e))?;
    tracing::info!(address = %bound, "serving metrics");
    let app = Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(readiness))
        .with_state(metrics);
    axum::serve(listener, app)
        .with_graceful_shutdown(stop)
        .await
        .map_err(ServeError::Serve)
}

async fn metrics_text(State(metrics): State<Arc<Metrics>>) -> (StatusCode, String) {
    match metrics.text() {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn readiness(State(metrics): State<Arc<Metrics>>) -> (StatusCode, &'static str) {
    if metrics.ready.load(Ordering::SeqCst) {
        (StatusCode::OK, "ok")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the first lists have not arrived",
        )
    }
}

/// Jobs by the reason of their summary condition.
pub(crate) fn count_states(store: &Store) -> BTreeMap<String, i64> {
    let mut counts = BTreeMap::new();
    for job in store.jobs.values() {
        let summary = job
            .status
            .as_ref()
            .and_then(|s| condition::find(&s.conditions, conditions::SUCCEEDED));
        *counts
            .entry(summary.map_or_else(|| "New".into(), |c| c.reason.clone()))
            .or_insert(0) += 1;
    }
    counts
}
