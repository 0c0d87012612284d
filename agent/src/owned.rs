//! Whose the cluster is.
//!
//! Owns: the look at the leader Lease before an agent publishes anything: a node that two installs report and use would be
//! promised twice. Must not: decide who leads.

use crate::metrics::Metrics;
use gogrid_api::names::{LEADER_LEASE, LEADER_NAMESPACE, RELEASE_ANNOTATION};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::Api;
use kube::{Client, ResourceExt as _};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Why an agent of install `ours` must not begin, if that Lease gives the cluster to another one.
fn refusal(lease: Option<&Lease>, ours: &str) -> Option<String> {
    let theirs = lease?
        .annotations()
        .get(RELEASE_ANNOTATION)
        .filter(|theirs| *theirs != ours)?;
    Some(format!(
        "this agent is of install {ours}, and the cluster belongs to {theirs}, by annotation {RELEASE_ANNOTATION} of Lease \
         {LEADER_NAMESPACE}/{LEADER_LEASE}: uninstall this one; or, if that one is gone for good: \
         kubectl -n {LEADER_NAMESPACE} annotate lease {LEADER_LEASE} {RELEASE_ANNOTATION}-"
    ))
}

/// Waits until the cluster belongs to this install or to none; false when the agent is told to end before.
pub(crate) async fn until_ours(client: Client, release: &str, metrics: &Metrics) -> std::io::Result<bool> {
    let leaders: Api<Lease> = Api::namespaced(client, LEADER_NAMESPACE);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut last = None;
    loop {
        let hindrance = match leaders.get_opt(LEADER_LEASE).await {
            Ok(lease) => refusal(lease.as_ref(), release),
            Err(error) => Some(format!("the leader lease can't be read: {error}")),
        };
        metrics.set_hindrance(hindrance.clone());
        let Some(why) = hindrance else {
            return Ok(true);
        };
        if last.as_ref() != Some(&why) {
            tracing::error!(error = why, "the agent does not begin");
            last = Some(why);
        }
        tokio::select! {
            _ = terminate.recv() => return Ok(false),
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_a_lease_that_names_another_install_keeps_an_agent_from_beginning() {
        let lease = |annotations: serde_json::Value| -> Lease {
            serde_json::from_value(json!({"metadata": {"annotations": annotations}})).unwrap()
        };
        assert_eq!(refusal(None, "a/gogrid"), None);
        assert_eq!(refusal(Some(&lease(json!({}))), "a/gogrid"), None);
        let ours = lease(json!({"gogrid.dev/release": "a/gogrid"}));
        assert_eq!(refusal(Some(&ours), "a/gogrid"), None);
        let said = refusal(Some(&ours), "b/two").unwrap();
        assert!(said.contains("a/gogrid") && said.contains("b/two"), "{said}");
    }
}
