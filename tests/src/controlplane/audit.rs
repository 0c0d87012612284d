//! Who asked for what and when, from the API server's audit log.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::Deserialize;

use super::ControlPlane;

/// Where a service account's token says which one it is.
const CREDENTIAL: &str = "authentication.kubernetes.io/credential-id";
/// Where one that is bound to a pod says which node that is on.
const NODE: &str = "authentication.kubernetes.io/node-name";
/// What the names of GoGrid's service accounts begin with.
pub const OURS: &str = "system:serviceaccount:gogrid-system:";
const READS: [&str; 3] = ["get", "list", "watch"];

/// One finished request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEvent {
    /// When the API server got it.
    pub received: Timestamp,
    /// When the API server answered.
    pub at: Timestamp,
    /// The user's full name, such as `system:serviceaccount:<namespace>:<name>`.
    pub user: String,
    /// Which token of that user's it came with; empty for tokens that carry no such mark.
    pub credential: String,
    /// Node of the pod that the token is bound to; empty for other tokens.
    pub node: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete` or `deletecollection`.
    pub verb: String,
    /// API group; empty for the core group.
    pub group: String,
    /// Plural resource name.
    pub resource: String,
    /// Such as `status`; empty for the object itself.
    pub subresource: String,
    /// Empty for what belongs to the whole cluster.
    pub namespace: String,
    /// Empty where the request did not name the object.
    pub name: String,
    /// HTTP status of the answer.
    pub code: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    request_received_timestamp: Timestamp,
    stage_timestamp: Timestamp,
    stage: String,
    verb: String,
    user: User,
    object_ref: Option<ObjectRef>,
    response_status: Option<ResponseStatus>,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
    #[serde(default)]
    extra: BTreeMap<String, Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ObjectRef {
    api_group: String,
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[derive(Deserialize)]
struct ResponseStatus {
    #[serde(default)]
    code: u16,
}

impl AuditEvent {
    /// The finished request that a line of the log tells of, if it does.
    fn parse(line: &str) -> Result<Option<Self>> {
        let line: Line = serde_json::from_str(line).with_context(|| format!("audit log line {line:?}"))?;
        if line.stage != "ResponseComplete" {
            return Ok(None);
        }
        let object = line.object_ref.unwrap_or_default();
        let mut extra = line.user.extra;
        let mut marked = |key| extra.remove(key).and_then(|all| all.into_iter().next());
        Ok(Some(Self {
            received: line.request_received_timestamp,
            at: line.stage_timestamp,
            credential: marked(CREDENTIAL).unwrap_or_default(),
            node: marked(NODE).unwrap_or_default(),
            user: line.user.username,
            verb: line.verb,
            group: object.api_group,
            resource: object.resource,
            subresource: object.subresource,
            namespace: object.namespace,
            name: object.name,
            code: line.response_status.map_or(0, |status| status.code),
        }))
    }

    /// Whether it could change anything.
    pub fn writes(&self) -> bool {
        !READS.contains(&self.verb.as_str())
    }
}

/// A growing audit log, read as it grows.
pub struct AuditTail {
    log: File,
    /// The beginning of a line whose end is yet to be written.
    half: Vec<u8>,
}

impl AuditTail {
    /// Hands over what was finished since the last call. Blocks for as long as reading takes.
    pub fn more(&mut self, mut take: impl FnMut(AuditEvent)) -> Result<()> {
        let mut piece = vec![0; 1 << 20];
        loop {
            let count = self.log.read(&mut piece)?;
            if count == 0 {
                return Ok(());
            }
            self.half
                .extend_from_slice(piece.get(..count).unwrap_or_default());
            let Some(end) = self.half.iter().rposition(|byte| *byte == b'\n') else {
                continue;
            };
            let rest = self.half.split_off(end + 1);
            let whole = std::mem::replace(&mut self.half, rest);
            for line in std::str::from_utf8(&whole)?.lines() {
                if let Some(event) = AuditEvent::parse(line)? {
                    take(event);
                }
            }
        }
    }
}

impl ControlPlane {
    /// The writes that the API server answered from `since` up to, not including, `until`, refused ones too, in the
    /// log's order. A write is in the log before its sender has the answer.
    pub fn audit_writes(&self, since: Timestamp, until: Timestamp) -> Result<Vec<AuditEvent>> {
        let mut writes = self.audit_requests(since, until)?;
        writes.retain(AuditEvent::writes);
        Ok(writes)
    }

    /// As [`Self::audit_writes`], with what GoGrid's service accounts read; a watch is there once it has ended.
    pub fn audit_requests(&self, since: Timestamp, until: Timestamp) -> Result<Vec<AuditEvent>> {
        let path = self.layout.audit_log();
        let log = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        // The last line may be half written; only what ends in a newline is whole.
        let whole = log.rsplit_once('\n').map_or("", |(whole, _rest)| whole);
        let mut events = Vec::new();
        for line in whole.lines() {
            let event = AuditEvent::parse(line)?;
            events.extend(event.filter(|event| event.at >= since && event.at < until));
        }
        Ok(events)
    }

    /// Follows the log from its beginning, holding none of it.
    pub fn audit_tail(&self) -> Result<AuditTail> {
        let path = self.layout.audit_log();
        let log = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        Ok(AuditTail { log, half: vec![] })
    }

    /// As [`Self::audit_writes`], only those that the API server took, by GoGrid's own accounts.
    pub fn audit_accepted(&self, since: Timestamp, until: Timestamp) -> Result<Vec<AuditEvent>> {
        let mut writes = self.audit_writes(since, until)?;
        writes.retain(|event| event.user.starts_with(OURS) && event.code < 300);
        Ok(writes)
    }

    /// Now, by the clock that also stamps the audit log.
    pub fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}
