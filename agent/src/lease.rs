//! The node's Lease: taken over at the start, renewed for as long as the agent lives.
//!
//! Owns: the Lease object and the deadline of every attempt. Must not decide what a late renewal means.

use crate::clock::{Host, until, within};
use crate::config::Config;
use gogrid_agent_core::session::{Nanos, Renewals, Session, may_take};
use gogrid_api::{Millis, names};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, Resource as _};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// What became of a renewal.
#[derive(Clone, Debug)]
pub enum LeaseEvent {
    /// It is renewed; the fence counts from when it was sent.
    Renewed {
        /// CLOCK_BOOTTIME.
        sent: Nanos,
    },
    /// The attempt failed or ran out of time.
    Failed {
        /// Why.
        error: String,
    },
    /// Another session holds the node's Lease: this one must end.
    Superseded {
        /// Which.
        holder: String,
    },
}

/// Why an attempt did not renew.
#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error("{0}")]
    Api(#[from] kube::Error),
    #[error("no answer within the attempt's deadline")]
    Deadline,
    #[error("session {0} holds the lease")]
    Superseded(String),
    #[error("session {0} of this machine renews the lease from another state directory: it must end first")]
    Held(String),
}

/// The Lease of one node.
pub struct Keeper {
    host: Arc<dyn Host>,
    api: Api<Lease>,
    nodes: Api<Node>,
    node: String,
    name: String,
    session: Session,
    former: Vec<String>,
    /// The stored version last seen before the Lease was taken, and since when.
    seen: Option<(String, Nanos)>,
    timing: gogrid_api::LeaseTiming,
    held: Option<Lease>,
    taken: bool,
}

impl Keeper {
    /// Not taken yet; `former` are sessions of which nothing is left.
    pub fn new(
        host: Arc<dyn Host>,
        client: Client,
        config: &Config,
        session: Session,
        former: Vec<String>,
    ) -> Self {
        Self {
            host,
            api: Api::namespaced(client.clone(), &config.namespace),
            nodes: Api::all(client),
            node: config.node.clone(),
            name: names::node_lease(&config.node),
            session,
            former,
            seen: None,
            timing: config.timing,
            held: None,
            taken: false,
        }
    }

    /// Renews for ever; ends only when another session has taken the Lease or nobody listens.
    pub async fn keep(mut self, events: mpsc::Sender<LeaseEvent>) {
        let mut renewals = Renewals::new(self.timing);
        loop {
            until(&*self.host, renewals.next()).await;
            let attempt = renewals.begin(self.host.boottime());
            let limit = Duration::from_nanos(attempt.deadline.saturating_sub(attempt.sent));
            let host = Arc::clone(&self.host);
            let result = within(&*host, limit, self.renew())
                .await
                .unwrap_or(Err(RenewError::Deadline));
            let event = match result {
                Ok(()) => {
                    renewals.succeeded(attempt.sent);
                    LeaseEvent::Renewed { sent: attempt.sent }
                }
                Err(RenewError::Superseded(holder)) => {
                    let _ = events.send(LeaseEvent::Superseded { holder }).await;
                    return;
                }
                Err(error @ (RenewError::Api(_) | RenewError::Deadline | RenewError::Held(_))) => {
                    renewals.failed();
                    LeaseEvent::Failed {
                        error: error.to_string(),
                    }
                }
            };
            if events.send(event).await.is_err() {
                return;
            }
        }
    }

    /// One compare-and-swap. The first one takes the Lease from whatever session held it; a later one gives way.
    async fn renew(&mut self) -> Result<(), RenewError> {
        // Whatever goes wrong below, nobody knows what is stored: the next attempt looks first.
        let before = match self.held.take() {
            Some(lease) => Some(lease),
            None => self.look().await?,
        };
        let written = match self.write(before.as_ref()).await {
            Err(kube::Error::Api(status)) if self.taken && matches!(status.code, 404 | 409) => {
                let now = self.look().await?;
                self.write(now.as_ref()).await?
            }
            other => other?,
        };
        self.taken = true;
        self.held = Some(written);
        Ok(())
    }

    /// The stored Lease; an error when it has been taken from this session.
    async fn look(&mut self) -> Result<Option<Lease>, RenewError> {
        let lease = self.api.get_opt(&self.name).await?;
        let holder = lease
            .as_ref()
            .and_then(|l| l.spec.as_ref())
            .and_then(|s| s.holder_identity.clone());
        let me = self.session.to_string();
        match holder.filter(|holder| *holder != me) {
            Some(holder) if self.taken => Err(RenewError::Superseded(holder)),
            Some(holder) if !self.may_take(lease.as_ref(), &holder) => Err(RenewError::Held(holder)),
            Some(_) | None => Ok(lease),
        }
    }

    fn may_take(&mut self, lease: Option<&Lease>, holder: &str) -> bool {
        let now = self.host.boottime();
        let mark = lease
            .and_then(|l| l.metadata.resource_version.clone())
            .unwrap_or_default();
        let since = match &self.seen {
            Some((old, since)) if *old == mark => *since,
            Some(_) | None => now,
        };
        self.seen = Some((mark, since));
        let unchanged = Millis(now.saturating_sub(since) / 1_000_000);
        may_take(Some(holder), &self.session, &self.former, unchanged, self.timing)
    }

    /// A Lease that is made gets its Node as owner, where that can be read; one that is there keeps what it has.
    async fn owner(&self, before: Option<&Lease>) -> Option<Vec<OwnerReference>> {
        if let Some(lease) = before {
            return lease.metadata.owner_references.clone();
        }
        let node = self.nodes.get_opt(&self.node).await.ok().flatten();
        node.and_then(|n| n.owner_ref(&())).map(|o| vec![o])
    }

    async fn write(&self, before: Option<&Lease>) -> Result<Lease, kube::Error> {
        let old = before.and_then(|l| l.spec.clone()).unwrap_or_default();
        let me = self.session.to_string();
        let same = old.holder_identity.as_deref() == Some(&me);
        let now = MicroTime(self.host.wall());
        let transitions = old.lease_transitions.unwrap_or(0);
        let seconds = i32::try_from(self.timing.lease().0 / 1000).unwrap_or(i32::MAX);
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                resource_version: before.and_then(|l| l.metadata.resource_version.clone()),
                owner_references: self.owner(before).await,
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                acquire_time: old.acquire_time.filter(|_| same).or_else(|| Some(now.clone())),
                holder_identity: Some(me),
                lease_duration_seconds: Some(seconds),
                lease_transitions: Some(if same {
                    transitions
                } else {
                    transitions.saturating_add(1)
                }),
                renew_time: Some(now),
                ..LeaseSpec::default()
            }),
        };
        match before {
            Some(_) => self.api.replace(&self.name, &PostParams::default(), &lease).await,
            None => self.api.create(&PostParams::default(), &lease).await,
        }
    }
}
