//! What the agent watches: its assignments, the profiles, its Node and its GpuNode.
//!
//! Owns: the four watches, each restarted with backoff and each ended by the server within two minutes. A malformed
//! object never stops the others. Must not act on what it sees.

use crate::clock::Host;
use crate::config::Config;
use crate::event::{Event, Hub};
use crate::kube_client::{Clients, WATCH_SECONDS};
use futures::{Stream, StreamExt as _};
use gogrid_api::effective::NamedProfile;
use gogrid_api::guarded::Guarded;
use gogrid_api::{Assignment, GpuNode, ResourceProfile};
use k8s_openapi::api::core::v1::Node;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event as Seen, watcher};
use kube::{Api, ResourceExt as _};
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How long to wait after that many failures in a row: doubled up to half a minute, and spread, so that a thousand
/// agents that lost the API server together don't come back together.
fn pause(failures: u32, random: u64) -> Duration {
    let base = (800_u64 << failures.saturating_sub(1).min(6)).min(30_000);
    Duration::from_millis(base + random % base)
}

fn narrowed(fields: &str) -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS).fields(fields)
}

fn lasting<K: Send + 'static>(
    host: &Arc<dyn Host>,
    watch: impl Stream<Item = watcher::Result<Seen<K>>> + Send + 'static,
) -> impl Stream<Item = Seen<K>> + Send + 'static {
    let start = (Arc::clone(host), Box::pin(watch), 0);
    futures::stream::unfold(start, |(host, mut seen, mut failures)| async move {
        loop {
            match seen.next().await? {
                Ok(event) => return Some((event, (host, seen, 0))),
                Err(error) => {
                    tracing::warn!(%error, "a watch broke and is begun again");
                    failures += 1;
                    host.sleep(pause(failures, host.random())).await;
                }
            }
        }
    })
}

/// Keeps all four going for ever; begins them anew when told to.
pub(crate) async fn keep(
    host: Arc<dyn Host>,
    clients: Clients,
    config: Config,
    hub: Hub,
    again: Arc<Notify>,
) {
    loop {
        let tasks = start(&host, &clients, &config, &hub);
        again.notified().await;
        tracing::info!("watches begin anew");
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

fn start(
    host: &Arc<dyn Host>,
    clients: &Clients,
    config: &Config,
    hub: &Hub,
) -> Vec<tokio::task::JoinHandle<()>> {
    let client = || clients.watch.clone();
    let mine = format!("spec.nodeName={}", config.node);
    let named = format!("metadata.name={}", config.node);
    let orders = watcher(Api::namespaced(client(), &config.namespace), narrowed(&mine));
    let all = watcher(Api::all(client()), narrowed(""));
    // Of these two, what the agent wants to know stands in the metadata.
    let own = watcher(Api::<PartialObjectMeta<Node>>::all(client()), narrowed(&named));
    let said = watcher(Api::<PartialObjectMeta<GpuNode>>::all(client()), narrowed(&named));
    vec![
        host.spawn(Box::pin(assignments(lasting(host, orders), hub.clone()))),
        host.spawn(Box::pin(profiles(lasting(host, all), hub.clone()))),
        host.spawn(Box::pin(node(lasting(host, own), hub.clone()))),
        host.spawn(Box::pin(gpu_node(lasting(host, said), hub.clone()))),
    ]
}

async fn assignments(stream: impl Stream<Item = Seen<Guarded<Assignment>>>, hub: Hub) {
    let mut stream = pin!(stream);
    let whole = |Guarded(object): Guarded<Assignment>| match object {
        Ok(assignment) => Some(assignment),
        Err(invalid) => {
            let name = invalid.metadata.name.unwrap_or_default();
            tracing::error!(
                assignment = name,
                error = invalid.error,
                "assignment can't be read and is left alone"
            );
            None
        }
    };
    while let Some(seen) = stream.next().await {
        let event = match seen {
            Seen::Init => Some(Event::AssignmentsInit),
            Seen::InitApply(object) | Seen::Apply(object) => {
                whole(object).map(|a| Event::Assignment(Box::new(a)))
            }
            Seen::InitDone => Some(Event::AssignmentsComplete),
            Seen::Delete(object) => Some(Event::AssignmentGone(object.name_any())),
        };
        if let Some(event) = event {
            hub.send(event).await;
        }
    }
}

async fn profiles(stream: impl Stream<Item = Seen<Guarded<ResourceProfile>>>, hub: Hub) {
    let mut stream = pin!(stream);
    let (mut known, mut complete) = (BTreeMap::new(), false);
    while let Some(seen) = stream.next().await {
        match seen {
            Seen::Init => {
                known.clear();
                complete = false;
            }
            Seen::InitDone => complete = true,
            Seen::Delete(object) => {
                known.remove(&object.name_any());
            }
            Seen::InitApply(object) | Seen::Apply(object) => match object.0 {
                Ok(profile) => {
                    let (name, generation) = (profile.name_any(), profile.metadata.generation.unwrap_or(0));
                    known.insert(
                        name.clone(),
                        NamedProfile {
                            name,
                            generation,
                            spec: profile.spec,
                        },
                    );
                }
                Err(invalid) => tracing::error!(error = invalid.error, "a profile can't be read"),
            },
        }
        if complete {
            hub.send(Event::Profiles(known.values().cloned().collect())).await;
        }
    }
}

async fn node(stream: impl Stream<Item = Seen<PartialObjectMeta<Node>>>, hub: Hub) {
    let mut stream = pin!(stream);
    while let Some(seen) = stream.next().await {
        if let Seen::InitApply(node) | Seen::Apply(node) = seen {
            let uid = node.metadata.uid.unwrap_or_default();
            hub.send(Event::Node(uid, node.metadata.labels.unwrap_or_default()))
                .await;
        }
    }
}

async fn gpu_node(stream: impl Stream<Item = Seen<PartialObjectMeta<GpuNode>>>, hub: Hub) {
    let mut stream = pin!(stream);
    let mut there = false;
    while let Some(seen) = stream.next().await {
        let gone = match seen {
            Seen::Init => {
                there = false;
                false
            }
            Seen::InitApply(_) | Seen::Apply(_) => {
                there = true;
                false
            }
            Seen::InitDone => !there,
            Seen::Delete(_) => true,
        };
        if gone {
            hub.send(Event::GpuNodeGone).await;
        }
    }
}
