//! What changes beneath a running GoGrid: CRDs, versions, tokens, and a second install beside it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gogrid_api::names::{LEADER_LEASE, LEADER_NAMESPACE, RELEASE_ANNOTATION, node_lease};
use gogrid_api::{GpuNode, InferenceJob, condition};
use gogrid_tests::chart;
use gogrid_tests::cluster::{Cluster, ClusterOptions, NAMESPACE, on_runtime, tenths_of_lease};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, spec, succeeded};
use gogrid_tests::ports;
use gogrid_tests::wait::{eventually, throughout};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);
const SECOND: &str = "second";

async fn cluster() -> Result<Arc<Cluster>> {
    static SHARED: tokio::sync::OnceCell<Arc<Cluster>> = tokio::sync::OnceCell::const_new();
    let started = SHARED.get_or_try_init(|| async {
        let mut options = ClusterOptions::quick(2);
        for name in ["operator", SECOND, "node-2"] {
            // Fixed, so that a program that refuses can be asked why.
            options.metrics.insert(name.to_owned(), ports::fixed()?);
        }
        let control = ControlPlane::shared().await?;
        anyhow::Ok(Arc::new(Cluster::start(control, options).await?))
    });
    Ok(Arc::clone(started.await?))
}

/// Waits until a program says that it isn't ready, in these words among others.
async fn until_refusing(cluster: &Cluster, program: &str, words: &[&str]) -> Result<String> {
    eventually(LONG, &format!("{program} to say {words:?}"), || async {
        let said = cluster.hindrance(program).await?.context("it is ready")?;
        ensure!(words.iter().all(|word| said.contains(word)), "{said}");
        Ok(said)
    })
    .await
    .with_context(|| cluster.log_tails(20))
}

async fn until_ready(cluster: &Cluster, program: &str) -> Result<()> {
    eventually(LONG, &format!("{program} to be ready"), || async {
        let said = cluster.hindrance(program).await?;
        ensure!(said.is_none(), "{said:?}");
        Ok(())
    })
    .await
    .with_context(|| cluster.log_tails(20))
}

/// A job of that many records on that node; slow ones take 100 ms and more a record.
async fn submit(
    cluster: &Cluster,
    name: &str,
    node: &str,
    records: usize,
    slow: bool,
) -> Result<InferenceJob> {
    let mut spec = spec(&Questions::new(5, records).lines(), name)?;
    spec["placement"] = json!({"nodeSelector": {"kubernetes.io/hostname": node}});
    if slow {
        spec["profileName"] = json!("conservative");
    }
    cluster.create_job("default", name, spec).await
}

async fn until_succeeded(cluster: &Cluster, job: &InferenceJob) -> Result<InferenceJob> {
    let job = cluster.until_finished(job, LONG).await?;
    succeeded(&job)?;
    Ok(job)
}

fn leader_leases(cluster: &Cluster) -> Api<Lease> {
    Api::namespaced(cluster.client.clone(), LEADER_NAMESPACE)
}

#[test]
fn crds_that_are_missing_or_older_keep_an_operator_from_leading_until_they_are_updated() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let crds: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
        let name = "gpunodes.gogrid.dev";
        let mut good = crds.get(name).await?;
        good.status = None;
        good.metadata.resource_version = None;
        good.metadata.uid = None;
        good.metadata.managed_fields = None;
        cluster.process("operator")?.stop(LONG);
        crds.delete(name, &DeleteParams::default()).await?;
        cluster.start_operator(&[])?;
        let missing = until_refusing(&cluster, "operator", &[name, "is not installed"]).await?;
        ensure!(missing.contains("kubectl apply"), "{missing}");

        let mut older = serde_json::to_value(&good)?;
        let fields = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties";
        let fields = older.pointer_mut(fields).and_then(Value::as_object_mut);
        fields
            .context("no fields")?
            .remove("heartbeat")
            .context("no such field")?;
        let make = async |crd: Value| {
            let crd: CustomResourceDefinition = serde_json::from_value(crd)?;
            anyhow::Ok(crds.create(&PostParams::default(), &crd).await?)
        };
        eventually(LONG, "the CRD to be gone", || async {
            make(older.clone()).await.map(drop)
        })
        .await?;
        let lacks = "lacks the field status.heartbeat";
        let said = until_refusing(&cluster, "operator", &[name, lacks]).await?;
        println!("{said}");
        let events: Api<Event> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        eventually(LONG, "an event about the pod", || async {
            let all = events.list(&ListParams::default()).await?.items;
            let told = all.iter().any(|event| {
                let about = event.regarding.clone().unwrap_or_default();
                event.reason.as_deref() == Some("LeadershipRefused")
                    && event.note.as_deref().is_some_and(|note| note.contains(lacks))
                    && (about.kind.as_deref(), about.name.as_deref())
                        == (Some("Pod"), Some("gogrid-operator"))
            });
            ensure!(told, "{} events, none of them", all.len());
            Ok(())
        })
        .await?;

        let versions = serde_json::to_value(&good.spec.versions)?;
        let updated = Patch::Merge(json!({"spec": {"versions": versions}}));
        crds.patch(name, &PatchParams::default(), &updated).await?;
        until_ready(&cluster, "operator").await?;
        for node in ["node-1", "node-2"] {
            cluster.until_node_ready(node).await?;
            let job = submit(&cluster, &format!("updated-{node}"), node, 3, false).await?;
            until_succeeded(&cluster, &job).await?;
        }
        Ok(())
    })
}

#[test]
fn a_second_install_refuses_to_lead_and_to_use_nodes_until_the_first_is_given_up() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        until_ready(&cluster, "operator").await?;
        let leases = leader_leases(&cluster);
        cluster.start_operator_as(SECOND, &["--release=other/two"])?;
        let belongs = [
            "other/two",
            "the cluster belongs to gogrid-system",
            "annotate lease",
        ];
        until_refusing(&cluster, SECOND, &belongs).await?;

        let nodes: Api<GpuNode> = Api::all(cluster.client.clone());
        let session = async || anyhow::Ok(nodes.get("node-2").await?.status.unwrap_or_default().session);
        cluster.process("node-2")?.stop(LONG);
        let before = session().await?;
        let agent = cluster.start_agent_with("node-2", &["--release=other/two"])?;
        until_refusing(&cluster, "node-2", &belongs).await?;

        // Also while nobody holds the Lease: between two leaders of the first install it must not slip in.
        cluster.process("operator")?.stop(LONG);
        throughout(tenths_of_lease(20), "nobody leads", || async {
            let holder = leases
                .get(LEADER_LEASE)
                .await?
                .spec
                .and_then(|s| s.holder_identity);
            ensure!(holder.is_none(), "{holder:?} leads");
            ensure!(
                cluster.hindrance("node-2").await?.is_some(),
                "the second install's agent began"
            );
            Ok(())
        })
        .await?;
        ensure!(
            session().await? == before,
            "an agent of the second install wrote the GpuNode"
        );
        // Told to end, it ends at once.
        agent.stop(Duration::from_secs(5));
        cluster.start_operator(&[])?;
        cluster.start_agent("node-2")?;
        until_ready(&cluster, "operator").await?;
        until_refusing(&cluster, SECOND, &belongs).await?;

        cluster.process("operator")?.stop(LONG);
        let unclaimed = Patch::Merge(json!({"metadata": {"annotations": {RELEASE_ANNOTATION: null}}}));
        leases
            .patch(LEADER_LEASE, &PatchParams::default(), &unclaimed)
            .await?;
        until_ready(&cluster, SECOND).await?;
        let owner = leases
            .get(LEADER_LEASE)
            .await?
            .annotations()
            .get(RELEASE_ANNOTATION)
            .cloned();
        ensure!(owner.as_deref() == Some("other/two"), "{owner:?}");
        cluster.process(SECOND)?.stop(LONG);
        leases
            .patch(LEADER_LEASE, &PatchParams::default(), &unclaimed)
            .await?;
        cluster.start_operator(&[])?;
        until_ready(&cluster, "operator").await?;
        cluster.until_node_ready("node-2").await
    })
}

#[test]
fn agents_one_version_apart_get_work_in_both_directions_and_one_that_is_two_apart_is_named() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let restart = async |node: &str, version: &[&str]| {
            cluster.process(node)?.stop(LONG);
            cluster.start_agent_with(node, version)?;
            let wanted = version
                .first()
                .and_then(|flag| flag.split_once('='))
                .map(|(_, version)| version);
            let nodes: Api<GpuNode> = Api::all(cluster.client.clone());
            eventually(LONG, &format!("{node} to report its version"), || async {
                let found = nodes.get(node).await?.status.unwrap_or_default();
                let ready = condition::is_true(&found.conditions, "Ready");
                let version = found.agent_version;
                ensure!(
                    ready && wanted.is_none_or(|wanted| version == wanted),
                    "{version}, ready: {ready}"
                );
                Ok(())
            })
            .await
        };
        // The operator is 0.1.0.
        restart("node-1", &["--reported-version=0.0.9"]).await?;
        restart("node-2", &["--reported-version=0.2.3"]).await?;
        for node in ["node-1", "node-2"] {
            let job = submit(&cluster, &format!("apart-{node}"), node, 3, false).await?;
            until_succeeded(&cluster, &job).await?;
        }
        restart("node-2", &["--reported-version=0.3.0"]).await?;
        let job = submit(&cluster, "too-far", "node-2", 3, false).await?;
        let job = cluster.until_reason(&job, "Placed", "VersionSkew", LONG).await?;
        let status = job.status.clone().unwrap_or_default();
        let placed = condition::find(&status.conditions, "Placed").context("no condition")?;
        for word in ["node-2", "0.3.0", "0.1.0", "upgrade"] {
            ensure!(placed.message.contains(word), "{}", placed.message);
        }
        ensure!(
            status
                .candidates
                .iter()
                .any(|c| c.node == "node-2" && c.reason == "VersionSkew"),
            "{:?}",
            status.candidates
        );
        restart("node-2", &[]).await?;
        until_succeeded(&cluster, &job).await?;
        restart("node-1", &[]).await
    })
}

#[test]
fn an_agent_whose_old_token_is_refused_goes_on_with_the_new_one_within_its_lease() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let control = &cluster.control;
        let job = submit(&cluster, "rotated", "node-1", 250, true).await?;
        cluster.until_reason(&job, "Loaded", "Loaded", LONG).await?;
        let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        let old_pod = format!("{}-node-1", chart::AGENT);
        let old = control
            .token_bound_to_pod(NAMESPACE, chart::AGENT, &old_pod)
            .await?;
        let old = control.client_for_token(&old).await?;
        let nodes: Api<Node> = Api::all(old);
        nodes
            .get("node-1")
            .await
            .context("the old token is good before")?;

        let next = control
            .create_pod_on("node-1", NAMESPACE, chart::AGENT, "next")
            .await?;
        let token = control
            .token_bound_to_pod(NAMESPACE, chart::AGENT, &next.name_any())
            .await?;
        control.replace_token("agent-node-1", &token)?;
        // A token dies with the pod that it is bound to.
        pods.delete(&old_pod, &DeleteParams::default().grace_period(0))
            .await?;
        eventually(LONG, "the old token to be refused", || async {
            match nodes.get("node-1").await {
                Err(kube::Error::Api(status)) if status.code == 401 => Ok(()),
                other => Err(anyhow::anyhow!("{other:?}")),
            }
        })
        .await?;
        let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        let renewed = async || {
            let lease = leases.get(&node_lease("node-1")).await?;
            anyhow::Ok(lease.spec.and_then(|s| s.renew_time))
        };
        let before = renewed().await?;
        eventually(tenths_of_lease(10), "a renewal within a lease", || async {
            ensure!(renewed().await? > before, "none since {before:?}");
            Ok(())
        })
        .await?;
        let job = until_succeeded(&cluster, &job).await?;
        let epoch = job.status.map_or(0, |s| s.epoch);
        ensure!(epoch == 1, "the job was placed {epoch} times");
        Ok(())
    })
}

/// Named so that it comes last: nothing of GoGrid is left afterwards.
#[test]
fn z_gogrids_own_namespace_is_gone_within_a_minute_and_jobs_are_told_what_holds_them_up_until_then()
-> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let job = submit(&cluster, "last", "node-1", 200, true).await?;
        cluster.until_reason(&job, "Loaded", "Loaded", LONG).await?;
        // Without its account the operator could say nothing any more.
        let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        let finalizers = |list: Value| Patch::Merge(json!({"metadata": {"finalizers": list}}));
        let held = finalizers(json!(["gogrid.test/hold"]));
        accounts
            .patch(chart::OPERATOR, &PatchParams::default(), &held)
            .await?;
        let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
        namespaces.delete(NAMESPACE, &DeleteParams::default()).await?;
        submit(&cluster, "too-late", "node-1", 3, false).await?;
        let events: Api<Event> = Api::namespaced(cluster.client.clone(), "default");
        eventually(LONG, "the job to be told", || async {
            let refused = ListParams::default().fields("reason=StepRefused,regarding.name=too-late");
            let told = events.list(&refused).await?.items;
            let note = told
                .first()
                .and_then(|event| event.note.clone())
                .context("no event")?;
            ensure!(note.contains("being terminated"), "{note}");
            println!("{note}");
            Ok(())
        })
        .await
        .with_context(|| cluster.log_tails(20))?;
        // No kubelet stands behind the agents' pods.
        let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        let now = DeleteParams::default().grace_period(0);
        pods.delete_collection(&now, &ListParams::default()).await?;
        let freed = finalizers(Value::Null);
        accounts
            .patch(chart::OPERATOR, &PatchParams::default(), &freed)
            .await?;
        eventually(LONG, "the namespace to be gone", || async {
            let found = namespaces.get_opt(NAMESPACE).await?;
            ensure!(found.is_none(), "{:?}", found.and_then(|n| n.status));
            Ok(())
        })
        .await
    })
}
