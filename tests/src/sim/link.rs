//! The way between one process and the modelled API server, with everything that can happen on it.
//!
//! Owns: delays, partitions, losses, refusals of an overloaded server, and what watches suffer. Must not: know what a
//! request means.

use super::feed::{Feed, Sent};
use super::rng::Rng;
use super::server::{Asked, Sender, Server, pairs};
use super::store::Refusal;
use super::time::{MILLI, Machine, Nanos, SECOND, Time, lock};
use http::{Request, Response};
use kube::client::Body;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use tokio::sync::oneshot;
use tower::BoxError;

/// What is wrong with a way, each in parts per thousand unless it says otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trouble {
    /// Longest extra delay of anything, nanoseconds.
    pub slow: Nanos,
    /// Requests or answers that never arrive.
    pub loss: u64,
    /// Requests that are answered 429, 500, 503 or 504; one in four was carried out nevertheless.
    pub refused: u64,
    /// Longest extra delay of a watch event, nanoseconds.
    pub late: Nanos,
    /// Watch events that come twice.
    pub twice: u64,
    /// Watch events that overtake the one before.
    pub swapped: u64,
    /// Watch events that are lost; the watch must then list anew.
    pub dropped: u64,
    /// Versions that lists lag behind.
    pub lag: u64,
}

/// How one watch event travels.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// How long.
    pub delay: Nanos,
    /// It never arrives.
    pub lost: bool,
    /// It arrives twice.
    pub twice: bool,
    /// It overtakes the one before.
    pub swapped: bool,
}

struct State {
    rng: Rng,
    cut: bool,
    held: bool,
    reset_at: Option<Nanos>,
    trouble: Trouble,
    feeds: Vec<Weak<Feed>>,
    waiting: Vec<Waker>,
}

/// The way of one process.
pub struct Link {
    time: Time,
    quiet: Nanos,
    state: Mutex<State>,
}

impl Link {
    /// A way in order; a watch that is silent for `quiet` is given up.
    pub fn new(time: Time, rng: Rng, quiet: Nanos) -> Arc<Self> {
        let state = State {
            rng,
            cut: false,
            held: false,
            reset_at: None,
            trouble: Trouble::default(),
            feeds: vec![],
            waiting: vec![],
        };
        Arc::new(Self {
            time,
            quiet,
            state: Mutex::new(state),
        })
    }

    /// How the next watch event travels.
    pub fn event(&self, _now: Nanos) -> Way {
        let mut state = lock(&self.state);
        let Trouble {
            slow,
            late,
            twice,
            swapped,
            dropped,
            ..
        } = state.trouble;
        let most = slow + late;
        Way {
            delay: state.rng.between(MILLI, 4 * MILLI)
                + if most > 0 { state.rng.between(0, most) } else { 0 },
            lost: state.rng.permille(dropped),
            twice: state.rng.permille(twice),
            swapped: state.rng.permille(swapped),
        }
    }

    /// Whether nothing passes.
    pub fn is_cut(&self) -> bool {
        let state = lock(&self.state);
        state.cut || state.held
    }

    /// Whether a watch that has been silent since then breaks now.
    pub fn breaks(&self, quiet_since: Nanos, now: Nanos) -> bool {
        let reset = lock(&self.state).reset_at.is_some_and(|at| at >= quiet_since);
        reset || now >= self.quiet_limit(quiet_since)
    }

    /// When a watch that has been silent since then is given up.
    pub fn quiet_limit(&self, quiet_since: Nanos) -> Nanos {
        quiet_since.saturating_add(self.quiet)
    }

    /// Versions that lists lag behind.
    pub fn lag(&self) -> u64 {
        lock(&self.state).trouble.lag
    }

    /// Keeps a watch in mind.
    pub fn add(&self, feed: Weak<Feed>) {
        let mut state = lock(&self.state);
        state.feeds.retain(|feed| feed.strong_count() > 0);
        state.feeds.push(feed);
    }

    fn changed(&self) {
        let (feeds, waiting) = {
            let mut state = lock(&self.state);
            (state.feeds.clone(), std::mem::take(&mut state.waiting))
        };
        waiting.into_iter().for_each(Waker::wake);
        for feed in feeds.iter().filter_map(Weak::upgrade) {
            feed.wake();
        }
    }

    /// Nothing passes any more; with `reset` connections end as well, rather than being silent.
    pub fn cut(&self, reset: bool) {
        {
            let mut state = lock(&self.state);
            state.cut = true;
            if reset {
                state.reset_at = Some(self.time.now());
            }
        }
        self.changed();
    }

    /// Everything passes again; with `reset` connections from before end.
    pub fn mend(&self, reset: bool) {
        {
            let mut state = lock(&self.state);
            state.cut = false;
            if reset {
                state.reset_at = Some(self.time.now());
            }
        }
        self.changed();
    }

    /// What was not sent yet stays where it is: its process stands still.
    pub fn hold(&self, held: bool) {
        lock(&self.state).held = held;
        self.changed();
    }

    /// From now on, that is wrong with it.
    pub fn trouble(&self, trouble: Trouble) {
        lock(&self.state).trouble = trouble;
    }

    fn delay(&self) -> Nanos {
        let mut state = lock(&self.state);
        let slow = state.trouble.slow;
        state.rng.between(MILLI, 5 * MILLI) + if slow > 0 { state.rng.between(0, slow) } else { 0 }
    }

    /// Whether something on its way now is lost: by bad luck, or every other time while nothing passes.
    fn loses(&self) -> bool {
        let mut state = lock(&self.state);
        let chance = if state.cut { 500 } else { state.trouble.loss };
        state.rng.permille(chance)
    }

    /// Whether the server refuses, with what, and whether it does the work nevertheless.
    fn refuses(&self) -> Option<(u16, bool)> {
        let mut state = lock(&self.state);
        let chance = state.trouble.refused;
        if !state.rng.permille(chance) {
            return None;
        }
        let code = state.rng.pick(&[429, 500, 503, 504]).copied().unwrap_or(503);
        Some((code, state.rng.permille(250)))
    }

    /// Waits until nothing of that is in the way.
    async fn without(&self, obstacle: fn(&State) -> bool) {
        std::future::poll_fn(|cx| {
            let mut state = lock(&self.state);
            if obstacle(&state) {
                state.waiting.push(cx.waker().clone());
                Poll::Pending
            } else {
                Poll::Ready(())
            }
        })
        .await;
    }

    /// A request's way; false when it ends there: it is lost, or nothing passed when it was to arrive and its connection
    /// was given up, `delivery` after it was sent.
    async fn there(&self, delivery: Nanos) -> bool {
        self.without(|state| state.held).await;
        let sent = self.time.now();
        self.time.until(sent + self.delay()).await;
        if self.loses() {
            return false;
        }
        if !lock(&self.state).cut {
            return true;
        }
        self.without(|state| state.cut).await;
        self.time.now() <= sent.saturating_add(delivery)
    }

    /// An answer's way; false when it ends there.
    async fn back(&self) -> bool {
        self.time.until(self.time.now() + self.delay()).await;
        if self.loses() {
            return false;
        }
        self.without(|state| state.cut || state.held).await;
        true
    }
}

/// No answer came.
#[derive(Debug, thiserror::Error)]
#[error("no answer within {0} s")]
pub struct NoAnswer(u64);

/// A connection of one process to the modelled server.
#[derive(Clone)]
pub struct Transport {
    /// The server.
    pub server: Server,
    /// The way there.
    pub link: Arc<Link>,
    /// Whose it is.
    pub sender: Sender,
    /// The machine that it starts from.
    pub machine: Machine,
    /// How long an answer may take.
    pub limit: Nanos,
    /// How long a request may be on its way before its connection is given up.
    pub delivery: Nanos,
}

async fn deliver(transport: Transport, asked: Asked, tell: oneshot::Sender<Response<Sent>>) {
    let Transport {
        server,
        link,
        sender,
        delivery,
        ..
    } = transport;
    if !link.there(delivery).await {
        // Nobody ever hears of it; the asker gives up by its own clock.
        return std::future::pending().await;
    }
    let refused = if asked.watches() { None } else { link.refuses() };
    let response = match refused {
        Some((code, done)) => {
            if done {
                // Carried out, and the answer says otherwise.
                drop(server.serve(&sender, &link, &asked));
            }
            let refusal = Refusal {
                code,
                reason: "ServiceUnavailable",
                message: "the server is overloaded".into(),
            };
            super::server::refusal(&refusal)
        }
        None => server.serve(&sender, &link, &asked),
    };
    if !link.back().await {
        return std::future::pending().await;
    }
    // An asker that has given up is none.
    let _ = tell.send(response);
}

impl tower::Service<Request<Body>> for Transport {
    type Response = Response<Sent>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Sent>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let transport = self.clone();
        let (tell, told) = oneshot::channel();
        let sent = self.machine.time().now();
        let (parts, body) = request.into_parts();
        // On its way from here on, whatever becomes of the asker.
        tokio::spawn(async move {
            let header = |name: http::HeaderName| {
                let value = parts.headers.get(name).and_then(|value| value.to_str().ok());
                value.unwrap_or_default().to_owned()
            };
            let asked = Asked {
                sent,
                path: parts.uri.path().to_owned(),
                query: pairs(parts.uri.query().unwrap_or_default()),
                content: header(http::header::CONTENT_TYPE),
                accept: header(http::header::ACCEPT),
                method: parts.method,
                body: body.collect_bytes().await.unwrap_or_default(),
            };
            deliver(transport, asked, tell).await;
        });
        let limit = self.limit;
        let over = self.machine.sleep(limit);
        Box::pin(async move {
            tokio::select! {
                biased;
                Ok(response) = told => Ok(response),
                () = over => Err(BoxError::from(NoAnswer(limit / SECOND))),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a request arrives that is sent into a partition of that length, on a connection that is given up after 2 s.
    fn arrives(seed: u64, partition: Nanos) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(async {
            let time = Time::default();
            let link = Link::new(time.clone(), Rng::new(seed), SECOND);
            link.cut(false);
            let sent = Arc::clone(&link);
            let way = tokio::spawn(async move { sent.there(2 * SECOND).await });
            tokio::task::yield_now().await;
            while time.advance(partition) {
                tokio::task::yield_now().await;
            }
            link.mend(false);
            way.await.unwrap()
        })
    }

    #[test]
    fn what_a_partition_holds_back_for_longer_than_its_connection_lasts_never_arrives() {
        let of_20 = |partition| (0..20).filter(|seed| arrives(*seed, partition)).count();
        assert!(of_20(SECOND) > 0, "some are lost in a partition, not all");
        assert_eq!(of_20(10 * SECOND), 0);
    }
}
