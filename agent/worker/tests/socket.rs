//! Pool and worker as processes, with the agent's end of the socket in the test.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail the test"
)]

use gogrid_agent_core::protocol::{
    FromPool, FromWorker, Hello, IoPriority, Outcome, PROTOCOL_VERSION, Role, Sampling, ToPool, ToWorker,
    WorkerLimits, body_length, decode, encode,
};
use gogrid_testmodels::random::{RandomLlama, random_llama};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::time::{ClockId, clock_gettime};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::time::Duration;

const SECOND: u64 = 1_000_000_000;

fn now() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    u64::try_from(time.tv_sec).unwrap() * SECOND + u64::try_from(time.tv_nsec).unwrap()
}

struct Peer(UnixStream);

impl Peer {
    fn send<T: serde::Serialize>(&mut self, message: &T) {
        self.0.write_all(&encode(message).unwrap()).unwrap();
    }

    fn receive<T: for<'de> serde::Deserialize<'de>>(&mut self) -> Option<T> {
        let mut header = [0; 4];
        self.0.read_exact(&mut header).ok()?;
        let mut body = vec![0; body_length(header).unwrap()];
        self.0.read_exact(&mut body).ok()?;
        Some(decode(&body).unwrap())
    }

    /// Messages until one that `wanted` takes; the others are dropped.
    fn until<T>(&mut self, wanted: impl Fn(FromWorker) -> Option<T>) -> T {
        loop {
            let message = self.receive::<FromWorker>().expect("the worker ended");
            if let FromWorker::Failed { reason, message } = &message {
                panic!("{reason}: {message}");
            }
            if let Some(found) = wanted(message) {
                return found;
            }
        }
    }

    fn grant(&mut self, share_permille: u16, fence_at: u64) {
        self.send(&ToWorker::Grant {
            fence_at,
            share_permille,
            expires_at: fence_at,
        });
    }

    fn load(&mut self, model: &std::fs::File, parallel_sequences: u16) {
        let sampling = Sampling {
            max_tokens: 8,
            temperature_milli: 0,
            top_p_milli: 1000,
            top_k: 0,
            seed: 1,
            stop: Vec::new(),
        };
        let load = ToWorker::Load {
            device: "cpu".into(),
            context_tokens: 64,
            parallel_sequences,
            memory: 256 << 20,
            sampling,
        };
        let frame = encode(&load).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [model.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let sent = sendmsg(
            &self.0,
            &[IoSlice::new(&frame)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
        assert_eq!(sent, frame.len());
    }

    fn record(&mut self, line: u64, prompt: &str) {
        let text = format!(
            r#"{{"custom_id":"r{line}","method":"POST","url":"/v1/completions","body":{{"prompt":{prompt:?}}}}}"#
        );
        self.send(&ToWorker::Record { line, text });
    }
}

struct Node {
    folder: tempfile::TempDir,
    listener: UnixListener,
    pool_process: Child,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.pool_process.kill();
        let _ = self.pool_process.wait();
    }
}

fn limits(generation: u64) -> WorkerLimits {
    WorkerLimits {
        generation,
        niceness: 15,
        io: IoPriority::Idle,
        max_batch: 2,
        request_interval: 0,
        threads: 1,
    }
}

impl Node {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let pool_process = Command::new(env!("CARGO_BIN_EXE_gogrid-worker"))
            .args(["pool", "--die-with-parent", "--socket"])
            .arg(&socket)
            .spawn()
            .unwrap();
        Self {
            folder,
            listener,
            pool_process,
        }
    }

    fn accept(&self) -> (Peer, Role) {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut peer = Peer(stream);
        let hello: Hello = peer.receive().unwrap();
        assert_eq!(hello.version, PROTOCOL_VERSION);
        (peer, hello.role)
    }

    fn pool(&self) -> Peer {
        let (peer, role) = self.accept();
        assert_eq!(role, Role::Pool { alive: Vec::new() });
        peer
    }

    /// A worker that has said hello, and its process id.
    fn worker(&self, pool: &mut Peer, worker: u64, limits: WorkerLimits, fence_at: u64) -> (Peer, i32) {
        let nonce = format!("{worker:064x}");
        pool.send(&ToPool::Spawn {
            worker,
            nonce: nonce.clone(),
            limits,
            fence_at,
            memory_limit: 1 << 30,
        });
        let Some(FromPool::Spawned { worker: spawned, pid }) = pool.receive() else {
            panic!("not spawned")
        };
        assert_eq!(spawned, worker);
        let (peer, role) = self.accept();
        assert_eq!(role, Role::Worker { worker, nonce });
        (peer, i32::try_from(pid).unwrap())
    }

    fn model(&self) -> std::fs::File {
        let path = self.folder.path().join("model.gguf");
        std::fs::write(&path, random_llama(&RandomLlama::default())).unwrap();
        std::fs::File::open(path).unwrap()
    }
}

fn state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

#[test]
fn records_are_answered_inside_the_limits_and_drained() {
    let node = Node::start();
    let mut pool = node.pool();
    let fence = now() + 600 * SECOND;
    let (mut worker, pid) = node.worker(&mut pool, 7, limits(1), fence);
    let applied = worker.until(|message| match message {
        FromWorker::Applied(readback) => Some(readback),
        _ => None,
    });
    assert_eq!(
        (applied.generation, applied.max_batch, applied.io),
        (1, 2, IoPriority::Idle)
    );
    assert!(applied.niceness >= 15 && applied.threads >= 2, "{applied:?}");
    assert_eq!(
        std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))
            .unwrap()
            .trim(),
        "1000"
    );
    assert_eq!(
        std::fs::read_to_string(format!("/proc/{pid}/environ"))
            .map(|e| e.contains("CARGO"))
            .ok(),
        Some(false)
    );

    worker.load(&node.model(), 4);
    worker.grant(1000, fence);
    let bytes = worker.until(|message| match message {
        FromWorker::Loaded { device_bytes } => Some(device_bytes),
        _ => None,
    });
    assert!(bytes > 100_000, "{bytes}");

    // A new set of limits while nothing runs.
    worker.send(&ToWorker::Limits(WorkerLimits {
        request_interval: SECOND / 50,
        ..limits(2)
    }));
    worker.until(|message| match message {
        FromWorker::Applied(readback) if readback.generation == 2 => Some(()),
        _ => None,
    });
    for line in 1..=6 {
        worker.record(line, "the weather");
    }
    worker.send(&ToWorker::Record {
        line: 9,
        text: "{".into(),
    });
    let (mut starts, mut texts, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        match worker.receive::<FromWorker>().unwrap() {
            FromWorker::Started { at, .. } => starts.push(at),
            FromWorker::Result(result) => match result.outcome {
                Outcome::Text { text, completion, .. } => {
                    assert!(completion && (1..=2).contains(&result.batch), "{}", result.batch);
                    assert_eq!(result.custom_id, Some(format!("r{}", result.line)));
                    texts.push(text);
                    worker.send(&ToWorker::Acknowledge {
                        lines: vec![result.line],
                    });
                }
                Outcome::Error { code, message } => errors.push((code, message)),
            },
            FromWorker::Usage(_) | FromWorker::Applied(_) | FromWorker::Loaded { .. } => {}
            FromWorker::Drained => break,
            FromWorker::Failed { reason, message } => panic!("{reason}: {message}"),
        }
        if texts.len() + errors.len() == 7 {
            worker.send(&ToWorker::Drain);
        }
    }
    assert_eq!(errors.len(), 1);
    assert!(
        errors[0].0 == "InvalidRecord" && errors[0].1.starts_with("line 9: "),
        "{errors:?}"
    );
    assert!(texts.windows(2).all(|pair| pair[0] == pair[1]), "{texts:?}");
    assert_eq!(starts.len(), texts.len());
    assert!(
        starts.windows(2).all(|pair| pair[1] - pair[0] >= SECOND / 50),
        "{starts:?}"
    );

    pool.send(&ToPool::Kill { worker: 7 });
    assert_eq!(
        pool.receive(),
        Some(FromPool::Exited {
            worker: 7,
            code: None,
            signal: Some(9)
        })
    );
}

#[test]
fn a_worker_without_a_new_grant_is_stopped_by_the_kernel_at_its_fence_and_goes_on_after_the_next() {
    let node = Node::start();
    let mut pool = node.pool();
    let fence = now() + 2 * SECOND;
    let (mut worker, pid) = node.worker(&mut pool, 1, limits(1), fence);
    worker.until(|message| matches!(message, FromWorker::Applied(_)).then_some(()));
    while state(pid) != Some('T') {
        assert!(now() < fence + 2 * SECOND, "state {:?}", state(pid));
        std::thread::yield_now();
    }
    assert!(now() >= fence);
    let later = now() + 600 * SECOND;
    worker.grant(1000, later);
    worker.load(&node.model(), 1);
    pool.send(&ToPool::Continue { worker: 1 });
    worker.until(|message| matches!(message, FromWorker::Loaded { .. }).then_some(()));
}

#[test]
fn a_worker_that_stood_still_while_its_grants_ran_out_goes_on_with_the_newest_when_it_is_woken_once() {
    let node = Node::start();
    let mut pool = node.pool();
    let (mut worker, pid) = node.worker(&mut pool, 1, limits(1), now() + 600 * SECOND);
    worker.until(|message| matches!(message, FromWorker::Applied(_)).then_some(()));
    let process = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    // While it can't read them, one after the other runs out.
    let last = now() + SECOND / 5;
    for early in 0..20 {
        worker.grant(1000, last - early * SECOND / 100);
    }
    while now() < last {
        std::thread::yield_now();
    }
    worker.grant(1000, now() + 600 * SECOND);
    worker.load(&node.model(), 1);
    pool.send(&ToPool::Continue { worker: 1 });
    worker.until(|message| matches!(message, FromWorker::Loaded { .. }).then_some(()));
}

#[test]
fn workers_end_with_their_agent_and_the_pool_comes_back_empty() {
    let node = Node::start();
    let mut pool = node.pool();
    let (worker, pid) = node.worker(&mut pool, 1, limits(1), now() + 600 * SECOND);
    drop(pool);
    let mut pool = node.pool();
    assert_eq!(state(pid), None, "reaped before the hello");
    drop(worker);
    // The name is free again, and a worker without an agent ends by itself.
    let (mut worker, _) = node.worker(&mut pool, 1, limits(1), now() + 600 * SECOND);
    worker.until(|message| matches!(message, FromWorker::Applied(_)).then_some(()));
    drop(worker);
    assert_eq!(
        pool.receive(),
        Some(FromPool::Exited {
            worker: 1,
            code: Some(75),
            signal: None
        })
    );
}

#[test]
fn a_model_that_is_none_fails_the_worker_with_a_reason() {
    let node = Node::start();
    let mut pool = node.pool();
    let fence = now() + 600 * SECOND;
    let (mut worker, _) = node.worker(&mut pool, 1, limits(1), fence);
    let path = node.folder.path().join("none");
    std::fs::write(&path, "no model").unwrap();
    worker.grant(1000, fence);
    worker.load(&std::fs::File::open(path).unwrap(), 1);
    loop {
        if let FromWorker::Failed { reason, .. } = worker.receive().unwrap() {
            assert_eq!(reason, "NotGguf");
            break;
        }
    }
    assert_eq!(
        pool.receive(),
        Some(FromPool::Exited {
            worker: 1,
            code: Some(1),
            signal: None
        })
    );
}

#[test]
fn a_worker_takes_no_more_of_the_device_than_its_share() {
    let node = Node::start();
    let mut pool = node.pool();
    let fence = now() + 600 * SECOND;
    let (mut worker, _) = node.worker(&mut pool, 1, limits(1), fence);
    worker.load(&node.model(), 2);
    worker.grant(1000, fence);
    worker.until(|message| matches!(message, FromWorker::Loaded { .. }).then_some(()));
    // Loading at a full share leaves no debt; from here on a tenth.
    let share = 100;
    worker.grant(share, fence);
    let mut usage = Vec::new();
    let mut line = 0;
    while usage.len() < 4 {
        while line < 400 * (u64::try_from(usage.len()).unwrap() + 1) {
            line += 1;
            worker.record(line, "the weather of tomorrow and of the day after");
        }
        match worker.receive::<FromWorker>().unwrap() {
            FromWorker::Usage(counters) => usage.push((now(), counters)),
            FromWorker::Result(result) => worker.send(&ToWorker::Acknowledge {
                lines: vec![result.line],
            }),
            FromWorker::Failed { reason, message } => panic!("{reason}: {message}"),
            _ => {}
        }
    }
    let ((begin, first), (end, last)) = (usage[1], usage[3]);
    let (used, elapsed) = (last.device - first.device, end - begin);
    // A burst, a slice, and counters that are up to a slice old.
    let most = elapsed * u64::from(share) / 1000 + SECOND / 10;
    assert!(used <= most, "{used} ns of {elapsed} ns");
    assert!(last.waited > first.waited, "{last:?}");
}
