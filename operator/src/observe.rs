//! What the API server shows.
//!
//! Owns: one watch per kind with back-off, malformed objects logged and counted, and the changes on their way to the
//! owner. Must not: keep state or decide anything.

use crate::clock::Host;
use crate::metrics::Metrics;
use futures::StreamExt as _;
use gogrid_api::guarded::Guarded;
use gogrid_api::job::TaintEffect;
use gogrid_api::names::DRAIN_NODE_ANNOTATION;
use gogrid_api::{Assignment, GpuNode, InferenceJob, ResourceProfile};
use gogrid_planner::Taint;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use kube::api::Api;
use kube::runtime::watcher;
use kube::{Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// A Node as placement needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeInfo {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) taints: Vec<Taint>,
    /// Whether it is cordoned or drained.
    pub(crate) unschedulable: bool,
    /// Whether its jobs are to leave.
    pub(crate) drained: bool,
}

/// A heartbeat Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseInfo {
    pub(crate) name: String,
    pub(crate) holder: Option<String>,
    /// Differs between any two renewals.
    pub(crate) mark: String,
}

/// A PriorityClass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PriorityInfo {
    pub(crate) name: String,
    pub(crate) value: i32,
}

/// What happened to the objects of one kind.
#[derive(Clone, Debug)]
pub(crate) enum Change<T> {
    /// All there are.
    Listed(Vec<T>),
    /// One is new or different.
    Changed(Box<T>),
    /// One is gone.
    Gone(Box<T>),
    /// The watch broke: something may be missed until the next list or change.
    Blind,
}

/// One change, by kind.
#[derive(Clone, Debug)]
pub(crate) enum Observation {
    Job(Change<InferenceJob>),
    Assignment(Change<Assignment>),
    GpuNode(Change<GpuNode>),
    Profile(Change<ResourceProfile>),
    Node(Change<NodeInfo>),
    Lease(Change<LeaseInfo>),
    Priority(Change<PriorityInfo>),
}

/// Kinds watched: readiness waits for the first list of each.
pub(crate) const KINDS: usize = 7;

/// Starts all watches; they end with the process or when nobody listens any more.
pub(crate) fn start(
    host: &Arc<dyn Host>,
    client: &Client,
    namespace: &str,
    metrics: &Arc<Metrics>,
) -> mpsc::Receiver<Observation> {
    let (tx, rx) = mpsc::channel(1024);
    let c = || client.clone();
    spawn(
        host,
        Api::all(c()),
        plain::<InferenceJob>,
        Observation::Job,
        &tx,
        metrics,
    );
    spawn(
        host,
        Api::namespaced(c(), namespace),
        plain::<Assignment>,
        Observation::Assignment,
        &tx,
        metrics,
    );
    spawn(
        host,
        Api::all(c()),
        plain::<GpuNode>,
        Observation::GpuNode,
        &tx,
        metrics,
    );
    spawn(
        host,
        Api::all(c()),
        plain::<ResourceProfile>,
        Observation::Profile,
        &tx,
        metrics,
    );
    spawn(host, Api::all(c()), node_info, Observation::Node, &tx, metrics);
    spawn(
        host,
        Api::namespaced(c(), namespace),
        lease_info,
        Observation::Lease,
        &tx,
        metrics,
    );
    spawn(
        host,
        Api::all(c()),
        priority_info,
        Observation::Priority,
        &tx,
        metrics,
    );
    rx
}

fn spawn<K, T>(
    host: &Arc<dyn Host>,
    api: Api<Guarded<K>>,
    convert: fn(K) -> T,
    wrap: fn(Change<T>) -> Observation,
    tx: &mpsc::Sender<Observation>,
    metrics: &Arc<Metrics>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    T: Send + 'static,
{
    let (tx, metrics, machine) = (tx.clone(), metrics.clone(), Arc::clone(host));
    host.spawn(Box::pin(async move {
        let kind = K::kind(&()).into_owned();
        let read = |guarded: Guarded<K>| match guarded.0 {
            Ok(object) => Some(convert(object)),
            Err(invalid) => {
                metrics.malformed.with_label_values(&[&kind]).inc();
                let (namespace, name) = (invalid.metadata.namespace, invalid.metadata.name);
                tracing::error!(
                    kind,
                    namespace,
                    name,
                    error = invalid.error,
                    "a stored object can't be read and is passed over"
                );
                None
            }
        };
        let mut listed = vec![];
        let mut failures = 0;
        let mut events = watcher(api, watcher::Config::default()).boxed();
        while let Some(event) = events.next().await {
            let broken = event.is_err();
            let change = match event {
                Ok(watcher::Event::Init) => {
                    listed.clear();
                    None
                }
                Ok(watcher::Event::InitApply(object)) => {
                    listed.extend(read(object));
                    None
                }
                Ok(watcher::Event::InitDone) => Some(Change::Listed(std::mem::take(&mut listed))),
                Ok(watcher::Event::Apply(object)) => read(object).map(|o| Change::Changed(Box::new(o))),
                Ok(watcher::Event::Delete(object)) => read(object).map(|o| Change::Gone(Box::new(o))),
                Err(error) => {
                    metrics.watch_errors.with_label_values(&[&kind]).inc();
                    tracing::warn!(kind, error = crate::error_text(&error), "a watch was interrupted");
                    Some(Change::Blind)
                }
            };
            if let Some(change) = change
                && tx.send(wrap(change)).await.is_err()
            {
                return;
            }
            failures = if broken { failures + 1 } else { 0 };
            if broken {
                machine.sleep(pause(failures, machine.random())).await;
            }
        }
    }));
}

/// How long to wait after that many failures in a row: doubled up to half a minute, and spread, so that operators and
/// kinds that lost the API server together don't come back together.
fn pause(failures: u32, random: u64) -> Duration {
    let base = (800_u64 << failures.saturating_sub(1).min(6)).min(30_000);
    Duration::from_millis(base + random % base)
}

fn plain<K: Resource>(mut object: K) -> K {
    object.meta_mut().managed_fields = None;
    object
}

fn node_info(node: Node) -> NodeInfo {
    let name = node.name_any();
    let labels = node.metadata.labels.unwrap_or_default();
    let drained = node
        .metadata
        .annotations
        .is_some_and(|a| a.contains_key(DRAIN_NODE_ANNOTATION));
    let spec = node.spec.unwrap_or_default();
    let taints = spec.taints.unwrap_or_default().into_iter().filter_map(|t| {
        let effect = match t.effect.as_str() {
            "NoSchedule" => TaintEffect::NoSchedule,
            "PreferNoSchedule" => TaintEffect::PreferNoSchedule,
            "NoExecute" => TaintEffect::NoExecute,
            _ => return None,
        };
        Some(Taint {
            key: t.key,
            value: t.value.unwrap_or_default(),
            effect,
        })
    });
    NodeInfo {
        name,
        labels,
        taints: taints.collect(),
        unschedulable: drained || spec.unschedulable.unwrap_or(false),
        drained,
    }
}

pub(crate) fn lease_info(lease: Lease) -> LeaseInfo {
    let mark = lease.resource_version().unwrap_or_default();
    LeaseInfo {
        name: lease.name_any(),
        holder: lease.spec.and_then(|s| s.holder_identity),
        mark,
    }
}

#[expect(clippy::needless_pass_by_value, reason = "one signature for all conversions")]
fn priority_info(class: PriorityClass) -> PriorityInfo {
    PriorityInfo {
        name: class.name_any(),
        value: class.value,
    }
}
