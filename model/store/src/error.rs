//! Everything that can go wrong between a model's address and a verified file. Messages carry numbers and the user's
//! own words, never content of the model or of a response.

use crate::address::AddressClass;
use crate::digest::Sha256;
use std::net::IpAddr;
use std::path::PathBuf;

/// Why a model could not be handed out.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The scheme of the address is not one this build reads.
    #[error("scheme {scheme} is not supported; supported: {allowed}")]
    UnsupportedScheme {
        /// Scheme found, sanitised.
        scheme: String,
        /// Comma-separated list of those supported.
        allowed: &'static str,
    },
    /// The address cannot be used.
    #[error("invalid model address: {why}")]
    InvalidUri {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The digest is not 64 hexadecimal digits.
    #[error("invalid digest: sha256 is 64 hexadecimal digits")]
    InvalidDigest,
    /// An entry of the configuration cannot be used.
    #[error("invalid {what}: {why}")]
    InvalidConfiguration {
        /// Which entry.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The path is not beneath any root, or leaves it through a link.
    #[error("{} is not beneath the model roots of this node ({})", path.display(), listed(roots))]
    OutsideRoots {
        /// Path asked for.
        path: PathBuf,
        /// Roots of the node.
        roots: Vec<PathBuf>,
    },
    /// There is no such model.
    #[error("{origin} does not exist")]
    NotFound {
        /// Address without credentials and query.
        origin: String,
    },
    /// The path is a directory, a device or another thing that is not a regular file.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// Path asked for.
        path: PathBuf,
    },
    /// The kernel cannot open beneath a directory (`openat2`, Linux 5.6), so links cannot be ruled out.
    #[error("this kernel has no openat2; models cannot be opened safely from {}", root.display())]
    KernelTooOld {
        /// Root that was to be opened beneath.
        root: PathBuf,
    },
    /// The host resolves to an address that must not be contacted.
    #[error("{host} resolves to {address}, which is {class} and not on the allow-list")]
    AddressRefused {
        /// Host asked for.
        host: String,
        /// Address it has.
        address: IpAddr,
        /// What kind of address that is.
        class: AddressClass,
    },
    /// A redirect from https to http.
    #[error("{host} redirects from https to http")]
    InsecureRedirect {
        /// Host that sent the redirect.
        host: String,
    },
    /// More redirects than allowed.
    #[error("more than {limit} redirects")]
    TooManyRedirects {
        /// Limit.
        limit: u32,
    },
    /// The host name has no address, or no answer came in time.
    #[error("{host} does not resolve")]
    Unresolved {
        /// Host asked for.
        host: String,
        /// Cause.
        #[source]
        source: Option<std::io::Error>,
    },
    /// The server answered with something other than the file.
    #[error("{host} answered with status {status}")]
    Status {
        /// Host asked.
        host: String,
        /// HTTP status.
        status: u16,
    },
    /// The connection failed, timed out or ended early.
    #[error("downloading from {host} failed after {bytes} bytes")]
    Transfer {
        /// Host asked.
        host: String,
        /// Bytes received until then.
        bytes: u64,
        /// Cause, without the address.
        #[source]
        source: reqwest::Error,
    },
    /// The file is larger than the node accepts.
    #[error("the model has {bytes} bytes or more; the limit is {limit}")]
    TooLarge {
        /// Bytes announced or received.
        bytes: u64,
        /// Limit.
        limit: u64,
    },
    /// The bytes are not those that were asked for.
    #[error("the model has digest {actual} ({bytes} bytes), not {expected}")]
    DigestMismatch {
        /// Digest asked for.
        expected: Sha256,
        /// Digest of the bytes.
        actual: Sha256,
        /// How many bytes there were.
        bytes: u64,
    },
    /// A stored object no longer has its digest. It has been removed.
    #[error("the stored object {expected} had become {actual} ({bytes} bytes) and was removed")]
    ObjectCorrupt {
        /// Digest it is stored under.
        expected: Sha256,
        /// Digest of its bytes.
        actual: Sha256,
        /// Its size.
        bytes: u64,
    },
    /// The file changed while it was hashed.
    #[error("{} changed while it was verified", path.display())]
    SourceChanged {
        /// Path of the file.
        path: PathBuf,
    },
    /// Not enough room for the model.
    #[error(
        "{needed} bytes are needed on the disk of this node's model cache and {free} are free: make room there, or put \
         the cache (agent.stateDir) on a larger disk"
    )]
    InsufficientDisk {
        /// Bytes needed, the reserve included.
        needed: u64,
        /// Bytes free to this process.
        free: u64,
    },
    /// Another process owns the directory.
    #[error("the store {} is in use by another process", dir.display())]
    Busy {
        /// Directory of the store.
        dir: PathBuf,
    },
    /// The work was given up because nobody waits for it any more.
    #[error("cancelled")]
    Cancelled,
    /// The HTTP client could not be set up.
    #[error("setting up the HTTP client")]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The file system failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

impl StoreError {
    /// One CamelCase word for conditions and metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnsupportedScheme { .. } => "UnsupportedScheme",
            Self::InvalidUri { .. } => "InvalidModelUri",
            Self::InvalidDigest => "InvalidDigest",
            Self::InvalidConfiguration { .. } | Self::Client(_) => "InvalidConfiguration",
            Self::OutsideRoots { .. } => "OutsideModelRoots",
            Self::NotFound { .. } => "ModelNotFound",
            Self::NotRegular { .. } => "NotRegularFile",
            Self::KernelTooOld { .. } => "KernelTooOld",
            Self::AddressRefused { .. } => "AddressRefused",
            Self::InsecureRedirect { .. } => "InsecureRedirect",
            Self::TooManyRedirects { .. }
            | Self::Unresolved { .. }
            | Self::Status { .. }
            | Self::Transfer { .. } => "SourceUnavailable",
            Self::TooLarge { .. } => "ModelTooLarge",
            Self::DigestMismatch { .. } => "DigestMismatch",
            Self::ObjectCorrupt { .. } => "ObjectCorrupt",
            Self::SourceChanged { .. } => "SourceChanged",
            Self::InsufficientDisk { .. } => "InsufficientDisk",
            Self::Cancelled => "Cancelled",
            Self::Busy { .. } | Self::Io { .. } => "StoreUnavailable",
        }
    }

    /// Whether the same request may succeed later without anyone changing it.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unresolved { .. }
                | Self::Transfer { .. }
                | Self::ObjectCorrupt { .. }
                | Self::SourceChanged { .. }
                | Self::InsufficientDisk { .. }
                | Self::Busy { .. }
                | Self::Cancelled
                | Self::Io { .. }
        ) || matches!(self, Self::Status { status, .. } if *status >= 500 || *status == 429)
    }

    pub(crate) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

fn listed(roots: &[PathBuf]) -> String {
    if roots.is_empty() {
        return "none are configured".to_owned();
    }
    roots
        .iter()
        .map(|root| root.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
