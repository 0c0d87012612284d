//! A fake pool and fake workers at the real socket: what the agent lets in, and how it cuts off what breaks the protocol.

use crate::event::{Event, Hub};
use crate::link::{Link, bind, listen};
use crate::pressure::PoolProcess;
use gogrid_agent_core::protocol::{
    FromWorker, Hello, MAX_FRAME_BYTES, PROTOCOL_VERSION, Role, ToWorker, body_length, decode, encode,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::io::{IoSliceMut, Read as _, Seek as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::Receiver;

/// A listening agent whose owner is the test.
struct Agent {
    dir: tempfile::TempDir,
    events: Receiver<Event>,
}

impl Agent {
    fn start(allowed: Vec<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (hub, events) = Hub::new();
        tokio::spawn(listen(
            bind(&dir.path().join("s"), false).unwrap(),
            hub,
            allowed,
            PoolProcess::default(),
            None,
        ));
        Self { dir, events }
    }

    fn own() -> Self {
        Self::start(vec![rustix::process::geteuid().as_raw()])
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    async fn next(&mut self) -> Event {
        tokio::time::timeout(Duration::from_secs(10), self.events.recv())
            .await
            .unwrap()
            .unwrap()
    }

    /// Greets as a worker and is let in, if the nonce is the right one.
    async fn worker(&mut self, nonce: &str) -> (UnixStream, Link, bool) {
        let mut stream = self.connect();
        let role = Role::Worker {
            worker: 7,
            nonce: nonce.into(),
        };
        stream
            .write_all(
                &encode(&Hello {
                    version: PROTOCOL_VERSION,
                    role,
                })
                .unwrap(),
            )
            .unwrap();
        let Event::WorkerHello {
            greeting,
            link,
            reply,
        } = self.next().await
        else {
            panic!("no hello")
        };
        let good = greeting.worker == 7 && greeting.nonce == "right";
        reply.send(good).unwrap();
        (stream, link, good)
    }

    async fn lost(&mut self) -> Option<String> {
        let Event::WorkerLost { worker: 7, why } = self.next().await else {
            panic!("not lost")
        };
        why
    }
}

fn ended(mut stream: UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_the_right_nonce_is_let_in_and_heard() {
    let mut agent = Agent::own();
    let (mut stream, _link, good) = agent.worker("right").await;
    assert!(good);
    stream.write_all(&encode(&FromWorker::Drained).unwrap()).unwrap();
    assert!(matches!(
        agent.next().await,
        Event::FromWorker {
            worker: 7,
            message: FromWorker::Drained
        }
    ));
    drop(stream);
    assert_eq!(agent.lost().await.unwrap(), "connection: early eof");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_a_wrong_nonce_is_cut_off_and_never_heard() {
    let mut agent = Agent::own();
    let (mut stream, link, good) = agent.worker("wrong").await;
    drop(link);
    assert!(!good);
    let _ = stream.write_all(&encode(&FromWorker::Drained).unwrap());
    assert!(ended(stream));
    assert!(agent.events.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_frame_and_a_malformed_one_end_the_connection_with_their_reason() {
    for (bytes, why) in [
        (
            u32::MAX.to_le_bytes().to_vec(),
            format!("longer than {MAX_FRAME_BYTES}"),
        ),
        (b"\x02\0\0\0{}".to_vec(), "no message of protocol".to_owned()),
        (
            b"\x08\0\0\0\"Reboot\"".to_vec(),
            "no message of protocol".to_owned(),
        ),
    ] {
        let mut agent = Agent::own();
        let (mut stream, _link, _) = agent.worker("right").await;
        stream.write_all(&bytes).unwrap();
        assert!(agent.lost().await.unwrap().contains(&why));
        assert!(ended(stream));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_version_another_user_and_a_frame_before_hello_are_cut_off_unheard() {
    let hello = |version| {
        encode(&Hello {
            version,
            role: Role::Pool { alive: vec![] },
        })
        .unwrap()
    };
    let other_user = rustix::process::geteuid().as_raw() + 1;
    for (agent, bytes) in [
        (Agent::own(), hello(PROTOCOL_VERSION + 1)),
        (Agent::own(), encode(&FromWorker::Drained).unwrap()),
        (Agent::start(vec![other_user]), hello(PROTOCOL_VERSION)),
    ] {
        let mut agent = agent;
        let mut stream = agent.connect();
        let _ = stream.write_all(&bytes);
        assert!(ended(stream));
        assert!(agent.events.try_recv().is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_is_announced_with_its_workers_and_its_user() {
    let mut agent = Agent::own();
    let mut stream = agent.connect();
    let role = Role::Pool { alive: vec![3] };
    stream
        .write_all(
            &encode(&Hello {
                version: PROTOCOL_VERSION,
                role,
            })
            .unwrap(),
        )
        .unwrap();
    let Event::PoolHello { alive, user, .. } = agent.next().await else {
        panic!("no pool")
    };
    assert_eq!((alive, user), (vec![3], rustix::process::geteuid().as_raw()));
    drop(stream);
    assert!(matches!(agent.next().await, Event::PoolLost));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_travels_with_its_load_as_a_descriptor() {
    let mut agent = Agent::own();
    let (stream, link, _) = agent.worker("right").await;
    let mut model = tempfile::tempfile().unwrap();
    model.write_all(b"weights").unwrap();
    model.rewind().unwrap();
    let sent = ToWorker::Record {
        line: 1,
        text: "x".repeat(200_000),
    };
    link.load(&sent, Arc::new(OwnedFd::from(model))).unwrap();
    let received = tokio::task::spawn_blocking(move || receive(&stream))
        .await
        .unwrap();
    let (message, mut file) = received;
    assert_eq!(message, sent);
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "weights");
}

/// A frame and the descriptor that came with it.
fn receive(mut stream: &UnixStream) -> (ToWorker, std::fs::File) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut header = [0; 4];
    let got = recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(&mut header)],
        &mut control,
        RecvFlags::empty(),
    )
    .unwrap();
    assert_eq!(got.bytes, 4);
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|m| match m {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let mut body = vec![0; body_length(header).unwrap()];
    stream.read_exact(&mut body).unwrap();
    (decode(&body).unwrap(), fds.into_iter().next().unwrap().into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_read_is_given_up_and_does_not_hold_the_agent() {
    let mut agent = Agent::own();
    let (_stream, link, _) = agent.worker("right").await;
    let record = ToWorker::Record {
        line: 1,
        text: "x".repeat(100_000),
    };
    let refused = (0..2000).any(|_| link.worker(&record).is_err());
    assert!(refused);
}
