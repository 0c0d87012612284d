//! Who may write.
//!
//! Owns: winning, renewing and releasing the leader Lease by compare-and-swap, judged by changes this process saw on
//! its own monotonic clock; saying why this process never will. Must not: trust a timestamp in the Lease, or lead on older
//! CRDs or in a cluster that belongs to another install.

use crate::apply::post_params;
use crate::clock::{Host, within};
use crate::config::Pod;
use crate::events;
use crate::gate::Leadership;
use crate::metrics::Metrics;
use crate::probe::{self, ProbeError};
use gogrid_api::names::{LEADER_LEASE, LEADER_NAMESPACE, RELEASE_ANNOTATION};
use gogrid_api::{LeaseTiming, Millis};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta};
use kube::{Client, ResourceExt as _};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What to do about the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// It is ours.
    Renew,
    /// Nobody holds it, or its holder was silent for long enough.
    Take,
    /// Someone else holds it.
    Wait,
}

/// Decides on a Lease that was not seen to change for `unchanged`.
fn act(holder: Option<&str>, me: &str, unchanged: Millis, timing: LeaseTiming) -> Act {
    match holder {
        Some(holder) if holder == me => Act::Renew,
        None | Some("") => Act::Take,
        // An eighth more than the lease, for clocks that drift.
        Some(_) if unchanged.0 > timing.leader_lease().0 * 9 / 8 => Act::Take,
        Some(_) => Act::Wait,
    }
}

/// A turn of the election failed.
#[derive(Debug, thiserror::Error)]
enum LeaderError {
    /// The API server said no.
    #[error("the leader lease could not be read or written")]
    Api(#[source] Box<kube::Error>),
    /// No answer in time.
    #[error("the leader lease was not answered in time")]
    Timeout,
    /// The CRDs are not this version's.
    #[error("leading is refused")]
    Probe(#[from] ProbeError),
    /// Another install has the cluster.
    #[error(
        "leading is refused: this is install {ours}, and the cluster belongs to {theirs} (last leader {holder}), by annotation \
         {RELEASE_ANNOTATION} of Lease {LEADER_NAMESPACE}/{LEADER_LEASE}: uninstall this one; or, if that one is gone for good: \
         kubectl -n {LEADER_NAMESPACE} annotate lease {LEADER_LEASE} {RELEASE_ANNOTATION}-"
    )]
    OtherInstall {
        /// This one.
        ours: String,
        /// The other one.
        theirs: String,
        /// Who led there.
        holder: String,
    },
}

impl LeaderError {
    fn variant(&self) -> &'static str {
        match self {
            LeaderError::Api(_) => "Api",
            LeaderError::Timeout => "Timeout",
            LeaderError::Probe(_) => "Probe",
            LeaderError::OtherInstall { .. } => "OtherInstall",
        }
    }

    /// Whether this process won't lead until someone has done something about it.
    fn stands(&self) -> bool {
        match self {
            LeaderError::Api(_) | LeaderError::Timeout => false,
            LeaderError::Probe(error) => error.stands(),
            LeaderError::OtherInstall { .. } => true,
        }
    }
}

/// The election of one process.
pub(crate) struct Election {
    pub(crate) host: Arc<dyn Host>,
    pub(crate) client: Client,
    pub(crate) holder: String,
    /// Which install this is.
    pub(crate) release: String,
    /// Where events about this pod go.
    pub(crate) namespace: String,
    pub(crate) pod: Pod,
    pub(crate) timing: LeaseTiming,
    pub(crate) leadership: Arc<Leadership>,
    pub(crate) metrics: Arc<Metrics>,
}

impl Election {
    /// Runs until `stop` says true, then gives the Lease back. `leads` says the term while this process leads.
    pub(crate) async fn run(self, leads: watch::Sender<Option<i64>>, mut stop: watch::Receiver<bool>) {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), LEADER_NAMESPACE);
        let mut seen: Option<(String, Millis)> = None;
        let mut probed = false;
        let mut last_error: Option<String> = None;
        while !*stop.borrow() {
            let outcome = self.turn(&api, &mut seen, &mut probed).await;
            match &outcome {
                Ok(()) => {
                    last_error = None;
                    self.metrics.set_refusal(None);
                }
                Err(error) => {
                    self.metrics
                        .errors
                        .with_label_values(&["leader", error.variant()])
                        .inc();
                    let text = crate::error_text(error);
                    if error.stands() {
                        self.metrics.set_refusal(Some(text.clone()));
                    }
                    if last_error.as_ref() != Some(&text) {
                        tracing::error!(error = text, "no leadership");
                        if error.stands() {
                            self.tell(&text).await;
                        }
                        last_error = Some(text);
                    }
                }
            }
            let term = self.leadership.term(self.host.mono());
            self.metrics.leader.set(i64::from(term.is_some()));
            if *leads.borrow() != term {
                if let Some(term) = term {
                    self.metrics.term.set(term);
                    tracing::info!(term, holder = self.holder, "leading");
                } else {
                    tracing::warn!(holder = self.holder, "leading no more");
                }
                leads.send_replace(term);
            }
            let pause = Duration::from_millis(self.timing.leader_renew().0);
            tokio::select! {
                biased;
                _ = stop.changed() => {}
                () = self.host.sleep(pause) => {}
            }
        }
        leads.send_replace(None);
        self.leadership.drop_now();
        self.release(&api).await;
    }

    async fn turn(
        &self,
        api: &Api<Lease>,
        seen: &mut Option<(String, Millis)>,
        probed: &mut bool,
    ) -> Result<(), LeaderError> {
        // Also by who only waits: a release whose pods could never lead must not replace one that does.
        self.probe(probed).await?;
        let found = self.call(api.get_opt(LEADER_LEASE)).await?;
        let now = self.host.mono();
        let Some(lease) = found else {
            let sent = self.host.mono();
            let new = self.written(None);
            let made = self.call(api.create(&post_params(), &new)).await?;
            self.won(sent, &made);
            return Ok(());
        };
        let mark = lease.resource_version().unwrap_or_default();
        let since = match seen {
            Some((old, since)) if *old == mark => *since,
            _ => now,
        };
        *seen = Some((mark, since));
        let holder = lease.spec.as_ref().and_then(|s| s.holder_identity.as_deref());
        let theirs = lease.annotations().get(RELEASE_ANNOTATION);
        if let Some(theirs) = theirs.filter(|theirs| **theirs != self.release) {
            self.leadership.drop_now();
            return Err(LeaderError::OtherInstall {
                ours: self.release.clone(),
                theirs: theirs.clone(),
                holder: holder.unwrap_or("none").to_owned(),
            });
        }
        match act(
            holder,
            &self.holder,
            Millis(now.0.saturating_sub(since.0)),
            self.timing,
        ) {
            Act::Wait => {
                self.leadership.drop_now();
                Ok(())
            }
            Act::Renew | Act::Take => {
                let sent = self.host.mono();
                let new = self.written(Some(&lease));
                let made = self.call(api.replace(LEADER_LEASE, &post_params(), &new)).await?;
                *seen = made.resource_version().map(|mark| (mark, sent));
                self.won(sent, &made);
                Ok(())
            }
        }
    }

    async fn probe(&self, probed: &mut bool) -> Result<(), LeaderError> {
        if !*probed {
            let outcome = probe::crds(&self.client).await;
            self.metrics.refused.set(i64::from(outcome.is_err()));
            outcome?;
            *probed = true;
        }
        Ok(())
    }

    /// An Event about this pod: that is where people look who see it unready.
    async fn tell(&self, why: &str) {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let event = events::refusal(&self.namespace, &self.pod, why, &self.holder, self.host.wall());
        if let Err(error) = self.call(api.create(&post_params(), &event)).await {
            tracing::warn!(error = crate::error_text(&error), "an event was not told");
        }
    }

    /// How long writing is allowed counts from before the lease was asked for.
    fn won(&self, sent: Millis, lease: &Lease) {
        let term = lease.spec.as_ref().and_then(|s| s.lease_transitions).unwrap_or(0);
        self.leadership
            .hold(Millis(sent.0 + self.timing.leader_writes().0), term.into());
    }

    /// The Lease as this process writes it; a new holder is a new transition.
    fn written(&self, old: Option<&Lease>) -> Lease {
        let spec = old.and_then(|l| l.spec.clone()).unwrap_or_default();
        let ours = spec.holder_identity.as_deref() == Some(self.holder.as_str());
        let now = MicroTime(self.host.wall());
        let seconds = i32::try_from(self.timing.leader_lease().0.div_ceil(1000)).unwrap_or(8);
        Lease {
            metadata: ObjectMeta {
                name: Some(LEADER_LEASE.into()),
                namespace: Some(LEADER_NAMESPACE.into()),
                annotations: Some(BTreeMap::from([(
                    RELEASE_ANNOTATION.into(),
                    self.release.clone(),
                )])),
                resource_version: old.and_then(kube::ResourceExt::resource_version),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.holder.clone()),
                lease_duration_seconds: Some(seconds),
                acquire_time: if ours {
                    spec.acquire_time
                } else {
                    Some(now.clone())
                },
                renew_time: Some(now),
                lease_transitions: Some(spec.lease_transitions.unwrap_or(0) + i32::from(!ours)),
                ..LeaseSpec::default()
            }),
        }
    }

    async fn release(&self, api: &Api<Lease>) {
        let Ok(Some(mut lease)) = self.call(api.get_opt(LEADER_LEASE)).await else {
            return;
        };
        let Some(spec) = lease
            .spec
            .as_mut()
            .filter(|s| s.holder_identity.as_deref() == Some(self.holder.as_str()))
        else {
            return;
        };
        spec.holder_identity = None;
        spec.renew_time = Some(MicroTime(self.host.wall()));
        lease.metadata.managed_fields = None;
        match self.call(api.replace(LEADER_LEASE, &post_params(), &lease)).await {
            Ok(_) => tracing::info!("leadership released"),
            Err(error) => tracing::warn!(
                error = crate::error_text(&error),
                "leadership could not be released"
            ),
        }
    }

    async fn call<T>(&self, call: impl Future<Output = kube::Result<T>> + Send) -> Result<T, LeaderError> {
        let limit = Duration::from_millis((self.timing.leader_lease().0 / 2).max(500));
        let answer = within(&*self.host, limit, call).await;
        let refused = |error: &kube::Error| matches!(error, kube::Error::Api(status) if status.code < 500);
        let answered = answer
            .as_ref()
            .is_some_and(|answer| answer.as_ref().err().is_none_or(refused));
        self.leadership.heard(answered);
        match answer {
            Some(answer) => answer.map_err(|e| LeaderError::Api(Box::new(e))),
            None => Err(LeaderError::Timeout),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_taken_only_when_free_or_seen_unchanged_for_longer_than_it_is() {
        let t = LeaseTiming::default();
        assert_eq!(act(Some("me"), "me", Millis(0), t), Act::Renew);
        assert_eq!(act(Some("me"), "me", Millis(99_000), t), Act::Renew);
        assert_eq!(act(None, "me", Millis(0), t), Act::Take);
        assert_eq!(act(Some("you"), "me", Millis(9_000), t), Act::Wait);
        assert_eq!(act(Some("you"), "me", Millis(9_001), t), Act::Take);
    }
}
