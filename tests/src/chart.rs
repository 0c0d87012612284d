//! GoGrid's own chart, as helm renders it and as it holds on a control plane.
//!
//! Owns: rendering, installing, and knowing when the chart's admission policies are in force. Must not: repeat what
//! the templates say; tests read that out of the rendered objects.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use http::HeaderName;
use kube::api::{Api, DynamicObject, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::controlplane::{Binaries, ControlPlane, apply_yaml_documents};
use crate::wait::eventually;

/// Release name that tests install under; the service accounts are `gogrid-operator` and `gogrid-agent` then.
pub const RELEASE: &str = "gogrid";
/// The operator's service account in an install by [`install`].
pub const OPERATOR: &str = "gogrid-operator";
/// The agents' service account in an install by [`install`].
pub const AGENT: &str = "gogrid-agent";
/// A user who may do everything by RBAC, yet is in no group that admission exempts.
pub const INTRUDER: &str = "gogrid-intruder";

/// The oldest Kubernetes that the chart supports; without a cluster, helm believes in one of its own making.
pub const KUBE_VERSION: &str = "--kube-version=1.32.0";

const ACTIVE_WITHIN: Duration = Duration::from_secs(60);

/// The chart's directory.
pub fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/gogrid")
}

/// Copies the chart to `to` and returns its files there.
pub fn copy(to: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    copy_folder(&dir(), to, &mut files)?;
    files.sort();
    Ok(files)
}

/// Version of [`next`].
pub const NEXT: &str = "0.2.0";

/// Copies the chart to `to` as its next minor version could be: it asks for images of its own, and a job has a field more.
pub fn next(to: &Path) -> Result<()> {
    copy(to)?;
    let about = to.join("Chart.yaml");
    let text = std::fs::read_to_string(&about)?;
    std::fs::write(about, text.replace(env!("CARGO_PKG_VERSION"), NEXT))?;
    let crd = to.join("files/crds/inferencejobs.yaml");
    let mut definition: Value = serde_yaml::from_str(&std::fs::read_to_string(&crd)?)?;
    let spec = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let fields = definition.pointer_mut(spec).context("the CRD has no spec")?;
    fields["later"] = json!({"type": "string", "maxLength": 64});
    std::fs::write(crd, serde_yaml::to_string(&definition)?)?;
    Ok(())
}

fn copy_folder(from: &Path, to: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target, files)?;
        } else {
            std::fs::copy(entry.path(), &target)?;
            files.push(target);
        }
    }
    Ok(())
}

/// `helm template` of the chart with `values`, for namespace `gogrid-system`.
pub async fn render(values: &Value) -> Result<String> {
    render_as(RELEASE, "gogrid-system", values).await
}

/// The objects of [`render`], rendered once per process however often they are asked for.
pub async fn rendered(values: &Value) -> Result<Arc<Vec<Value>>> {
    static SEEN: Mutex<BTreeMap<String, Arc<Vec<Value>>>> = Mutex::new(BTreeMap::new());
    let key = values.to_string();
    let seen = |key: &str| {
        SEEN.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned()
    };
    if let Some(documents) = seen(&key) {
        return Ok(documents);
    }
    let fresh = Arc::new(documents(&render(values).await?)?);
    SEEN.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(key, Arc::clone(&fresh));
    Ok(fresh)
}

/// `helm template` of the chart as release `name` in `namespace`, without what `helm test` adds for a moment.
pub async fn render_as(name: &str, namespace: &str, values: &Value) -> Result<String> {
    template(name, namespace, values, &[KUBE_VERSION, "--skip-tests"]).await
}

/// What `helm test` adds to release `name` in `namespace`.
pub async fn render_test(name: &str, namespace: &str, values: &Value) -> Result<String> {
    let only = "--show-only=templates/tests/trial.yaml";
    template(name, namespace, values, &[KUBE_VERSION, only]).await
}

/// `helm template` of the chart as it is, for a cluster of that Kubernetes version.
pub async fn render_for(version: &str) -> Result<String> {
    let version = format!("--kube-version={version}");
    template(RELEASE, "gogrid-system", &json!({}), &[&version]).await
}

async fn template(name: &str, namespace: &str, values: &Value, more: &[&str]) -> Result<String> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(values.to_string().as_bytes())?;
    let (chart, file) = (dir().display().to_string(), file.path().display().to_string());
    let fixed = [
        "template",
        name,
        &chart,
        "--namespace",
        namespace,
        "--values",
        &file,
    ];
    let args: Vec<&std::ffi::OsStr> = fixed.iter().chain(more).map(std::ffi::OsStr::new).collect();
    helm(&args).await
}

/// Runs helm without any cluster, reading and writing nothing of the user's home, and returns its standard output.
pub async fn helm(args: &[&std::ffi::OsStr]) -> Result<String> {
    let home = tempfile::tempdir()?;
    let ended = Command::new(Binaries::find().await?.helm())
        .args(args)
        .env("HOME", home.path())
        .env("KUBECONFIG", home.path().join("none"))
        .env("HELM_CACHE_HOME", home.path().join("cache"))
        .env("HELM_CONFIG_HOME", home.path().join("config"))
        .env("HELM_DATA_HOME", home.path().join("data"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .context("running helm")?;
    ensure!(
        ended.status.success(),
        "helm {}: {}{}",
        ended.status,
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr)
    );
    Ok(String::from_utf8(ended.stdout)?)
}

/// The documents of rendered YAML, empty ones left out.
pub fn documents(yaml: &str) -> Result<Vec<Value>> {
    use serde::Deserialize as _;
    let mut found = Vec::new();
    for document in serde_yaml::Deserializer::from_str(yaml) {
        let value = Value::deserialize(document)?;
        if !value.is_null() {
            found.push(value);
        }
    }
    Ok(found)
}

/// Applies the rendered chart in `namespace`, which is made when absent, and waits until both admission bindings refuse
/// what they must. Makes [`INTRUDER`] on the way.
pub async fn install(control_plane: &ControlPlane, namespace: &str, values: &Value) -> Result<()> {
    control_plane.ensure_namespace(namespace).await?;
    let client = control_plane.admin_client().await?;
    apply_yaml_documents(&client, &render_as(RELEASE, namespace, values).await?).await?;
    apply_yaml_documents(&client, &intruder_binding().to_string()).await?;
    until_confinement_is(control_plane, namespace, true).await?;
    let intruder = client_as(control_plane, INTRUDER, &[]).await?;
    until_refused("the one-writer binding to be active", || try_gpu_node(&intruder)).await
}

/// What [`admit_node`] calls the kubeconfig of that node's agent.
pub(crate) fn agent_kubeconfig_name(node: &str) -> String {
    format!("agent-{node}")
}

/// Makes a node with these labels and what its agent needs: a pod on it, a token bound to that and a kubeconfig.
pub async fn admit_node(
    control_plane: &ControlPlane,
    namespace: &str,
    node: &str,
    labels: &[(&str, &str)],
) -> Result<PathBuf> {
    control_plane.create_node_with(node, labels, &[]).await?;
    let pod = control_plane.create_agent_pod(node, namespace, AGENT).await?;
    let token = control_plane
        .token_bound_to_pod(namespace, AGENT, &pod.name_any())
        .await?;
    control_plane.kubeconfig_for_token_file(&agent_kubeconfig_name(node), &token)
}

/// Waits until the confinement of agents to their nodes is in force (`active`) or no longer.
pub async fn until_confinement_is(control_plane: &ControlPlane, namespace: &str, active: bool) -> Result<()> {
    let unbound = control_plane
        .client_for_token(&control_plane.token_for_sa(namespace, AGENT).await?)
        .await?;
    if active {
        return until_refused("the confinement binding to be active", || try_gpu_node(&unbound)).await;
    }
    eventually(ACTIVE_WITHIN, "the confinement binding to be gone", || async {
        try_gpu_node(&unbound).await.map_err(Into::into)
    })
    .await
}

/// A client that acts as `user` in `groups`, by the admin's right to impersonate.
pub async fn client_as(control_plane: &ControlPlane, user: &str, groups: &[&str]) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(control_plane.admin_kubeconfig())?;
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    // As headers: kube reads the kubeconfig's own words for this and then ignores them.
    let named = |name: &'static str, value: &str| {
        Ok::<_, http::header::InvalidHeaderValue>((HeaderName::from_static(name), value.parse()?))
    };
    config.headers.push(named("impersonate-user", user)?);
    for group in groups {
        config.headers.push(named("impersonate-group", group)?);
    }
    Ok(Client::try_from(config)?)
}

/// Whether admission, and not RBAC or anything else, refused the request.
pub fn refused_by_policy(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.message.contains("ValidatingAdmissionPolicy"))
}

async fn until_refused<F, Fut>(what: &str, attempt: F) -> Result<()>
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<(), kube::Error>>,
{
    eventually(ACTIVE_WITHIN, what, || async {
        match attempt().await {
            Err(error) if refused_by_policy(&error) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(()) => Err(anyhow!("a write that must be refused went through")),
        }
    })
    .await
}

async fn try_gpu_node(client: &Client) -> Result<(), kube::Error> {
    let kind = kube::api::ApiResource::erase::<gogrid_api::GpuNode>(&());
    let object: DynamicObject = serde_json::from_value(json!({
        "apiVersion": kind.api_version, "kind": kind.kind,
        "metadata": {"name": "nobody"}, "spec": {"nodeName": "nobody"},
    }))
    .map_err(kube::Error::SerdeError)?;
    let parameters = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    Api::<DynamicObject>::all_with(client.clone(), &kind)
        .create(&parameters, &object)
        .await
        .map(drop)
}

fn intruder_binding() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": INTRUDER},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": INTRUDER}],
    })
}
