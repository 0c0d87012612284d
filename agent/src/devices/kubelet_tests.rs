use super::*;
use h2::server::{self, SendResponse};
use tokio::net::UnixListener;

fn pods() -> ListResponse {
    let container = Container {
        devices: vec![Devices {
            resource: "nvidia.com/gpu".into(),
            ids: vec!["GPU-a".into(), "GPU-b".into()],
        }],
        claims: vec![Claim {
            devices: vec![Claimed {
                driver: "gpu.nvidia.com".into(),
                device: "gpu-3".into(),
            }],
        }],
    };
    ListResponse {
        pods: vec![Pod {
            name: "train".into(),
            namespace: "lab".into(),
            containers: vec![container],
        }],
    }
}

fn framed(body: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(body.len()).unwrap());
    frame.put(body);
    frame.freeze()
}

/// What a kubelet does with the call.
enum Mood {
    Answers(Bytes),
    Fails,
    Hangs,
    Floods,
}

async fn answer(mood: Mood, mut respond: SendResponse<Bytes>) {
    let head = http::Response::builder().header("content-type", "application/grpc");
    let trailers = |status: &str| {
        HeaderMap::from_iter([(
            http::HeaderName::from_static("grpc-status"),
            status.parse().unwrap(),
        )])
    };
    match mood {
        Mood::Answers(body) => {
            let mut stream = respond.send_response(head.body(()).unwrap(), false).unwrap();
            stream.send_data(body, false).unwrap();
            stream.send_trailers(trailers("0")).unwrap();
        }
        Mood::Fails => {
            let head = head
                .header("grpc-status", "8")
                .header("grpc-message", "rejected by rate limit");
            respond.send_response(head.body(()).unwrap(), true).unwrap();
        }
        Mood::Hangs => std::future::pending().await,
        Mood::Floods => {
            let mut stream = respond.send_response(head.body(()).unwrap(), false).unwrap();
            for _ in 0..=(MAX_LIST_BYTES >> 16) {
                stream.send_data(Bytes::from(vec![0; 1 << 16]), false).unwrap();
            }
        }
    }
}

/// Calls a kubelet of that mood and returns what came of it.
async fn called(mood: Mood) -> Result<Vec<Allocated>, ListError> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kubelet.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let kubelet = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = server::handshake(stream).await.unwrap();
        let (request, respond) = connection.accept().await.unwrap().unwrap();
        assert_eq!(request.uri().path(), "/v1.PodResourcesLister/List");
        let answering = tokio::spawn(answer(mood, respond));
        while connection.accept().await.is_some() {}
        answering.abort();
    });
    let outcome = tokio::time::timeout(Duration::from_millis(ANSWER.0), list(&socket))
        .await
        .unwrap_or(Err(ListError::Late));
    kubelet.abort();
    outcome
}

#[tokio::test]
async fn plugins_devices_and_claims_devices_of_every_pod_are_read() {
    let all = called(Mood::Answers(framed(&pods().encode_to_vec())))
        .await
        .unwrap();
    let seen: Vec<(&str, &str)> = all.iter().map(|a| (a.resource.as_str(), a.id.as_str())).collect();
    assert_eq!(
        seen,
        [
            ("nvidia.com/gpu", "GPU-a"),
            ("nvidia.com/gpu", "GPU-b"),
            ("gpu.nvidia.com", "gpu-3")
        ]
    );
    assert!(
        all.iter()
            .all(|a| (a.namespace.as_str(), a.pod.as_str()) == ("lab", "train"))
    );
    assert_eq!(called(Mood::Answers(framed(&[]))).await.unwrap(), []);
}

#[tokio::test]
async fn a_kubelet_that_refuses_hangs_floods_or_is_not_there_is_an_error_in_time_that_says_so() {
    let failed = called(Mood::Fails).await.unwrap_err().to_string();
    assert_eq!(failed, "gRPC status 8: rejected by rate limit");
    assert!(matches!(called(Mood::Hangs).await, Err(ListError::Late)));
    assert!(matches!(called(Mood::Floods).await, Err(ListError::TooLong)));
    let missing = list(Path::new("/nowhere/kubelet.sock"))
        .await
        .unwrap_err()
        .to_string();
    assert!(missing.contains("/nowhere/kubelet.sock"), "{missing}");
}

#[tokio::test]
async fn an_answer_that_is_no_message_is_never_taken_for_an_empty_list() {
    let good = framed(&pods().encode_to_vec());
    let mut compressed = good.to_vec();
    compressed[0] = 1;
    let short = good.slice(..good.len() - 1);
    for bad in [
        Bytes::new(),
        good.slice(..4),
        short,
        Bytes::from(compressed),
        framed(&[0xFF; 8]),
    ] {
        assert!(called(Mood::Answers(bad.clone())).await.is_err(), "{bad:?}");
    }
}
