//! Opens a download. Owns redirects, pinning of connections to checked addresses and time limits; what is done with the
//! bytes is the store's business.

use crate::address::AddressPolicy;
use crate::error::StoreError;
use crate::uri::{check_web, shown};
use reqwest::header::{ACCEPT_ENCODING, LOCATION};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use std::sync::Arc;
use std::time::Duration;

/// Limits of a download.
#[derive(Clone, Debug)]
pub struct HttpLimits {
    /// Longest wait for a connection, TLS included.
    pub connect: Duration,
    /// Longest silence while waiting for headers or the next bytes.
    pub idle: Duration,
    /// Redirects followed.
    pub redirects: u32,
    /// Largest file, in bytes.
    pub max_bytes: u64,
}

impl Default for HttpLimits {
    /// 10 s to connect, 30 s of silence, 5 redirects, 1 TiB.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            redirects: 5,
            max_bytes: 1 << 40,
        }
    }
}

/// Makes requests one hop at a time.
#[derive(Clone, Debug)]
pub(crate) struct Downloader {
    policy: AddressPolicy,
    limits: HttpLimits,
    tls: rustls::ClientConfig,
}

/// An answer whose body is the file.
pub(crate) struct Download {
    pub(crate) response: Response,
    pub(crate) host: String,
    /// Bytes announced.
    pub(crate) length: Option<u64>,
}

impl Downloader {
    /// TLS with ring and the Mozilla roots compiled in: a minimal image has no certificates of its own, and what the
    /// node's image trusts must not decide where models come from.
    pub(crate) fn new(policy: AddressPolicy, limits: HttpLimits) -> Result<Self, StoreError> {
        let mut roots = rustls::RootCertStore::empty();
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| StoreError::Client(Box::new(error)))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { policy, limits, tls })
    }

    pub(crate) fn max_bytes(&self) -> u64 {
        self.limits.max_bytes
    }

    /// Follows redirects from `url` until a body is found. Every hop is resolved, checked and pinned anew.
    pub(crate) async fn open(&self, url: &Url) -> Result<Download, StoreError> {
        let mut url = url.clone();
        for _ in 0..=self.limits.redirects {
            check_web(&url)?;
            let host = url.host_str().unwrap_or_default().to_owned();
            let response = self.request(&url, &host).await?;
            let status = response.status();
            if status.is_redirection() {
                let next = next_hop(&url, &response).ok_or_else(|| StoreError::Status {
                    host: host.clone(),
                    status: status.as_u16(),
                })?;
                if url.scheme() == "https" && next.scheme() == "http" {
                    return Err(StoreError::InsecureRedirect { host });
                }
                url = next;
                continue;
            }
            return match status {
                StatusCode::OK => self.accept(response, host),
                StatusCode::NOT_FOUND | StatusCode::GONE => Err(StoreError::NotFound { origin: shown(&url) }),
                _ => Err(StoreError::Status {
                    host,
                    status: status.as_u16(),
                }),
            };
        }
        Err(StoreError::TooManyRedirects {
            limit: self.limits.redirects,
        })
    }

    async fn request(&self, url: &Url, host: &str) -> Result<Response, StoreError> {
        let port = url.port_or_known_default().unwrap_or(443);
        let addresses = self.policy.resolve(host, port).await?;
        // A client per hop: it knows this host by the checked addresses only, so a second look-up cannot change them.
        let client = Client::builder()
            .tls_backend_preconfigured(self.tls.clone())
            .no_proxy()
            .redirect(redirect::Policy::none())
            .resolve_to_addrs(host, &addresses)
            .connect_timeout(self.limits.connect)
            .read_timeout(self.limits.idle)
            .user_agent(concat!("gogrid/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| StoreError::Client(Box::new(error.without_url())))?;
        client
            .get(url.clone())
            .header(ACCEPT_ENCODING, "identity")
            .send()
            .await
            .map_err(|error| StoreError::Transfer {
                host: host.to_owned(),
                bytes: 0,
                source: error.without_url(),
            })
    }

    fn accept(&self, response: Response, host: String) -> Result<Download, StoreError> {
        let length = response.content_length();
        match length {
            Some(bytes) if bytes > self.limits.max_bytes => Err(StoreError::TooLarge {
                bytes,
                limit: self.limits.max_bytes,
            }),
            _ => Ok(Download {
                response,
                host,
                length,
            }),
        }
    }
}

fn next_hop(url: &Url, response: &Response) -> Option<Url> {
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    url.join(location).ok()
}
