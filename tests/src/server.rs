//! A web server for one model.

#![allow(clippy::disallowed_methods, reason = "serves at a real speed")]

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

const PIECE: usize = 256 << 10;

/// What is served.
#[derive(Clone, Debug)]
pub enum Body {
    /// A file.
    File(PathBuf),
    /// These bytes and zeroes after them: a model without weights worth the name, of any size.
    Zeroes {
        /// The first bytes.
        head: Vec<u8>,
        /// Length of all.
        length: u64,
    },
}

impl Body {
    fn open(&self) -> Result<(u64, Box<dyn Read>)> {
        Ok(match self {
            Self::File(path) => {
                let file = std::fs::File::open(path)?;
                (file.metadata()?.len(), Box::new(file))
            }
            Self::Zeroes { head, length } => {
                let all = std::io::Cursor::new(head.clone()).chain(std::io::repeat(0));
                (*length, Box::new(all.take(*length)))
            }
        })
    }

    /// SHA-256 of all of it, in hexadecimal digits.
    pub fn sha256(&self) -> Result<String> {
        use sha2::Digest as _;
        let (_, mut body) = self.open()?;
        let mut hasher = sha2::Sha256::new();
        let mut piece = vec![0; PIECE];
        loop {
            let count = body.read(&mut piece)?;
            if count == 0 {
                return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect());
            }
            hasher.update(piece.get(..count).unwrap_or_default());
        }
    }
}

/// Serves to everybody for ever, at that many bytes a second at most; returns the address.
pub fn serve(body: Body, rate: Option<u64>) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("http://{}/model.gguf", listener.local_addr()?);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let body = body.clone();
            std::thread::spawn(move || {
                // A client that goes away is its own business.
                let _ = answer(stream, &body, rate);
            });
        }
    });
    Ok(address)
}

fn answer(mut stream: TcpStream, body: &Body, rate: Option<u64>) -> Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let (length, mut body) = body.open()?;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    let mut piece = vec![0; PIECE];
    let begun = Instant::now();
    let mut sent = 0_u64;
    loop {
        let count = body.read(&mut piece)?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(piece.get(..count).unwrap_or_default())?;
        sent += u64::try_from(count)?;
        if let Some(rate) = rate {
            let due = Duration::from_micros(sent * 1_000_000 / rate.max(1));
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }
}
