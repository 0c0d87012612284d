//! The kubelet's list of pods and the devices they were given.
//!
//! Owns: the one gRPC call `v1.PodResourcesLister/List` over the kubelet's Unix socket, its bounds, and asking again and
//! again. Must not judge what is listed: `gogrid_agent_core::guest` does.

use crate::event::{Event, Hub};
use bytes::{BufMut as _, Bytes, BytesMut};
use gogrid_agent_core::guest::{ANSWER, Allocated, MAX_LIST_BYTES, pause};
use http::{HeaderMap, Request, StatusCode};
use prost::Message;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// Where the call goes; a Unix socket has no host of its own.
const LIST: &str = "http://localhost/v1.PodResourcesLister/List";
/// Bytes before each gRPC message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// Why the kubelet's answer is not known.
#[derive(Debug, thiserror::Error)]
enum ListError {
    #[error("{}: {source}", socket.display())]
    Connect { socket: PathBuf, source: std::io::Error },
    #[error("no answer within {ANSWER:?}")]
    Late,
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    #[error("HTTP: {0}")]
    Http(#[from] http::Error),
    #[error("HTTP status {0}")]
    Status(StatusCode),
    #[error("gRPC status {code}: {message}")]
    Grpc { code: String, message: String },
    #[error("the answer is longer than {MAX_LIST_BYTES} bytes")]
    TooLong,
    #[error("the answer is no gRPC message: {0}")]
    Frame(&'static str),
    #[error("the answer can't be read: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// What is read of the kubelet's answer, after `podresources/v1/api.proto`.
#[derive(Clone, PartialEq, Message)]
struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    pods: Vec<Pod>,
}

#[derive(Clone, PartialEq, Message)]
struct Pod {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(message, repeated, tag = "3")]
    containers: Vec<Container>,
}

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(message, repeated, tag = "2")]
    devices: Vec<Devices>,
    #[prost(message, repeated, tag = "5")]
    claims: Vec<Claim>,
}

#[derive(Clone, PartialEq, Message)]
struct Devices {
    #[prost(string, tag = "1")]
    resource: String,
    #[prost(string, repeated, tag = "2")]
    ids: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Claim {
    #[prost(message, repeated, tag = "4")]
    devices: Vec<Claimed>,
}

#[derive(Clone, PartialEq, Message)]
struct Claimed {
    #[prost(string, tag = "2")]
    driver: String,
    #[prost(string, tag = "4")]
    device: String,
}

/// Asks for ever and tells the owner each answer, or why there is none.
pub(crate) async fn watch(socket: PathBuf, hub: Hub) {
    let mut failures = 0_u32;
    loop {
        let limit = Duration::from_millis(ANSWER.0);
        let answer = tokio::time::timeout(limit, list(&socket))
            .await
            .unwrap_or(Err(ListError::Late));
        failures = match &answer {
            Ok(_) => 0,
            Err(error) => {
                if failures == 0 {
                    tracing::warn!(%error, "the kubelet does not say which pods hold devices");
                }
                failures.saturating_add(1)
            }
        };
        hub.send(Event::PodGpus(answer.map_err(|error| error.to_string())))
            .await;
        tokio::time::sleep(Duration::from_millis(pause(failures).0)).await;
    }
}

/// One call over a connection of its own: the kubelet makes its socket anew when it starts.
async fn list(socket: &Path) -> Result<Vec<Allocated>, ListError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ListError::Connect {
            socket: socket.to_owned(),
            source,
        })?;
    let (mut client, connection) = h2::client::handshake(stream).await?;
    tokio::select! {
        answer = call(&mut client) => answer,
        // It ends by itself only when something is wrong with it.
        ended = connection => Err(ended.err().map_or(ListError::Frame("the connection ended"), ListError::from)),
    }
}

async fn call(client: &mut h2::client::SendRequest<Bytes>) -> Result<Vec<Allocated>, ListError> {
    std::future::poll_fn(|context| client.poll_ready(context)).await?;
    let request = Request::post(LIST)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (answer, mut body) = client.send_request(request, false)?;
    // The request has no fields: not compressed, no bytes.
    body.send_data(Bytes::from_static(&[0; PREFIX]), true)?;
    let (head, mut body) = answer.await?.into_parts();
    if head.status != StatusCode::OK {
        return Err(ListError::Status(head.status));
    }
    let mut read = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        if read.len().saturating_add(chunk.len()) > MAX_LIST_BYTES {
            return Err(ListError::TooLong);
        }
        body.flow_control().release_capacity(chunk.len())?;
        read.put(chunk);
    }
    // A call that fails before its first message has its status in the head.
    let trailers = body.trailers().await?.unwrap_or_default();
    outcome(&head.headers)
        .or_else(|| outcome(&trailers))
        .transpose()?;
    allocated(&read)
}

/// The status of the call, if these headers bear one.
fn outcome(headers: &HeaderMap) -> Option<Result<(), ListError>> {
    let text = |name: &str| {
        let value = headers.get(name)?;
        Some(
            String::from_utf8_lossy(value.as_bytes())
                .chars()
                .take(200)
                .collect::<String>(),
        )
    };
    let code = text("grpc-status")?;
    Some(if code == "0" {
        Ok(())
    } else {
        let message = text("grpc-message").unwrap_or_default();
        Err(ListError::Grpc { code, message })
    })
}

/// All devices of all pods in one gRPC message.
fn allocated(message: &[u8]) -> Result<Vec<Allocated>, ListError> {
    let (prefix, body) = message
        .split_first_chunk::<PREFIX>()
        .ok_or(ListError::Frame("it is cut off"))?;
    let [compressed, a, b, c, d] = *prefix;
    if compressed != 0 {
        return Err(ListError::Frame("it is compressed, which was not asked for"));
    }
    if usize::try_from(u32::from_be_bytes([a, b, c, d])) != Ok(body.len()) {
        return Err(ListError::Frame("its length is not the one it gives"));
    }
    let mut all = vec![];
    for Pod {
        name,
        namespace,
        containers,
    } in ListResponse::decode(body)?.pods
    {
        let mut add = |resource: String, id: String| {
            all.push(Allocated {
                namespace: namespace.clone(),
                pod: name.clone(),
                resource,
                id,
            });
        };
        for Container { devices, claims } in containers {
            for Devices { resource, ids } in devices {
                for id in ids {
                    add(resource.clone(), id);
                }
            }
            for Claimed { driver, device } in claims.into_iter().flat_map(|claim| claim.devices) {
                add(driver, device);
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
#[path = "kubelet_tests.rs"]
mod tests;
