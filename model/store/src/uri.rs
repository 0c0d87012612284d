//! Where a model comes from, parsed once. Owns the syntax; whether a place may be used is decided by [`crate::Roots`]
//! and [`crate::AddressPolicy`].

use crate::error::StoreError;
use reqwest::Url;
use std::path::{Path, PathBuf};

const ALLOWED: &str = "file, http, https";

/// Address of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelUri {
    /// An absolute path on the node.
    File(PathBuf),
    /// A web address, without credentials.
    Http(Url),
}

impl ModelUri {
    /// Reads `file:///absolute/path`, `http://…` or `https://…`.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let url = Url::parse(text).map_err(|_| StoreError::InvalidUri {
            why: "it is not a URL",
        })?;
        match url.scheme() {
            "file" => file_path(&url).map(Self::File),
            "http" | "https" => check_web(&url).map(|()| Self::Http(url)),
            other => Err(unsupported(other)),
        }
    }

    /// The address as it may be shown: without query and fragment, which can hold a signature.
    pub fn origin(&self) -> String {
        match self {
            Self::File(path) => format!("file://{}", path.display()),
            Self::Http(url) => shown(url),
        }
    }
}

impl std::str::FromStr for ModelUri {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        Self::parse(text)
    }
}

impl std::fmt::Display for ModelUri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.origin())
    }
}

pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

pub(crate) fn unsupported(scheme: &str) -> StoreError {
    let scheme = scheme
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
        .take(16);
    StoreError::UnsupportedScheme {
        scheme: scheme.collect(),
        allowed: ALLOWED,
    }
}

/// Rules for every web address that is contacted, redirects included.
pub(crate) fn check_web(url: &Url) -> Result<(), StoreError> {
    if !matches!(url.scheme(), "http" | "https") {
        return Err(unsupported(url.scheme()));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(StoreError::InvalidUri {
            why: "it has no host",
        });
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(StoreError::InvalidUri {
            why: "it contains credentials",
        });
    }
    Ok(())
}

fn file_path(url: &Url) -> Result<PathBuf, StoreError> {
    if url.query().is_some() || url.fragment().is_some() {
        return Err(StoreError::InvalidUri {
            why: "a file address has no query and no fragment",
        });
    }
    let path = url.to_file_path().map_err(|()| StoreError::InvalidUri {
        why: "a file address is file:///absolute/path",
    })?;
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(StoreError::InvalidUri {
            why: "the path contains a zero byte",
        });
    }
    if path
        .components()
        .any(|part| part == std::path::Component::ParentDir)
        || path == Path::new("/")
    {
        return Err(StoreError::InvalidUri {
            why: "the path does not name a file",
        });
    }
    Ok(path)
}
