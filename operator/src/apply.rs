//! Steps become calls.
//!
//! Owns: how each operation is written to the API server (field manager, preconditions). Must not: decide which
//! operation comes next, nor try one again; the next round does.

use crate::clock::Host;
use crate::events::{self, Told};
use crate::inputs;
use crate::observe::{LeaseInfo, lease_info};
use crate::publish;
use gogrid_api::assignment::{JobReference, StagedInput, Stop};
use gogrid_api::names::{INPUT_KEY, JOB_UID_LABEL, OPERATOR_MANAGER, ROLE_LABEL};
use gogrid_api::{
    Assignment, InferenceJob, InferenceJobStatus, ResourceProfile, ResourceProfileStatus, names,
};
use gogrid_planner::lifecycle::{Publication, Refusal};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;

/// One call or a few that belong together.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// The whole new status of a job, and what it tells.
    WriteStatus(Box<InferenceJobStatus>),
    /// Fails unless a silent node's Lease is still as it was seen (`None`: absent). Asked of the store itself: a cache or
    /// a watch may be behind.
    EnsureSilent {
        /// Its name.
        lease: String,
        /// Its version as last seen.
        mark: Option<String>,
    },
    /// Go on only if there is really no such order: this process may not have seen it yet.
    EnsureAbsent(String),
    /// Take the input down for the order, or into ConfigMaps where it is long.
    Stage,
    /// Order an agent.
    Create(Box<Assignment>),
    /// The same, for a status written earlier: only if that status still stands.
    CreateIfStill(Box<Assignment>),
    /// Order an agent to stop.
    Stop(Box<Assignment>, Stop),
    /// Merge and hand over.
    Publish(Vec<Assignment>, i64),
    /// Remove an order.
    DeleteAssignment(Box<Assignment>),
    /// Remove the ConfigMaps in which a job uid's input was staged.
    DeleteInputs(String),
    /// Remove the job.
    DeleteJob,
}

/// What was learned by doing it.
#[derive(Clone, Debug)]
pub(crate) enum Fact {
    Job(Box<InferenceJob>),
    Assignment(Box<Assignment>),
    AssignmentGone { name: String, uid: String },
    JobGone,
    Staged(Vec<StagedInput>),
    InputRefused(Refusal),
    Published(Publication),
    InputsGone,
    Silent,
}

/// A step failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StepError {
    /// Someone else wrote first: look again.
    #[error("the object changed in between")]
    Conflict(#[source] Box<kube::Error>),
    /// The server said no.
    #[error("the API server refused")]
    Refused(#[source] Box<kube::Error>),
    /// The server was not reached, or did not answer, or this process does not lead.
    #[error("the API server was not reached")]
    Unreachable(#[source] Box<kube::Error>),
    /// It took too long.
    #[error("the step took too long")]
    TimedOut,
    /// The order exists and is another one.
    #[error("assignment {0} exists with another content")]
    Taken(String),
    /// A node that was taken for silent has renewed its Lease.
    #[error("node lease {} was renewed: the watch is behind", .0.name)]
    NotSilent(Box<LeaseInfo>),
    /// An order that seemed to be gone is there.
    #[error("the order is there after all")]
    Present(Box<Assignment>),
    /// The status that the order is for has moved on.
    #[error("the job moved on")]
    MovedOn,
}

impl StepError {
    pub(crate) fn variant(&self) -> &'static str {
        match self {
            StepError::Conflict(_) => "Conflict",
            StepError::Refused(_) => "Refused",
            StepError::Unreachable(_) => "Unreachable",
            StepError::TimedOut => "TimedOut",
            StepError::Taken(_) => "Taken",
            StepError::NotSilent(_) => "NotSilent",
            StepError::Present(_) => "Present",
            StepError::MovedOn => "MovedOn",
        }
    }
}

impl StepError {
    /// What the API server has against the step, where trying again won't help by itself.
    pub(crate) fn objection(&self) -> Option<&str> {
        match self {
            StepError::Refused(error) => match &**error {
                kube::Error::Api(status) if matches!(status.code, 400 | 403 | 413 | 422) => {
                    Some(&status.message)
                }
                _ => None,
            },
            _ => None,
        }
    }
}

impl From<kube::Error> for StepError {
    fn from(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 409 => StepError::Conflict(Box::new(error)),
            kube::Error::Api(_) => StepError::Refused(Box::new(error)),
            _ => StepError::Unreachable(Box::new(error)),
        }
    }
}

/// The hand that writes.
#[derive(Clone)]
pub(crate) struct Executor {
    pub(crate) host: Arc<dyn Host>,
    pub(crate) client: Client,
    pub(crate) namespace: String,
    pub(crate) reporter: String,
    /// Whether a record counts once, whatever its epochs answered.
    pub(crate) one_answer: bool,
}

pub(crate) fn apply_params() -> PatchParams {
    PatchParams::apply(OPERATOR_MANAGER).force()
}

pub(crate) fn post_params() -> PostParams {
    PostParams {
        field_manager: Some(OPERATOR_MANAGER.into()),
        ..PostParams::default()
    }
}

/// 404 is the answer that was hoped for.
fn absent_is_fine<T>(answer: kube::Result<T>) -> Result<(), StepError> {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other.map(|_| ())?),
    }
}

impl Executor {
    fn jobs(&self, job: &InferenceJob) -> Api<InferenceJob> {
        Api::namespaced(self.client.clone(), &job.namespace().unwrap_or_default())
    }

    fn own<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + DeserializeOwned
            + Clone
            + Debug,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Fails unless the job is really gone: a cache may be behind.
    pub(crate) async fn ensure_gone(&self, job: &JobReference) -> Result<(), StepError> {
        let api: Api<InferenceJob> = Api::namespaced(self.client.clone(), &job.namespace);
        match api.get_metadata_opt(&job.name).await? {
            Some(there) if there.metadata.uid.as_ref() == Some(&job.uid) => Err(StepError::MovedOn),
            _ => Ok(()),
        }
    }

    /// Does one operation; those on a job itself need it.
    pub(crate) async fn run(&self, job: Option<&InferenceJob>, op: Op) -> Result<Fact, StepError> {
        let job = job.ok_or(StepError::MovedOn);
        match op {
            Op::WriteStatus(status) => self.write_status(job?, *status).await,
            Op::EnsureSilent { lease, mark } => self.ensure_silent(&lease, mark.as_deref()).await,
            Op::EnsureAbsent(name) => match self.own::<Assignment>().get_opt(&name).await? {
                Some(found) => Err(StepError::Present(Box::new(found))),
                None => Ok(Fact::Silent),
            },
            Op::Stage => self.stage(job?).await,
            Op::Create(assignment) => self.create(&assignment).await,
            Op::CreateIfStill(assignment) => self.create_if_still(job?, &assignment).await,
            Op::Stop(assignment, stop) => self.stop(&assignment, &stop).await,
            Op::Publish(runs, expected) => Ok(Fact::Published(
                publish::publish(self, job?, &runs, expected).await?,
            )),
            Op::DeleteAssignment(assignment) => {
                let api: Api<Assignment> = self.own();
                absent_is_fine(
                    api.delete(&assignment.name_any(), &exactly(&assignment.metadata))
                        .await,
                )?;
                Ok(Fact::AssignmentGone {
                    name: assignment.name_any(),
                    uid: assignment.uid().unwrap_or_default(),
                })
            }
            Op::DeleteInputs(uid) => self.delete_inputs(&uid).await,
            Op::DeleteJob => {
                let job = job?;
                absent_is_fine(
                    self.jobs(job)
                        .delete(&job.name_any(), &exactly(&job.metadata))
                        .await,
                )?;
                Ok(Fact::JobGone)
            }
        }
    }

    async fn write_status(&self, job: &InferenceJob, status: InferenceJobStatus) -> Result<Fact, StepError> {
        let told = events::between(job.status.as_ref(), &status);
        let patch = json!({
            "apiVersion": InferenceJob::api_version(&()),
            "kind": InferenceJob::kind(&()),
            "metadata": {"name": job.name_any(), "namespace": job.namespace(), "uid": job.uid(), "resourceVersion": job.resource_version()},
            "status": status,
        });
        let written = self
            .jobs(job)
            .patch_status(&job.name_any(), &apply_params(), &Patch::Apply(&patch))
            .await?;
        for told in told {
            self.tell(job, &told).await;
        }
        Ok(Fact::Job(Box::new(written)))
    }

    /// Tells an Event about a job. One that can't be told (a namespace on its way out) must not hold the job up.
    pub(crate) async fn tell(&self, job: &InferenceJob, told: &Told) {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &job.namespace().unwrap_or_default());
        let event = events::object(job, told, &self.reporter, self.host.wall());
        if let Err(error) = api.create(&post_params(), &event).await {
            tracing::warn!(
                error = crate::error_text(&error),
                reason = told.reason,
                "an event was not told"
            );
        }
    }

    async fn ensure_silent(&self, lease: &str, mark: Option<&str>) -> Result<Fact, StepError> {
        match self.own::<Lease>().get_opt(lease).await? {
            Some(found) if found.resource_version().as_deref() != mark => {
                Err(StepError::NotSilent(Box::new(lease_info(found))))
            }
            Some(_) | None => Ok(Fact::Silent),
        }
    }

    async fn stage(&self, job: &InferenceJob) -> Result<Fact, StepError> {
        let cut = match (&job.spec.input.inline, &job.spec.input.config_map_ref) {
            (Some(lines), _) => inputs::cut(lines.iter().map(String::as_str)),
            (None, Some(reference)) => {
                let api: Api<ConfigMap> =
                    Api::namespaced(self.client.clone(), &job.namespace().unwrap_or_default());
                match api.get_opt(&reference.name).await? {
                    None => Err(not_found(&format!(
                        "ConfigMap {} does not exist in this namespace",
                        reference.name
                    ))),
                    Some(map) => match text(&map, &reference.key) {
                        None => Err(not_found(&format!(
                            "ConfigMap {} has no text under key {}",
                            reference.name, reference.key
                        ))),
                        Some(text) => inputs::cut(text.lines()),
                    },
                }
            }
            (None, None) => inputs::cut(std::iter::empty()),
        };
        let parts = match cut {
            Ok(parts) => parts,
            Err(refusal) => return Ok(Fact::InputRefused(refusal)),
        };
        if let Some(carried) = inputs::inline(&parts) {
            return Ok(Fact::Staged(carried));
        }
        let uid = job.uid().unwrap_or_default();
        let mut staged = vec![];
        for (n, part) in parts.into_iter().enumerate() {
            let name = names::input_chunk(&uid, n);
            let object = json!({
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": name, "labels": {ROLE_LABEL: "input", JOB_UID_LABEL: uid}},
                "data": {INPUT_KEY: part.text},
            });
            self.stage_part(object).await?;
            staged.push(StagedInput {
                config_map: Some(name),
                text: None,
                first_line: part.first_line,
                records: part.records,
            });
        }
        Ok(Fact::Staged(staged))
    }

    /// Never over what another leader has staged meanwhile, perhaps of a later text: agents may be reading it.
    async fn stage_part(&self, object: serde_json::Value) -> Result<(), StepError> {
        let api: Api<ConfigMap> = self.own();
        let map: ConfigMap = serde_json::from_value(object.clone()).map_err(kube::Error::SerdeError)?;
        match api.create(&post_params(), &map).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            other => return Ok(other.map(|_| ())?),
        }
        let there = api.get(&map.name_any()).await?;
        if there.data != map.data || there.metadata.labels != map.metadata.labels {
            publish::overwrite(&api, &there, object).await?;
        }
        Ok(())
    }

    async fn create(&self, assignment: &Assignment) -> Result<Fact, StepError> {
        let api: Api<Assignment> = self.own();
        match api.create(&post_params(), assignment).await {
            Ok(made) => Ok(Fact::Assignment(Box::new(made))),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let there = api.get(&assignment.name_any()).await?;
                let (mine, theirs) = (&assignment.spec, &there.spec);
                let same = mine.job.uid == theirs.job.uid
                    && mine.epoch == theirs.epoch
                    && mine.node_name == theirs.node_name;
                if same {
                    Ok(Fact::Assignment(Box::new(there)))
                } else {
                    Err(StepError::Taken(there.name_any()))
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn create_if_still(&self, job: &InferenceJob, assignment: &Assignment) -> Result<Fact, StepError> {
        let now = self.jobs(job).get(&job.name_any()).await?;
        if now.uid() != job.uid()
            || now.resource_version() != job.resource_version()
            || now.metadata.deletion_timestamp.is_some()
        {
            return Err(StepError::MovedOn);
        }
        self.create(assignment).await
    }

    async fn stop(&self, assignment: &Assignment, stop: &Stop) -> Result<Fact, StepError> {
        let patch = json!({"metadata": {"uid": assignment.uid(), "resourceVersion": assignment.resource_version()}, "spec": {"stop": stop}});
        let params = PatchParams {
            field_manager: Some(OPERATOR_MANAGER.into()),
            ..PatchParams::default()
        };
        let written = self
            .own::<Assignment>()
            .patch(&assignment.name_any(), &params, &Patch::Merge(&patch))
            .await?;
        Ok(Fact::Assignment(Box::new(written)))
    }

    async fn delete_inputs(&self, uid: &str) -> Result<Fact, StepError> {
        let api: Api<ConfigMap> = self.own();
        let mine = ListParams::default().labels(&format!("{ROLE_LABEL}=input,{JOB_UID_LABEL}={uid}"));
        for map in api.list_metadata(&mine).await?.items {
            absent_is_fine(api.delete(&map.name_any(), &exactly(&map.metadata)).await)?;
        }
        Ok(Fact::InputsGone)
    }

    /// Uids of jobs that inputs are staged for.
    pub(crate) async fn staged_uids(&self) -> Result<BTreeSet<String>, StepError> {
        let api: Api<ConfigMap> = self.own();
        let all = api
            .list_metadata(&ListParams::default().labels(&format!("{ROLE_LABEL}=input")))
            .await?;
        Ok(all
            .items
            .into_iter()
            .filter_map(|m| m.labels().get(JOB_UID_LABEL).cloned())
            .collect())
    }

    /// All orders there are.
    pub(crate) async fn orders(&self) -> Result<Vec<Assignment>, StepError> {
        Ok(self.own::<Assignment>().list(&ListParams::default()).await?.items)
    }

    /// A profile's status.
    pub(crate) async fn write_profile(
        &self,
        profile: &ResourceProfile,
        status: &ResourceProfileStatus,
    ) -> Result<ResourceProfile, StepError> {
        let api: Api<ResourceProfile> = Api::all(self.client.clone());
        let patch = json!({
            "apiVersion": ResourceProfile::api_version(&()),
            "kind": ResourceProfile::kind(&()),
            "metadata": {"name": profile.name_any(), "uid": profile.uid(), "resourceVersion": profile.resource_version()},
            "status": status,
        });
        Ok(api
            .patch_status(&profile.name_any(), &apply_params(), &Patch::Apply(&patch))
            .await?)
    }

    /// Creates profiles that are absent; one that exists stays as it is.
    pub(crate) async fn create_absent_profiles(
        &self,
        profiles: Vec<ResourceProfile>,
    ) -> Result<(), StepError> {
        let api: Api<ResourceProfile> = Api::all(self.client.clone());
        for profile in profiles {
            if api.get_metadata_opt(&profile.name_any()).await?.is_some() {
                continue;
            }
            match api.create(&post_params(), &profile).await {
                Ok(_) => tracing::info!(profile = profile.name_any(), "preset created"),
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Text of the presets' ConfigMap, if there is one.
    pub(crate) async fn presets_text(&self) -> Result<Option<String>, StepError> {
        let map = self
            .own::<ConfigMap>()
            .get_opt(crate::presets::CONFIG_MAP)
            .await?;
        Ok(map.and_then(|m| text(&m, crate::presets::KEY)))
    }
}

fn not_found(message: &str) -> Refusal {
    Refusal {
        word: "InputNotFound",
        message: format!("{message}: create it, it is looked for again every few seconds"),
    }
}

/// A key's text, also where it was stored as bytes.
fn text(map: &ConfigMap, key: &str) -> Option<String> {
    let plain = map
        .data
        .as_ref()
        .and_then(|d: &BTreeMap<String, String>| d.get(key).cloned());
    plain.or_else(|| {
        map.binary_data
            .as_ref()?
            .get(key)
            .and_then(|b| String::from_utf8(b.0.clone()).ok())
    })
}

/// Delete exactly this version of this object.
fn exactly(metadata: &ObjectMeta) -> DeleteParams {
    let preconditions = Preconditions {
        uid: metadata.uid.clone(),
        resource_version: metadata.resource_version.clone(),
    };
    DeleteParams {
        preconditions: Some(preconditions),
        ..DeleteParams::background()
    }
}
