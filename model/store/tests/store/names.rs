//! Addresses and digests as text.

use gogrid_store::{ModelUri, Sha256, StoreError};
use std::path::PathBuf;

#[test]
fn files_and_web_addresses_are_understood() {
    assert_eq!(
        ModelUri::parse("file:///models/a%20b.gguf").unwrap(),
        ModelUri::File(PathBuf::from("/models/a b.gguf"))
    );
    let web = ModelUri::parse("https://example.org/m.gguf?signature=secret#part").unwrap();
    assert_eq!(web.to_string(), "https://example.org/m.gguf");
    assert_eq!(
        ModelUri::parse("file:///models/../etc/passwd")
            .unwrap()
            .to_string(),
        "file:///etc/passwd"
    );
}

#[test]
fn other_schemes_are_refused_by_name() {
    for (text, name) in [
        ("s3://bucket/m", "s3"),
        ("oci://r/m", "oci"),
        ("hf://o/m", "hf"),
        ("ftp://h/m", "ftp"),
    ] {
        let error = ModelUri::parse(text).unwrap_err();
        assert_eq!(error.reason(), "UnsupportedScheme");
        assert_eq!(
            error.to_string(),
            format!("scheme {name} is not supported; supported: file, http, https")
        );
    }
}

#[test]
fn addresses_that_hide_something_are_refused() {
    for text in [
        "",
        "model.gguf",
        "/models/m.gguf",
        "file:///",
        "file://host/models/m.gguf",
        "file:///m.gguf?x=1",
        "file:///a%00b",
        "http://user:password@example.org/m",
        "https://token@example.org/m",
        "http://",
    ] {
        let error = ModelUri::parse(text).unwrap_err();
        assert_eq!(error.reason(), "InvalidModelUri", "{text}");
        assert!(!error.to_string().contains("password"), "{error}");
    }
}

#[test]
fn digests_are_read_in_both_forms_and_written_in_one() {
    let digest = Sha256::of(b"abc");
    let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(digest.to_string(), hex);
    assert_eq!(Sha256::parse(hex).unwrap(), digest);
    assert_eq!(
        format!("sha256:{}", hex.to_uppercase())
            .parse::<Sha256>()
            .unwrap(),
        digest
    );
    for wrong in [
        "",
        "sha256:",
        &hex[1..],
        &format!("{hex}0"),
        &format!("{}g", &hex[1..]),
        "md5:00",
    ] {
        assert!(
            matches!(Sha256::parse(wrong), Err(StoreError::InvalidDigest)),
            "{wrong}"
        );
    }
}
