//! A modelled worker: what `gogrid-worker` does as far as an agent can tell, with its kernel timer.
//!
//! Owns: loading, answering and standing still at the fence, all by its machine's clock. Speaks the real protocol. Must
//! not know of leases or epochs.

use super::pool::Yard;
use super::rng::Rng;
use super::time::{MILLI, Nanos, SECOND};
use super::truth::Stretch;
use gogrid_agent::event::{Event, Greeting, Hub};
use gogrid_agent::link::{Frames, Link};
use gogrid_agent_core::protocol::{
    Finish, FromWorker, Outcome, Readback, RecordResult, ToWorker, Usage, WorkerId, WorkerLimits, decode,
};
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::{Notify, oneshot};

/// Where a record's body says how long it takes of a worker, in milliseconds.
pub(super) const MILLIS: &str = "millis";
/// Between two reports of its counters.
const USAGE: Nanos = 5 * SECOND;

/// What a pool starts a worker with.
pub struct Start {
    /// Its name within the session.
    pub worker: WorkerId,
    /// What it must say.
    pub nonce: String,
    /// Its first limits.
    pub limits: WorkerLimits,
    /// Its first fence.
    pub fence_at: Nanos,
}

/// What a worker lives in.
pub struct Place {
    /// What it shares with its node.
    pub yard: Yard,
    /// The way to its agent.
    pub hub: Hub,
    /// User that workers run as.
    pub user: u32,
    /// Its number in the whole run.
    pub number: u64,
    /// SIGCONT.
    pub wake: Arc<Notify>,
    /// Chance.
    pub rng: Rng,
}

struct Task {
    line: u64,
    custom_id: Option<String>,
    prompt: String,
    job: String,
    left: Nanos,
    began: Option<Nanos>,
}

/// Computing that has begun; however it ends, it is on the record.
struct Running {
    yard: Yard,
    job: String,
    worker: u64,
    from: Nanos,
}

impl Drop for Running {
    fn drop(&mut self) {
        let until = self.yard.machine.time().now();
        for (from, until) in self.yard.awake(self.from, until) {
            let stretch = Stretch {
                worker: self.worker,
                from,
                until,
            };
            self.yard.truth.computed(&self.job, stretch);
        }
    }
}

/// A worker's state.
pub struct Worker {
    place: Place,
    id: WorkerId,
    limits: WorkerLimits,
    fence_at: Nanos,
    share: u16,
    expires_at: Nanos,
    loading: Option<(Nanos, u64)>,
    waiting: VecDeque<(u64, String)>,
    task: Option<Task>,
    draining: bool,
    drained: bool,
    usage: Usage,
    told_at: Nanos,
}

impl Worker {
    /// Lives until its agent is gone or its task is dropped.
    pub async fn live(mut place: Place, start: Start) {
        let exec = place.rng.between(10 * MILLI, 150 * MILLI);
        place.yard.machine.sleep(exec).await;
        let Start {
            worker,
            nonce,
            limits,
            fence_at,
        } = start;
        let (link, mut frames) = Link::pair();
        let (reply, answer) = oneshot::channel();
        let greeting = Greeting {
            worker,
            nonce,
            user: place.user,
            idle: false,
        };
        place
            .hub
            .send(Event::WorkerHello {
                greeting,
                link,
                reply,
            })
            .await;
        if !answer.await.unwrap_or(false) {
            return;
        }
        let mut this = Self {
            place,
            id: worker,
            limits,
            fence_at,
            share: 0,
            expires_at: 0,
            loading: None,
            waiting: VecDeque::new(),
            task: None,
            draining: false,
            drained: false,
            usage: Usage::default(),
            told_at: 0,
        };
        this.apply().await;
        while this.turn(&mut frames).await {}
        let worker = this.id;
        this.place.hub.send(Event::WorkerLost { worker, why: None }).await;
    }

    async fn say(&self, message: FromWorker) {
        let worker = self.id;
        self.place.hub.send(Event::FromWorker { worker, message }).await;
    }

    async fn apply(&self) {
        let limits = &self.limits;
        self.say(FromWorker::Applied(Readback {
            generation: limits.generation,
            threads: 2,
            niceness: limits.niceness,
            io: limits.io,
            autogroup: None,
            max_batch: limits.max_batch,
            request_interval: limits.request_interval,
        }))
        .await;
    }

    /// One turn; false when the agent is gone.
    async fn turn(&mut self, frames: &mut Frames) -> bool {
        let now = self.place.yard.machine.boottime();
        if now >= self.fence_at {
            // The kernel has stopped it: it reads nothing until it is woken, and computes nothing without a new grant.
            self.place.wake.notified().await;
            self.fence_at = Nanos::MAX;
            self.expires_at = 0;
            return true;
        }
        self.begin(now).await;
        let left = match (&self.loading, &self.task) {
            (Some((left, _)), _) => Some(*left),
            (None, Some(task)) => Some(task.left),
            (None, None) => None,
        };
        let may = self.share > 0 && now < self.expires_at;
        let until = match left {
            Some(left) if may => (now + left).min(self.expires_at),
            _ => Nanos::MAX,
        };
        let stop = until.min(self.fence_at);
        let running = self
            .task
            .as_ref()
            .filter(|_| may && self.loading.is_none())
            .map(|task| Running {
                yard: self.place.yard.clone(),
                job: task.job.clone(),
                worker: self.place.number,
                from: self.place.yard.machine.time().now(),
            });
        let sleep = self.place.yard.machine.sleep(stop.saturating_sub(now));
        let frame = tokio::select! {
            biased;
            () = sleep => None,
            frame = frames.next() => Some(frame),
        };
        drop(running);
        let spent = self.place.yard.machine.boottime().saturating_sub(now);
        if may {
            self.spend(spent).await;
        }
        match frame {
            Some(Some(bytes)) => self.take(&bytes).await,
            Some(None) => false,
            None => true,
        }
    }

    /// Takes up the next record.
    async fn begin(&mut self, now: Nanos) {
        if self.task.is_some() || self.loading.is_some() {
            return;
        }
        if !self.draining
            && let Some((line, text)) = self.waiting.pop_front()
        {
            let record: Value = serde_json::from_str(&text).unwrap_or_default();
            let custom_id = record["custom_id"].as_str().map(str::to_owned);
            let job = custom_id
                .as_deref()
                .and_then(|id| id.rsplit_once('/'))
                .map_or("", |(job, _)| job);
            let left = match record["body"][MILLIS].as_u64() {
                Some(millis) => millis.saturating_mul(MILLI),
                None => self.place.rng.between(600 * MILLI, 5 * SECOND),
            };
            self.task = Some(Task {
                line,
                prompt: record["body"]["prompt"].as_str().unwrap_or("").to_owned(),
                job: job.to_owned(),
                custom_id,
                left,
                began: None,
            });
        } else if self.draining && !self.drained {
            self.drained = true;
            self.say(FromWorker::Drained).await;
        }
        if now >= self.told_at.saturating_add(USAGE) {
            self.told_at = now;
            self.say(FromWorker::Usage(self.usage)).await;
        }
    }

    async fn spend(&mut self, spent: Nanos) {
        let now = self.place.yard.machine.boottime();
        if let Some((left, bytes)) = self.loading {
            let left = left.saturating_sub(spent);
            if left > 0 {
                self.loading = Some((left, bytes));
                return;
            }
            self.loading = None;
            self.usage.peak_bytes = bytes;
            return self.say(FromWorker::Loaded { device_bytes: bytes }).await;
        }
        let Some(mut task) = self.task.take() else { return };
        if task.began.is_none() {
            task.began = Some(now);
            self.say(FromWorker::Started {
                line: task.line,
                at: now,
            })
            .await;
        }
        task.left = task.left.saturating_sub(spent);
        self.usage.device += spent;
        if task.left > 0 {
            self.task = Some(task);
            return;
        }
        let result = RecordResult {
            line: task.line,
            custom_id: task.custom_id,
            outcome: Outcome::Text {
                text: format!("by {}: {}", self.place.number, task.prompt),
                prompt_tokens: 8,
                completion_tokens: 8,
                finish: Finish::Stop,
                completion: false,
            },
            started_at: task.began.unwrap_or(now),
            finished_at: now,
            batch: 1,
        };
        self.say(FromWorker::Result(result)).await;
    }

    async fn take(&mut self, bytes: &[u8]) -> bool {
        match decode::<ToWorker>(bytes) {
            Ok(ToWorker::Load { memory, .. }) => {
                let Yard { truth, node, cap, .. } = &self.place.yard;
                truth.takes(node, self.place.number, memory, *cap);
                let long = self.place.rng.mostly_short(20 * MILLI, self.place.yard.longest.1);
                self.loading = Some((long, memory));
            }
            Ok(ToWorker::Limits(limits)) => {
                self.limits = limits;
                self.apply().await;
            }
            Ok(ToWorker::Grant {
                fence_at,
                share_permille,
                expires_at,
            }) => (self.fence_at, self.share, self.expires_at) = (fence_at, share_permille, expires_at),
            Ok(ToWorker::Record { line, text }) => self.waiting.push_back((line, text)),
            Ok(ToWorker::Acknowledge { .. }) => {}
            Ok(ToWorker::Drain) => self.draining = true,
            Err(_) => return false,
        }
        true
    }
}
