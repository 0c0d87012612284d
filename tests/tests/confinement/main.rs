//! What each of GoGrid's accounts may and may not do, on a real API server with the chart's own roles and policies.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by panicking"
)]

mod rights;
mod world;

use gogrid_tests::chart;
use gogrid_tests::confinement::{Attempt, Outcome, Verb, matrix, surprises};
use gogrid_tests::wait::eventually;
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicyBinding;
use kube::api::{Api, DeleteParams};
use serde_json::json;
use std::time::Duration;

use world::{CONFINEMENT, NAMESPACE, NODES, World};

#[tokio::test]
async fn an_agent_writes_for_its_own_node_and_for_no_other() {
    let world = World::get().await;
    let _undisturbed = world.policies.read().await;
    let mut found = Vec::new();
    let mut cells = 0;
    for (own, foreign) in [(NODES[0], NODES[1]), (NODES[1], NODES[0])] {
        let client = world.agent(own).await;
        let (ours, theirs) = (
            matrix::writes(&world.admin().await, own).await.unwrap(),
            matrix::writes(&world.admin().await, foreign).await.unwrap(),
        );
        found.extend(surprises(&client, own, &ours, &Outcome::Allowed).await);
        found.extend(surprises(&client, own, &theirs, &Outcome::RefusedByPolicy).await);
        cells += ours.len() + theirs.len();
    }
    assert!(found.is_empty(), "{} of {cells} cells: {found:#?}", found.len());
    println!("{cells} cells");
}

#[tokio::test]
async fn an_agent_can_neither_take_over_nor_disguise_a_chunk() {
    let world = World::get().await;
    let _undisturbed = world.policies.read().await;
    let client = world.agent(NODES[0]).await;
    let attempts = matrix::disguises(&world.admin().await, NODES[0], NODES[1])
        .await
        .unwrap();
    let found = surprises(&client, NODES[0], &attempts, &Outcome::RefusedByPolicy).await;
    assert!(
        found.is_empty(),
        "{} of {}: {found:#?}",
        found.len(),
        attempts.len()
    );
}

#[tokio::test]
async fn a_token_that_is_bound_to_no_pod_writes_nothing() {
    let world = World::get().await;
    let _undisturbed = world.policies.read().await;
    let token = world.plane.token_for_sa(NAMESPACE, chart::AGENT).await.unwrap();
    let unbound = world.plane.client_for_token(&token).await.unwrap();
    // The same account by impersonation carries no extra fields at all.
    let user = format!("system:serviceaccount:{NAMESPACE}:{}", chart::AGENT);
    let impersonated = chart::client_as(&world.plane, &user, &[]).await.unwrap();
    let mut found = Vec::new();
    for node in NODES {
        let attempts = matrix::writes(&world.admin().await, node).await.unwrap();
        found.extend(surprises(&unbound, "unbound", &attempts, &Outcome::RefusedByPolicy).await);
        found.extend(
            surprises(
                &impersonated,
                "impersonated",
                &attempts,
                &Outcome::RefusedByPolicy,
            )
            .await,
        );
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[tokio::test]
async fn an_agent_has_no_right_beyond_its_work() {
    let world = World::get().await;
    let _undisturbed = world.policies.read().await;
    let client = world.agent(NODES[0]).await;
    let mut found = surprises(
        &client,
        "agent",
        &rights::beyond_an_agent(NODES[0]),
        &Outcome::RefusedByRole,
    )
    .await;
    found.extend(
        surprises(
            &client,
            "agent",
            &rights::an_agents_reads(NODES[0]),
            &Outcome::Allowed,
        )
        .await,
    );
    assert!(found.is_empty(), "{found:#?}");
}

#[tokio::test]
async fn the_operator_has_the_rights_for_its_work_and_none_beyond() {
    let world = World::get().await;
    let _undisturbed = world.policies.read().await;
    let client = world.operator().await;
    let mut found = surprises(
        &client,
        "operator",
        &rights::an_operators_work(world, NODES[0]).await,
        &Outcome::Allowed,
    )
    .await;
    found.extend(
        surprises(
            &client,
            "operator",
            &rights::beyond_the_operator(NODES[0]),
            &Outcome::RefusedByRole,
        )
        .await,
    );
    assert!(found.is_empty(), "{found:#?}");
}

#[tokio::test]
async fn a_user_with_every_role_still_is_not_the_writer_of_what_has_one() {
    let world = World::get().await;
    let _undisturbed = world.policies.read().await;
    let intruder = chart::client_as(&world.plane, chart::INTRUDER, &[])
        .await
        .unwrap();
    let attempts = rights::writes_with_one_writer(NODES[0]);
    let mut found = surprises(&intruder, "intruder", &attempts, &Outcome::RefusedByPolicy).await;
    // An admin of the cluster may repair all of it, and users write their jobs' specs.
    let admin = world.plane.admin_client().await.unwrap();
    found.extend(surprises(&admin, "admin", &attempts, &Outcome::Allowed).await);
    found.extend(surprises(&intruder, "user", &rights::a_users_work(), &Outcome::Allowed).await);
    assert!(found.is_empty(), "{found:#?}");
}

/// The proof that the matrix can fail: what the policy refuses, nothing else does.
#[tokio::test]
async fn without_the_policy_an_agent_writes_for_every_node() {
    let world = World::get().await;
    let _alone = world.policies.write().await;
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(world.plane.admin_client().await.unwrap());
    bindings
        .delete(CONFINEMENT, &DeleteParams::default())
        .await
        .unwrap();
    chart::until_confinement_is(&world.plane, NAMESPACE, false)
        .await
        .unwrap();

    let client = world.agent(NODES[0]).await;
    let mut attempts = matrix::writes(&world.admin().await, NODES[1]).await.unwrap();
    attempts.extend(
        matrix::disguises(&world.admin().await, NODES[0], NODES[1])
            .await
            .unwrap(),
    );
    let found = surprises(&client, "unconfined", &attempts, &Outcome::Allowed).await;

    chart::install(&world.plane, NAMESPACE, &json!({})).await.unwrap();
    assert!(
        found.is_empty(),
        "refused by something else than the policy: {found:#?}"
    );
}

#[tokio::test]
async fn what_a_gone_owner_leaves_behind_is_collected_in_spite_of_the_policies() {
    let world = World::get().await;
    let _undisturbed = world.policies.read().await;
    let node = world.plane.create_node("node-gone").await.unwrap();
    let admin = world.plane.admin_client().await.unwrap();
    world
        .add_gpu_node("node-gone", node.metadata.uid.as_deref())
        .await;
    world.add_assignment("node-gone").await;
    world.add_chunk("node-gone").await;

    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(admin.clone());
    nodes.delete("node-gone", &DeleteParams::default()).await.unwrap();
    let operator = world.operator().await;
    let deletion = Attempt::new(Verb::Delete, matrix::assignment_path("node-gone")).for_good();
    assert_eq!(deletion.outcome(&operator).await, Outcome::Allowed);

    for path in [
        matrix::gpu_node_path("node-gone"),
        matrix::chunk_path("node-gone"),
    ] {
        let look = Attempt::new(Verb::Get, path.clone());
        eventually(
            Duration::from_secs(60),
            &format!("{path} to be collected"),
            || async {
                match look.outcome(&admin).await {
                    Outcome::NotFound => Ok(()),
                    other => Err(anyhow::anyhow!("{other:?}")),
                }
            },
        )
        .await
        .unwrap();
    }
}
