//! Downloads over a real connection.

use crate::server::{Answer, Server};
use gogrid_store::{
    AddressPolicy, HttpLimits, ModelUri, Roots, Sha256, Store, StoreConfig, StoreError, VerifiedModel,
};
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;

pub(crate) fn config(dir: &Path) -> StoreConfig {
    StoreConfig {
        dir: dir.join("store"),
        roots: Roots::default(),
        policy: AddressPolicy::new(["127.0.0.1"], []).unwrap(),
        http: HttpLimits {
            idle: Duration::from_secs(5),
            ..HttpLimits::default()
        },
        reserve_bytes: 0,
    }
}

fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(config(dir.path())).unwrap();
    (dir, store)
}

fn body(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|index| u8::try_from(index * 31 % 251).unwrap())
        .collect()
}

pub(crate) async fn obtain(store: &Store, uri: &str, digest: Sha256) -> Result<VerifiedModel, StoreError> {
    store
        .obtain(&ModelUri::parse(uri).unwrap(), digest, |_, _| ())
        .await
}

fn files(dir: &TempDir, below: &str) -> Vec<String> {
    let entries = fs::read_dir(dir.path().join("store").join(below)).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Waits for what another thread does after a future was dropped.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never happened: {what}");
}

#[tokio::test]
async fn a_model_is_downloaded_once_and_served_from_the_store_afterwards() {
    let content = body(3_000_000);
    let digest = Sha256::of(&content);
    let sent = content.clone();
    let server = Server::start(move |_| Answer::Body(sent.clone())).await;
    let (dir, store) = store();
    let seen = Arc::new(AtomicU64::new(0));
    let progress = Arc::clone(&seen);
    let uri = ModelUri::parse(&server.url("/m.gguf?key=secret")).unwrap();
    let mut model = store
        .obtain(&uri, digest, move |done, total| {
            assert_eq!(total, Some(3_000_000));
            progress.fetch_max(done, Ordering::SeqCst);
        })
        .await
        .unwrap();
    let mut read = Vec::new();
    model.file.read_to_end(&mut read).unwrap();
    assert!(read == content);
    assert_eq!(
        (model.bytes, model.digest, seen.load(Ordering::SeqCst)),
        (3_000_000, digest, 3_000_000)
    );
    assert_eq!(model.origin, server.url("/m.gguf"));
    assert_eq!(files(&dir, "objects/sha256"), [digest.to_string()]);
    assert!(files(&dir, "partial").is_empty());

    obtain(&store, &server.url("/m.gguf"), digest).await.unwrap();
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn the_file_handed_out_cannot_be_written_to() {
    let server = Server::start(|_| Answer::Body(b"model".to_vec())).await;
    let (_dir, store) = store();
    let model = obtain(&store, &server.url("/m"), Sha256::of(b"model"))
        .await
        .unwrap();
    assert!(std::io::Write::write(&mut &model.file, b"x").is_err());
}

#[tokio::test]
async fn callers_at_the_same_time_share_one_download() {
    let content = body(500_000);
    let digest = Sha256::of(&content);
    let server = Server::start(move |_| Answer::Body(content.clone())).await;
    let (_dir, store) = store();
    let url = server.url("/m");
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let (store, url) = (store.clone(), url.clone());
            tokio::spawn(async move { obtain(&store, &url, digest).await.map(|model| model.bytes) })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), 500_000);
    }
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn wrong_bytes_are_reported_with_both_digests_and_kept_nowhere() {
    let server = Server::start(|_| Answer::Body(b"other".to_vec())).await;
    let (dir, store) = store();
    let error = obtain(&store, &server.url("/m"), Sha256::of(b"model"))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "DigestMismatch");
    assert!(matches!(
        error,
        StoreError::DigestMismatch { expected, actual, bytes: 5 }
            if expected == Sha256::of(b"model") && actual == Sha256::of(b"other")
    ));
    assert!(files(&dir, "partial").is_empty() && files(&dir, "objects/sha256").is_empty());
}

#[tokio::test]
async fn a_body_that_ends_early_is_not_kept() {
    let server = Server::start(|_| Answer::Short {
        body: body(1000),
        announced: 2000,
    })
    .await;
    let (dir, store) = store();
    let error = obtain(&store, &server.url("/m"), Sha256::of(&body(1000)))
        .await
        .unwrap_err();
    assert!(
        matches!(error, StoreError::Transfer { bytes: 1000, .. }),
        "{error:?}"
    );
    assert_eq!(
        (error.reason(), error.is_transient()),
        ("SourceUnavailable", true)
    );
    assert!(files(&dir, "partial").is_empty() && files(&dir, "objects/sha256").is_empty());
}

#[tokio::test]
async fn a_server_that_falls_silent_is_given_up() {
    let server = Server::start(|_| Answer::Stall {
        body: body(1000),
        announced: 2000,
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let http = HttpLimits {
        idle: Duration::from_millis(200),
        ..HttpLimits::default()
    };
    let store = Store::open(StoreConfig {
        http,
        ..config(dir.path())
    })
    .unwrap();
    let error = obtain(&store, &server.url("/m"), Sha256::of(&body(2000)))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "SourceUnavailable");
    assert!(files(&dir, "partial").is_empty());
}

#[tokio::test]
async fn a_download_dropped_half_way_leaves_nothing_loadable_and_the_next_one_works() {
    let content = body(400_000);
    let digest = Sha256::of(&content);
    let stalled = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let switch = Arc::clone(&stalled);
    let server = Server::start(move |_| {
        if switch.load(Ordering::SeqCst) {
            Answer::Stall {
                body: content[..200_000].to_vec(),
                announced: content.len(),
            }
        } else {
            Answer::Body(content.clone())
        }
    })
    .await;
    let (dir, store) = store();
    let done = Arc::new(AtomicU64::new(0));
    let (progress, watched) = (Arc::clone(&done), Arc::clone(&done));
    let uri = ModelUri::parse(&server.url("/m")).unwrap();
    tokio::select! {
        _ = store.obtain(&uri, digest, move |bytes, _| progress.store(bytes, Ordering::SeqCst)) => panic!("it stalls"),
        () = eventually("half of it", || watched.load(Ordering::SeqCst) == 200_000) => {}
    }
    eventually("the partial file is gone", || files(&dir, "partial").is_empty()).await;
    assert!(files(&dir, "objects/sha256").is_empty());
    assert!(store.open_verified(digest).await.unwrap().is_none());

    stalled.store(false, Ordering::SeqCst);
    assert_eq!(
        obtain(&store, &server.url("/m"), digest).await.unwrap().bytes,
        400_000
    );
}

#[tokio::test]
async fn redirects_are_followed_up_to_the_limit() {
    let server = Server::start(|path| match path.trim_start_matches('/').parse::<u32>() {
        Ok(0) => Answer::Body(b"model".to_vec()),
        Ok(left) => Answer::Redirect(format!("/{}", left - 1)),
        Err(_) => Answer::Status(404),
    })
    .await;
    let (_dir, store) = store();
    let digest = Sha256::of(b"model");
    let error = obtain(&store, &server.url("/6"), digest).await.unwrap_err();
    assert!(matches!(error, StoreError::TooManyRedirects { limit: 5 }));
    assert_eq!(obtain(&store, &server.url("/5"), digest).await.unwrap().bytes, 5);
}

#[tokio::test]
async fn a_redirect_to_a_refused_address_or_scheme_is_not_followed() {
    let victim = Server::start(|_| Answer::Body(b"model".to_vec())).await;
    for (to, reason) in [
        (format!("http://localhost:{}/m", victim.port), "AddressRefused"),
        (format!("http://127.0.0.2:{}/m", victim.port), "AddressRefused"),
        (
            format!("http://[::ffff:127.0.0.2]:{}/m", victim.port),
            "AddressRefused",
        ),
        (format!("http://0x7f000002:{}/m", victim.port), "AddressRefused"),
        (
            "http://169.254.169.254/latest/meta-data".to_owned(),
            "AddressRefused",
        ),
        ("file:///etc/passwd".to_owned(), "UnsupportedScheme"),
        (
            format!("http://user:pass@127.0.0.1:{}/m", victim.port),
            "InvalidModelUri",
        ),
    ] {
        let location = to.clone();
        let server = Server::start(move |_| Answer::Redirect(location.clone())).await;
        let dir = tempfile::tempdir().unwrap();
        // Only 127.0.0.1 is allowed; "localhost" may also be ::1, which is not.
        let policy = AddressPolicy::new(["127.0.0.1"], ["127.0.0.2".parse().unwrap()]).unwrap();
        let store = Store::open(StoreConfig {
            policy,
            ..config(dir.path())
        })
        .unwrap();
        let result = obtain(&store, &server.url("/m"), Sha256::of(b"model")).await;
        match result {
            Err(error) => assert_eq!(error.reason(), reason, "{to}: {error}"),
            // A machine whose localhost is 127.0.0.1 alone was allowed to go there.
            Ok(_) => assert!(to.contains("localhost"), "{to}"),
        }
    }
}

#[tokio::test]
async fn a_loopback_server_is_refused_unless_allowed_and_never_contacted() {
    let server = Server::start(|_| Answer::Body(b"model".to_vec())).await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(StoreConfig {
        policy: AddressPolicy::default(),
        ..config(dir.path())
    })
    .unwrap();
    let error = obtain(&store, &server.url("/m"), Sha256::of(b"model"))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "AddressRefused");
    assert_eq!(server.requests(), 0);
}

#[tokio::test]
async fn statuses_are_reported_without_what_the_server_wrote() {
    let server = Server::start(|path| Answer::Status(path[1..].parse().unwrap())).await;
    let (_dir, store) = store();
    for (status, reason, transient) in [
        (404, "ModelNotFound", false),
        (410, "ModelNotFound", false),
        (403, "SourceUnavailable", false),
        (206, "SourceUnavailable", false),
        (503, "SourceUnavailable", true),
    ] {
        let error = obtain(&store, &server.url(&format!("/{status}")), Sha256::of(b""))
            .await
            .unwrap_err();
        assert_eq!(
            (error.reason(), error.is_transient()),
            (reason, transient),
            "{status}"
        );
        assert!(!format!("{error} {error:?}").contains("SECRET"));
    }
}

#[tokio::test]
async fn size_and_disk_are_checked_before_the_body_is_read() {
    let server = Server::start(|_| Answer::Announce(1 << 50)).await;
    let dir = tempfile::tempdir().unwrap();
    let http = HttpLimits {
        max_bytes: 1 << 60,
        ..HttpLimits::default()
    };
    let store = Store::open(StoreConfig {
        http,
        ..config(dir.path())
    })
    .unwrap();
    let error = obtain(&store, &server.url("/m"), Sha256::of(b""))
        .await
        .unwrap_err();
    assert!(
        matches!(error, StoreError::InsufficientDisk { needed, free } if needed == 1 << 50 && free > 0),
        "{error}"
    );
    drop(store);

    let http = HttpLimits {
        max_bytes: 1000,
        ..HttpLimits::default()
    };
    let store = Store::open(StoreConfig {
        http,
        ..config(dir.path())
    })
    .unwrap();
    let error = obtain(&store, &server.url("/m"), Sha256::of(b""))
        .await
        .unwrap_err();
    assert!(
        matches!(error, StoreError::TooLarge { limit: 1000, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn the_reserve_of_the_disk_stays_free() {
    let server = Server::start(|_| Answer::Body(b"model".to_vec())).await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(StoreConfig {
        reserve_bytes: u64::MAX,
        ..config(dir.path())
    })
    .unwrap();
    let error = obtain(&store, &server.url("/m"), Sha256::of(b"model"))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "InsufficientDisk");
}

#[tokio::test]
async fn a_secure_connection_needs_no_certificates_of_the_system() {
    // The server does not speak TLS: what matters is that the client gets as far as the handshake.
    let server = Server::start(|_| Answer::Status(500)).await;
    let dir = tempfile::tempdir().unwrap();
    let http = HttpLimits {
        idle: Duration::from_millis(300),
        connect: Duration::from_millis(300),
        ..HttpLimits::default()
    };
    let store = Store::open(StoreConfig {
        http,
        ..config(dir.path())
    })
    .unwrap();
    let url = format!("https://127.0.0.1:{}/m", server.port);
    let error = obtain(&store, &url, Sha256::of(b"")).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Transfer { bytes: 0, .. }),
        "{error:?}"
    );
}
