//! The words of GoGrid's API, group `gogrid.dev/v1alpha1`.
//!
//! Owns: the four custom resource types with their bounds and CEL rules, the units they speak in, condition
//! types and reasons, names of objects and labels, the lease timing contract, and `effective_profile`.
//! Must not: talk to an API server, read a clock or know anything of models, planners or agents.

#![allow(
    unreachable_pub,
    reason = "KubeSchema derives a copy of every struct inside a function"
)]

pub mod assignment;
pub mod condition;
pub mod effective;
pub mod guarded;
pub mod job;
pub mod names;
pub mod node;
pub mod profile;
pub mod quantity;
mod schema;
pub mod timing;
pub mod version;

pub use assignment::{Assignment, AssignmentSpec, AssignmentStatus};
pub use condition::{Condition, ConditionStatus};
pub use effective::{EffectiveProfile, effective_profile};
pub use job::{InferenceJob, InferenceJobSpec, InferenceJobStatus};
pub use node::{GpuNode, GpuNodeSpec, GpuNodeStatus};
pub use profile::{ResourceProfile, ResourceProfileSpec, ResourceProfileStatus};
pub use quantity::{ByteQuantity, Bytes, Millis, Niceness, Percent};
pub use timing::LeaseTiming;

/// API group of every GoGrid resource.
pub const GROUP: &str = "gogrid.dev";
/// The one served and stored version.
pub const VERSION: &str = "v1alpha1";

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

/// The four CRDs, in the order in which they are installed.
pub fn crds() -> [CustomResourceDefinition; 4] {
    [
        InferenceJob::crd(),
        ResourceProfile::crd(),
        Assignment::crd(),
        GpuNode::crd(),
    ]
    .map(schema::finish)
}
