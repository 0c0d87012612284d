//! Stored objects, files of the node, and the directory of the store.

use crate::downloads::{config, obtain};
use crate::server::{Answer, Server};
use gogrid_store::{Roots, Sha256, Store, StoreConfig, StoreError, StoredObject};
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};

#[tokio::test]
async fn a_corrupt_object_is_removed_and_downloaded_again() {
    let server = Server::start(|_| Answer::Body(b"model".to_vec())).await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(config(dir.path())).unwrap();
    let digest = Sha256::of(b"model");
    obtain(&store, &server.url("/m"), digest).await.unwrap();
    let object = dir.path().join("store/objects/sha256").join(digest.to_string());
    fs::set_permissions(&object, fs::Permissions::from_mode(0o600)).unwrap();

    fs::write(&object, "mold!").unwrap();
    let error = store.open_verified(digest).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("ObjectCorrupt", true));
    assert!(!object.exists());

    fs::write(&object, "mold!").unwrap();
    let mut model = obtain(&store, &server.url("/m"), digest).await.unwrap();
    let mut text = String::new();
    model.file.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), server.requests()), ("model", 2));
}

#[tokio::test]
async fn objects_are_listed_and_removed_while_open_files_stay_readable() {
    let server = Server::start(|_| Answer::Body(b"model".to_vec())).await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(config(dir.path())).unwrap();
    let digest = Sha256::of(b"model");
    let mut model = obtain(&store, &server.url("/m"), digest).await.unwrap();
    assert_eq!(store.objects().unwrap(), [StoredObject { digest, bytes: 5 }]);
    assert!(store.remove(digest).unwrap());
    assert!(!store.remove(digest).unwrap());
    assert!(store.objects().unwrap().is_empty());
    let mut text = String::new();
    model.file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "model");
}

#[test]
fn leftovers_of_a_killed_process_go_at_the_start_and_are_never_objects() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(config(dir.path())).unwrap());
    let leftover = dir
        .path()
        .join("store/partial")
        .join(format!("{}.0", Sha256::of(b"model")));
    fs::write(&leftover, "mod").unwrap();
    let store = Store::open(config(dir.path())).unwrap();
    assert!(!leftover.exists() && store.objects().unwrap().is_empty());
}

#[test]
fn a_second_store_in_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(config(dir.path())).unwrap();
    assert!(matches!(
        Store::open(config(dir.path())),
        Err(StoreError::Busy { .. })
    ));
    drop(first);
    Store::open(config(dir.path())).unwrap();
}

#[tokio::test]
async fn a_file_of_the_node_is_verified_where_it_lies_and_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("models");
    fs::create_dir(&root).unwrap();
    let content = vec![7_u8; 2_500_000];
    fs::write(root.join("m.gguf"), &content).unwrap();
    fs::write(dir.path().join("secret.gguf"), "secret").unwrap();
    symlink("../secret.gguf", root.join("link.gguf")).unwrap();
    let roots = Roots::new([root.clone()]).unwrap();
    let store = Store::open(StoreConfig {
        roots,
        ..config(dir.path())
    })
    .unwrap();
    let uri = |name: &str| format!("file://{}/{name}", root.display());

    let mut model = obtain(&store, &uri("m.gguf"), Sha256::of(&content))
        .await
        .unwrap();
    let mut read = Vec::new();
    model.file.read_to_end(&mut read).unwrap();
    assert!(read == content && model.bytes == 2_500_000);
    assert_eq!(model.origin, uri("m.gguf"));
    assert!(store.objects().unwrap().is_empty());
    assert!(std::io::Write::write(&mut &model.file, b"x").is_err());

    let wrong = obtain(&store, &uri("m.gguf"), Sha256::of(b"else"))
        .await
        .unwrap_err();
    assert!(matches!(
        wrong,
        StoreError::DigestMismatch { bytes: 2_500_000, .. }
    ));
    let outside = obtain(&store, &uri("link.gguf"), Sha256::of(b"secret"))
        .await
        .unwrap_err();
    assert_eq!(outside.reason(), "OutsideModelRoots");
    let missing = obtain(&store, &uri("nope.gguf"), Sha256::of(b""))
        .await
        .unwrap_err();
    assert_eq!(missing.reason(), "ModelNotFound");
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_verified_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("models");
    fs::create_dir(&root).unwrap();
    let path = root.join("m.gguf");
    let content = vec![7_u8; 3 << 20];
    fs::write(&path, &content).unwrap();
    let roots = Roots::new([root]).unwrap();
    let store = Store::open(StoreConfig {
        roots,
        ..config(dir.path())
    })
    .unwrap();
    let uri = gogrid_store::ModelUri::parse(&format!("file://{}", path.display())).unwrap();
    // The hash is of the old bytes; the file grows behind the reader's back after the first chunk.
    let result = store
        .obtain(&uri, Sha256::of(&content), move |done, _| {
            if done <= 1 << 20 {
                let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                file.set_modified(std::time::UNIX_EPOCH).unwrap();
            }
        })
        .await;
    assert!(
        matches!(result, Err(StoreError::SourceChanged { .. })),
        "{result:?}"
    );
}
