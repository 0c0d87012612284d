//! Everything that users and machines get wrong: each with a clear reason, and nothing lost.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use gogrid_api::{Assignment, InferenceJob, condition};
use gogrid_testmodels::demo;
use gogrid_testmodels::quant::TensorType;
use gogrid_testmodels::random::RandomLlama;
use gogrid_tests::cluster::{Cluster, ClusterOptions, NAMESPACE, on_runtime, record};
use gogrid_tests::controlplane::ControlPlane;
use gogrid_tests::jobs::{Questions, sha256, spec, succeeded};
use gogrid_tests::procfs;
use gogrid_tests::wait::eventually;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(90);

fn models() -> PathBuf {
    std::env::temp_dir()
        .join(format!("gogrid-bad-{}", std::process::id()))
        .join("models")
}

async fn cluster() -> Result<Arc<Cluster>> {
    static SHARED: tokio::sync::OnceCell<Arc<Cluster>> = tokio::sync::OnceCell::const_new();
    let started = SHARED.get_or_try_init(|| async {
        std::fs::create_dir_all(models())?;
        write_bad_models()?;
        let mut options = ClusterOptions::quick(2);
        options.model_roots.push(models());
        anyhow::Ok(Arc::new(
            Cluster::start(ControlPlane::shared().await?, options).await?,
        ))
    });
    Ok(Arc::clone(started.await?))
}

fn write_bad_models() -> Result<()> {
    let good = std::fs::read(demo::demo_model_path(demo::Quant::Q8_0))?;
    std::fs::write(
        models().join("truncated.gguf"),
        good.get(..good.len() / 2).context("empty model")?,
    )?;
    std::fs::write(
        models().join("text.gguf"),
        "This is a letter to my bank, and no model at all.",
    )?;
    std::fs::write(
        models().join("other-architecture.gguf"),
        with_architecture(&good, *b"mamba")?,
    )?;
    let outside = models().join("../outside.gguf");
    std::fs::write(&outside, &good)?;
    std::os::unix::fs::symlink(&outside, models().join("leads-out.gguf"))?;
    Ok(())
}

/// The same file with another name of five letters in place of `llama` in `general.architecture`.
fn with_architecture(model: &[u8], name: [u8; 5]) -> Result<Vec<u8>> {
    let key = b"general.architecture";
    let at = model
        .windows(key.len())
        .position(|w| w == key)
        .context("no architecture")?
        + key.len()
        + 4
        + 8;
    let mut changed = model.to_vec();
    changed
        .get_mut(at..at + 5)
        .context("too short")?
        .copy_from_slice(&name);
    Ok(changed)
}

fn one_record() -> Vec<String> {
    vec![record("only", "What is 2 plus 3?", 8)]
}

/// A job's spec over a file of the extra model root.
fn spec_for(file: &str, output: &str) -> Result<Value> {
    let mut spec = spec(&one_record(), output)?;
    let path = models().join(file);
    spec["model"] = json!({"uri": format!("file://{}", path.display()), "sha256": sha256(&path).unwrap_or("0".repeat(64))});
    Ok(spec)
}

/// Waits until one of the job's conditions, or its last failure, carries that word; returns the sentence behind it.
async fn said(cluster: &Cluster, job: &InferenceJob, word: &str) -> Result<String> {
    let find = |job: &InferenceJob| {
        let status = job.status.clone().unwrap_or_default();
        let failure = status.last_failure.map(|f| (f.reason, f.message));
        let all = status
            .conditions
            .into_iter()
            .map(|c| (c.reason, c.message))
            .chain(failure);
        all.filter(|(reason, _)| reason == word)
            .map(|(_, message)| message)
            .find(|m| !m.is_empty())
    };
    let job = cluster
        .until(job, &format!("{} to say {word}", job.name_any()), LONG, |job| {
            let conditions = job.status.clone().unwrap_or_default().conditions;
            let words: Vec<_> = conditions
                .iter()
                .map(|c| format!("{}={}", c.type_, c.reason))
                .collect();
            find(job).map(drop).ok_or_else(|| anyhow!("{words:?}"))
        })
        .await?;
    let message = find(&job).context("gone again")?;
    println!("{word}: {message}");
    Ok(message)
}

async fn refused(name: &str, spec: Value, word: &str, must_contain: &[&str]) -> Result<()> {
    let cluster = cluster().await?;
    let job = cluster.create_job("default", name, spec).await?;
    let message = said(&cluster, &job, word).await?;
    for part in must_contain {
        ensure!(
            message.contains(part),
            "{word}: {message:?} does not say {part:?}"
        );
    }
    cluster
        .jobs("default")
        .delete(name, &DeleteParams::default())
        .await?;
    Ok(())
}

#[test]
fn a_model_whose_bytes_have_another_digest_is_not_run() -> Result<()> {
    on_runtime(async {
        cluster().await?;
        let mut spec = spec(&one_record(), "digest")?;
        spec["model"]["sha256"] = json!("ab".repeat(32));
        refused(
            "digest",
            spec,
            "DigestMismatch",
            &["abab", &sha256(&demo::demo_model_path(demo::Quant::Q8_0))?],
        )
        .await
    })
}

#[test]
fn a_missing_file_one_outside_the_roots_and_a_symlink_out_of_them_are_told_apart() -> Result<()> {
    on_runtime(async {
        cluster().await?;
        refused(
            "missing",
            spec_for("nowhere.gguf", "missing")?,
            "ModelNotFound",
            &["nowhere.gguf"],
        )
        .await?;
        refused(
            "outside",
            spec_for("../outside.gguf", "outside")?,
            "OutsideModelRoots",
            &[],
        )
        .await?;
        let mut etc = spec(&one_record(), "etc")?;
        etc["model"] = json!({"uri": "file:///etc/passwd", "sha256": "0".repeat(64)});
        refused("etc", etc, "OutsideModelRoots", &["/etc/passwd"]).await?;
        refused(
            "symlink",
            spec_for("leads-out.gguf", "symlink")?,
            "OutsideModelRoots",
            &["leads-out.gguf"],
        )
        .await
    })
}

#[test]
fn a_truncated_file_a_text_and_an_unknown_architecture_are_each_named() -> Result<()> {
    on_runtime(async {
        cluster().await?;
        refused(
            "truncated",
            spec_for("truncated.gguf", "truncated")?,
            "TruncatedModel",
            &[],
        )
        .await?;
        refused("text", spec_for("text.gguf", "text")?, "NotGguf", &[]).await?;
        refused(
            "mamba",
            spec_for("other-architecture.gguf", "mamba")?,
            "UnsupportedModel",
            &["mamba"],
        )
        .await
    })
}

#[test]
fn a_model_too_big_for_every_node_says_so_and_one_too_big_for_now_waits_with_numbers() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let mut huge = spec(&one_record(), "huge")?;
        huge["memory"] = json!({"vram": "900Ti"});
        refused("huge", huge, "ExceedsClusterVRAM", &["921600.0 GiB", "node-"]).await?;

        let nodes: Api<gogrid_api::GpuNode> = Api::all(cluster.client.clone());
        let node = nodes.get("node-1").await?.status.unwrap_or_default();
        let cpu = node
            .devices
            .iter()
            .find(|d| d.uuid == "cpu")
            .context("no CPU device")?;
        let most = cpu.memory_free.bytes()?.0 / 100 * 80;
        let pin = json!({"nodeSelector": {"kubernetes.io/hostname": "node-1"}});
        // Slow, but with no memory limit of its own.
        let unhurried = json!({"apiVersion": "gogrid.dev/v1alpha1", "kind": "ResourceProfile", "metadata": {"name": "unhurried"},
            "spec": {"vram": {"maxPercent": 100}, "compute": {"maxPercent": 100, "minRequestIntervalMillis": 200},
                "cpu": {"niceness": 0}, "maxBatchSize": 16}});
        let profiles: Api<gogrid_api::ResourceProfile> = Api::all(cluster.client.clone());
        profiles
            .patch(
                "unhurried",
                &PatchParams::apply("test"),
                &Patch::Apply(&unhurried),
            )
            .await?;
        let mut first = spec(&Questions::new(1, 200).lines(), "first")?;
        first["memory"] = json!({"vram": most.to_string()});
        first["placement"] = pin.clone();
        first["profileName"] = json!("unhurried");
        let mut second = spec(&one_record(), "second")?;
        second["memory"] = json!({"vram": most.to_string()});
        second["placement"] = pin;
        let first = cluster.create_job("default", "first", first).await?;
        cluster.until_reason(&first, "Placed", "Placed", LONG).await?;
        let second = cluster.create_job("default", "second", second).await?;
        let message = said(&cluster, &second, "InsufficientVRAM").await?;
        ensure!(message.contains("node-1") && message.contains("GiB"), "{message}");
        let waiting = cluster
            .jobs("default")
            .get("second")
            .await?
            .status
            .unwrap_or_default();
        ensure!(
            waiting.candidates.iter().any(|c| c.node == "node-1"),
            "{:?}",
            waiting.candidates
        );
        cluster
            .jobs("default")
            .delete("first", &DeleteParams::default())
            .await?;
        cluster.until_finished(&second, LONG).await?;
        Ok(())
    })
}

#[test]
fn a_job_that_names_a_missing_profile_waits_for_it_and_one_that_fits_no_node_says_what_does_not_fit()
-> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let mut profile = spec(&one_record(), "profile")?;
        profile["profileName"] = json!("gentle");
        refused("profile", profile, "ProfileNotFound", &["gentle"]).await?;
        let mut label = spec(&one_record(), "label")?;
        label["placement"] = json!({"nodeSelector": {"rack": "moon"}});
        refused("label", label, "NoMatchingNode", &["nodeSelector"]).await?;

        let nodes: Api<Node> = Api::all(cluster.client.clone());
        let taints = |list: Value| Patch::Merge(json!({"spec": {"taints": list}}));
        let taint = json!([{"key": "reserved", "value": "lab", "effect": "NoSchedule"}]);
        nodes
            .patch("node-2", &PatchParams::default(), &taints(taint))
            .await?;
        let mut tainted = spec(&one_record(), "tainted")?;
        tainted["placement"] = json!({"nodeSelector": {"kubernetes.io/hostname": "node-2"}});
        refused("tainted", tainted.clone(), "NoMatchingNode", &["taint"]).await?;
        tainted["placement"]["tolerations"] = json!([{"key": "reserved", "operator": "Exists"}]);
        let job = cluster.create_job("default", "tolerant", tainted).await?;
        cluster.until_finished(&job, LONG).await?;
        nodes
            .patch("node-2", &PatchParams::default(), &taints(Value::Null))
            .await?;
        Ok(())
    })
}

#[test]
fn a_malformed_record_fails_alone_with_its_line_number_and_max_failed_records_decides_the_job() -> Result<()>
{
    on_runtime(async {
        let cluster = cluster().await?;
        let lines = vec![
            record("a", "What is 1 plus 1?", 8),
            "{\"custom_id\": \"broken\", ".to_owned(),
            record("c", "What is 2 plus 2?", 8),
        ];
        let job = cluster
            .create_job("default", "malformed", spec(&lines, "malformed")?)
            .await?;
        let job = cluster.until_finished(&job, LONG).await?;
        succeeded(&job)?;
        let results = cluster.results(&job).await?;
        ensure!(results.len() == 3, "{results:?}");
        let failed: Vec<_> = results.iter().filter(|r| !r["error"].is_null()).collect();
        let [failed] = failed.as_slice() else {
            return Err(anyhow!("{} failed records", failed.len()));
        };
        let message = failed["error"]["message"].as_str().unwrap_or_default();
        ensure!(message.contains("line 2"), "{message}");
        let mut strict = spec(&lines, "strict")?;
        strict["failurePolicy"] = json!({"maxFailedRecords": 0});
        refused("strict", strict, "TooManyFailedRecords", &["1"]).await
    })
}

#[test]
fn a_result_too_large_for_a_config_map_and_one_that_would_overwrite_are_refused() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let many: Vec<String> = (0..4500).map(|n| record(&format!("r{n}"), "Hi", 1)).collect();
        let mut large = spec(&[], "large")?;
        large["input"] = cluster.create_input("default", "many", &many).await?;
        refused("large", large, "OutputTooLarge", &["bytes"]).await?;
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "default");
        let theirs = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs"}, "data": {"precious": "data"}});
        maps.patch("theirs", &PatchParams::apply("test"), &Patch::Apply(&theirs))
            .await?;
        refused(
            "theirs",
            spec(&one_record(), "theirs")?,
            "OutputConflict",
            &["theirs"],
        )
        .await?;
        let kept = maps.get("theirs").await?.data.unwrap_or_default();
        ensure!(
            kept.get("precious").is_some_and(|v| v == "data") && kept.len() == 1,
            "{kept:?}"
        );
        Ok(())
    })
}

#[test]
fn suspended_from_birth_overdue_and_failing_jobs_each_say_so() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let mut suspended = spec(&one_record(), "born-suspended")?;
        suspended["suspend"] = json!(true);
        refused("born-suspended", suspended, "Suspended", &[]).await?;

        let slow = Questions::new(1, 200).lines();
        let mut overdue = spec(&slow, "overdue")?;
        overdue["profileName"] = json!("conservative");
        overdue["activeDeadlineSeconds"] = json!(2);
        refused("overdue", overdue, "DeadlineExceeded", &["2"]).await?;

        let mut failing = spec(&slow, "failing")?;
        failing["profileName"] = json!("conservative");
        failing["backoffLimit"] = json!(1);
        let job = cluster.create_job("default", "failing", failing).await?;
        for _ in 0..2 {
            let me = std::process::id();
            let worker = eventually(LONG, "a worker to kill", || async {
                procfs::workers_of(me)?.pop().context("none")
            });
            let pid = i32::try_from(worker.await?.pid)?;
            let pid = rustix::process::Pid::from_raw(pid).context("pid 0")?;
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
            eventually(LONG, "it to be gone", || async {
                ensure!(
                    procfs::workers_of(me)?
                        .iter()
                        .all(|w| i32::try_from(w.pid).is_ok_and(|p| p != pid.as_raw_nonzero().get()))
                );
                Ok(())
            })
            .await?;
        }
        said(&cluster, &job, "BackoffLimitExceeded").await?;
        Ok(())
    })
}

#[test]
fn a_system_priority_class_is_refused_by_the_api_server_and_an_unsupported_field_by_name() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let mut system = spec(&one_record(), "system")?;
        system["priorityClassName"] = json!("system-node-critical");
        let error = cluster
            .create_job("default", "system", system)
            .await
            .err()
            .context("it was accepted")?;
        ensure!(
            format!("{error:#}").contains("must not be a system- class"),
            "{error:#}"
        );
        let mut service = spec(&one_record(), "service")?;
        service["mode"] = json!("Service");
        refused("service", service, "Unsupported", &["spec.mode", "Service"]).await?;
        let mut missing = spec(&one_record(), "priority")?;
        missing["priorityClassName"] = json!("urgent");
        refused("priority", missing, "PriorityClassNotFound", &["urgent"]).await
    })
}

async fn slow_running(cluster: &Cluster, namespace: &str, name: &str) -> Result<InferenceJob> {
    let mut slow = spec(&Questions::new(4, 200).lines(), name)?;
    slow["profileName"] = json!("conservative");
    let job = cluster.create_job(namespace, name, slow).await?;
    cluster.until_reason(&job, "Loaded", "Loaded", LONG).await
}

async fn nothing_left(cluster: &Cluster, job: &InferenceJob) -> Result<()> {
    let of_job =
        ListParams::default().labels(&format!("gogrid.dev/job-uid={}", job.uid().context("no uid")?));
    let assignments: Api<Assignment> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    eventually(LONG, "everything of the job to be gone", || async {
        let left = assignments.list(&of_job).await?.items.len() + maps.list(&of_job).await?.items.len();
        let workers = procfs::workers_of(std::process::id())?;
        ensure!(
            left == 0 && workers.is_empty(),
            "{left} objects and {} workers are left",
            workers.len()
        );
        Ok(())
    })
    .await
}

#[test]
fn a_job_deleted_while_the_operator_was_down_is_stopped_when_it_is_back() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        let job = slow_running(&cluster, "default", "orphan").await?;
        cluster.process("operator")?.kill();
        cluster
            .jobs("default")
            .delete("orphan", &DeleteParams::default())
            .await?;
        cluster.start_operator(&[])?;
        nothing_left(&cluster, &job).await
    })
}

#[test]
fn a_namespace_deleted_with_running_jobs_is_gone_within_a_minute() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        cluster.control.ensure_namespace("doomed").await?;
        let first = slow_running(&cluster, "doomed", "first").await?;
        let second = slow_running(&cluster, "doomed", "second").await?;
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "doomed");
        let hold = json!({"metadata": {"name": "hold", "finalizers": ["gogrid.test/hold"]}});
        maps.create(&PostParams::default(), &serde_json::from_value(hold)?)
            .await?;
        let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
        namespaces.delete("doomed", &DeleteParams::default()).await?;
        nothing_left(&cluster, &first).await?;
        nothing_left(&cluster, &second).await?;
        let third = cluster
            .create_job("doomed", "third", spec(&one_record(), "third")?)
            .await;
        let refused = format!(
            "{:#}",
            third
                .err()
                .context("a job was let into a namespace on its way out")?
        );
        ensure!(refused.contains("being terminated"), "{refused}");
        let freed = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        maps.patch("hold", &PatchParams::default(), &freed).await?;
        eventually(Duration::from_secs(60), "the namespace to be gone", || async {
            ensure!(namespaces.get_opt("doomed").await?.is_none(), "still there");
            Ok(())
        })
        .await
    })
}

#[test]
fn a_malformed_stored_job_never_stops_the_others() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        // An object from before a bound existed: stored while the schema did not refuse it.
        let crds: Api<
            k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
        > = Api::all(cluster.client.clone());
        let good = crds.get("inferencejobs.gogrid.dev").await?;
        let mut loose = serde_json::to_value(&good)?;
        let anything = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let schema = loose
            .pointer_mut("/spec/versions/0/schema/openAPIV3Schema")
            .context("no schema")?;
        *schema.pointer_mut("/properties/spec").context("no spec")? = anything;
        schema
            .as_object_mut()
            .context("no object")?
            .remove("x-kubernetes-validations");
        let as_patch =
            |crd: &Value| Patch::Merge(json!({"spec": {"versions": crd["spec"]["versions"].clone()}}));
        crds.patch(
            "inferencejobs.gogrid.dev",
            &PatchParams::default(),
            &as_patch(&loose),
        )
        .await?;
        let dynamic = kube::api::ApiResource::erase::<InferenceJob>(&());
        let raw: Api<kube::api::DynamicObject> =
            Api::namespaced_with(cluster.client.clone(), "default", &dynamic);
        let malformed = json!({"apiVersion": "gogrid.dev/v1alpha1", "kind": "InferenceJob",
            "metadata": {"name": "malformed-stored"}, "spec": {"model": 7, "input": "none"}});
        eventually(LONG, "the loose schema to accept it", || async {
            let object = serde_json::from_value(malformed.clone())?;
            raw.create(&PostParams::default(), &object)
                .await
                .map_err(Into::into)
        })
        .await?;
        crds.patch(
            "inferencejobs.gogrid.dev",
            &PatchParams::default(),
            &as_patch(&serde_json::to_value(&good)?),
        )
        .await?;
        let job = cluster
            .create_job(
                "default",
                "beside-malformed",
                spec(&one_record(), "beside-malformed")?,
            )
            .await?;
        let job = cluster.until_finished(&job, LONG).await?;
        ensure!(condition::is_true(
            &job.status.unwrap_or_default().conditions,
            "Succeeded"
        ));
        raw.delete("malformed-stored", &DeleteParams::default()).await?;
        Ok(())
    })
}

#[test]
fn a_random_model_whose_answers_mean_nothing_still_runs() -> Result<()> {
    on_runtime(async {
        let cluster = cluster().await?;
        for (kind, name) in [
            (TensorType::F16, "f16"),
            (TensorType::Q4_0, "q4-0"),
            (TensorType::Q6K, "q6-k"),
        ] {
            let shape = RandomLlama {
                seed: 3,
                layers: 2,
                hidden: 256,
                heads: 4,
                kv_heads: 2,
                head_dim: 64,
                ffn: 512,
                vocab: 512,
                context: 128,
                tensor_type: kind,
                tied: true,
            };
            shape.write_to(&models().join(format!("{name}.gguf")))?;
            let job = cluster
                .create_job("default", name, spec_for(&format!("{name}.gguf"), name)?)
                .await?;
            let job = cluster.until_finished(&job, LONG).await?;
            ensure!(
                condition::is_true(&job.status.clone().unwrap_or_default().conditions, "Succeeded"),
                "{name}"
            );
            ensure!(cluster.results(&job).await?.len() == 1, "{name}");
        }
        Ok(())
    })
}
