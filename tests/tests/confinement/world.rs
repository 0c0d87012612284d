//! The control plane of this test binary: the chart installed, two nodes, their agents and what those have written.

use std::sync::Arc;

use gogrid_tests::chart;
use gogrid_tests::confinement::matrix::{self, typed};
use gogrid_tests::confinement::{furnish, make};
use gogrid_tests::controlplane::ControlPlane;
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::{OnceCell, RwLock};

/// GoGrid's own namespace here.
pub(crate) const NAMESPACE: &str = "gogrid-system";
/// The two nodes whose agents are confined.
pub(crate) const NODES: [&str; 2] = ["node-a", "node-b"];
/// Name of the confinement policy and of its binding.
pub(crate) const CONFINEMENT: &str = "gogrid-node-confinement";

/// What every test of this binary shares; clients are made anew, because each test has its own runtime.
pub(crate) struct World {
    pub(crate) plane: Arc<ControlPlane>,
    /// Held for writing by the one test that takes a policy away.
    pub(crate) policies: RwLock<()>,
    operator_token: String,
}

static WORLD: OnceCell<World> = OnceCell::const_new();

impl World {
    /// The world, made by whoever asks first.
    pub(crate) async fn get() -> &'static World {
        WORLD.get_or_init(Self::make).await
    }

    async fn make() -> World {
        let plane = ControlPlane::shared().await.unwrap();
        chart::install(&plane, NAMESPACE, &json!({})).await.unwrap();
        let operator_token = plane.token_for_sa(NAMESPACE, chart::OPERATOR).await.unwrap();
        let world = World {
            plane,
            policies: RwLock::new(()),
            operator_token,
        };
        let admin = world.admin().await;
        let preset =
            json!({"metadata": {"name": "conservative"}, "spec": gogrid_api::profile::presets()[0].1});
        for (path, body) in [
            (
                "/api/v1/namespaces/default/secrets",
                json!({"metadata": {"name": "a-secret"}}),
            ),
            (
                "/api/v1/namespaces/default/configmaps",
                json!({"metadata": {"name": "an-input"}}),
            ),
            (
                "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases",
                json!({"metadata": {"name": "gogrid-leader"}, "spec": {"leaseTransitions": 1}}),
            ),
            (matrix::JOBS, matrix::job()),
            (
                "/apis/gogrid.dev/v1alpha1/resourceprofiles",
                typed("gogrid.dev/v1alpha1", "ResourceProfile", preset),
            ),
        ] {
            make(&admin, path, body).await.unwrap();
        }
        furnish(&admin).await.unwrap();
        for node in NODES {
            let made = world.plane.create_node(node).await.unwrap();
            world.add_gpu_node(node, made.metadata.uid.as_deref()).await;
            world.add_lease(node).await;
            world.add_assignment(node).await;
            world.add_chunk(node).await;
        }
        world
    }

    /// A client with every right.
    pub(crate) async fn admin(&self) -> Client {
        self.plane.admin_client().await.unwrap()
    }

    /// A client with the token of the agent's pod on `node`; the pod is made when there is none.
    pub(crate) async fn agent(&self, node: &str) -> Client {
        let pod = format!("{}-{node}", chart::AGENT);
        let token = match self.plane.token_bound_to_pod(NAMESPACE, chart::AGENT, &pod).await {
            Ok(token) => token,
            Err(_absent) => {
                // Another test may be making it at this moment.
                let _ = self.plane.create_agent_pod(node, NAMESPACE, chart::AGENT).await;
                self.plane
                    .token_bound_to_pod(NAMESPACE, chart::AGENT, &pod)
                    .await
                    .unwrap()
            }
        };
        self.plane.client_for_token(&token).await.unwrap()
    }

    /// A client with the operator's token.
    pub(crate) async fn operator(&self) -> Client {
        self.plane.client_for_token(&self.operator_token).await.unwrap()
    }

    /// What is stored at `path`, as the admin sees it.
    pub(crate) async fn stored(&self, path: &str) -> Value {
        matrix::stored(&self.admin().await, path).await.unwrap()
    }

    /// The node's agent makes its GpuNode, owned by the Node where its uid is given.
    pub(crate) async fn add_gpu_node(&self, node: &str, uid: Option<&str>) {
        let mut object = matrix::gpu_node(node);
        if let Some(uid) = uid {
            object["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}]);
        }
        self.by_agent(node, matrix::GPU_NODES, object).await;
    }

    /// The node's agent makes its Lease.
    pub(crate) async fn add_lease(&self, node: &str) {
        self.by_agent(node, &matrix::leases(), matrix::lease(node)).await;
    }

    /// The operator orders something of the node.
    pub(crate) async fn add_assignment(&self, node: &str) {
        make(
            &self.operator().await,
            &matrix::assignments(),
            matrix::assignment(node),
        )
        .await
        .unwrap();
    }

    /// The node's agent writes its first chunk of results.
    pub(crate) async fn add_chunk(&self, node: &str) {
        let chunk = matrix::chunk(&self.admin().await, node, 0).await.unwrap();
        self.by_agent(node, &matrix::config_maps(), chunk).await;
    }

    async fn by_agent(&self, node: &str, path: &str, body: Value) {
        make(&self.agent(node).await, path, body).await.unwrap();
    }
}
