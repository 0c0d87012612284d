//! What the agent tells about itself over HTTP.
//!
//! Owns: the metrics, `/metrics`, `/healthz` and `/readyz`. Must not decide anything.

use crate::clock;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use gogrid_api::LeaseTiming;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::net::TcpListener;

/// The main loop must come round this often, in nanoseconds.
const LOOP_LIMIT: u64 = 15_000_000_000;

/// All metrics, and what the probes look at.
pub(crate) struct Metrics {
    registry: Registry,
    /// Renewals of the node's Lease by result.
    pub(crate) renewals: IntCounterVec,
    /// Writes to the API server by object and result.
    pub(crate) writes: IntCounterVec,
    /// Records by outcome.
    pub(crate) records: IntCounterVec,
    /// Tokens generated.
    pub(crate) tokens: IntCounter,
    /// Ends of assignments by reason.
    pub(crate) ends: IntCounterVec,
    /// Jobs of this session that are not over.
    pub(crate) jobs: IntGauge,
    /// Device memory by device and kind.
    pub(crate) memory: IntGaugeVec,
    /// Share of a device given to workers, in permille.
    pub(crate) share: IntGaugeVec,
    /// Peers cut off for breaking the protocol.
    pub(crate) breaches: IntCounter,
    loop_at: AtomicU64,
    attempt_at: AtomicU64,
    good_at: AtomicU64,
    timing: LeaseTiming,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new(timing: LeaseTiming) -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let counter = |name: &str, help: &str| {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let jobs = IntGauge::new(
            "gogrid_agent_jobs",
            "Assignments of this session that are not over.",
        )?;
        registry.register(Box::new(jobs.clone()))?;
        Ok(Arc::new(Self {
            renewals: counters(
                "gogrid_agent_lease_renewals_total",
                "Renewals of the node's Lease.",
                &["result"],
            )?,
            writes: counters(
                "gogrid_agent_api_writes_total",
                "Writes but Leases.",
                &["object", "result"],
            )?,
            records: counters("gogrid_agent_records_total", "Records by outcome.", &["outcome"])?,
            tokens: counter("gogrid_agent_tokens_total", "Tokens generated.")?,
            ends: counters(
                "gogrid_agent_assignments_total",
                "Assignments that ended.",
                &["reason"],
            )?,
            memory: gauges(
                "gogrid_agent_device_memory_bytes",
                "Device memory.",
                &["device", "kind"],
            )?,
            share: gauges(
                "gogrid_agent_device_share_permille",
                "Device share given.",
                &["device"],
            )?,
            breaches: counter("gogrid_agent_protocol_breaches_total", "Workers cut off.")?,
            jobs,
            loop_at: AtomicU64::new(clock::boottime()),
            attempt_at: AtomicU64::new(clock::boottime()),
            good_at: AtomicU64::new(0),
            timing,
            registry,
        }))
    }

    /// The main loop came round.
    pub(crate) fn looped(&self) {
        self.loop_at.store(clock::boottime(), Ordering::Relaxed);
    }

    /// A renewal was tried.
    pub(crate) fn renewed(&self, good: bool) {
        let now = clock::boottime();
        self.attempt_at.store(now, Ordering::Relaxed);
        if good {
            self.good_at.store(now, Ordering::Relaxed);
        }
        self.renewals
            .with_label_values(&[if good { "ok" } else { "failed" }])
            .inc();
    }

    /// Alive: the loop turns and renewals are tried. An API server that is away is no reason to be restarted: that
    /// would turn a pause of the workers into their end.
    fn healthy(&self) -> Result<(), &'static str> {
        let now = clock::boottime();
        let lease = self.timing.lease().0.saturating_mul(1_000_000);
        if now.saturating_sub(self.loop_at.load(Ordering::Relaxed)) > LOOP_LIMIT {
            Err("the main loop stands still")
        } else if now.saturating_sub(self.attempt_at.load(Ordering::Relaxed)) > lease {
            Err("no renewal of the lease was tried for a whole lease")
        } else {
            Ok(())
        }
    }

    fn ready(&self) -> Result<(), &'static str> {
        self.healthy()?;
        let good = self.good_at.load(Ordering::Relaxed);
        let fence = self.timing.fence_after().0.saturating_mul(1_000_000);
        if good > 0 && clock::boottime() < good.saturating_add(fence) {
            Ok(())
        } else {
            Err("the lease is not held")
        }
    }
}

fn probe(result: Result<(), &'static str>) -> (StatusCode, &'static str) {
    match result {
        Ok(()) => (StatusCode::OK, "ok"),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
    }
}

/// Serves for ever.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<Metrics>) {
    let (health, ready) = (Arc::clone(&metrics), Arc::clone(&metrics));
    let text = move || async move {
        TextEncoder::new()
            .encode_to_string(&metrics.registry.gather())
            .unwrap_or_default()
    };
    let router = Router::new()
        .route("/metrics", get(text))
        .route("/healthz", get(move || async move { probe(health.healthy()) }))
        .route("/readyz", get(move || async move { probe(ready.ready()) }));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "metrics server ended");
    }
}
