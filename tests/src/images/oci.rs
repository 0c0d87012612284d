//! An OCI image as one archive, written so that the same content always gives the same bytes.
//!
//! Owns: the order of entries, the absence of times and owners, digests. Must not: know what is in an image.

use std::collections::BTreeMap;
use std::io::Write as _;

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

const TYPES: &str = "application/vnd.oci.image";

/// One layer's files by absolute path.
#[derive(Debug, Default)]
pub struct Layer(BTreeMap<String, Entry>);

#[derive(Debug)]
enum Entry {
    Directory(u32),
    File(Vec<u8>, u32),
}

impl Layer {
    /// A file that everybody may read and, if `program`, run. Directories above it are made.
    #[must_use]
    pub fn file(mut self, path: &str, content: Vec<u8>, program: bool) -> Self {
        let mode = if program { 0o755 } else { 0o644 };
        self.0.insert(path.into(), Entry::File(content, mode));
        self
    }

    /// An empty directory.
    #[must_use]
    pub fn directory(mut self, path: &str, mode: u32) -> Self {
        self.0.insert(path.into(), Entry::Directory(mode));
        self
    }

    /// The layer's tar: parents before children, by path, all owned by root and of no time.
    fn tar(&self) -> Result<Vec<u8>> {
        let mut all: BTreeMap<&str, &Entry> = BTreeMap::new();
        let parent = Entry::Directory(0o755);
        for path in self.0.keys() {
            for (end, _) in path.match_indices('/').skip(1) {
                all.insert(path.get(..end).unwrap_or_default(), &parent);
            }
        }
        all.extend(self.0.iter().map(|(path, entry)| (path.as_str(), entry)));
        let mut archive = Builder::new(Vec::new());
        for (path, entry) in all {
            let (kind, mode, content): (_, _, &[u8]) = match entry {
                Entry::Directory(mode) => (EntryType::Directory, *mode, &[]),
                Entry::File(content, mode) => (EntryType::Regular, *mode, content),
            };
            append(&mut archive, path.trim_start_matches('/'), kind, mode, content)?;
        }
        Ok(archive.into_inner()?)
    }
}

fn append(
    archive: &mut Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    mode: u32,
    content: &[u8],
) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(u64::try_from(content.len())?);
    archive
        .append_data(&mut header, path, content)
        .with_context(|| format!("adding {path}"))
}

/// A finished image.
#[derive(Debug)]
pub struct Image {
    /// The OCI layout as one tar, which `ctr images import`, `kind load`, `k3s ctr`, `skopeo` and `podman load` take.
    pub archive: Vec<u8>,
    /// The manifest's digest, `sha256:<hex>`: what a registry calls it.
    pub digest: String,
    /// Bytes of its layers, compressed.
    pub compressed: usize,
}

/// Writes the image `name` (`<registry>/<repository>:<tag>`) with `config` (the OCI image config's `config`) and one layer.
pub fn image(name: &str, config: &Value, layer: &Layer) -> Result<Image> {
    let tar = layer.tar()?;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
    encoder.write_all(&tar)?;
    let compressed = encoder.finish()?;
    let mut blobs: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut put = |bytes: Vec<u8>, kind: &str| {
        let digest = sha256(&bytes);
        let descriptor = json!({
            "mediaType": format!("{TYPES}.{kind}"), "digest": format!("sha256:{digest}"), "size": bytes.len(),
        });
        blobs.insert(digest, bytes);
        descriptor
    };
    let size = compressed.len();
    let layer = put(compressed, "layer.v1.tar+gzip");
    let platform = json!({"architecture": "amd64", "os": "linux"});
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&tar))]},
        "history": [{"created_by": "make images"}],
    });
    let config = put(serde_json::to_vec(&config)?, "config.v1+json");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": format!("{TYPES}.manifest.v1+json"), "config": config, "layers": [layer],
    });
    let mut manifest = put(serde_json::to_vec(&manifest)?, "manifest.v1+json");
    let digest = manifest["digest"].as_str().unwrap_or_default().to_owned();
    let tag = name.rsplit(':').next().unwrap_or("latest");
    manifest["platform"] = platform;
    manifest["annotations"] =
        json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
    let index = json!({
        "schemaVersion": 2, "mediaType": format!("{TYPES}.index.v1+json"), "manifests": [manifest],
    });
    let mut archive = Builder::new(Vec::new());
    let mut add = |path: &str, content: &[u8]| {
        let kind = if content.is_empty() {
            EntryType::Directory
        } else {
            EntryType::Regular
        };
        let mode = if content.is_empty() { 0o755 } else { 0o644 };
        append(&mut archive, path, kind, mode, content)
    };
    add("blobs", &[])?;
    add("blobs/sha256", &[])?;
    for (digest, bytes) in &blobs {
        add(&format!("blobs/sha256/{digest}"), bytes)?;
    }
    add("index.json", &serde_json::to_vec(&index)?)?;
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(Image {
        archive: archive.into_inner()?,
        digest,
        compressed: size,
    })
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> Layer {
        Layer::default()
            .directory("/tmp", 0o1777)
            .file("/usr/bin/program", b"run me".to_vec(), true)
            .file("/etc/text", b"read me".to_vec(), false)
    }

    #[test]
    fn the_same_content_gives_the_same_bytes_in_whatever_order_it_was_added() {
        let config = json!({"User": "65532"});
        let other = Layer::default()
            .file("/etc/text", b"read me".to_vec(), false)
            .file("/usr/bin/program", b"run me".to_vec(), true)
            .directory("/tmp", 0o1777);
        let (a, b) = (
            image("a/b:1", &config, &layer()).unwrap(),
            image("a/b:1", &config, &other).unwrap(),
        );
        assert_eq!((a.digest, a.archive), (b.digest, b.archive));
        let differs = image("a/b:1", &config, &layer().file("/etc/text", b"x".to_vec(), false)).unwrap();
        assert_ne!(
            differs.archive,
            image("a/b:1", &config, &layer()).unwrap().archive
        );
    }

    #[test]
    fn parents_come_before_children_and_nothing_has_an_owner_or_a_time() {
        let tar = layer().tar().unwrap();
        let mut archive = tar::Archive::new(&tar[..]);
        let mut seen = vec![];
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!(
                (
                    header.uid().unwrap(),
                    header.gid().unwrap(),
                    header.mtime().unwrap()
                ),
                (0, 0, 0)
            );
            seen.push((
                entry.path().unwrap().display().to_string(),
                header.mode().unwrap(),
            ));
        }
        let seen: Vec<(&str, u32)> = seen.iter().map(|(p, m)| (p.as_str(), *m)).collect();
        assert_eq!(
            seen,
            [
                ("etc", 0o755),
                ("etc/text", 0o644),
                ("tmp", 0o1777),
                ("usr", 0o755),
                ("usr/bin", 0o755),
                ("usr/bin/program", 0o755)
            ]
        );
    }

    #[test]
    fn every_blob_has_the_name_of_its_digest_and_the_index_names_the_image() {
        let image = image("docker.io/a/b:1", &json!({}), &layer()).unwrap();
        let mut archive = tar::Archive::new(&image.archive[..]);
        let mut index = Value::Null;
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut bytes = vec![];
            std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
            if let Some(digest) = path.strip_prefix("blobs/sha256/").filter(|d| !d.is_empty()) {
                assert_eq!(digest, sha256(&bytes));
            }
            if path == "index.json" {
                index = serde_json::from_slice(&bytes).unwrap();
            }
        }
        let manifest = &index["manifests"][0];
        assert_eq!(manifest["digest"], image.digest.as_str());
        assert_eq!(
            manifest["annotations"]["io.containerd.image.name"],
            "docker.io/a/b:1"
        );
    }
}
