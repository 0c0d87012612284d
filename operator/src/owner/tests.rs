//! The loop, before an API server that is scripted.

use super::*;
use crate::config::Flags;
use clap::{Args as _, Command, FromArgMatches as _};
use futures::future::BoxFuture;
use http::{Request, Response};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::client::Body;
use serde_json::json;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::task::JoinHandle;

const TERM: i64 = 7;

/// A machine whose clock is moved by hand.
#[derive(Clone)]
struct ByHand(watch::Sender<u64>);

impl ByHand {
    /// Some milliseconds later, when everybody has done what there was to do.
    async fn pass(&self, millis: u64) {
        self.0.send_modify(|now| *now += millis);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }
}

impl Host for ByHand {
    fn mono(&self) -> Millis {
        Millis(*self.0.borrow())
    }

    fn wall(&self) -> Timestamp {
        Timestamp::UNIX_EPOCH
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        let mut now = self.0.subscribe();
        let until = *self.0.borrow() + u64::try_from(time.as_millis()).unwrap();
        Box::pin(async move {
            now.wait_for(|now| *now >= until).await.unwrap();
        })
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) -> JoinHandle<()> {
        tokio::spawn(task)
    }

    fn random(&self) -> u64 {
        4
    }
}

/// What a cluster answers in which there is nothing but profiles; nothing useful while it is not `up`.
fn answer(path: &str, up: bool) -> (u16, serde_json::Value) {
    let refusal = |code: u16, reason: &str| {
        (
            code,
            json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "", "reason": reason, "code": code}),
        )
    };
    if !up {
        refusal(503, "ServiceUnavailable")
    } else if path.contains("/configmaps/") {
        refusal(404, "NotFound")
    } else if path.contains("/resourceprofiles/") {
        (
            200,
            json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": {"name": "p"}}),
        )
    } else {
        (
            200,
            json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": []}),
        )
    }
}

/// An owner that leads.
fn leader(host: &ByHand, up: bool) -> (Owner, Arc<AtomicBool>) {
    let arguments = [
        "operator",
        "--namespace",
        "own",
        "--model-root",
        "/models",
        "--identity",
        "o",
    ];
    let flags = Flags::augment_args(Command::new("operator")).get_matches_from(arguments);
    let config = Flags::from_arg_matches(&flags).unwrap().validate("1").unwrap();
    let up = Arc::new(AtomicBool::new(up));
    let is_up = Arc::clone(&up);
    let service = tower::service_fn(move |request: Request<Body>| {
        let (status, body) = answer(request.uri().path(), is_up.load(Ordering::SeqCst));
        let body = Body::from(serde_json::to_vec(&body).unwrap());
        async move { Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap()) }
    });
    let executor = Executor {
        host: Arc::new(host.clone()),
        client: Client::new(service, "own"),
        namespace: "own".into(),
        reporter: "o".into(),
        one_answer: true,
    };
    let leadership = Arc::new(Leadership::default());
    leadership.hold(Millis(u64::MAX), TERM);
    let metrics = Arc::new(Metrics::new().unwrap());
    (Owner::new(config, executor, leadership, metrics), up)
}

#[tokio::test]
async fn a_leader_whose_first_look_failed_looks_again_at_the_next_tick() {
    let host = ByHand(watch::Sender::new(1_000));
    let (mut owner, up) = leader(&host, false);
    for expected in [None, Some(TERM)] {
        owner.tick();
        assert_eq!(owner.sweeping, Some(TERM));
        host.pass(0).await;
        host.pass(1_000).await;
        let answer = owner.answered.try_recv().unwrap();
        owner.take(answer);
        assert_eq!((owner.swept, owner.sweeping), (expected, None));
        up.store(true, Ordering::SeqCst);
    }
    owner.tick();
    assert_eq!(owner.sweeping, None, "once is enough");
}

#[tokio::test]
async fn what_an_earlier_terms_first_look_found_is_not_taken_in() {
    let host = ByHand(watch::Sender::new(1_000));
    let (mut owner, _up) = leader(&host, true);
    owner.tick();
    host.pass(0).await;
    let old = owner.answered.try_recv().unwrap();
    owner.leadership.hold(Millis(u64::MAX), TERM + 1);
    owner.tick();
    owner.take(old);
    assert_eq!((owner.swept, owner.sweeping), (None, Some(TERM + 1)));
}

#[tokio::test]
async fn what_happens_within_a_rest_is_one_round() {
    let host = ByHand(watch::Sender::new(1_000));
    let (owner, _up) = leader(&host, true);
    let metrics = Arc::clone(&owner.metrics);
    let (see, seen) = mpsc::channel(100);
    let (_leads, term) = watch::channel(Some(TERM));
    let (stop, stopped) = watch::channel(false);
    let running = tokio::spawn(owner.run(seen, term, stopped));
    for list in [
        Observation::Job(Change::Listed(vec![])),
        Observation::Assignment(Change::Listed(vec![])),
        Observation::Profile(Change::Listed(vec![])),
        Observation::Lease(Change::Listed(vec![])),
        Observation::Priority(Change::Listed(vec![])),
        Observation::Node(Change::Listed(vec![])),
        Observation::GpuNode(Change::Listed(vec![])),
    ] {
        see.send(list).await.unwrap();
    }
    for _ in 0..100 {
        host.pass(10).await;
    }
    let before = metrics.round_seconds.get_sample_count();
    for _ in 0..500 {
        see.send(Observation::Node(Change::Listed(vec![]))).await.unwrap();
        host.pass(1).await;
    }
    let rounds = metrics.round_seconds.get_sample_count() - before;
    assert!((15..=22).contains(&rounds), "{rounds} rounds in 500 ms");
    stop.send_replace(true);
    running.await.unwrap();
}
