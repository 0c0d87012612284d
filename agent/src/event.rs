//! What the owner of the agent's state is told.
//!
//! Owns: the events and the way to the owner. Must not hold state.

use crate::lease::LeaseEvent;
use crate::link::Link;
use crate::models::Obtained;
use gogrid_agent_core::adaptive::Sample;
use gogrid_agent_core::driver::View;
use gogrid_agent_core::guest::Allocated;
use gogrid_agent_core::protocol::{FromPool, FromWorker, WorkerId};
use gogrid_api::assignment::ModelFacts;
use gogrid_api::effective::NamedProfile;
use gogrid_api::job::Failure;
use gogrid_api::node::{Backend, Device, HeldModel};
use gogrid_api::{Assignment, Bytes, GpuNodeStatus};
use std::collections::BTreeMap;
use tokio::sync::{mpsc, oneshot};

/// What a connecting worker says of itself.
#[derive(Debug)]
pub struct Greeting {
    /// Which.
    pub worker: WorkerId,
    /// Its proof.
    pub nonce: String,
    /// User it runs as, by the kernel's word.
    pub user: u32,
    /// Whether it was moved to the idle cgroup.
    pub idle: bool,
}

/// A write's outcome: the new resourceVersion, or an error and whether the object is gone.
pub type Written = Result<String, WriteFailure>;

/// Why a write failed.
#[derive(Clone, Debug)]
pub struct WriteFailure {
    /// The object is gone.
    pub gone: bool,
    /// The text.
    pub error: String,
}

/// Something happened.
pub enum Event {
    /// About the node's Lease.
    Lease(LeaseEvent),
    /// The list of assignments begins anew.
    AssignmentsInit,
    /// An assignment of this node.
    Assignment(Box<Assignment>),
    /// The list is whole.
    AssignmentsComplete,
    /// An assignment is gone.
    AssignmentGone(String),
    /// Looked up: absent when it is gone.
    Confirmed(String, Option<Box<Assignment>>),
    /// Term of the leader Lease for an order; `None`: it could not be read.
    Term(String, Option<i64>),
    /// All profiles.
    Profiles(Vec<NamedProfile>),
    /// The Node's uid and labels.
    Node(String, BTreeMap<String, String>),
    /// The GpuNode is gone.
    GpuNodeGone,
    /// The GpuNode was written, or not.
    GpuNodeWritten(Box<GpuNodeStatus>, Result<(), String>),
    /// The pool connected.
    PoolHello {
        /// Workers it still has.
        alive: Vec<WorkerId>,
        /// User it runs as, by the kernel's word.
        user: u32,
        /// The way to it.
        link: Link,
    },
    /// Its connection ended.
    PoolLost,
    /// The pool's process ended and all of its workers with it.
    PoolEnded,
    /// From the pool.
    FromPool(FromPool),
    /// A worker connected.
    WorkerHello {
        /// Who it says it is.
        greeting: Greeting,
        /// The way to it.
        link: Link,
        /// Whether it is let in.
        reply: oneshot::Sender<bool>,
    },
    /// From a worker.
    FromWorker {
        /// Which.
        worker: WorkerId,
        /// What.
        message: FromWorker,
    },
    /// A worker's connection ended; why, if it broke the protocol.
    WorkerLost {
        /// Which.
        worker: WorkerId,
        /// The breach.
        why: Option<String>,
    },
    /// A model was fetched and verified, or not.
    Obtained(String, Result<Obtained, Failure>),
    /// A staged input was read; the flag says whether to try again.
    InputRead(String, usize, Result<String, Failure>),
    /// A chunk and its checkpoint are durable, or not.
    Saved(String, Written),
    /// An assignment's status was written, or not.
    StatusWritten(String, Written),
    /// A model's header was read.
    Inspected(String, Result<ModelFacts, Failure>),
    /// Models beneath the roots.
    Models(Vec<HeldModel>),
    /// All devices of one backend, as something other than the driver's probe has measured them.
    Devices(Backend, Vec<Device>),
    /// The driver and its devices as measured.
    Driver(Box<View>),
    /// The devices that the kubelet has given to pods, or why it doesn't say.
    PodGpus(Result<Vec<Allocated>, String>),
    /// A device was looked at for the load of others.
    Sensed(String, Sample),
    /// Memory that processes of ours hold, by process id.
    Resident(BTreeMap<i32, Bytes>),
    /// End in good order.
    Shutdown,
}

/// The way to the owner.
#[derive(Clone)]
pub struct Hub(mpsc::Sender<Event>);

impl Hub {
    /// A hub and its other end.
    pub fn new() -> (Self, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(1024);
        (Self(sender), receiver)
    }

    /// Tells the owner; waits while it is behind.
    pub async fn send(&self, event: Event) {
        // A closed channel means that the agent is ending.
        let _ = self.0.send(event).await;
    }

    /// Whether both lead to the same agent.
    pub fn same(&self, other: &Self) -> bool {
        self.0.same_channel(&other.0)
    }

    /// Tells the owner from a thread.
    pub(crate) fn send_blocking(&self, event: Event) {
        let _ = self.0.blocking_send(event);
    }
}
