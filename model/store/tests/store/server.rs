//! A web server on the loopback interface that does exactly what a test tells it to, wrong things included.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What is sent for one path.
#[derive(Clone)]
pub(crate) enum Answer {
    /// 200 with this body.
    Body(Vec<u8>),
    /// 200 that announces more than it sends before it closes.
    Short { body: Vec<u8>, announced: usize },
    /// 200 that sends this much of a larger body and then stays silent.
    Stall { body: Vec<u8>, announced: usize },
    /// 200 with a length no disk has.
    Announce(u64),
    /// 302 to this place.
    Redirect(String),
    /// This status, with a body that must not be shown.
    Status(u16),
}

pub(crate) struct Server {
    pub(crate) port: u16,
    requests: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(answer: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&requests);
        let answer = Arc::new(answer);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (answer, counter) = (Arc::clone(&answer), Arc::clone(&counter));
                tokio::spawn(async move { serve(stream, &*answer, &counter).await });
            }
        });
        Self { port, requests, task }
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, answer: &(impl Fn(&str) -> Answer + Sync), requests: &AtomicUsize) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    requests.fetch_add(1, Ordering::SeqCst);
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap_or("/").to_owned();
    let ok =
        |length: u64| format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    let (head, body, stay) = match answer(&path) {
        Answer::Body(body) => (ok(u64::try_from(body.len()).unwrap()), body, false),
        Answer::Short { body, announced } => (ok(u64::try_from(announced).unwrap()), body, false),
        Answer::Stall { body, announced } => (ok(u64::try_from(announced).unwrap()), body, true),
        Answer::Announce(length) => (ok(length), Vec::new(), true),
        Answer::Redirect(to) => (
            format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"),
            Vec::new(),
            false,
        ),
        Answer::Status(status) => (
            format!("HTTP/1.1 {status} Whatever\r\ncontent-length: 6\r\nconnection: close\r\n\r\n"),
            b"SECRET".to_vec(),
            false,
        ),
    };
    let sent = async {
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&body).await?;
        stream.flush().await
    };
    if sent.await.is_ok() && stay {
        std::future::pending::<()>().await;
    }
}
