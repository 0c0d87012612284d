//! Watches: events on their way to whoever watches.
//!
//! Owns: the stream of one watch, with bookmarks, its end and its loss. Must not: choose what happens to an event; `link`
//! does.

use super::kind::{Kind, Selector};
use super::link::Link;
use super::store::{Change, What};
use super::time::{Nanos, SECOND, Sleep, Time, lock};
use bytes::Bytes;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

/// Between two bookmarks of a watch.
pub(super) const BOOKMARK: Nanos = 60 * SECOND;

pub(super) struct Frames {
    pub(super) ready: VecDeque<(Nanos, Bytes)>,
    pub(super) last: Nanos,
    pub(super) bookmark: Nanos,
    pub(super) seen: u64,
    pub(super) ends: Nanos,
    pub(super) waker: Option<Waker>,
    pub(super) dropped: bool,
}

/// One watch.
pub struct Feed {
    pub(super) kind: Kind,
    pub(super) selector: Selector,
    /// Whether only metadata is told.
    pub(super) partial: bool,
    pub(super) link: Arc<Link>,
    pub(super) frames: Mutex<Frames>,
}

impl Feed {
    /// Whether a change is told here.
    pub(super) fn wants(&self, change: &Change) -> bool {
        change.kind == self.kind
            && self
                .selector
                .takes(&change.object.namespace, &change.object.value)
    }

    /// Puts an event on its way.
    pub(super) fn push(&self, now: Nanos, change: &Change, frame: &Bytes) {
        let way = self.link.event(now);
        let waker = {
            let mut frames = lock(&self.frames);
            frames.seen = change.version;
            if way.lost {
                // The stream must begin anew, or what is lost would stay lost.
                frames.dropped = true;
                frames.ends = frames.ends.min(now + way.delay);
            } else {
                let at = frames.last.max(now + way.delay);
                frames.last = at;
                frames.ready.push_back((at, frame.clone()));
                if way.twice {
                    frames.ready.push_back((at, frame.clone()));
                }
                let length = frames.ready.len();
                if way.swapped && length >= 2 {
                    frames.ready.swap(length - 1, length - 2);
                }
            }
            frames.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Wakes whoever reads it.
    pub fn wake(&self) {
        let waker = lock(&self.frames).waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The body of an answer.
pub enum Sent {
    /// All of it.
    Whole(Option<Bytes>),
    /// Events as they come.
    Watch(Box<WatchBody>),
}

impl http_body::Body for Sent {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Broken>>> {
        match &mut *self {
            Self::Whole(body) => Poll::Ready(body.take().map(|body| Ok(http_body::Frame::data(body)))),
            Self::Watch(body) => Pin::new(&mut **body).poll_frame(cx),
        }
    }
}

/// The body of a watch's answer.
pub struct WatchBody {
    pub(super) feed: Arc<Feed>,
    pub(super) time: Time,
    pub(super) version: Box<dyn Fn() -> u64 + Send>,
    pub(super) timer: Option<Pin<Box<Sleep>>>,
    pub(super) quiet_since: Nanos,
    pub(super) over: bool,
}

/// The connection broke.
#[derive(Debug, thiserror::Error)]
#[error("the connection of a watch broke")]
pub struct Broken;

impl http_body::Body for WatchBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Broken>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let now = self.time.now();
        let feed = Arc::clone(&self.feed);
        if feed.link.breaks(self.quiet_since, now) {
            self.over = true;
            return Poll::Ready(Some(Err(Broken)));
        }
        let mut frames = lock(&feed.frames);
        let open = !feed.link.is_cut();
        let mut next = feed.link.quiet_limit(self.quiet_since);
        if open {
            match frames.ready.front() {
                Some((at, _)) if *at <= now => {
                    let frame = frames
                        .ready
                        .pop_front()
                        .map(|(_, frame)| frame)
                        .unwrap_or_default();
                    self.quiet_since = now;
                    return Poll::Ready(Some(Ok(http_body::Frame::data(frame))));
                }
                Some((at, _)) => next = next.min(*at),
                None if now >= frames.ends => {
                    self.over = true;
                    let gone = std::mem::take(&mut frames.dropped);
                    return Poll::Ready(gone.then(|| Ok(http_body::Frame::data(expired()))));
                }
                None if now >= frames.bookmark => {
                    frames.bookmark = now + BOOKMARK;
                    self.quiet_since = now;
                    let version = (self.version)().to_string();
                    let (api, kind) = if feed.partial {
                        PARTIAL
                    } else {
                        (feed.kind.api_version(), feed.kind.name())
                    };
                    let object =
                        json!({"apiVersion": api, "kind": kind, "metadata": {"resourceVersion": version}});
                    let frame = format!("{}\n", json!({"type": "BOOKMARK", "object": object}));
                    return Poll::Ready(Some(Ok(http_body::Frame::data(Bytes::from(frame)))));
                }
                None => next = next.min(frames.ends).min(frames.bookmark),
            }
        }
        frames.waker = Some(cx.waker().clone());
        drop(frames);
        let mut timer = Box::pin(self.time.until(next.max(now + 1)));
        // A moment later than now: never ready at once.
        let _ = timer.as_mut().poll(cx);
        self.timer = Some(timer);
        Poll::Pending
    }
}

pub(super) fn expired() -> Bytes {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Expired",
        "message": "too old resource version", "code": 410});
    Bytes::from(format!("{}\n", json!({"type": "ERROR", "object": status})))
}

/// Version and kind of an object of which only the metadata is told.
pub(super) const PARTIAL: (&str, &str) = ("meta.k8s.io/v1", "PartialObjectMetadata");

pub(super) fn metadata_only(object: &Value) -> Vec<u8> {
    let (api, kind) = PARTIAL;
    let partial = json!({"apiVersion": api, "kind": kind, "metadata": object["metadata"]});
    partial.to_string().into_bytes()
}

pub(super) fn frame(change: &Change, partial: bool) -> Bytes {
    let what = match change.what {
        What::Added => "ADDED",
        What::Modified => "MODIFIED",
        What::Deleted => "DELETED",
    };
    let metadata = partial.then(|| metadata_only(&change.object.value));
    let object = metadata.as_deref().unwrap_or(&change.object.text);
    let mut text = Vec::with_capacity(object.len() + 40);
    text.extend_from_slice(b"{\"type\":\"");
    text.extend_from_slice(what.as_bytes());
    text.extend_from_slice(b"\",\"object\":");
    text.extend_from_slice(object);
    text.extend_from_slice(b"}\n");
    Bytes::from(text)
}
