//! What may be opened beneath the roots.

use gogrid_store::{Roots, StoreError};
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

struct Place {
    _dir: TempDir,
    root: PathBuf,
    outside: PathBuf,
    roots: Roots,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("models");
    let outside = dir.path().join("outside");
    fs::create_dir_all(root.join("a/b")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret.gguf"), "secret").unwrap();
    fs::write(root.join("a/b/m.gguf"), "model").unwrap();
    let roots = Roots::new([root.clone()]).unwrap();
    Place {
        _dir: dir,
        root,
        outside,
        roots,
    }
}

fn reason(result: Result<fs::File, StoreError>) -> &'static str {
    result.unwrap_err().reason()
}

#[test]
fn a_file_beneath_a_root_opens_also_through_a_relative_link_that_stays_inside() {
    let place = place();
    symlink("a/b/m.gguf", place.root.join("link.gguf")).unwrap();
    for path in ["a/b/m.gguf", "link.gguf"] {
        let mut text = String::new();
        place
            .roots
            .open(&place.root.join(path))
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "model");
    }
}

#[test]
fn a_link_out_of_the_root_is_refused_whether_absolute_relative_or_a_directory() {
    let place = place();
    symlink(
        place.outside.join("secret.gguf"),
        place.root.join("absolute.gguf"),
    )
    .unwrap();
    symlink("../outside/secret.gguf", place.root.join("relative.gguf")).unwrap();
    symlink("../outside", place.root.join("dir")).unwrap();
    symlink("loop.gguf", place.root.join("loop.gguf")).unwrap();
    for path in [
        "absolute.gguf",
        "relative.gguf",
        "dir/secret.gguf",
        "loop.gguf",
        "../outside/secret.gguf",
    ] {
        assert_eq!(
            reason(place.roots.open(&place.root.join(path))),
            "OutsideModelRoots",
            "{path}"
        );
    }
}

#[test]
fn a_path_elsewhere_is_refused_with_the_roots_named() {
    let place = place();
    let error = place.roots.open(&place.outside.join("secret.gguf")).unwrap_err();
    assert!(matches!(&error, StoreError::OutsideRoots { roots, .. } if *roots == [place.root.clone()]));
    let sibling = PathBuf::from(format!("{}-more/m.gguf", place.root.display()));
    assert_eq!(reason(place.roots.open(&sibling)), "OutsideModelRoots");
    assert_eq!(reason(place.roots.open(&place.root)), "OutsideModelRoots");
    let none = Roots::default().open(Path::new("/m.gguf")).unwrap_err();
    assert!(none.to_string().contains("none are configured"), "{none}");
}

#[test]
fn what_is_missing_or_no_file_is_said_so() {
    let place = place();
    assert_eq!(
        reason(place.roots.open(&place.root.join("nope.gguf"))),
        "ModelNotFound"
    );
    assert_eq!(
        reason(place.roots.open(&place.root.join("a/b/m.gguf/x"))),
        "ModelNotFound"
    );
    assert_eq!(reason(place.roots.open(&place.root.join("a"))), "NotRegularFile");
    let fifo = place.root.join("fifo.gguf");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert_eq!(reason(place.roots.open(&fifo)), "NotRegularFile");
    let absent = Roots::new([place.root.join("later")]).unwrap();
    assert_eq!(
        reason(absent.open(&place.root.join("later/m.gguf"))),
        "ModelNotFound"
    );
}

#[test]
fn roots_must_be_absolute() {
    for path in ["models", "/models/../etc", ""] {
        assert_eq!(
            Roots::new([PathBuf::from(path)]).unwrap_err().reason(),
            "InvalidConfiguration"
        );
    }
}

#[test]
fn the_listing_holds_model_files_and_names_links_out_of_the_root_without_their_size() {
    let place = place();
    fs::write(place.root.join("z.GGUF"), "12345678").unwrap();
    fs::write(place.root.join("notes.txt"), "x").unwrap();
    symlink("../outside", place.root.join("dir")).unwrap();
    symlink("../outside/secret.gguf", place.root.join("secret.gguf")).unwrap();
    symlink("a", place.root.join("again")).unwrap();
    let listing = place.roots.list(64).unwrap();
    let found: Vec<_> = listing
        .models
        .iter()
        .map(|model| {
            (
                model.path.strip_prefix(&place.root).unwrap().to_str().unwrap(),
                model.bytes,
            )
        })
        .collect();
    assert_eq!(found, [("a/b/m.gguf", 5), ("secret.gguf", 0), ("z.GGUF", 8)]);
    assert!(!listing.truncated);
}

#[test]
fn a_listing_beyond_its_limits_says_so() {
    let place = place();
    for index in 0..5 {
        fs::write(place.root.join(format!("{index}.gguf")), "x").unwrap();
    }
    let listing = place.roots.list(3).unwrap();
    assert_eq!((listing.models.len(), listing.truncated), (3, true));
    let deep = (0..12).fold(place.root.clone(), |path, level| path.join(level.to_string()));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("deep.gguf"), "x").unwrap();
    let listing = place.roots.list(64).unwrap();
    assert!(
        listing.truncated
            && listing
                .models
                .iter()
                .all(|model| !model.path.ends_with("deep.gguf"))
    );
}
