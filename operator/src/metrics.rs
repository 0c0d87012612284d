//! What can be measured of the operator.
//!
//! Owns: every metric, and the HTTP server for them and for probes.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus::core::Collector;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;

/// Buckets of API work and planning, in seconds.
const BUCKETS: [f64; 8] = [0.0005, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 30.0];

/// All metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    build: IntGaugeVec,
    /// Time of one turn of the owner.
    pub(crate) round_seconds: Histogram,
    /// Time of one job's calls.
    pub(crate) work_seconds: Histogram,
    /// Jobs by how they stand.
    pub(crate) jobs: IntGaugeVec,
    /// Longest wait for a place, in seconds.
    pub(crate) oldest_pending: IntGauge,
    /// Jobs that ended, by result.
    pub(crate) finished: IntCounterVec,
    /// Jobs turned away by placement, by reason.
    pub(crate) rejections: IntCounterVec,
    /// Nodes by the state of their heartbeat.
    pub(crate) nodes: IntGaugeVec,
    /// Leases that were seen alive and then given up.
    pub(crate) lease_expirations: IntCounter,
    /// Nodes that a profile governs.
    pub(crate) profile_matched: IntGaugeVec,
    /// Nodes that have it in force.
    pub(crate) profile_applied: IntGaugeVec,
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
    /// Whether leading is refused because of the CRDs.
    pub(crate) refused: IntGauge,
    ready: AtomicBool,
    refusal: Mutex<Option<String>>,
}

fn counters(name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

fn gauges(name: &str, help: &str, label: &str) -> Result<IntGaugeVec, prometheus::Error> {
    IntGaugeVec::new(Opts::new(name, help), &[label])
}

fn seconds(name: &str, help: &str) -> Result<Histogram, prometheus::Error> {
    Histogram::with_opts(HistogramOpts::new(name, help).buckets(BUCKETS.to_vec()))
}

impl Metrics {
    /// Registers everything.
    pub fn new() -> Result<Self, prometheus::Error> {
        let new = Self {
            registry: Registry::new(),
            build: gauges(
                "gogrid_build_info",
                "1, with the version of this process.",
                "version",
            )?,
            round_seconds: seconds(
                "gogrid_planning_duration_seconds",
                "Time of one turn over all jobs, placement included.",
            )?,
            work_seconds: seconds(
                "gogrid_reconcile_duration_seconds",
                "Time of the API calls of one step of a job.",
            )?,
            jobs: gauges(
                "gogrid_jobs",
                "InferenceJobs: New, Succeeded, Failed, or why one has no place or what it waits for.",
                "state",
            )?,
            oldest_pending: IntGauge::new(
                "gogrid_jobs_oldest_pending_seconds",
                "How long the job that has waited longest for a place has waited; 0 when none waits.",
            )?,
            finished: counters(
                "gogrid_jobs_finished_total",
                "Jobs that ended while this process led: Succeeded, Failed.",
                &["result"],
            )?,
            rejections: counters(
                "gogrid_placement_rejections_total",
                "Times that a job was left without a place for a new reason.",
                &["reason"],
            )?,
            nodes: gauges(
                "gogrid_nodes",
                "GpuNodes by their heartbeat: Fresh, Waiting (late or not seen yet), Lost.",
                "state",
            )?,
            lease_expirations: IntCounter::new(
                "gogrid_lease_expirations_total",
                "Nodes that this process saw alive and then gave up.",
            )?,
            profile_matched: gauges(
                "gogrid_profile_nodes_matched",
                "Nodes that a ResourceProfile governs.",
                "profile",
            )?,
            profile_applied: gauges(
                "gogrid_profile_nodes_applied",
                "Nodes that report the profile's newest generation in force.",
                "profile",
            )?,
            errors: counters(
                "gogrid_reconcile_errors_total",
                "Failed steps by step and cause; each is tried again.",
                &["step", "cause"],
            )?,
            api_calls: counters(
                "gogrid_api_requests_total",
                "Calls to the API server by method.",
                &["verb"],
            )?,
            malformed: counters(
                "gogrid_malformed_objects_total",
                "Stored objects that could not be read.",
                &["kind"],
            )?,
            watch_errors: counters(
                "gogrid_watch_errors_total",
                "Interruptions of watches.",
                &["kind"],
            )?,
            steps: counters("gogrid_reconcile_steps_total", "Steps begun, by step.", &["step"])?,
            leader: IntGauge::new("gogrid_leader", "1 while this process leads.")?,
            term: IntGauge::new(
                "gogrid_leader_term",
                "Term of the last leadership of this process; 0 before the first.",
            )?,
            refused: IntGauge::new(
                "gogrid_leadership_refused",
                "1 while this process refuses to lead because the CRDs are absent, older than it or can't be checked.",
            )?,
            ready: AtomicBool::new(false),
            refusal: Mutex::default(),
        };
        new.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        // There from the start, so that the first of a kind is seen as an increase.
        for result in ["Succeeded", "Failed"] {
            new.finished.with_label_values(&[result]);
        }
        for collector in new.collectors() {
            new.registry.register(collector)?;
        }
        Ok(new)
    }

    /// Every metric there is.
    fn collectors(&self) -> Vec<Box<dyn Collector>> {
        // Field by field, so that none can be made and never be shown.
        let Self {
            registry: _,
            ready: _,
            refusal: _,
            build,
            round_seconds,
            work_seconds,
            jobs,
            oldest_pending,
            finished,
            rejections,
            nodes,
            lease_expirations,
            profile_matched,
            profile_applied,
            errors,
            api_calls,
            malformed,
            watch_errors,
            steps,
            leader,
            term,
            refused,
        } = self;
        let mut all: Vec<Box<dyn Collector>> = vec![Box::new(lease_expirations.clone())];
        for histogram in [round_seconds, work_seconds] {
            all.push(Box::new(histogram.clone()));
        }
        for gauge in [oldest_pending, leader, term, refused] {
            all.push(Box::new(gauge.clone()));
        }
        for gauges in [build, jobs, nodes, profile_matched, profile_applied] {
            all.push(Box::new(gauges.clone()));
        }
        for counters in [
            finished,
            rejections,
            errors,
            api_calls,
            malformed,
            watch_errors,
            steps,
        ] {
            all.push(Box::new(counters.clone()));
        }
        all
    }

    /// Every watch has brought its first list.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
    }

    /// Why this process refuses to lead, if it does.
    pub(crate) fn set_refusal(&self, why: Option<String>) {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// What keeps this process from being ready.
    fn hindrance(&self) -> Option<String> {
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        let listed = self.ready.load(Ordering::SeqCst);
        refusal
            .clone()
            .or_else(|| (!listed).then(|| "the first lists have not arrived".to_owned()))
    }

    fn text(&self) -> Result<String, prometheus::Error> {
        let mut out = vec![];
        TextEncoder::new().encode(&self.registry.gather(), &mut out)?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }
}

/// The server could not be started or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken or not ours.
    #[error("--metrics-addr {0} can't be bound: free it, or choose another")]
    Bind(SocketAddr, #[source] std::io::Error),
    /// It broke.
    #[error("the metrics server ended")]
    Serve(#[source] std::io::Error),
}

/// Takes the address that is served; a program that can't be asked whether it is ready must not start.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ServeError> {
    let error = |source| ServeError::Bind(address, source);
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    tracing::info!(address = %bound, "serving metrics");
    Ok(listener)
}

/// Serves until `stop`.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
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

async fn readiness(State(metrics): State<Arc<Metrics>>) -> (StatusCode, String) {
    match metrics.hindrance() {
        None => (StatusCode::OK, "ok".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_taken_is_refused_by_name() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let refused = bind(address).await.unwrap_err().to_string();
        assert!(
            refused.starts_with(&format!("--metrics-addr {address} can't be bound")),
            "{refused}"
        );
    }

    #[test]
    fn the_page_of_metrics_is_what_this_program_exports() {
        let collectors = Metrics::new().unwrap().collectors();
        let page = gogrid_reference::metrics_page("gogrid-operator", "operator/src/metrics.rs", &collectors);
        gogrid_reference::compare("docs/reference/metrics-operator.md", &page);
    }
}
