//! What the agent tells about itself over HTTP.
//!
//! Owns: the metrics, `/metrics`, `/healthz` and `/readyz`. Must not decide anything.

use crate::clock::Host;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use gogrid_agent_core::driver;
use gogrid_agent_core::protocol::{Outcome, RecordResult, Usage};
use gogrid_agent_core::session::Nanos;
use gogrid_api::LeaseTiming;
use prometheus::core::Collector;
use prometheus::{
    CounterVec, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;

/// The main loop must come round this often, in nanoseconds.
const LOOP_LIMIT: u64 = 15_000_000_000;

/// Buckets of GenAI server durations, as OpenTelemetry's conventions give them.
const REQUEST_BUCKETS: [f64; 14] = [
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
];

/// All metrics, and what the probes look at.
pub struct Metrics {
    host: Arc<dyn Host>,
    registry: Registry,
    build: IntGaugeVec,
    renewals: IntCounterVec,
    heartbeat: IntGauge,
    /// Writes to the API server by object and result.
    pub(crate) writes: IntCounterVec,
    records: IntCounterVec,
    request_seconds: Histogram,
    prompt_tokens: IntCounter,
    tokens: IntCounter,
    /// Ends of assignments by result.
    pub(crate) ends: IntCounterVec,
    /// Jobs of this session that are not over.
    pub(crate) jobs: IntGauge,
    /// Workers that stand still because the lease was not renewed in time.
    pub(crate) fenced: IntGauge,
    /// Memory of a device.
    pub(crate) memory_total: IntGaugeVec,
    /// What the profile lets all jobs have of it.
    pub(crate) memory_limit: IntGaugeVec,
    /// What jobs have reserved.
    pub(crate) memory_reserved: IntGaugeVec,
    /// What workers said they use at most.
    pub(crate) memory_used: IntGaugeVec,
    /// What others use.
    pub(crate) memory_foreign: IntGaugeVec,
    /// What could be reserved now.
    pub(crate) memory_free: IntGaugeVec,
    /// Whether a device may be used.
    pub(crate) healthy: IntGaugeVec,
    /// What the profile lets all jobs have of its time.
    pub(crate) compute_limit: GaugeVec,
    /// Share of a device's time granted now.
    pub(crate) share: GaugeVec,
    busy: CounterVec,
    outside: CounterVec,
    waited: CounterVec,
    record_wait: Histogram,
    /// Load that others put on a device, in permille; -1 where it can't be told.
    pub(crate) foreign: IntGaugeVec,
    /// Turns of the shares that yield, by device and what they do since.
    pub(crate) turns: IntCounterVec,
    /// Rungs of the watchdog of device memory that were stepped on.
    pub(crate) rungs: IntCounterVec,
    /// Models being read or downloaded.
    pub(crate) obtaining: IntGauge,
    /// Bytes of models read or downloaded.
    pub(crate) model_bytes: IntCounter,
    /// Models that could not be had, by reason.
    pub(crate) model_failures: IntCounterVec,
    /// Questions to the GPU driver without an answer, by how.
    pub(crate) driver_silences: IntCounterVec,
    /// Peers cut off for breaking the protocol.
    pub(crate) breaches: IntCounter,
    loop_at: AtomicU64,
    attempt_at: AtomicU64,
    good_at: AtomicU64,
    hindrance: Mutex<Option<String>>,
    driver_gone: Mutex<Option<Nanos>>,
    timing: LeaseTiming,
}

fn counters(name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

fn gauges(name: &str, help: &str) -> Result<IntGaugeVec, prometheus::Error> {
    IntGaugeVec::new(Opts::new(name, help), &["device"])
}

fn ratios(name: &str, help: &str) -> Result<GaugeVec, prometheus::Error> {
    GaugeVec::new(Opts::new(name, help), &["device"])
}

fn times(name: &str, help: &str) -> Result<CounterVec, prometheus::Error> {
    CounterVec::new(Opts::new(name, help), &["device"])
}

impl Metrics {
    /// All at zero.
    pub fn new(host: Arc<dyn Host>, timing: LeaseTiming) -> Result<Arc<Self>, prometheus::Error> {
        let new = Self {
            registry: Registry::new(),
            build: IntGaugeVec::new(
                Opts::new("gogrid_build_info", "1, with the version of this process."),
                &["version"],
            )?,
            renewals: counters(
                "gogrid_lease_renewals_total",
                "Attempts to renew the node's Lease: ok, failed.",
                &["result"],
            )?,
            heartbeat: IntGauge::new(
                "gogrid_lease_last_heartbeat_timestamp_seconds",
                "When the node's Lease was last renewed, in seconds since 1970 by the node's clock; 0 before.",
            )?,
            writes: counters(
                "gogrid_agent_api_writes_total",
                "Writes but Leases, by object and result: ok, failed.",
                &["object", "result"],
            )?,
            records: counters(
                "gogrid_records_total",
                "Records answered: ok, failed.",
                &["outcome"],
            )?,
            request_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "gen_ai_server_request_duration_seconds",
                    "Time of one record in its worker, waiting for a share of the device included.",
                )
                .buckets(REQUEST_BUCKETS.to_vec()),
            )?,
            prompt_tokens: IntCounter::new("gogrid_prompt_tokens_total", "Tokens of the prompts answered.")?,
            tokens: IntCounter::new("gogrid_generated_tokens_total", "Tokens generated.")?,
            ends: counters(
                "gogrid_assignments_ended_total",
                "Assignments that ended: Succeeded, Stopped, Failed.",
                &["result"],
            )?,
            jobs: IntGauge::new(
                "gogrid_assignments",
                "Assignments of this session that are not over.",
            )?,
            fenced: IntGauge::new(
                "gogrid_workers_fenced",
                "Workers that stand still because the Lease was not renewed in time.",
            )?,
            memory_total: gauges("gogrid_device_memory_total_bytes", "Memory of the device.")?,
            memory_limit: gauges(
                "gogrid_device_memory_limit_bytes",
                "What the node's profile lets all jobs together have of the device's memory.",
            )?,
            memory_reserved: gauges(
                "gogrid_device_memory_reserved_bytes",
                "What jobs have reserved of the device's memory.",
            )?,
            memory_used: gauges(
                "gogrid_device_memory_used_bytes",
                "Sum of the highest use that each running worker has reported.",
            )?,
            memory_foreign: gauges(
                "gogrid_device_memory_foreign_bytes",
                "What others than GoGrid use of the device's memory.",
            )?,
            memory_free: gauges(
                "gogrid_device_memory_free_bytes",
                "What a job could reserve of the device's memory now.",
            )?,
            healthy: gauges("gogrid_device_healthy", "1 when the device may be used.")?,
            compute_limit: ratios(
                "gogrid_device_compute_limit_ratio",
                "What the node's profile lets all jobs together have of the device's time, 0 to 1.",
            )?,
            share: ratios(
                "gogrid_device_share_ratio",
                "Share of the device's time that is granted to workers now, 0 to 1.",
            )?,
            busy: times(
                "gogrid_device_busy_seconds_total",
                "Device time billed to workers; on the CPU, CPU time divided by cores.",
            )?,
            outside: times(
                "gogrid_device_outside_seconds_total",
                "The part of it that was used between permits: reading and writing messages.",
            )?,
            waited: times(
                "gogrid_throttle_wait_seconds_total",
                "Time that workers waited for their share of the device.",
            )?,
            record_wait: Histogram::with_opts(
                HistogramOpts::new(
                    "gogrid_record_wait_seconds",
                    "Time of one record from being sent to its worker to its start: interval, share and batch together.",
                )
                .buckets(REQUEST_BUCKETS.to_vec()),
            )?,
            foreign: gauges(
                "gogrid_device_foreign_load_permille",
                "Load that others put on the device, in permille of it; -1 where it can't be told.",
            )?,
            turns: counters(
                "gogrid_adaptive_turns_total",
                "Turns of the device's share that yields: Full, Yielding, Climbing, Blind.",
                &["device", "mood"],
            )?,
            rungs: counters(
                "gogrid_vram_watchdog_rungs_total",
                "Rungs of the watchdog of device memory: StopAdmitting, Shed, Drain, Kill, and Clear again.",
                &["rung"],
            )?,
            obtaining: IntGauge::new(
                "gogrid_models_obtaining",
                "Models being downloaded, or read and hashed, now.",
            )?,
            model_bytes: IntCounter::new(
                "gogrid_model_bytes_total",
                "Bytes of models downloaded, or read and hashed.",
            )?,
            model_failures: counters(
                "gogrid_model_failures_total",
                "Models that could not be had or verified, by reason.",
                &["reason"],
            )?,
            driver_silences: counters(
                "gogrid_driver_silences_total",
                "Questions to the GPU driver without an answer: late (its probe was killed), ended (it crashed).",
                &["how"],
            )?,
            breaches: IntCounter::new(
                "gogrid_protocol_breaches_total",
                "Workers cut off for breaking the protocol.",
            )?,
            loop_at: AtomicU64::new(host.boottime()),
            attempt_at: AtomicU64::new(host.boottime()),
            good_at: AtomicU64::new(0),
            hindrance: Mutex::default(),
            driver_gone: Mutex::default(),
            timing,
            host,
        };
        new.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        // There from the start, so that the first of a kind is seen as an increase.
        for reason in ["DigestMismatch", "ObjectCorrupt", "SourceChanged"] {
            new.model_failures.with_label_values(&[reason]);
        }
        for collector in new.collectors() {
            new.registry.register(collector)?;
        }
        Ok(Arc::new(new))
    }

    /// Every metric there is.
    fn collectors(&self) -> Vec<Box<dyn Collector>> {
        // Field by field, so that none can be made and never be shown.
        let Self {
            host: _,
            registry: _,
            loop_at: _,
            attempt_at: _,
            hindrance: _,
            driver_gone: _,
            good_at: _,
            timing: _,
            build,
            renewals,
            heartbeat,
            writes,
            records,
            request_seconds,
            prompt_tokens,
            tokens,
            ends,
            jobs,
            fenced,
            memory_total,
            memory_limit,
            memory_reserved,
            memory_used,
            memory_foreign,
            memory_free,
            healthy,
            compute_limit,
            share,
            busy,
            outside,
            waited,
            record_wait,
            foreign,
            turns,
            rungs,
            obtaining,
            model_bytes,
            model_failures,
            driver_silences,
            breaches,
        } = self;
        let mut all: Vec<Box<dyn Collector>> =
            vec![Box::new(request_seconds.clone()), Box::new(record_wait.clone())];
        for gauge in [heartbeat, jobs, fenced, obtaining] {
            all.push(Box::new(gauge.clone()));
        }
        for gauges in [
            build,
            memory_total,
            memory_limit,
            memory_reserved,
            memory_used,
            memory_foreign,
            memory_free,
            healthy,
            foreign,
        ] {
            all.push(Box::new(gauges.clone()));
        }
        for ratios in [compute_limit, share] {
            all.push(Box::new(ratios.clone()));
        }
        for times in [busy, outside, waited] {
            all.push(Box::new(times.clone()));
        }
        for counters in [
            renewals,
            writes,
            records,
            ends,
            model_failures,
            driver_silences,
            turns,
            rungs,
        ] {
            all.push(Box::new(counters.clone()));
        }
        for counter in [prompt_tokens, tokens, model_bytes, breaches] {
            all.push(Box::new(counter.clone()));
        }
        all
    }

    /// What a worker has used since it last said so.
    pub(crate) fn used(&self, device: &str, before: &Usage, now: &Usage) {
        let seconds = |before: u64, now: u64| Duration::from_nanos(now.saturating_sub(before)).as_secs_f64();
        self.busy
            .with_label_values(&[device])
            .inc_by(seconds(before.device, now.device));
        self.outside
            .with_label_values(&[device])
            .inc_by(seconds(before.outside, now.outside));
        self.waited
            .with_label_values(&[device])
            .inc_by(seconds(before.waited, now.waited));
    }

    /// A record has begun that long after it was sent.
    pub(crate) fn began(&self, waited: u64) {
        self.record_wait
            .observe(Duration::from_nanos(waited).as_secs_f64());
    }

    /// A record that was answered.
    pub(crate) fn answered(&self, result: &RecordResult) {
        let outcome = match &result.outcome {
            Outcome::Text {
                prompt_tokens,
                completion_tokens,
                ..
            } => {
                self.prompt_tokens.inc_by(u64::from(*prompt_tokens));
                self.tokens.inc_by(u64::from(*completion_tokens));
                "ok"
            }
            Outcome::Error { .. } => "failed",
        };
        self.records.with_label_values(&[outcome]).inc();
        if result.started_at > 0 && result.finished_at >= result.started_at {
            let took = Duration::from_nanos(result.finished_at - result.started_at);
            self.request_seconds.observe(took.as_secs_f64());
        }
    }

    /// The main loop came round.
    pub(crate) fn looped(&self) {
        self.loop_at.store(self.host.boottime(), Ordering::Relaxed);
    }

    /// A renewal was tried.
    pub(crate) fn renewed(&self, good: bool) {
        let now = self.host.boottime();
        self.attempt_at.store(now, Ordering::Relaxed);
        if good {
            self.good_at.store(now, Ordering::Relaxed);
            self.heartbeat.set(self.host.wall().as_second());
        }
        self.renewals
            .with_label_values(&[if good { "ok" } else { "failed" }])
            .inc();
    }

    /// What keeps the agent from beginning, if anything does.
    pub(crate) fn set_hindrance(&self, why: Option<String>) {
        if why.is_none() {
            self.looped();
            self.attempt_at.store(self.host.boottime(), Ordering::Relaxed);
        }
        *self.hindrance.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// Since when the driver can't be loaded any more although it has answered, if that is so.
    pub(crate) fn set_driver_gone(&self, since: Option<Nanos>) {
        *self.driver_gone.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    fn hindrance(&self) -> Option<String> {
        self.hindrance
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Alive: it waits to begin, or the loop turns, renewals are tried, and its driver is not gone for good. An API server
    /// that is away is no reason to be restarted: that would turn a pause of the workers into their end.
    fn healthy(&self) -> Result<(), String> {
        if self.hindrance().is_some() {
            return Ok(());
        }
        let now = self.host.boottime();
        let lease = self.timing.lease().0.saturating_mul(1_000_000);
        let gone = *self.driver_gone.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = driver::useless(gone, now) {
            Err(why)
        } else if now.saturating_sub(self.loop_at.load(Ordering::Relaxed)) > LOOP_LIMIT {
            Err("the main loop stands still".to_owned())
        } else if now.saturating_sub(self.attempt_at.load(Ordering::Relaxed)) > lease {
            Err("no renewal of the lease was tried for a whole lease".to_owned())
        } else {
            Ok(())
        }
    }

    fn ready(&self) -> Result<(), String> {
        if let Some(why) = self.hindrance() {
            return Err(why);
        }
        self.healthy()?;
        let good = self.good_at.load(Ordering::Relaxed);
        let fence = self.timing.fence_after().0.saturating_mul(1_000_000);
        if good > 0 && self.host.boottime() < good.saturating_add(fence) {
            Ok(())
        } else {
            Err("the lease is not held".to_owned())
        }
    }
}

fn probe(result: Result<(), String>) -> (StatusCode, String) {
    match result {
        Ok(()) => (StatusCode::OK, "ok".to_owned()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Machine;
    use gogrid_agent_core::protocol::Finish;

    #[test]
    fn the_page_of_metrics_is_what_this_program_exports() {
        let collectors = Metrics::new(Arc::new(Machine), LeaseTiming::default())
            .unwrap()
            .collectors();
        let page = gogrid_reference::metrics_page("gogrid-agent", "agent/src/metrics.rs", &collectors);
        gogrid_reference::compare("docs/reference/metrics-agent.md", &page);
    }

    #[test]
    fn a_device_adds_fewer_than_forty_series() {
        let metrics = Metrics::new(Arc::new(Machine), LeaseTiming::default()).unwrap();
        let series = || -> usize {
            metrics
                .registry
                .gather()
                .iter()
                .map(|family| family.get_metric().len())
                .sum()
        };
        let device = |name: &str| {
            for gauges in [
                &metrics.memory_total,
                &metrics.memory_limit,
                &metrics.memory_reserved,
                &metrics.memory_used,
                &metrics.memory_foreign,
                &metrics.memory_free,
                &metrics.healthy,
            ] {
                gauges.with_label_values(&[name]).set(1);
            }
            metrics.compute_limit.with_label_values(&[name]).set(0.5);
            metrics.share.with_label_values(&[name]).set(0.5);
            metrics.used(name, &Usage::default(), &Usage::default());
        };
        device("one");
        let before = series();
        device("two");
        assert_eq!(series() - before, 12);
    }

    #[test]
    fn a_driver_that_went_away_ends_the_health_of_the_process_until_it_is_back() {
        let metrics = Metrics::new(Arc::new(Machine), LeaseTiming::default()).unwrap();
        let long_ago = Machine.boottime().saturating_sub(60_000_000_000);
        metrics.set_driver_gone(Some(Machine.boottime()));
        assert_eq!(metrics.healthy(), Ok(()));
        metrics.set_driver_gone(Some(long_ago));
        assert!(metrics.healthy().is_err_and(|why| why.contains("NVIDIA driver")));
        metrics.set_driver_gone(None);
        assert_eq!(metrics.healthy(), Ok(()));
    }

    #[test]
    fn an_answer_counts_its_tokens_and_its_time_and_an_error_that_never_began_has_none() {
        let metrics = Metrics::new(Arc::new(Machine), LeaseTiming::default()).unwrap();
        let result = |outcome, started_at, finished_at| RecordResult {
            line: 1,
            custom_id: None,
            outcome,
            started_at,
            finished_at,
            batch: 1,
        };
        metrics.answered(&result(
            Outcome::Text {
                text: String::new(),
                prompt_tokens: 3,
                completion_tokens: 4,
                finish: Finish::Stop,
                completion: false,
            },
            1_000_000_000,
            1_500_000_000,
        ));
        let error = Outcome::Error {
            code: "InvalidRecord".into(),
            message: String::new(),
        };
        metrics.answered(&result(error, 0, 5));
        assert_eq!((metrics.prompt_tokens.get(), metrics.tokens.get()), (3, 4));
        assert_eq!(metrics.request_seconds.get_sample_count(), 1);
        assert!((metrics.request_seconds.get_sample_sum() - 0.5).abs() < 1e-9);
        let count = |outcome: &str| metrics.records.with_label_values(&[outcome]).get();
        assert_eq!((count("ok"), count("failed")), (1, 1));
    }

    #[test]
    fn what_a_worker_used_is_added_once_and_a_counter_that_fell_adds_nothing() {
        let metrics = Metrics::new(Arc::new(Machine), LeaseTiming::default()).unwrap();
        let usage = |device, waited| Usage {
            device,
            waited,
            ..Usage::default()
        };
        metrics.used("cpu", &usage(0, 0), &usage(2_000_000_000, 1_000_000_000));
        metrics.used(
            "cpu",
            &usage(2_000_000_000, 1_000_000_000),
            &usage(0, 1_500_000_000),
        );
        assert!((metrics.busy.with_label_values(&["cpu"]).get() - 2.0).abs() < 1e-9);
        assert!((metrics.waited.with_label_values(&["cpu"]).get() - 1.5).abs() < 1e-9);
    }
}
